"""The line search of a Newton solve: each row cuts its own step back until its residual has fallen enough."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ..settings import NewtonSettings
from .groups import Layout, per_row, row_dots, row_norm_squares

# A value of each row, or that of one row.
Number = TypeVar("Number", Tensor, float)
Residual = Callable[[list[Tensor]], list[Tensor]]
Report = Callable[[str], None]


def acceptance(settings: NewtonSettings, norm0_sq: Number, bdu: Number | None, alpha: Number | float) -> Number:
    """The squared residual norm that a trial must not exceed to be accepted.

    Both criteria ask for a decrease in proportion to the step length. `BACKTRACKING` takes `b . du` for the slope
    and `STRONG_WOLFE` the squared norm itself, without a test of the curvature: neml2's definitions.

    Args:
        settings: `ls_type` and `ls_c` are used.
        norm0_sq: squared residual norm of each row before the step, `(*batch,)`.
        bdu: `b . du` of each row before the step; may be absent for `STRONG_WOLFE`.
        alpha: step length of each row.

    Returns:
        `(*batch,)`, or a number for one row; may be negative.
    """
    if settings.ls_type == "STRONG_WOLFE":
        return (1.0 - settings.ls_c * alpha) * norm0_sq
    assert bdu is not None, "BACKTRACKING needs the slope"
    return norm0_sq - 2.0 * settings.ls_c * alpha * bdu


def accepted(settings: NewtonSettings, trial_sq: Tensor, threshold: Tensor) -> Tensor:
    """Tell for each row whether a trial with the squared residual norm `trial_sq` may stand."""
    return (trial_sq <= threshold) | (trial_sq <= settings.atol * settings.atol)


def search(
    residual: Residual,
    u: Sequence[Tensor],
    b: Sequence[Tensor],
    du: Sequence[Tensor],
    norm0_sq: Tensor,
    unknown_layout: Layout,
    residual_layout: Layout,
    settings: NewtonSettings,
    settled: Tensor | None = None,
    report: Report | None = None,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Take the step, cut back row by row where the residual does not fall enough.

    A row that no trial satisfies moves by its last trial: a line search never fails. With `ls_max_iters` 1 the full
    step is taken untested.

    Args:
        residual: `b = -r` at given unknowns.
        u: unknowns before the step, one tensor per group.
        b: `b = -r` at `u`.
        du: the full step.
        norm0_sq: squared norm of `b` of each row, `(*batch,)`.
        unknown_layout: groups of `u` and `du`.
        residual_layout: groups of `b`.
        settings: the fields `ls_*` and `atol` are used.
        settled: rows whose step is zero; no trial waits for them.
        report: takes a line about each trial.

    Returns:
        The unknowns after the step, `b` there, and its squared norm for each row.
    """
    trial = [x + d for x, d in zip(u, du, strict=True)]
    trial_b = residual(trial)
    trial_sq = row_norm_squares(trial_b, residual_layout)
    last = settings.ls_max_iters - 1
    if last < 1:
        return trial, trial_b, trial_sq

    bdu = None if settings.ls_type == "STRONG_WOLFE" else row_dots(b, du, residual_layout, unknown_layout)
    alpha = torch.ones_like(norm0_sq)
    for k in range(1, last + 1):
        if k == last and report is None:
            break
        threshold = acceptance(settings, norm0_sq, bdu, alpha)
        if report is not None:
            report(_trial_line(k, alpha, trial_sq, threshold))
        ok = accepted(settings, trial_sq, threshold)
        if settled is not None:
            ok = ok | settled
        if k == last or ok.all():
            break
        alpha = torch.where(ok, alpha, alpha / settings.ls_cutback)
        trial = [x + per_row(alpha, group) * d for x, d, group in zip(u, du, unknown_layout, strict=True)]
        trial_b = residual(trial)
        trial_sq = row_norm_squares(trial_b, residual_layout)
    return trial, trial_b, trial_sq


def _trial_line(k: int, alpha: Tensor, trial_sq: Tensor, threshold: Tensor) -> str:
    figures = torch.stack((alpha.amin(), trial_sq.amax().sqrt(), threshold.amin().sqrt())).tolist()
    return "  LS ITERATION {:3d}, min(alpha) = {:.6e}, max(||R||) = {:.6e}, min(||Rc||) = {:.6e}".format(k, *figures)
