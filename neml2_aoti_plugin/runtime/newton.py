"""Newton's method over a batch whose rows are problems of their own.

A row leaves the batch when it has converged or when its residual is no longer finite; the rest goes on without it. The
residual that the Jacobian graph returns serves the convergence test, so a step costs one Jacobian and one solve. A row
that has converged after a step takes one more, by the linearisation at hand: its error falls as if the batch had gone
on for its slowest row, and does not depend on which row that was.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import log
from ..settings import NewtonSettings
from .layout import Layout, norms, per_row, row_dots, scaled_row_norms
from .linesearch import acceptance, accepted
from .onerow import solve_row
from .rows import Rows
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
    keep_linear: bool = False,
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
        keep_linear: whether the linearisations are kept for sensitivities.

    Returns:
        The outcome of each row.
    """
    of_u, of_r = layouts
    total = u[0].shape[0]
    if total == 1 and not u[0].is_cuda:
        return solve_row(system, u, g, tail, layouts, settings, gated=gated, keep_linear=keep_linear)
    b, linear = system.evaluate(u, g, tail)
    norm = norms(b, of_r)
    norm0 = norm
    rows: Tensor | None = None
    result: Rows | None = None
    du: Groups = []
    alpha: Tensor | None = None
    verbose = log.enabled("newton", "debug")
    last = max(settings.miters - 1, 0)
    for i in range(last + 1):
        done, lost = _verdict(norm, norm0, b, of_r, settings, first=i == 0)
        if i == 0:
            norm0 = norm = _finite_norms(norm, lost, b, of_r)
            if lost is not None:
                lost = ~norm.isfinite()
                done = (norm < settings.atol) & ~lost
        elif gated:
            moved = norms(du, of_u) if alpha is None else norms(du, of_u) * alpha
            done &= (norm < settings.atol) | (moved < settings.substep_del_tol * (norms(u, of_u) + settings.atol))
        if verbose and norm.numel():
            log.emit(
                "newton", "debug", f"ITERATION {i:3d}, |R| = {norm.amax().item():.6e}, |R0| = {norm0.amax().item():.6e}"
            )
        stop = done if lost is None else done | lost
        count = norm.shape[0] if i == last else int(torch.count_nonzero(stop))
        ending = count == norm.shape[0]
        if not ending or i > 0:
            du = system.direction(u, g, tail, b, linear)
        # Without rows there is nothing to count, and the end is at once.
        if count or ending:
            final = u if i == 0 else _polished(u, du, done, of_u)
            if ending and rows is None:
                steps = torch.full((total,), i, dtype=torch.int64, device=norm.device)
                return Rows(final, done, steps, norm, norm0, linear if keep_linear else [])
            which = None if ending else stop.nonzero().squeeze(-1)
            if result is None:
                result = _blank(total, final, norm, linear if keep_linear else [])
            _record(result, rows, which, i, final, done, norm, norm0, linear if keep_linear else [])
            if ending:
                return result
            keep = (~stop).nonzero().squeeze(-1)
            rows = keep if rows is None else rows[keep]
            u, g, du, b = (_take(x, keep) for x in (u, g, du, b))
            norm, norm0 = norm[keep], norm0[keep]
        u, b, linear, norm, alpha = _advance(system, u, g, tail, b, du, norm, layouts, settings)
    raise AssertionError("the last iteration returns")


def _verdict(
    norm: Tensor, norm0: Tensor, b: Groups, layout: Layout, settings: NewtonSettings, *, first: bool
) -> tuple[Tensor, Tensor | None]:
    """Which rows have converged, and which are lost; None where the test for the lost found none."""
    done = norm < settings.atol
    if not first:
        done |= norm / norm0 < settings.rtol
    lost = ~norm.isfinite()
    return done, lost


def _finite_norms(norm: Tensor, lost: Tensor | None, b: Groups, layout: Layout) -> Tensor:
    """The first norms, taken with scaling where a square overflowed: over an infinite one, all would look converged."""
    if lost is None or not bool(lost.any()):
        return norm
    return torch.where(lost, scaled_row_norms(b, layout), norm)


def _polished(u: Groups, du: Groups, done: Tensor, layout: Layout) -> Groups:
    """One more step for the rows that have converged, where it is finite."""
    return [
        torch.where(per_row(done, group) & (step := x + d).isfinite(), step, x)
        for x, d, group in zip(u, du, layout, strict=True)
    ]


def _advance(
    system: System,
    u: Groups,
    g: Groups,
    tail: Sequence[Tensor],
    b: Groups,
    du: Groups,
    norm: Tensor,
    layouts: tuple[Layout, Layout],
    settings: NewtonSettings,
) -> tuple[Groups, Groups, Groups, Tensor, Tensor | None]:
    """Take the step, cut back row by row where a line search is on.

    Returns:
        The unknowns after the step, `b` and the linearisation there, its norms, and the step lengths (None: all 1).
    """
    of_u, of_r = layouts
    trial = [x + d for x, d in zip(u, du, strict=True)]
    trial_b, linear = system.evaluate(trial, g, tail)
    trial_norm = norms(trial_b, of_r)
    trials = settings.ls_max_iters - 1
    if trials < 2:
        return trial, trial_b, linear, trial_norm, None
    squares = norm * norm
    bdu = None if settings.ls_type == "STRONG_WOLFE" else row_dots(b, du, of_r, of_u)
    alpha = torch.ones_like(norm)
    for _ in range(trials - 1):
        refused = ~accepted(settings, trial_norm * trial_norm, acceptance(settings, squares, bdu, alpha))
        if not bool(refused.any()):
            break
        alpha = torch.where(refused, alpha / settings.ls_cutback, alpha)
        rows = refused.nonzero().squeeze(-1)
        part = [x[rows] + per_row(alpha[rows], group) * d[rows] for x, d, group in zip(u, du, of_u, strict=True)]
        part_b, part_linear = system.evaluate(part, _take(g, rows), tail)
        for whole, some in ((trial, part), (trial_b, part_b), (linear, part_linear)):
            for k, x in enumerate(some):
                whole[k] = whole[k].index_copy(0, rows, x)
        trial_norm = trial_norm.index_copy(0, rows, norms(part_b, of_r))
    return trial, trial_b, linear, trial_norm, alpha


def _take(groups: Groups, rows: Tensor) -> Groups:
    return [x.index_select(0, rows) for x in groups]


def _blank(total: int, u: Groups, norm: Tensor, linear: Groups) -> Rows:
    return Rows(
        [x.new_empty((total, *x.shape[1:])) for x in u],
        torch.zeros(total, dtype=torch.bool, device=norm.device),
        torch.zeros(total, dtype=torch.int64, device=norm.device),
        norm.new_empty(total),
        norm.new_empty(total),
        [x.new_empty((total, *x.shape[1:])) for x in linear],
    )


def _record(
    result: Rows,
    rows: Tensor | None,
    which: Tensor | None,
    iterations: int,
    u: Groups,
    done: Tensor,
    norm: Tensor,
    norm0: Tensor,
    linear: Groups,
) -> None:
    """Write the outcome of the rows `which` of the present batch; `rows` are their places in the whole one."""
    if which is not None:
        u, linear = _take(u, which), _take(linear, which)
        done, norm, norm0 = done[which], norm[which], norm0[which]
    place = which if rows is None else rows if which is None else rows[which]
    assert place is not None, "the whole batch is returned, not recorded"
    for target, values in zip((*result.unknowns, *result.linear), (*u, *linear), strict=True):
        target.index_copy_(0, place, values)
    result.converged[place] = done
    result.iterations[place] = iterations
    result.norm[place] = norm
    result.norm0[place] = norm0
