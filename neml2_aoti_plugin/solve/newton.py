"""Newton's method over a batch whose rows are problems of their own.

A row that has converged, or whose residual is no longer finite, moves no more, and leaves the batch as soon as that is
worth copying the others. A row that has converged after a step takes one more, by the last linearisation there is,
unless its residual is far below the limit: its error falls as if the batch had gone on for its slowest row, and does
not depend on which row that was.

The test of a step needs the residual alone. The Jacobian's graph returns it too, so where rows are expected to go on,
both are evaluated at once, and rows that turn out to have converged take their last step with the others. Where rows
are expected to converge or to be cut back, first the residual is evaluated, then the Jacobian of those that need it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf, isfinite

import torch
from torch import Tensor

from .. import log
from ..program.systems import Groups, System
from ..settings import NewtonSettings
from .groups import Layout, norms, per_row, scaled_row_norms
from .onerow import solve_row
from .rows import ROUGH, Rows, Told
from .step import advance, take

# So many idle rows, and such a part of the batch, are worth a copy of the others.
IDLE_ROWS, IDLE_PART = 64, 1 / 4


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
    gone = _Gone(norm)
    batch = _Batch(u, g, b, linear, norm, norm, torch.full_like(norm, settings.atol))
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
            if batch.idle is not None:
                going.index_fill_(0, batch.idle, False)
        if verbose:
            first = gone.norm0 if batch.place is None else gone.norm0[batch.place]
            log.emit("newton", "debug", f"ITERATION {i:3d}, |R| = {worst:.6e}, |R0| = {first.amax().item():.6e}")
        count = int(going.count_nonzero())
        if count == 0 or i == last:
            done = None if sound and count == 0 else ~going & (norm < inf)
            gone.keep(batch, _polished(system, tail, batch, of_u, done, stale) if i > 0 else batch.u, done)
            return gone.rows()
        # Quadratic convergence goes on as it did: the next norm is to this one as this was to the last, squared.
        ending = i == 0 or worst * worst * worst < loosest * before * before
        apart = (cutting and settings.ls_max_iters > 2) or (system.direct and ending)
        # The steps of several rows may be taken together, where those of one do not depend on the others.
        jointly = system.direct and sound
        frozen, leaving = batch.idle, None
        if count < present and (frozen is None or count < present - len(frozen)):
            resting = going.logical_not().nonzero().squeeze(-1)
            if i == 0 or len(resting) >= max(IDLE_ROWS, IDLE_PART * present) or not jointly:
                leaving = resting
            else:
                batch.let_wait(resting, i)
        if leaving is not None and (i == 0 or stale or not jointly):
            some = batch.some(leaving)
            done = None if sound else some.norm < inf
            gone.keep(some, _polished(system, tail, some, of_u, done, stale) if i > 0 else some.u, done)
            batch = batch.some(going.nonzero().squeeze(-1), linear=not stale)
            frozen = leaving = None
        if i == 0:
            batch.limit = torch.clamp(batch.norm * settings.rtol, min=settings.atol)
            loosest = batch.limit.amax().item()
        if stale:
            batch.b, batch.linear = system.evaluate(batch.u, batch.g, tail)
        du = system.direction(batch.u, batch.g, tail, batch.b, batch.linear)
        if leaving is not None:
            some = batch.some(leaving, linear=False)
            gone.keep(some, _moved(some.u, take(du, leaving), some.rough, of_u), None)
            staying = going.nonzero().squeeze(-1)
            batch, du, frozen = batch.some(staying, linear=apart), take(du, staying), None
        if frozen is not None:
            du = [d.index_fill(0, frozen, 0.0) for d in du]
        batch.steps += 1 if batch.idle is None else going
        origin, limit = batch.u, batch.limit
        step = advance(system, origin, batch.g, tail, batch.b, du, batch.norm, limit, layouts, settings, apart=apart)
        stale = step.linear is None
        batch.u, batch.b, batch.norm, batch.before = step.u, step.b, step.norm, batch.norm
        batch.linear = batch.linear if step.linear is None else step.linear
        alpha, cutting = step.alpha, step.cut
        before, worst = worst, batch.norm.amax().item()
        if batch.idle is not None and not isfinite(worst):
            batch.take_back(origin, of_u)
            worst = batch.norm.amax().item()
    raise AssertionError("the last iteration returns")


@dataclass
class _Batch:
    """The rows that are still in the batch; some of them may wait.

    Args:
        u: last iterate.
        g: givens.
        b: `-r` there.
        linear: the last linearisation there is.
        norm: of `b`.
        before: that norm before the last step.
        limit: that the norm has to come below; infinite for rows that wait.
        steps: taken by each row; a number where it is the same for all.
        place: of the rows in the whole batch; None while they are all of it.
        idle: rows that wait; None for none.
    """

    u: Groups
    g: Groups
    b: Groups
    linear: Groups
    norm: Tensor
    before: Tensor
    limit: Tensor
    steps: Tensor | int = 0
    place: Tensor | None = None
    idle: Tensor | None = None

    @property
    def rough(self) -> Tensor:
        """Rows that have not had their last step, and gain by it."""
        return self.norm > ROUGH * self.limit

    def some(self, rows: Tensor, *, linear: bool = True) -> _Batch:
        """Some of these rows; without the linearisation, if it is not asked for."""
        return _Batch(
            take(self.u, rows),
            take(self.g, rows),
            take(self.b, rows),
            take(self.linear, rows) if linear else [],
            self.norm.index_select(0, rows),
            self.before.index_select(0, rows),
            self.limit.index_select(0, rows),
            self.steps.index_select(0, rows) if isinstance(self.steps, Tensor) else self.steps,
            rows if self.place is None else self.place.index_select(0, rows),
        )

    def let_wait(self, rows: Tensor, steps: int) -> None:
        """Let rows wait, but for the step that they are about to take with the others."""
        self.idle = rows
        self.limit.index_fill_(0, rows, inf)
        if not isinstance(self.steps, Tensor):
            self.steps = torch.full(self.norm.shape, steps, dtype=torch.int64, device=self.norm.device)

    def take_back(self, origin: Groups, layout: Layout) -> None:
        """Take back the last step of rows that wait, where it has led nowhere."""
        back = (self.norm < inf).logical_not_() & (self.limit == inf)
        self.u = [torch.where(per_row(back, of), x, y) for x, y, of in zip(origin, self.u, layout, strict=True)]
        self.norm = self.norm.masked_fill(back, 0.0)


def _polished(
    system: System, tail: Sequence[Tensor], batch: _Batch, layout: Layout, done: Tensor | None, stale: bool
) -> Groups:
    """The unknowns after the last step of those rows that have converged.

    Args:
        system: residual and Newton direction.
        tail: promoted parameters.
        batch: the rows.
        layout: of the unknowns.
        done: which have converged; None for all.
        stale: whether the linearisation is that before the last step.
    """
    rough = batch.rough if done is None else batch.rough & done
    if not bool(rough.any()):
        return batch.u
    u, g = batch.u, batch.g
    du = system.direction(u, g, tail, batch.b, batch.linear)
    # By an old linearisation the residual falls about as far as it fell by the last step; where that is too little for
    # the rows that are polished, there is a new one.
    slow = rough & (batch.norm * batch.norm > ROUGH * batch.limit * batch.before) if stale else None
    if slow is not None and bool(slow.any()):
        rows = slow.nonzero().squeeze(-1)
        u_slow, g_slow = take(u, rows), take(g, rows)
        b, linear = system.evaluate(u_slow, g_slow, tail)
        better = system.direction(u_slow, g_slow, tail, b, linear)
        du = [d.index_copy(0, rows, some) for d, some in zip(du, better, strict=True)]
    return _moved(u, du, rough, layout)


def _moved(u: Groups, du: Groups, which: Tensor, layout: Layout) -> Groups:
    """Take a step with some rows, where it is finite."""
    moved = []
    for x, d, group in zip(u, du, layout, strict=True):
        step = x + d
        moved.append(torch.where(step.isfinite().logical_and_(per_row(which, group)), step, x))
    return moved


@dataclass
class _Gone:
    """The rows that have left the batch: a part for each time that some did.

    Args:
        norm0: first residual norm of each row of the whole batch.
    """

    norm0: Tensor
    sound: bool = True
    places: list[Tensor | None] = field(default_factory=list)
    unknowns: list[Groups] = field(default_factory=list)
    fares: list[tuple[Tensor | None, Tensor | int, Tensor]] = field(default_factory=list)

    def keep(self, batch: _Batch, u: Groups, done: Tensor | None) -> None:
        """Keep rows: what is told of their batch, their unknowns, and which have converged (None for all)."""
        self.sound &= done is None
        self.places.append(batch.place)
        self.unknowns.append(u)
        self.fares.append((done, batch.steps, batch.norm))

    def rows(self) -> Rows:
        """The outcome of the whole batch."""
        whole = [self._whole(parts) for parts in zip(*self.unknowns, strict=True)]
        self.unknowns = []
        return Rows(whole, self._told, self.sound)

    def _whole(self, parts: Sequence[Tensor]) -> Tensor:
        """Put what belongs to the parts together."""
        if len(parts) == 1:
            return parts[0]
        whole = parts[0].new_empty((len(self.norm0), *parts[0].shape[1:]))
        for place, part in zip(self.places, parts, strict=True):
            assert place is not None, "of several parts, each is some of the rows"
            whole.index_copy_(0, place, part)
        return whole

    def _told(self) -> Told:
        norms = [norm for _, _, norm in self.fares]
        done = [torch.ones_like(norm, dtype=torch.bool) if x is None else x for x, _, norm in self.fares]
        steps = [x if isinstance(x, Tensor) else torch.full_like(norm, x).long() for _, x, norm in self.fares]
        return Told(self._whole(done), self._whole(steps), self._whole(norms), self.norm0)


def _none(u: Groups) -> Rows:
    """The outcome of a batch without rows."""
    norm = u[0].new_empty(0)
    told = Told(norm.to(torch.bool), norm.to(torch.int64), norm, norm)
    return Rows(u, lambda: told, True)
