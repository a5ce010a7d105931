"""What callers give and get: arrays of one value per point, in their notation and dimension."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, InputTypeError, UnknownNameError
from ..model import Solution
from ..notation import ORDER, Form
from ._arrays import Array, Arrays, require_unmasked, share_memory, to_caller
from ._forms import IN_PLANE, SYMMETRIC, Forms
from ._roles import Base, Pair


@dataclass(frozen=True)
class PointsResult:
    """What an update gives; arrays of NumPy, or of torch where one of torch was given.

    Args:
        outputs: by name, `(n, *sub_batch, *base)` in the caller's notation; NaN at points that failed.
        tangent: derivatives of outputs by driven inputs, `tangent[out][by]`, `(n, *out base, *by base)`. To ask for
            one that was not compiled is a `DerivativeNotCompiledError` with the command that compiles it.
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
    """How a caller writes what belongs to the points.

    Args:
        n: number of points.
        arrays: what arrays must be.
        forms: notation of the variables.
        natural: shape of each variable at one point in the model, with the axes of its sub-batch.
    """

    n: int
    arrays: Arrays
    forms: Forms
    natural: Mapping[str, Base]

    def admitted(self, name: str, variable: str, value: Array, *, whole: bool = False) -> Tensor:
        """A caller's value of a variable as the model takes it, `(n, *natural)`.

        Args:
            name: that the caller uses.
            variable: the variable.
            value: `(n, *sub_batch, *base)`, or without `n` for all points.
            whole: whether it has three dimensions in any case.

        Raises:
            InputError: the shape does not fit, or a 3 x 3 tensor is not symmetric.
            InputTypeError: the value is no array, or has the wrong dtype or device.
        """
        tensor = self.arrays.tensor(value, name)
        natural, base = self.natural[variable], self.forms.bases[variable]
        one = natural[: len(natural) - len(base)] + self.forms.shape(variable, whole=whole)
        shape = tuple(tensor.shape)
        if shape not in (one, (self.n, *one)):
            raise InputError(self._shape_message(name, variable, shape, one))
        try:
            found = self.forms.inward(variable, tensor, whole=whole)
        except InputError as error:
            raise InputError(f"{name!r}: {error}") from None
        return found.expand(self.n, *natural) if shape == one else found

    def _shape_message(self, name: str, variable: str, shape: Base, one: Base) -> str:
        form = self.forms.forms.get(variable)
        wanted = f"{name!r} has shape {shape}, expected {(self.n, *one)}, or {one} for all points alike"
        if form is None:
            return f"{wanted}."
        if shape[1:] == one:
            return f"{wanted}: there are {self.n} points."
        parts = ", ".join(ORDER[k] for k in (IN_PLANE if one[-1] == len(IN_PLANE) else range(6)))
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
        """The caller's arrays for results, looked over before anything is evaluated.

        Args:
            out: arrays by output or pair.
            outputs: of the model.
            pairs: of the tangent.
        """
        if not isinstance(out, Mapping):
            raise InputTypeError(f"out is a {type(out).__name__}, expected a dict from output or pair to array.")
        found = {}
        for key, value in out.items():
            if isinstance(key, str) and key in outputs:
                natural, base = self.natural.get(key, ()), self.forms.bases[key]
                sites = natural[: len(natural) - len(base)]
                shape = (self.n, *sites, *self.forms.shape(key))
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
    """The call that writes what was given as it was expected, where there is one."""
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
    """Put a result together.

    Args:
        results: from `Interface.results`.
        found: how the points fared.
        pairs: of the tangent.
        factor: for the step.
        refuse: raises for a derivative that is not there, of an output by an input or by any.
        torch_kind: whether arrays are torch's.
    """
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


def mask_of(keep: Array, n: int) -> Tensor:
    """Points as a mask, `(n,)`.

    Args:
        keep: a mask `(n,)`, or indices.
        n: number of points.

    Raises:
        InputError: it is neither.
    """
    require_unmasked(keep, "keep")
    try:
        given = np.asarray(keep.detach().cpu() if isinstance(keep, Tensor) else keep)
    except (TypeError, ValueError) as error:
        raise InputError(f"keep is no array of points ({error}), expected a mask ({n},), or indices.") from None
    if given.dtype == np.bool_ and given.shape == (n,):
        return torch.from_numpy(given.copy())
    mask = np.zeros(n, dtype=np.bool_)
    if given.size and (given.dtype.kind not in "iu" or given.ndim != 1):
        raise InputError(
            f"keep has shape {given.shape} and dtype {given.dtype}, expected a mask of bool ({n},), or indices."
        )
    if given.size:
        if given.min() < 0 or given.max() >= n:
            raise InputError(f"keep has indices from {given.min()} to {given.max()}, expected 0 to {n - 1}.")
        mask[given] = True
    return torch.from_numpy(mask)
