"""How far two values of one quantity are apart, and whether that is too far."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from . import differences


@dataclass(frozen=True)
class Comparison:
    """One quantity against its reference.

    Args:
        quantity: an output, or a derivative such as `d(stress)/d(strain)`.
        reference: `source`, `differences` or `golden`.
        rows: how many points were compared.
        left_out: how many were not: differences with two steps disagree there.
        worst: the largest difference of an entry, over the largest entry of the reference; see `scale_of` for
            derivatives that are zero.
        worst_row: the point where that is; -1 where nothing was compared.
        tolerance: what `worst` may be at most.
        passed: whether it is, and something was compared.
    """

    quantity: str
    reference: str
    rows: int
    left_out: int
    worst: float
    worst_row: int
    tolerance: float
    passed: bool


def derivative(out: str, by: str) -> str:
    """What a derivative is called in reports."""
    return f"d({out})/d({by})"


def scale_of(block: Tensor, out: Tensor, by: Tensor) -> float:
    """What an error of a derivative is measured by: its largest entry, or a small part of output over input.

    So a derivative that is zero but for rounding has no error to speak of.

    Args:
        block: the derivative.
        out: the output.
        by: the input or parameter.
    """
    found, size, moved = (float(x.detach().abs().max()) if x.numel() else 0.0 for x in (block, out, by))
    return max(found, differences.ZERO * size / (moved or differences.SCALE))


def compare(
    quantity: str,
    reference: str,
    found: Tensor,
    wanted: Tensor,
    rtol: float,
    rows: Tensor | None = None,
    scale: float | None = None,
) -> Comparison:
    """Compare one quantity, `(rows, ...)`.

    Args:
        quantity: its name.
        reference: what `wanted` is from.
        found: of the compiled model.
        wanted: the reference.
        rtol: tolerance.
        rows: a mask of those to compare.
        scale: what errors are measured by; the largest entry of the reference if not given.
    """
    a, b = found.detach().cpu().to(torch.float64), wanted.detach().cpu().to(torch.float64)
    total = a.shape[0]
    index = torch.arange(total) if rows is None else rows.cpu().nonzero().squeeze(-1)
    if not len(index):
        return Comparison(quantity, reference, 0, total, 0.0, -1, rtol, False)
    try:
        b = b.expand(a.shape)
    except RuntimeError:
        # Of another shape, it is another quantity.
        return Comparison(quantity, reference, len(index), total - len(index), inf, int(index[0]), rtol, False)
    a, b = a[index].reshape(len(index), -1), b[index].reshape(len(index), -1)
    if scale is None:
        scale = float(b.abs().max()) if b.numel() else 0.0
    apart = (a - b).abs().amax(-1) if b.numel() else torch.zeros(len(index))
    worst, at = apart.max(0)
    ratio = float(worst) / scale if scale else float(worst)
    return Comparison(quantity, reference, len(index), total - len(index), ratio, int(index[at]), rtol, ratio <= rtol)
