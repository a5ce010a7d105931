"""Whether two peers give the same numbers, row by row."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Tensors = dict[str, Tensor]

# The plugin against the C++ runtime, whose slowest rows of composed leave 1e-8 in the derivatives.
TOLERANCE = 1e-9
DERIVATIVE_TOLERANCE = 1e-7
# Against eager neml2, which stops as the C++ runtime does: its slowest rows are right to the solver's tolerance only.
EAGER_TOLERANCE = 1e-5
# A row's own size counts, but not below this part of the largest in the batch.
LEAST = 1e-3
CHUNK = 1 << 16


def deviations(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
    """Largest deviation in each row relative to the row's largest entry, over all tensors, `(rows,)`.

    Outputs go by name and derivatives by `output:input`, each `(rows, ...)`, or `(1, ...)` for all rows. A derivative
    counts as small if the input does little to the output by it.
    """
    assert list(found) == list(expected), f"{list(found)} and {list(expected)}"
    worst: Tensor | None = None
    for name, value in expected.items():
        mine = found[name]
        rows = max(len(mine), len(value))
        out, _, wrt = name.partition(":")
        largest = _size(expected[out]) / _size(inputs[wrt]) if wrt else _size(value)
        parts = []
        for start in range(0, rows, CHUNK):
            a, b = (x[start : start + CHUNK] if len(x) == rows else x for x in (mine, value))
            gap = (a - b).abs().flatten(1).amax(1) if b.ndim > 1 else (a - b).abs()
            size = b.abs().flatten(1).amax(1) if b.ndim > 1 else b.abs()
            parts.append(gap / size.clamp_min(LEAST * largest))
        part = torch.cat(parts)
        part = torch.where(part.isnan(), torch.inf, part)
        if worst is not None and len(part) != len(worst):
            part = part.expand(max(len(part), len(worst)))
            worst = worst.expand(len(part))
        worst = part if worst is None else torch.maximum(worst, part)
    assert worst is not None, "nothing to compare"
    return worst


def _size(value: Tensor) -> float:
    """The largest entry, 1 where all is zero."""
    return (float(value.abs().max()) if value.numel() else 0.0) or 1.0


def compare(
    found: Tensors, native: Tensors, inputs: Tensors, tight: Callable[[Tensor], Tensors | None]
) -> tuple[float, int]:
    """The largest deviation of the plugin from the C++ runtime in a row, and how many rows a tighter solve judged.

    The C++ runtime leaves its slowest rows where its tolerance is met; the plugin takes one step more. So rows that
    differ are judged by the C++ runtime with a tighter tolerance: `tight` gives their outputs by their indices, or None
    where the model has nothing to solve, or cannot be solved more tightly.
    """
    gaps = deviations(found, native, inputs)
    suspects = (gaps > TOLERANCE).nonzero().squeeze(-1)
    if not len(suspects):
        return float(gaps.max()), 0
    better = tight(suspects)
    if better is None:
        return float(gaps.max()), 0
    rest = float(gaps[gaps <= TOLERANCE].max()) if len(suspects) < len(gaps) else 0.0
    rows = len(gaps)
    mine = {name: value[suspects] if len(value) == rows else value for name, value in found.items()}
    again = deviations(mine, better, {name: value[suspects] for name, value in inputs.items()})
    return max(rest, float(again.max())), len(suspects)
