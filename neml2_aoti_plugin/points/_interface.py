"""How a caller writes values, one per point, and gets results: in a notation, in the components of a dimension.

Inside, symmetric tensors are what the model takes: Mandel's notation in three dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from .._checks import require_names
from ..errors import InputError, InputTypeError, UnknownNameError
from ..model import Model, Solution
from ..notation import ORDER, Form, convert, convert_gradient, require_symmetric
from ._arrays import Array, Arrays, share_memory, to_caller
from ._roles import Base, Pair, Roles

Notation = Literal["mandel", "voigt", "tensor"]
Dimension = Literal[3, "plane strain", "plane stress", "axisymmetric"]

NOTATIONS: tuple[Notation, ...] = get_args(Notation)
DIMENSIONS: tuple[Dimension, ...] = get_args(Dimension)

SYMMETRIC = (6,)
# Entries of a vector of six that callers give and get; of a 3 x 3 tensor in a plane dimension it is the 2 x 2 in it, in
# the axisymmetric one all of it.
COMPONENTS: dict[Dimension, list[int]] = {
    3: [0, 1, 2, 3, 4, 5],
    "plane strain": [0, 1, 5],
    "plane stress": [0, 1, 5],
    "axisymmetric": [0, 1, 2, 5],
}
# The axes by name; x, y, z are r, z, t (the hoop direction) where the body is one of revolution.
AXISYMMETRIC = str.maketrans("xyz", "rzt")


@dataclass(frozen=True)
class Written:
    """How a variable or promoted parameter is written; each entry of a symmetric tensor is one of Mandel's, scaled."""

    # None for what is no symmetric tensor.
    form: Form | None
    shape: Base
    # Of each entry, row by row: which one of Mandel's it is; what it is over that one; how much of it that one takes.
    entries: Tensor
    factors: Tensor
    shares: Tensor
    # Entries that the dimension does not have; and the names of all.
    zero: list[int]
    names: list[str]

    @property
    def is_plain(self) -> bool:
        """Whether it is written as the model has it."""
        return self.form is None or (self.form == "mandel" and self.shape == SYMMETRIC)

    def inward(self, value: Tensor) -> Tensor:
        """Bring a caller's value, `(..., *shape)`, to the model's form."""
        if self.is_plain:
            return value
        lead = value.shape[: value.ndim - len(self.shape)]
        flat = value.reshape(*lead, len(self.entries))
        if self.zero and bool((flat[..., self.zero].abs() > 0.0).any()):
            raise InputError(
                "an axisymmetric tensor has no shears rt and zt, the entries [0, 2] and [1, 2]; name it in whole= if "
                "the body is twisted."
            )
        if self.form == "tensor":
            require_symmetric(value)
        return value.new_zeros(*lead, 6).index_add(-1, self.entries, flat * self.shares)

    def outward(self, value: Tensor) -> Tensor:
        """Bring a value `(..., *base)` to the caller's form; the same object where there is nothing to do."""
        if self.is_plain:
            return value
        return (value.index_select(-1, self.entries) * self.factors).reshape(*value.shape[:-1], *self.shape)


@dataclass(frozen=True)
class Interface:
    """How a caller writes the values of `n` points."""

    n: int
    arrays: Arrays
    # Base shape of each variable and promoted parameter in the model; parameters are written as the model has them.
    bases: Mapping[str, Base]
    # Shape of each variable at one point in the model, with the axes of its sub-batch.
    natural: Mapping[str, Base]
    # How each is written; and in three dimensions.
    forms: Mapping[str, Written]
    whole: Mapping[str, Written]

    def one(self, name: str, *, whole: bool = False) -> Base:
        """Shape of a variable or parameter at one point, as the caller writes it, with the axes of its sub-batch."""
        base = self.bases[name]
        natural = self.natural.get(name, base)
        return natural[: len(natural) - len(base)] + (self.whole if whole else self.forms)[name].shape

    def admitted(self, name: str, variable: str, value: Array, *, whole: bool = False) -> Tensor:
        """A caller's value of a variable, for each point or for all, as the model takes it; messages call it `name`."""
        found, form = self.arrays.tensor(value, name), (self.whole if whole else self.forms)[variable]
        one, shape = self.one(variable, whole=whole), tuple(found.shape)
        if shape not in (one, (self.n, *one)):
            raise InputError(self._shape_message(name, shape, one, form))
        try:
            found = form.inward(found)
        except InputError as error:
            raise InputError(f"{name!r}: {error}") from None
        return found.expand(self.n, *self.natural[variable]) if shape == one else found

    def require_parameter(self, name: str, value: Tensor) -> None:
        """Refuse a value of a promoted parameter that is neither one for all points nor one for each."""
        base = self.bases[name]
        if tuple(value.shape) not in (base, (1, *base), (self.n, *base)):
            raise InputError(
                f"the parameter {name!r} has shape {tuple(value.shape)}, expected {(self.n, *base)}, a value for each "
                f"of {self.n} points, or {base} for all alike."
            )

    def tangent(self, out: str, by: str, block: Tensor) -> Tensor:
        """Bring a derivative, `(..., *out base, *by base)`, to the caller's forms."""
        form_out, form_by, behind = self.forms[out], self.forms[by], len(self.bases[by])
        lead = block.shape[: block.ndim - behind - len(self.bases[out])]
        if not form_by.is_plain:
            block = block.index_select(-1, form_by.entries) * form_by.shares
        if not form_out.is_plain:
            factors = form_out.factors.reshape(-1, *(1,) * behind)
            block = block.index_select(-1 - behind, form_out.entries) * factors
        return block.reshape(*lead, *form_out.shape, *form_by.shape)

    def targets(self, out: Mapping[Any, Array], outputs: Sequence[str], pairs: Sequence[Pair]) -> dict[Any, Tensor]:
        """The caller's arrays for results by output or pair, looked over before anything is evaluated."""
        if not isinstance(out, Mapping):
            raise InputTypeError(f"out is a {type(out).__name__}, expected a dict from output or pair to array.")
        found = {}
        for key, value in out.items():
            if isinstance(key, str) and key in outputs:
                shape = self.one(key)
            elif key in pairs:
                shape = self.forms[key[0]].shape + self.forms[key[1]].shape
            else:
                raise UnknownNameError(
                    f"out holds {key!r}, which is no result of this update; there are: "
                    f"{', '.join(map(repr, [*outputs, *pairs]))}."
                )
            found[key] = self.arrays.target(value, (self.n, *shape), str(key))
        for (key, value), (other, more) in combinations(found.items(), 2):
            if share_memory(value, more):
                raise InputError(f"out[{key}] and out[{other}] share memory; pass an array of its own for each result.")
        return found

    def results(self, found: Solution, pairs: Sequence[Pair], targets: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
        """Outputs and tangents in the caller's form, by output or pair, written to the caller's arrays where given."""
        results: dict[Any, Tensor] = {n: self.forms[n].outward(x) for n, x in found.outputs.items()}
        for out, by in pairs:
            block = found.blocks[out][by]
            value = self.tangent(out, by, block)
            if block.ndim < found.outputs[out].ndim + len(self.bases[by]):
                # It is the same at all points, and NaN at those that failed.
                value = value.expand(self.n, *value.shape)
                if not bool(found.converged.all()):
                    value = torch.where(found.converged.reshape(-1, *(1,) * (value.ndim - 1)), value, torch.nan)
            results[out, by] = value
        for key, value in results.items():
            results[key] = targets[key].copy_(value) if key in targets else value.contiguous()
        return results

    def _shape_message(self, name: str, shape: Base, one: Base, form: Written) -> str:
        wanted = f"{name!r} has shape {shape}, expected {(self.n, *one)}, or {one} for all points alike"
        if form.form is None:
            return f"{wanted}."
        if shape[1:] == one:
            return f"{wanted}: there are {self.n} points."
        kind, call = "symmetric tensors in components", ""
        if form.form != "tensor":
            kind = f"{', '.join(form.names)} in the form {form.form!r}"
        source = "tensor" if shape[-2:] == (3, 3) and one == SYMMETRIC else "mandel"
        if source == "tensor" or (shape[-1:] == SYMMETRIC and one == (3, 3)):
            call = f" neml2_aoti_plugin.notation.convert({name}, {source!r}, {form.form!r}) writes it so."
        return (
            f"{wanted}: {kind}.{call} Points(..., notation=...) says how tensors are written, dimension=... how many "
            "axes."
        )


def _written(form: Form, dimension: Dimension, axes: Dimension, arrays: Arrays) -> Written:
    """How a form writes a tensor in a dimension, with the axes of another one, by what it makes of Mandel's entries."""
    shape: Base = (len(COMPONENTS[dimension]),)
    kept, zero = COMPONENTS[dimension], []
    if form == "tensor":
        shape, kept = (3, 3), list(range(9))
        if dimension == "axisymmetric":
            zero = [2, 5, 6, 7]
        elif dimension != 3:
            shape, kept = (2, 2), [0, 1, 3, 4]
    unit = torch.eye(6, dtype=arrays.dtype, device=arrays.device)
    factors, entries = convert(unit, "mandel", form).reshape(6, -1)[:, kept].max(0)
    shares = convert_gradient(unit, "mandel", form).reshape(6, -1)[:, kept].amax(0)
    names = [ORDER[k].translate(AXISYMMETRIC if axes == "axisymmetric" else {}) for k in entries.tolist()]
    return Written(form, shape, entries, factors, shares, zero, names)


def interface_of(
    model: Model,
    n: int,
    roles: Roles,
    notation: Notation,
    dimension: Dimension,
    strains: Sequence[str],
    stresses: Sequence[str],
    whole: Sequence[str],
) -> Interface:
    """Find how each variable is written, from its base shape, its name and arguments of `Points`."""
    if notation not in NOTATIONS:
        raise InputError(f"notation is {notation!r}, expected one of {', '.join(NOTATIONS)}.")
    variables = {**{name: output.base_shape for name, output in model.outputs.items()}, **roles.bases}
    symmetric = [name for name, base in variables.items() if base == SYMMETRIC]
    for names, argument in ((strains, "strains"), (stresses, "stresses"), (whole, "whole")):
        require_names(names, symmetric, f"{argument}= of {model.artifact}", "symmetric tensors")
    arrays = Arrays(model.dtype, model.device)
    bases = {**{name: tuple(base) for name, base in model.parameter_base_shapes.items()}, **variables}
    none = torch.empty(0)
    forms = {name: Written(None, base, none, none, none, [], []) for name, base in bases.items()}
    in_three = dict(forms)
    for name in symmetric:
        form: Form
        if notation == "voigt":
            strain = name in strains or ("strain" in name and name not in stresses)
            if strain == (name in stresses or ("stress" in name and name not in strains)):
                raise InputError(
                    f"{model.artifact}: it is not clear whether Voigt's notation writes {name!r} as a strain, with "
                    f"shears doubled, or as a stress. Say it: Points(..., strains=[{name!r}]) or stresses=[{name!r}]."
                )
            form = "voigt strain" if strain else "voigt stress"
        else:
            form = notation
        in_three[name] = _written(form, 3, dimension, arrays)
        forms[name] = in_three[name] if name in whole else _written(form, dimension, dimension, arrays)
    return Interface(n, arrays, bases, roles.natural, forms, in_three)


# -- results ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PointsResult:
    """What an update gives; arrays of NumPy, or of torch where one of torch was given.

    Args:
        outputs: by name, `(n, *sub_batch, *base)` in the caller's notation; NaN at points that failed.
        tangent: derivatives of outputs by driven inputs and, where `pairs` has them, by promoted parameters:
            `tangent[out][by]`, `(n, *out base, *by base)`. To ask for one that was not compiled is a
            `DerivativeNotCompiledError` with the command that compiles it.
        converged: `(n,)`, bool.
        iterations: Newton updates at each point, `(n,)`; in plane stress those of the hardest of its solves.
        outcome: how each point's solve ended, an `Outcome`, `(n,)`.
        step_factor: what to multiply the step with: the next one, or this one to take it anew if a point failed.
    """

    outputs: dict[str, Array]
    tangent: dict[str, dict[str, Array]]
    converged: Array
    iterations: Array
    outcome: Array
    step_factor: float

    @property
    def failed(self) -> list[int]:
        """The points that failed."""
        converged = self.converged.cpu() if isinstance(self.converged, Tensor) else self.converged
        return [int(k) for k in np.flatnonzero(~np.asarray(converged))]


class _Tangent(dict[str, Any]):
    """A dict that says of an entry which is not there why; a copy or a pickle of it is a dict."""

    def __init__(self, entries: Mapping[str, Any], refuse: Callable[[str], object]) -> None:
        super().__init__(entries)
        self._refuse = refuse

    def __missing__(self, name: str) -> Any:
        self._refuse(name)
        raise KeyError(name)

    def __reduce__(self) -> Any:
        return dict, (dict(self),)


def result_of(
    results: Mapping[Any, Tensor],
    found: Solution,
    pairs: Sequence[Pair],
    factor: float,
    refuse: Callable[[str, str | None], object],
    *,
    torch_kind: bool,
) -> PointsResult:
    """Put a result together; `refuse` raises for a derivative that is not there, of an output by an input or any."""
    to = partial(to_caller, torch_kind=torch_kind)
    rows: dict[str, dict[str, Array]] = {}
    for out, by in pairs:
        rows.setdefault(out, {})[by] = to(results[out, by])
    tangent = {out: _Tangent(row, partial(refuse, out)) for out, row in rows.items()}
    return PointsResult(
        {name: to(results[name]) for name in found.outputs},
        _Tangent(tangent, lambda out: refuse(out, None)),
        to(found.converged),
        to(found.iterations),
        to(found.outcome),
        factor,
    )
