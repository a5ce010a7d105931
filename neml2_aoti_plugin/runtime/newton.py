"""Newton's method over a batch whose rows are problems of their own.

A row leaves the batch when it has converged or when its residual is no longer finite; the rest goes on without it. The
residual that the Jacobian graph returns serves the convergence test, so a step costs one Jacobian and one solve. A row
that has converged after a step takes one more, by the linearisation at hand: its error falls as if the batch had gone
on for its slowest row, and does not depend on which row that was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    # The first step is the one that goes too far.
    cutting = True
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
            if ending and rows is None:
                final = u if i == 0 else _polished(u, du, done, of_u)
                steps = torch.full((total,), i, dtype=torch.int64, device=norm.device)
                return Rows(final, done, steps, norm, norm0, linear if keep_linear else [])
            which = None if ending else stop.nonzero().squeeze(-1)
            kept = linear if keep_linear else []
            leaving = (
                _Leaving(u, du, done, norm, norm0, kept)
                if which is None
                else _leaving(which, u, du, done, norm, norm0, kept)
            )
            if result is None:
                result = _blank(total, u, norm, kept)
            place = which if rows is None else rows if which is None else rows[which]
            assert place is not None, "the whole batch is returned, not recorded"
            _record(result, place, i, leaving, of_u)
            if ending:
                return result
            keep = (~stop).nonzero().squeeze(-1)
            rows = keep if rows is None else rows[keep]
            u, g, du, b = (_take(x, keep) for x in (u, g, du, b))
            norm, norm0 = norm[keep], norm0[keep]
        step = _advance(system, u, g, tail, b, du, norm, layouts, settings, cutting)
        u, b, linear, norm, alpha, cutting = step.u, step.b, step.linear, step.norm, step.alpha, step.cut
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


@dataclass
class _Step:
    """Where a step has led.

    Args:
        u: the unknowns.
        b: `-r` there.
        linear: the linearisation there.
        norm: of `b`.
        alpha: step lengths; None where all are 1.
        cut: whether a row was cut back.
    """

    u: Groups
    b: Groups
    linear: Groups
    norm: Tensor
    alpha: Tensor | None
    cut: bool


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
    cutting: bool,
) -> _Step:
    """Take the step, cut back row by row where a line search is on.

    A trial needs the residual alone, which costs a fraction of the linearisation. The first trial asks for both at once
    where cuts are not expected: after a step that had none.

    Args:
        system: residual and Newton direction.
        u: the unknowns.
        g: givens.
        tail: promoted parameters.
        b: `-r` at `u`.
        du: the full step.
        norm: of `b`.
        layouts: of the unknown groups and of the residual groups.
        settings: of the line search.
        cutting: whether cuts are expected.
    """
    of_u, of_r = layouts
    trial = [x + d for x, d in zip(u, du, strict=True)]
    trials = settings.ls_max_iters - 1
    apart = system.residual_apart and cutting and trials >= 2
    trial_b, linear = (system.residual(trial, g, tail), []) if apart else system.evaluate(trial, g, tail)
    trial_norm = norms(trial_b, of_r)
    if trials < 2:
        return _Step(trial, trial_b, linear, trial_norm, None, False)
    squares = norm * norm
    bdu = None if settings.ls_type == "STRONG_WOLFE" else row_dots(b, du, of_r, of_u)
    alpha = torch.ones_like(norm)
    cut: Tensor | None = None
    for _ in range(trials - 1):
        refused = ~accepted(settings, trial_norm * trial_norm, acceptance(settings, squares, bdu, alpha))
        rows = refused.nonzero().squeeze(-1)
        if rows.shape[0] == 0:
            break
        # Rows that are refused later were refused at first.
        cut = rows if cut is None else cut
        alpha = torch.where(refused, alpha / settings.ls_cutback, alpha)
        part = [x[rows] + per_row(alpha[rows], group) * d[rows] for x, d, group in zip(u, du, of_u, strict=True)]
        part_b = system.residual(part, _take(g, rows), tail)
        trial = [_placed(x, rows, some) for x, some in zip(trial, part, strict=True)]
        if not system.residual_apart:
            trial_b = [_placed(x, rows, some) for x, some in zip(trial_b, part_b, strict=True)]
        trial_norm.index_copy_(0, rows, norms(part_b, of_r))
    if apart:
        trial_b, linear = system.evaluate(trial, g, tail)
        trial_norm = norms(trial_b, of_r)
    elif cut is not None and system.residual_apart:
        part_b, part_linear = system.evaluate(_take(trial, cut), _take(g, cut), tail)
        trial_b = [_placed(x, cut, some) for x, some in zip(trial_b, part_b, strict=True)]
        linear = [_placed(x, cut, some) for x, some in zip(linear, part_linear, strict=True)]
        trial_norm.index_copy_(0, cut, norms(part_b, of_r))
    return _Step(trial, trial_b, linear, trial_norm, alpha, cut is not None)


def _placed(whole: Tensor, rows: Tensor, some: Tensor) -> Tensor:
    """Put rows in their places: in place, but for what may be a constant of a graph."""
    if whole.shape[0] > 1 and whole.is_contiguous():
        return whole.index_copy_(0, rows, some)
    return whole.index_copy(0, rows, some)


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


@dataclass
class _Leaving:
    """The rows that leave the batch, with the step that they will not take.

    Args:
        u: the unknowns.
        du: the step.
        done: which have converged.
        norm: of the residual.
        norm0: first one.
        linear: the linearisation, where it is kept.
    """

    u: Groups
    du: Groups
    done: Tensor
    norm: Tensor
    norm0: Tensor
    linear: Groups


def _leaving(
    which: Tensor, u: Groups, du: Groups, done: Tensor, norm: Tensor, norm0: Tensor, linear: Groups
) -> _Leaving:
    """Some rows of the present batch."""
    return _Leaving(_take(u, which), _take(du, which), done[which], norm[which], norm0[which], _take(linear, which))


def _record(result: Rows, place: Tensor, iterations: int, rows: _Leaving, layout: Layout) -> None:
    """Write the outcome of rows to their places in the whole batch."""
    final = rows.u if iterations == 0 else _polished(rows.u, rows.du, rows.done, layout)
    for target, values in zip((*result.unknowns, *result.linear), (*final, *rows.linear), strict=True):
        target.index_copy_(0, place, values)
    result.converged[place] = rows.done
    result.iterations[place] = iterations
    result.norm[place] = rows.norm
    result.norm0[place] = rows.norm0
