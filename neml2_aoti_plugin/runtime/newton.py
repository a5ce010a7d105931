"""Newton's method over a batch whose rows are problems of their own.

A row leaves the batch when it has converged or when its residual is no longer finite; the rest goes on without it. The
residual that the Jacobian graph returns serves the convergence test, so a step costs one Jacobian and one solve. A row
that has converged after a step takes one more, by the linearisation at hand: its error falls as if the batch had gone
on for its slowest row, and does not depend on which row that was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from .. import log
from ..settings import NewtonSettings
from .layout import Layout, norms, per_row, scaled_row_norms
from .onerow import solve_row
from .rows import Rows
from .step import advance, take
from .systems import Groups, System


def solve_rows(
    system: System,
    u: Groups,
    g: Groups,
    tail: Sequence[Tensor],
    layouts: tuple[Layout, Layout],
    settings: NewtonSettings,
    *,
    gated: bool = False,
) -> Rows:
    """Solve `r(u) = 0` for each row.

    Args:
        system: residual and Newton direction.
        u: first iterate, one tensor per unknown group, `(rows, ...)`.
        g: givens, one tensor per given group, `(rows, ...)`.
        tail: promoted parameters, without a batch.
        layouts: of the unknown groups and of the residual groups.
        settings: tolerances and limits.
        gated: whether the relative test also asks for a small last step (`substep_del_tol`).

    Returns:
        The outcome of each row.
    """
    of_u, of_r = layouts
    total = u[0].shape[0]
    if total == 1 and not u[0].is_cuda:
        return solve_row(system, u, g, tail, layouts, settings, gated=gated)
    b, linear = system.evaluate(u, g, tail)
    norm = norm0 = norms(b, of_r)
    limit = torch.full_like(norm, settings.atol)
    rows: Tensor | None = None
    result: Rows | None = None
    du: Groups = []
    alpha: Tensor | None = None
    # The first step is the one that goes too far.
    cutting = True
    verbose = log.enabled("newton", "debug")
    last = max(settings.miters - 1, 0)
    for i in range(last + 1):
        going = (norm >= limit).logical_and_(norm < inf)
        if i == 0 and not bool(going.all()):
            # A square may have overflowed: over an infinite first norm, all would look converged.
            norm = norm0 = torch.where(norm.isfinite(), norm, scaled_row_norms(b, of_r))
            going = (norm >= limit).logical_and_(norm < inf)
        elif gated and i > 0:
            moved = norms(du, of_u) if alpha is None else norms(du, of_u) * alpha
            unsettled = moved >= settings.substep_del_tol * (norms(u, of_u) + settings.atol)
            going |= unsettled & (norm >= settings.atol) & (norm < inf)
        if verbose and norm.numel():
            log.emit(
                "newton", "debug", f"ITERATION {i:3d}, |R| = {norm.amax().item():.6e}, |R0| = {norm0.amax().item():.6e}"
            )
        keep = going.nonzero().squeeze(-1) if i < last else None
        staying = 0 if keep is None else keep.shape[0]
        if staying or i > 0:
            du = system.direction(u, g, tail, b, linear)
        if staying < norm.shape[0] or keep is None or total == 0:
            leaving = _Leaving(u, du, ~going & (norm < inf), norm, norm0)
            if not staying and rows is None:
                return _all_at_once(leaving, i, of_u)
            which = (~going).nonzero().squeeze(-1) if staying else None
            if result is None:
                result = _blank(total, leaving)
            place = which if rows is None else rows if which is None else rows[which]
            assert place is not None, "a batch that leaves at once is not recorded"
            _record(result, place, i, leaving if which is None else _some(leaving, which), of_u)
            if not staying:
                return result
            assert keep is not None
            rows = keep if rows is None else rows[keep]
            u, g, du, b = (take(x, keep) for x in (u, g, du, b))
            norm, norm0 = norm[keep], norm0[keep]
            limit = limit[keep]
        if i == 0:
            limit = torch.clamp(norm0 * settings.rtol, min=settings.atol)
        step = advance(system, u, g, tail, b, du, norm, layouts, settings, cutting)
        u, b, linear, norm, alpha, cutting = step.u, step.b, step.linear, step.norm, step.alpha, step.cut
    raise AssertionError("the last iteration returns")


@dataclass
class _Leaving:
    """The rows that leave the batch, with the step that they will not take.

    Args:
        u: the unknowns.
        du: the step.
        done: which have converged.
        norm: of the residual.
        norm0: first one.
    """

    u: Groups
    du: Groups
    done: Tensor
    norm: Tensor
    norm0: Tensor


def _some(rows: _Leaving, which: Tensor) -> _Leaving:
    """Some of these rows."""
    return _Leaving(
        take(rows.u, which),
        take(rows.du, which),
        rows.done[which],
        rows.norm[which],
        rows.norm0[which],
    )


def _polished(rows: _Leaving, iterations: int, layout: Layout) -> Groups:
    """The unknowns, after one more step of the rows that have converged by steps, where it is finite."""
    if iterations == 0:
        return rows.u
    return [
        torch.where(per_row(rows.done, group) & (step := x + d).isfinite(), step, x)
        for x, d, group in zip(rows.u, rows.du, layout, strict=True)
    ]


def _all_at_once(rows: _Leaving, iterations: int, layout: Layout) -> Rows:
    """The outcome of a batch whose rows leave together."""
    steps = torch.full(rows.norm.shape, iterations, dtype=torch.int64, device=rows.norm.device)
    return Rows(_polished(rows, iterations, layout), rows.done, steps, rows.norm, rows.norm0)


def _blank(total: int, like: _Leaving) -> Rows:
    """Room for the outcome of the whole batch."""
    return Rows(
        [x.new_empty((total, *x.shape[1:])) for x in like.u],
        torch.zeros(total, dtype=torch.bool, device=like.norm.device),
        torch.zeros(total, dtype=torch.int64, device=like.norm.device),
        like.norm.new_empty(total),
        like.norm.new_empty(total),
    )


def _record(result: Rows, place: Tensor, iterations: int, rows: _Leaving, layout: Layout) -> None:
    """Write the outcome of rows to their places in the whole batch."""
    final = _polished(rows, iterations, layout)
    for target, values in zip(result.unknowns, final, strict=True):
        target.index_copy_(0, place, values)
    result.converged.index_copy_(0, place, rows.done)
    result.iterations.index_fill_(0, place, iterations)
    result.norm.index_copy_(0, place, rows.norm)
    result.norm0.index_copy_(0, place, rows.norm0)
