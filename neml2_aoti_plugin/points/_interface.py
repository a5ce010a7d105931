"""What callers give and get: one value per point, in their notation and dimension, and derivatives in these.

Inside, symmetric tensors are what the model takes: Mandel's notation in three dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from .._checks import require_names
from ..errors import InputError, InputTypeError, UnknownNameError
from ..model import Solution
from ..notation import ORDER, Form, convert, convert_gradient, convert_tangent
from ._arrays import Array, Arrays, share_memory, to_caller
from ._roles import Base, Pair

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
# Those out of the plane.
OUT_OF_PLANE = [2, 3, 4]


@dataclass(frozen=True)
class Forms:
    """How a caller writes the variables; everything that depends on notation and dimension is here."""

    # Base shapes in the model, by variable and by promoted parameter.
    bases: dict[str, Base]
    # The form of each variable that is a symmetric tensor. Parameters are as the model has them.
    forms: dict[str, Form]
    # Entries that callers give and get of the symmetric tensors that they do not give whole.
    components: list[int]
    reduced: frozenset[str]

    def shape(self, name: str, *, whole: bool = False) -> Base:
        """Base shape of a variable as the caller writes it; in three dimensions in any case if `whole`."""
        if name not in self.forms:
            return self.bases[name]
        reduced = name in self.reduced and not whole
        if self.forms[name] == "tensor":
            return (2, 2) if reduced and not self.axisymmetric else (3, 3)
        return (len(self.components),) if reduced else SYMMETRIC

    @property
    def axisymmetric(self) -> bool:
        """Whether the body is one of revolution."""
        return len(self.components) == 4

    def inward(self, name: str, value: Tensor, *, whole: bool = False) -> Tensor:
        """Bring a caller's value, `(..., *shape)`, to the model's form."""
        form = self.forms.get(name)
        if form is None:
            return value
        if name in self.reduced and not whole and form == "tensor" and self.axisymmetric:
            if bool((value[..., 2, :2].abs() > 0.0).any()):
                raise InputError(
                    "an axisymmetric tensor has no shears rt and zt, the entries [0, 2] and [1, 2]; name it in whole= "
                    "if the body is twisted."
                )
        elif name in self.reduced and not whole:
            base = self.shape(name, whole=True)
            embedded = value.new_zeros((*value.shape[: value.ndim - len(base)], *base))
            if form == "tensor":
                embedded[..., :2, :2] = value
            else:
                embedded[..., self.components] = value
            value = embedded
        return convert(value, form, "mandel")

    def outward(self, name: str, value: Tensor, *, whole: bool = False) -> Tensor:
        """Bring a value `(..., *base)` to the caller's form; the same object where there is nothing to do."""
        form = self.forms.get(name)
        if form is None:
            return value
        found = convert(value, "mandel", form)
        return found if whole else self._reduced(found, name, 0)

    def tangent(self, out: str, by: str, block: Tensor) -> Tensor:
        """Bring a derivative, `(..., *out base, *by base)`, to the caller's forms."""
        form_out, form_by = self.forms.get(out), self.forms.get(by)
        if form_out is not None and form_by is not None:
            block = convert_tangent(block, "mandel", (form_out, form_by))
        elif form_by is not None:
            block = convert_gradient(block, "mandel", form_by)
        elif form_out is not None:
            behind, axes = len(self.bases[by]), len(self.shape(out))
            moved = convert(block.movedim(-1 - behind, -1), "mandel", form_out)
            last = range(moved.ndim - axes, moved.ndim)
            block = moved.movedim(tuple(last), tuple(k - behind for k in last))
        return self._reduced(self._reduced(block, by, 0), out, len(self.shape(by)))

    def _reduced(self, value: Tensor, name: str, behind: int) -> Tensor:
        """The components that the caller gets of a variable whose axes have `behind` axes behind them."""
        if name not in self.reduced:
            return value
        last = value.ndim - 1 - behind
        if self.forms[name] == "tensor":
            return value if self.axisymmetric else value.narrow(last, 0, 2).narrow(last - 1, 0, 2)
        return value.index_select(last, torch.tensor(self.components, device=value.device))


def forms_of(
    variables: dict[str, Base],
    parameters: dict[str, Base],
    notation: Notation,
    dimension: Dimension,
    strains: Iterable[str],
    stresses: Iterable[str],
    whole: Iterable[str],
    where: str,
) -> Forms:
    """Find the form of each symmetric tensor, from base shapes and arguments of `Points`; of the artifact `where`."""
    if notation not in NOTATIONS:
        raise InputError(f"notation is {notation!r}, expected one of {', '.join(NOTATIONS)}.")
    bases = {**parameters, **variables}
    symmetric = [name for name, base in variables.items() if base == SYMMETRIC]
    strains, stresses, whole = tuple(strains), tuple(stresses), tuple(whole)
    for names, argument in ((strains, "strains"), (stresses, "stresses"), (whole, "whole")):
        require_names(names, symmetric, f"{argument}= of {where}", "symmetric tensors")
    components = COMPONENTS[dimension]
    reduced = frozenset(symmetric).difference(whole) if len(components) < 6 else frozenset()
    if notation != "voigt":
        return Forms(bases, dict.fromkeys(symmetric, notation), components, reduced)
    found: dict[str, Form] = {}
    for name in symmetric:
        strain = name in strains or ("strain" in name and name not in stresses)
        stress = name in stresses or ("stress" in name and name not in strains)
        if strain == stress:
            raise InputError(
                f"{where}: it is not clear whether Voigt's notation writes {name!r} as a strain, with shears doubled, "
                f"or as a stress. Say it: Points(..., strains=[{name!r}]) or stresses=[{name!r}]."
            )
        found[name] = "voigt strain" if strain else "voigt stress"
    return Forms(bases, found, components, reduced)


# -- values and results of points --------------------------------------------------------------------------------------


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


@dataclass(frozen=True)
class Interface:
    """How a caller writes the values of `n` points."""

    n: int
    arrays: Arrays
    forms: Forms
    # Shape of each variable at one point in the model, with the axes of its sub-batch.
    natural: Mapping[str, Base]

    def one(self, name: str, *, whole: bool = False) -> Base:
        """Shape of a variable or parameter at one point, as the caller writes it, with the axes of its sub-batch."""
        base = self.forms.bases[name]
        natural = self.natural.get(name, base)
        return natural[: len(natural) - len(base)] + self.forms.shape(name, whole=whole)

    def admitted(self, name: str, variable: str, value: Array, *, whole: bool = False) -> Tensor:
        """A caller's value of a variable as the model takes it, `(n, *natural)`.

        It is `(n, *sub_batch, *base)`, or without `n` for all points; in three dimensions in any case if `whole`. For
        messages it has the name that the caller used, such as `stress~1`.
        """
        tensor = self.arrays.tensor(value, name)
        natural, one, shape = self.natural[variable], self.one(variable, whole=whole), tuple(tensor.shape)
        if shape not in (one, (self.n, *one)):
            raise InputError(self._shape_message(name, variable, shape, one))
        try:
            found = self.forms.inward(variable, tensor, whole=whole)
        except InputError as error:
            raise InputError(f"{name!r}: {error}") from None
        return found.expand(self.n, *natural) if shape == one else found

    def require_parameter(self, name: str, value: Tensor) -> None:
        """Refuse a value of a promoted parameter that is neither one for all points nor one for each."""
        base = self.forms.bases[name]
        if tuple(value.shape) not in (base, (1, *base), (self.n, *base)):
            raise InputError(
                f"the parameter {name!r} has shape {tuple(value.shape)}, expected {(self.n, *base)}, a value for each "
                f"of {self.n} points, or {base} for all alike."
            )

    def _shape_message(self, name: str, variable: str, shape: Base, one: Base) -> str:
        form = self.forms.forms.get(variable)
        wanted = f"{name!r} has shape {shape}, expected {(self.n, *one)}, or {one} for all points alike"
        if form is None:
            return f"{wanted}."
        if shape[1:] == one:
            return f"{wanted}: there are {self.n} points."
        parts = ", ".join(ORDER[k] for k in (range(6) if one[-1:] == SYMMETRIC else self.forms.components))
        parts = parts.translate(AXISYMMETRIC) if self.forms.axisymmetric else parts
        kind = "symmetric tensors in components" if form == "tensor" else f"{parts} in the form {form!r}"
        return (
            f"{wanted}: {kind}.{_conversion(name, shape, one, form)} Points(..., notation=...) says how tensors are "
            "written, dimension=... how many axes."
        )

    def shown(self, name: str, value: Tensor, *, torch_kind: bool = False) -> Array:
        """A copy of a variable's value in the caller's notation, in three dimensions."""
        found = self.forms.outward(name, value, whole=True)
        return to_caller(found.clone() if found is value else found.contiguous(), torch_kind=torch_kind)

    def targets(self, out: Mapping[Any, Array], outputs: Sequence[str], pairs: Sequence[Pair]) -> dict[Any, Tensor]:
        """The caller's arrays for results by output or pair, looked over before anything is evaluated."""
        if not isinstance(out, Mapping):
            raise InputTypeError(f"out is a {type(out).__name__}, expected a dict from output or pair to array.")
        found = {}
        for key, value in out.items():
            if isinstance(key, str) and key in outputs:
                shape = (self.n, *self.one(key))
            elif key in pairs:
                shape = (self.n, *(k for name in key for k in self.forms.shape(name)))
            else:
                raise UnknownNameError(
                    f"out holds {key!r}, which is no result of this update; there are: "
                    f"{', '.join(map(repr, [*outputs, *pairs]))}."
                )
            found[key] = self.arrays.target(value, shape, str(key))
        for (key, value), (other, more) in combinations(found.items(), 2):
            if share_memory(value, more):
                raise InputError(f"out[{key}] and out[{other}] share memory; pass an array of its own for each result.")
        return found

    def results(self, found: Solution, pairs: Sequence[Pair], targets: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
        """Outputs and tangents in the caller's form, by output or pair, written to the caller's arrays where given."""
        results: dict[Any, Tensor] = {name: self.forms.outward(name, value) for name, value in found.outputs.items()}
        for out, by in pairs:
            results[out, by] = self.forms.tangent(out, by, found.blocks[out][by])
        for key, value in results.items():
            results[key] = targets[key].copy_(value) if key in targets else value.contiguous()
        return results


def _conversion(name: str, shape: Base, one: Base, form: Form) -> str:
    """For a message: the call that writes what was given as it was expected, where there is one."""
    source = "tensor" if shape[-2:] == (3, 3) and one == SYMMETRIC else "mandel"
    if source == "mandel" and (shape[-1:] != SYMMETRIC or one != (3, 3)):
        return ""
    return f" neml2_aoti_plugin.notation.convert({name}, {source!r}, {form!r}) writes it so."


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
    rows: dict[str, dict[str, Array]] = {}
    for out, by in pairs:
        rows.setdefault(out, {})[by] = to_caller(results[out, by], torch_kind=torch_kind)
    tangent = {out: _Tangent(row, partial(refuse, out)) for out, row in rows.items()}
    outputs = {name: to_caller(results[name], torch_kind=torch_kind) for name in found.outputs}
    return PointsResult(
        outputs,
        _Tangent(tangent, lambda out: refuse(out, None)),
        to_caller(found.converged, torch_kind=torch_kind),
        to_caller(found.iterations, torch_kind=torch_kind),
        to_caller(found.outcome, torch_kind=torch_kind),
        factor,
    )
