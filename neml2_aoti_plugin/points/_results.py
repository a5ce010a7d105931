"""What an update gives: arrays in the caller's form, and derivatives that say why they are not there."""

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
from ._arrays import Array, share_memory
from ._interface import Interface
from ._roles import Pair


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


def targets_of(
    out: Mapping[Any, Array], interface: Interface, outputs: Sequence[str], pairs: Sequence[Pair]
) -> dict[Any, Tensor]:
    """The caller's arrays for results by output or pair, looked over before anything is evaluated."""
    if not isinstance(out, Mapping):
        raise InputTypeError(f"out is a {type(out).__name__}, expected a dict from output or pair to array.")
    found = {}
    for key, value in out.items():
        if isinstance(key, str) and key in outputs:
            shape = interface.one(key)
        elif key in pairs:
            shape = interface.shape(key[0]) + interface.shape(key[1])
        else:
            raise UnknownNameError(
                f"out holds {key!r}, which is no result of this update; there are: "
                f"{', '.join(map(repr, [*outputs, *pairs]))}."
            )
        found[key] = interface.arrays.target(value, (interface.n, *shape), str(key))
    for (key, value), (other, more) in combinations(found.items(), 2):
        if share_memory(value, more):
            raise InputError(f"out[{key}] and out[{other}] share memory; pass an array of its own for each result.")
    return found


def results_of(
    found: Solution, interface: Interface, pairs: Sequence[Pair], targets: Mapping[Any, Tensor]
) -> dict[Any, Tensor]:
    """Outputs and tangents in the caller's form, by output or pair, written to the caller's arrays where given."""
    results: dict[Any, Tensor] = {name: interface.outward(name, value) for name, value in found.outputs.items()}
    for out, by in pairs:
        block = found.blocks[out][by]
        value = interface.tangent(out, by, block)
        if block.ndim < found.outputs[out].ndim + len(interface.bases[by]):
            # It is the same at all points, and NaN at those that failed.
            value = value.expand(interface.n, *value.shape)
            if not bool(found.converged.all()):
                value = torch.where(found.converged.reshape(-1, *(1,) * (value.ndim - 1)), value, torch.nan)
        results[out, by] = value
    for key, value in results.items():
        results[key] = targets[key].copy_(value) if key in targets else value.contiguous()
    return results


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


def tangent_of(
    results: Mapping[Any, Array], pairs: Sequence[Pair], refuse: Callable[[str, str | None], object]
) -> dict[str, dict[str, Array]]:
    """The derivatives among results; `refuse` raises for one that is not there, of an output by an input or any."""
    rows: dict[str, dict[str, Array]] = {}
    for out, by in pairs:
        rows.setdefault(out, {})[by] = results[out, by]
    return _Tangent({out: _Tangent(row, partial(refuse, out)) for out, row in rows.items()}, lambda o: refuse(o, None))
