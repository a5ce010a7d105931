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
    gone = _Gone(total, of_u, norm)
    limit: Tensor | float = settings.atol
    place: Tensor | None = None  # of the rows in the whole batch; None while they are all of it
    idle: Tensor | None = None  # rows that move no more
    steps: Tensor | None = None  # taken by each row; None where it is the same number for all
    du: Groups = []
    alpha: Tensor | None = None
    loosest, before = inf, inf
    # The first step is the one that goes too far.
    cutting, stale = True, False
    verbose = log.enabled("newton", "debug")
    last = max(settings.miters - 1, 0)
    for i in range(last + 1):
        sound = isfinite(worst)
        going = norm >= limit
        if not sound:
            going &= norm < inf
        if gated and i > 0:
            moved = norms(du, of_u) if alpha is None else norms(du, of_u) * alpha
            unsettled = moved >= settings.substep_del_tol * (norms(u, of_u) + settings.atol)
            going |= unsettled & (norm >= settings.atol) & (norm < inf)
        if idle is not None:
            going.index_fill_(0, idle, False)
        if verbose:
            log.emit("newton", "debug", f"ITERATION {i:3d}, |R| = {worst:.6e}, |R0| = {gone.first(place):.6e}")
        count, present = int(going.count_nonzero()), norm.shape[0]
        if count == 0 or i == last:
            gone.sound &= sound and count == 0
            done = None if sound and count == 0 else ~going & (norm < inf)
            gone.leave(system, u, g, tail, b, linear, norm, limit, place, done, i if steps is None else steps)
            return gone.rows()
        if count < present:
            idle = going.logical_not().nonzero().squeeze(-1)
            many = present - count >= max(IDLE_ROWS, IDLE_PART * present)
            if i == 0 or many or not (system.direct and sound):
                gone.sound &= sound
                u_idle, g_idle, b_idle, linear_idle = (take(x, idle) for x in (u, g, b, linear))
                done = None if sound else norm[idle] < inf
                where, taken = idle if place is None else place[idle], i if steps is None else steps[idle]
                near = limit[idle] if isinstance(limit, Tensor) else limit
                gone.leave(system, u_idle, g_idle, tail, b_idle, linear_idle, norm[idle], near, where, done, taken)
                keep = going.nonzero().squeeze(-1)
                place = keep if place is None else place[keep]
                u, g, b, norm = take(u, keep), take(g, keep), take(b, keep), norm[keep]
                linear = linear if stale else take(linear, keep)
                limit = limit[keep] if isinstance(limit, Tensor) else limit
                idle = steps = None
            elif steps is None:
                steps = torch.full((present,), i, dtype=torch.int64, device=norm.device)
        if i == 0:
            limit = torch.clamp(norm * settings.rtol, min=settings.atol)
            loosest = limit.amax().item()
        if stale:
            b, linear = system.evaluate(u, g, tail)
        du = system.direction(u, g, tail, b, linear)
        if idle is not None and steps is not None:
            du = [d.index_fill(0, idle, 0.0) for d in du]
            steps += going
        # Quadratic convergence goes on as it did: the next norm is to this one as this was to the last, squared.
        ending = i == 0 or worst * worst * worst < loosest * before * before
        apart = (cutting and settings.ls_max_iters > 2) or (system.direct and ending)
        step = advance(system, u, g, tail, b, du, norm, idle, layouts, settings, apart=apart)
        stale = step.linear is None
        u, b, linear, norm = step.u, step.b, linear if step.linear is None else step.linear, step.norm
        alpha, cutting = step.alpha, step.cut
        before, worst = worst, norm.amax().item()
    raise AssertionError("the last iteration returns")


@dataclass
class _Gone:
    """The rows that have left the batch.

    Args:
        total: rows of the batch.
        layout: of the unknowns.
        norm0: first residual norm of each row.
        sound: whether all of them have converged.
    """

    total: int
    layout: Layout
    norm0: Tensor
    sound: bool = True
    unknowns: Groups = field(default_factory=list)
    told: Told | None = None

    def first(self, place: Tensor | None) -> float:
        """The largest first norm of some rows."""
        return (self.norm0 if place is None else self.norm0[place]).amax().item()

    def leave(
        self,
        system: System,
        u: Groups,
        g: Groups,
        tail: Sequence[Tensor],
        b: Groups,
        linear: Groups,
        norm: Tensor,
        limit: Tensor | float,
        place: Tensor | None,
        done: Tensor | None,
        steps: Tensor | int,
    ) -> None:
        """Polish rows and keep them.

        Args:
            system: residual and Newton direction.
            u: their last iterate.
            g: givens.
            tail: promoted parameters.
            b: `-r` there.
            linear: the last linearisation there is.
            norm: of `b`.
            limit: that it had to come below.
            place: in the whole batch; None for all of it.
            done: which have converged; None for all.
            steps: that they have taken.
        """
        if isinstance(steps, Tensor) or steps > 0:
            rough = norm > ROUGH * limit
            if bool(rough.any()):
                which = rough if done is None else done & rough
                du = system.direction(u, g, tail, b, linear)
                u = [_moved(x, d, which, group) for x, d, group in zip(u, du, self.layout, strict=True)]
        if place is None:
            self.unknowns, self.told = u, self._tell(done, steps, norm)
            return
        if self.told is None:
            self.unknowns = [x.new_empty((self.total, *x.shape[1:])) for x in u]
            self.told = self._tell(None, 0, self.norm0)
            self.told = self.told._replace(norm=norm.new_empty(self.total))
        for target, values in zip(self.unknowns, u, strict=True):
            target.index_copy_(0, place, values)
        if done is not None:
            self.told.converged.index_copy_(0, place, done)
        if isinstance(steps, Tensor):
            self.told.iterations.index_copy_(0, place, steps)
        else:
            self.told.iterations.index_fill_(0, place, steps)
        self.told.norm.index_copy_(0, place, norm)

    def _tell(self, done: Tensor | None, steps: Tensor | int, norm: Tensor) -> Told:
        device = norm.device
        converged = torch.ones(norm.shape, dtype=torch.bool, device=device) if done is None else done
        if not isinstance(steps, Tensor):
            steps = torch.full(norm.shape, steps, dtype=torch.int64, device=device)
        return Told(converged, steps, norm, self.norm0)

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
