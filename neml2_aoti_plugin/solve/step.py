"""One Newton step of a batch, cut back row by row where a line search is on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..program.systems import Groups, System
from ..settings import NewtonSettings
from .groups import Layout, norms, per_row, row_dots
from .linesearch import acceptance


@dataclass
class Step:
    """Where a step has led.

    Args:
        u: the unknowns.
        b: `-r` there.
        linear: the linearisation there; None if it was not evaluated.
        norm: of `b`.
        alpha: step lengths; None where all are 1.
        cut: whether a row was cut back.
    """

    u: Groups
    b: Groups
    linear: Groups | None
    norm: Tensor
    alpha: Tensor | None
    cut: bool


def advance(
    system: System,
    u: Groups,
    g: Groups,
    tail: Sequence[Tensor],
    b: Groups,
    du: Groups,
    norm: Tensor,
    limit: Tensor,
    layouts: tuple[Layout, Layout],
    settings: NewtonSettings,
    *,
    apart: bool,
) -> Step:
    """Take the step, cut back row by row where a line search is on.

    Args:
        system: residual and Newton direction.
        u: the unknowns.
        g: givens.
        tail: promoted parameters.
        b: `-r` at `u`.
        du: the full step.
        norm: of `b`.
        limit: norm of a row that has converged; no step that leads there is cut back.
        layouts: of the unknown groups and of the residual groups.
        settings: of the line search.
        apart: whether to evaluate the residual alone, as trials that are cut back do.
    """
    of_u, of_r = layouts
    trial = [x + d for x, d in zip(u, du, strict=True)]
    trials = settings.ls_max_iters - 1
    apart = apart and system.residual_apart
    linear: Groups | None = None
    if apart:
        trial_b = system.residual(trial, g, tail)
    else:
        trial_b, linear = system.evaluate(trial, g, tail)
    trial_norm = norms(trial_b, of_r)
    alpha: Tensor | None = None
    cut: Tensor | None = None
    if trials >= 2:
        # A trial stands if its square is not above this; a NaN always is.
        bdu = None if settings.ls_type == "STRONG_WOLFE" else row_dots(b, du, of_r, of_u)
        squares, least = norm * norm, limit * limit
        most = torch.maximum(acceptance(settings, squares, bdu, 1.0), least)
        for _ in range(trials - 1):
            stands = trial_norm * trial_norm <= most
            if bool(stands.all()):
                break
            rows = stands.logical_not_().nonzero().squeeze(-1)
            # Rows that are refused later were refused at first.
            cut = rows if cut is None else cut
            alpha = torch.ones_like(norm) if alpha is None else alpha
            shorter = alpha[rows] / settings.ls_cutback
            alpha.index_copy_(0, rows, shorter)
            part_most = acceptance(settings, squares[rows], None if bdu is None else bdu[rows], shorter)
            most.index_copy_(0, rows, torch.maximum(part_most, least[rows]))
            part = [x[rows] + per_row(shorter, group) * d[rows] for x, d, group in zip(u, du, of_u, strict=True)]
            part_b = system.residual(part, take(g, rows), tail)
            trial = [_place(x, rows, some) for x, some in zip(trial, part, strict=True)]
            trial_b = [_place(x, rows, some) for x, some in zip(trial_b, part_b, strict=True)]
            trial_norm.index_copy_(0, rows, norms(part_b, of_r))
    if apart and not system.direct:
        trial_b, linear = system.evaluate(trial, g, tail)
        trial_norm = norms(trial_b, of_r)
    elif linear is not None and cut is not None and system.residual_apart:
        part_b, part_linear = system.evaluate(take(trial, cut), take(g, cut), tail)
        trial_b = [_place(x, cut, some) for x, some in zip(trial_b, part_b, strict=True)]
        linear = [_place(x, cut, some) for x, some in zip(linear, part_linear, strict=True)]
        trial_norm.index_copy_(0, cut, norms(part_b, of_r))
    return Step(trial, trial_b, linear, trial_norm, alpha, cut is not None)


def _place(whole: Tensor, rows: Tensor, some: Tensor) -> Tensor:
    """Put rows in their places: in place, but for what may be a constant of a graph."""
    if whole.shape[0] > 1 and whole.is_contiguous():
        return whole.index_copy_(0, rows, some)
    return whole.index_copy(0, rows, some)


def take(groups: Groups, rows: Tensor) -> Groups:
    """Some rows of the tensors of all groups."""
    return [x.index_select(0, rows) for x in groups]
