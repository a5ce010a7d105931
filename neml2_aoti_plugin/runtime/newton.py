"""Newton's method over a batch whose rows are problems of their own.

A row that has converged, or whose residual is no longer finite, moves no more, and leaves the batch as soon as that is
worth copying the others. A row that has converged after a step takes one more when it leaves, by the last linearisation
there is, unless its residual is far below the limit: its error falls as if the batch had gone on for its slowest row,
and does not depend on which row that was.

The test of a step needs the residual alone. The Jacobian's graph returns it too, so where rows are expected to go on,
both are evaluated at once; where rows are expected to converge or to be cut back, first the residual, and then the
Jacobian of the rows that need it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf, isfinite

import torch
from torch import Tensor

from .. import log
from ..settings import NewtonSettings
from .layout import Group, Layout, norms, per_row, scaled_row_norms
from .onerow import solve_row
from .rows import ROUGH, Rows, Told
from .step import advance, take
from .systems import Groups, System

# So many idle rows, and such a part of the batch, are worth a copy of the others.
IDLE_ROWS, IDLE_PART = 64, 1 / 8


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
    if total == 0:
        return _none(u)
    b, linear = system.evaluate(u, g, tail)
    norm = norms(b, of_r)
    worst = norm.amax().item()
    if not isfinite(worst):
        # A square may have overflowed: over an infinite first norm, all would look converged.
        norm = torch.where(norm.isfinite(), norm, scaled_row_norms(b, of_r))
        worst = norm.amax().item()
    gone = _Gone(of_u, norm)
    batch = _Batch(u, g, b, linear, norm, torch.full_like(norm, settings.atol))
    idle: Tensor | None = None  # rows that move no more
    du: Groups = []
    alpha: Tensor | None = None
    loosest, before = inf, inf
    # The first step is the one that goes too far.
    cutting, stale = True, False
    verbose = log.enabled("newton", "debug")
    last = max(settings.miters - 1, 0)
    for i in range(last + 1):
        norm, present = batch.norm, batch.norm.shape[0]
        sound = isfinite(worst)
        going = norm >= batch.limit
        if not sound:
            going &= norm < inf
        if gated and i > 0:
            moved = norms(du, of_u) if alpha is None else norms(du, of_u) * alpha
            unsettled = moved >= settings.substep_del_tol * (norms(batch.u, of_u) + settings.atol)
            going |= unsettled & (norm >= settings.atol) & (norm < inf)
        if idle is not None:
            going.index_fill_(0, idle, False)
        if verbose:
            first = gone.norm0 if batch.place is None else gone.norm0[batch.place]
            log.emit("newton", "debug", f"ITERATION {i:3d}, |R| = {worst:.6e}, |R0| = {first.amax().item():.6e}")
        count = int(going.count_nonzero())
        if count == 0 or i == last:
            gone.leave(system, tail, batch, None if sound and count == 0 else ~going & (norm < inf))
            return gone.rows()
        if count < present:
            idle = going.logical_not().nonzero().squeeze(-1)
            many = present - count >= max(IDLE_ROWS, IDLE_PART * present)
            if i == 0 or many or not (system.direct and sound):
                gone.leave(system, tail, batch.some(idle), None if sound else norm[idle] < inf)
                batch.linear = [] if stale else batch.linear
                batch, idle = batch.some(going.nonzero().squeeze(-1)), None
                batch.steps = i
            elif not isinstance(batch.steps, Tensor):
                batch.steps = torch.full((present,), i, dtype=torch.int64, device=norm.device)
        if i == 0:
            batch.limit = torch.clamp(batch.norm * settings.rtol, min=settings.atol)
            loosest = batch.limit.amax().item()
        if stale:
            batch.b, batch.linear = system.evaluate(batch.u, batch.g, tail)
        du = system.direction(batch.u, batch.g, tail, batch.b, batch.linear)
        if idle is not None:
            du = [d.index_fill(0, idle, 0.0) for d in du]
        batch.steps += 1 if idle is None else going
        # Quadratic convergence goes on as it did: the next norm is to this one as this was to the last, squared.
        ending = i == 0 or worst * worst * worst < loosest * before * before
        apart = (cutting and settings.ls_max_iters > 2) or (system.direct and ending)
        step = advance(system, batch.u, batch.g, tail, batch.b, du, batch.norm, idle, layouts, settings, apart=apart)
        stale = step.linear is None
        batch.u, batch.b, batch.norm = step.u, step.b, step.norm
        batch.linear = batch.linear if step.linear is None else step.linear
        alpha, cutting = step.alpha, step.cut
        before, worst = worst, batch.norm.amax().item()
    raise AssertionError("the last iteration returns")


@dataclass
class _Batch:
    """The rows that are still in the batch.

    Args:
        u: last iterate.
        g: givens.
        b: `-r` there.
        linear: the last linearisation there is.
        norm: of `b`.
        limit: that the norm has to come below.
        steps: taken by each row; a number where it is the same for all.
        place: of the rows in the whole batch; None while they are all of it.
    """

    u: Groups
    g: Groups
    b: Groups
    linear: Groups
    norm: Tensor
    limit: Tensor
    steps: Tensor | int = 0
    place: Tensor | None = None

    def some(self, rows: Tensor) -> _Batch:
        """Some of these rows."""
        return _Batch(
            take(self.u, rows),
            take(self.g, rows),
            take(self.b, rows),
            take(self.linear, rows),
            self.norm[rows],
            self.limit[rows],
            self.steps[rows] if isinstance(self.steps, Tensor) else self.steps,
            rows if self.place is None else self.place[rows],
        )


@dataclass
class _Gone:
    """The rows that have left the batch.

    Args:
        layout: of the unknowns.
        norm0: first residual norm of each row of the whole batch.
    """

    layout: Layout
    norm0: Tensor
    sound: bool = True
    unknowns: Groups = field(default_factory=list)
    told: Told | None = None

    def leave(self, system: System, tail: Sequence[Tensor], batch: _Batch, done: Tensor | None) -> None:
        """Polish rows and keep them.

        Args:
            system: residual and Newton direction.
            tail: promoted parameters.
            batch: the rows.
            done: which have converged; None for all.
        """
        self.sound &= done is None
        u, steps = batch.u, batch.steps
        if isinstance(steps, Tensor) or steps > 0:
            rough = batch.norm > ROUGH * batch.limit
            if bool(rough.any()):
                which = rough if done is None else done & rough
                du = system.direction(u, batch.g, tail, batch.b, batch.linear)
                u = [_moved(x, d, which, group) for x, d, group in zip(u, du, self.layout, strict=True)]
        if not isinstance(steps, Tensor):
            steps = torch.full(batch.norm.shape, steps, dtype=torch.int64, device=batch.norm.device)
        converged = torch.ones_like(steps, dtype=torch.bool) if done is None else done
        if batch.place is None:
            self.unknowns, self.told = u, Told(converged, steps, batch.norm, self.norm0)
            return
        parts = [*u, converged, steps, batch.norm]
        if self.told is None:
            wholes = [x.new_empty((len(self.norm0), *x.shape[1:])) for x in parts]
            self.unknowns, self.told = wholes[:-3], Told(wholes[-3], wholes[-2], wholes[-1], self.norm0)
        for whole, part in zip((*self.unknowns, *self.told[:3]), parts, strict=True):
            whole.index_copy_(0, batch.place, part)

    def rows(self) -> Rows:
        """The outcome of the whole batch."""
        told = self.told
        assert told is not None, "asked for after the last row has left"
        return Rows(self.unknowns, lambda: told, self.sound)


def _moved(x: Tensor, d: Tensor, which: Tensor, group: Group) -> Tensor:
    """Take a step with some rows, where it is finite."""
    step = x + d
    return torch.where(step.isfinite().logical_and_(per_row(which, group)), step, x)


def _none(u: Groups) -> Rows:
    """The outcome of a batch without rows."""
    norm = u[0].new_empty(0)
    told = Told(norm.to(torch.bool), norm.to(torch.int64), norm, norm)
    return Rows(u, lambda: told, True)
