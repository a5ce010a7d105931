"""The rows of a solve as tensors: any device, any number of groups, any linear solver; simple before fast.

Rows that keep step with one another take the iterates of neml2's C++ runtime, operation for operation: all take every
iteration until all have converged, and none takes a last step. What it evaluates without need is left out, and a norm
whose square overflows is taken with scaling (there it is infinite, and makes the next finite norm look converged).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..settings import NewtonSettings
from . import criteria as by
from .criteria import Criteria, criteria_of
from .outcome import ITERATION, SECOND_ATTEMPT, TRIALS, Listener, Outcome, RowStatistics, Solved, blank
from .system import Groups, Layout, Linearisation, System, finite_rows, per_row, row_dots, row_norms, taken

# Gives the system of some rows, or of all: one for each attempt, for it may keep a preconditioner.
SystemOf = Callable[[Tensor | None], System]


def solve_rows(
    system: SystemOf,
    first: Groups,
    layouts: tuple[Layout, Layout],
    settings: NewtonSettings,
    *,
    small_steps: bool = False,
    listener: Listener | None = None,
) -> Solved:
    """Solve for each row from its initial guess; rows that fail with chord steps are solved again without them."""

    def attempt(rows: Tensor | None, first: Groups, settings: NewtonSettings) -> Solved:
        criteria = criteria_of(settings, small_steps=small_steps)
        return TensorRows(system(rows), first, layouts, criteria).solve(settings, listener)

    found = attempt(None, first, settings)
    statistics = found.statistics
    if statistics.all_converged or not settings.chord_steps:
        return found
    # Without an update there was no chord step, and the second attempt would end as the first.
    rows = (~statistics.converged & (statistics.iterations > 0)).nonzero().squeeze(-1)
    if not len(rows):
        return found
    if listener is not None:
        listener(SECOND_ATTEMPT.format(len(rows)))
    second = attempt(rows, taken(first, rows), replace(settings, chord_steps=False))
    statistics.iterations[rows] += second.statistics.iterations
    statistics.outcome[rows], statistics.norms[rows] = second.statistics.outcome, second.statistics.norms
    statistics = replace(statistics, all_converged=bool(statistics.converged.all()))
    return Solved(_put(found.unknowns, rows, second.unknowns), statistics)


def solve_in_lockstep(
    system: SystemOf,
    first: Groups,
    layouts: tuple[Layout, Layout],
    settings: NewtonSettings,
    *,
    small_steps: bool = False,
    listener: Listener | None = None,
) -> Solved:
    """Solve as the C++ runtime does; a batch that fails is iterated again, to tell which rows did."""
    for each in (False, True):
        if each or not small_steps:
            criteria = criteria_of(settings, small_steps=each, as_native=True)
            found = LockstepRows(system(None), first, layouts, criteria).solve(settings, listener)
            if found.statistics.all_converged:
                break
    return found


class TensorSteps(ABC):
    """Newton's method over rows with a line search: what the row-wise and the lockstep solve share."""

    # The number of rows that still move, and of those whose trial may not stand.
    _live: int
    _refused = 0
    # The step length of each row.
    _alpha: Tensor
    # Rows that do not move although they are live.
    _frozen: Tensor | None = None

    def __init__(self, system: System, u: Groups, layouts: tuple[Layout, Layout], criteria: Criteria) -> None:
        self._system, self._u, self._criteria = system, u, criteria
        self._of_u, self._of_r = layouts
        # Number of updates that the rows have taken.
        self.updates = 0

    def solve(self, settings: NewtonSettings, listener: Listener | None = None) -> Solved:
        """Solve `r(u) = 0` for each row; `listener` takes the lines of the log, None where nobody reads them."""
        self._b = self._system.residual(self._u)
        self._norm = self._norm0 = row_norms(self._b, self._of_r)
        # Nothing is relative to the first norm yet.
        self._start((self._norm < self._criteria.atol) | (self._norm == 0.0))
        while True:
            if listener is not None:
                listener(ITERATION.format(self.updates, *self._worst()))
            if not self._live or self.updates == settings.updates:
                return self._finish()
            self._step()
            for k in range(1, settings.ls_max_iters):
                if listener is not None:
                    listener(TRIALS.format(k, *self._trials()))
                if not self._refused or k > settings.cuts:
                    break
                # Shorten the steps of the refused rows.
                self._alpha = torch.where(self._stands, self._alpha, self._alpha / self._criteria.cutback)
                self._try()
            self._settle()

    @abstractmethod
    def _start(self, done: Tensor) -> None:
        """Take note of the rows that are done at the initial guess."""

    @abstractmethod
    def _settle(self) -> None:
        """Accept the trials; tell which rows go on."""

    @abstractmethod
    def _finish(self) -> Solved:
        """Take the last steps that are left, and give the outcome of all rows."""

    def _step(self) -> None:
        """Linearise, solve for the direction, and judge the trial at full step length."""
        self.updates += 1
        b, self._linear = self._system.linearise(self._u)
        self._du = self._linear.solve(b)
        if self._frozen is not None:
            groups = zip(self._du, self._of_u, strict=True)
            self._du = [d.masked_fill(per_row(self._frozen, group), 0.0) for d, group in groups]
        self._alpha = torch.ones_like(self._norm)
        if not self._criteria.strong_wolfe:
            # Divided by the norms first, so that products cannot overflow.
            b, du = _divided(self._b, self._norm, self._of_r), _divided(self._du, self._norm, self._of_u)
            self._slope = row_dots(b, du, self._of_r, self._of_u)
        else:
            self._slope = torch.zeros_like(self._norm)
        self._try()

    def _try(self) -> None:
        """Evaluate the trials at these step lengths, and judge them."""
        moves = zip(self._u, self._du, self._of_u, strict=True)
        self._trial = [x + per_row(self._alpha, group) * d for x, d, group in moves]
        self._trial_b = self._system.residual(self._trial)
        self._trial_norm = row_norms(self._trial_b, self._of_r)
        if self._criteria.searching:
            judged = by.accepted(self._trial_norm, self._norm, self._norm0, self._slope, self._alpha, self._criteria)
            # What does not move, or is lost, is not cut back.
            self._stands: Tensor = judged | ~finite_rows(self._du, self._of_u)
            if self._frozen is not None:
                self._stands = self._stands | self._frozen
            self._refused = int((~self._stands).count_nonzero())

    def _have_converged(self, before: Groups) -> Tensor:
        """Rows that have converged by the last step."""
        found: Tensor = by.converged(self._norm, self._norm0, self._criteria)
        if self._criteria.small_steps:
            moved = row_norms([x - y for x, y in zip(self._u, before, strict=True)], self._of_u)
            found = found & by.small_step(moved, row_norms(self._u, self._of_u), self._norm, self._criteria)
        return found

    def _worst(self) -> tuple[float, float]:
        """The largest residual norm of the live rows, and the largest first one, for the log."""
        return _largest(self._norm), _largest(self._norm0)

    def _trials(self) -> tuple[float, float, float]:
        """The least step length, the largest trial norm and the least that would be accepted, for the log."""
        if not self._alpha.numel():
            return 1.0, 0.0, 0.0
        slope = 1.0 if self._criteria.strong_wolfe else 2.0 * self._slope
        least = self._norm * (1.0 - self._criteria.c * self._alpha * slope).clamp(min=0.0).sqrt()
        return self._alpha.amin().item(), _largest(self._trial_norm), least.amin().item()


class TensorRows(TensorSteps):
    """The rows of a row-wise solve, each of which leaves when it is done. Their tensors have one batch axis."""

    def _start(self, done: Tensor) -> None:
        self._whole = self._system
        self._statistics = blank(len(self._norm), self._norm)
        self._statistics.norm0.copy_(self._norm0)
        self._solution = [x.clone() for x in self._u]
        self._place = torch.arange(len(self._norm), device=self._norm.device)
        # Places of rows that wait for a last step with a linearisation of its own.
        self._waiting: list[Tensor] = []
        self._leave(done | ~self._norm.isfinite(), torch.where(done, int(Outcome.CONVERGED), int(Outcome.DIVERGED)))

    def _settle(self) -> None:
        self._chord()
        origin, before = self._u, self._norm
        found = finite_rows(self._du, self._of_u)
        self._u = _chosen(found, self._trial, origin, self._of_u)
        self._b, self._norm = self._trial_b, torch.where(found, self._trial_norm, before)
        done = self._have_converged(origin) & found
        if bool(done.any()):
            self._take_last_steps(done, before)
        outcome = torch.where(done, int(Outcome.CONVERGED), int(Outcome.DIVERGED))
        outcome = torch.where(found, outcome, int(Outcome.SINGULAR))
        self._leave(done | ~found | ~self._norm.isfinite(), outcome)

    def _chord(self) -> None:
        """Take a second step by the factors at hand with the rows that gain by it."""
        # A linearisation that serves one right-hand side only takes none.
        if not self._linear.reusable:
            return
        followed = by.followed(self._trial_norm, self._norm, self._norm0, self._alpha, self._criteria)
        rows = (followed & finite_rows(self._du, self._of_u)).nonzero().squeeze(-1)
        if not len(rows):
            return
        trial, b = taken(self._trial, rows), taken(self._trial_b, rows)
        further = _moved(trial, self._linear.take(rows).solve(b), self._of_u)
        further_b = self._system.take(rows).residual(further)
        norm = row_norms(further_b, self._of_r)
        better = norm < self._trial_norm[rows]
        rows = rows[better]
        # The step before has been accepted: it is where the rows come from now.
        self._u = _put(self._u, rows, [x[better] for x in trial])
        self._norm = self._norm.index_copy(0, rows, self._trial_norm[rows])
        self._trial = _put(self._trial, rows, [x[better] for x in further])
        self._trial_b = _put(self._trial_b, rows, [x[better] for x in further_b])
        self._trial_norm = self._trial_norm.index_copy(0, rows, norm[better])

    def _take_last_steps(self, done: Tensor, before: Tensor) -> None:
        """Let rows that have converged take their last step, or wait for one with a linearisation of its own."""
        gains = done & by.gains(self._norm, self._norm0, self._criteria)
        now = gains & by.carries(self._norm, before, self._norm0, self._criteria)
        now = now if self._linear.reusable else torch.zeros_like(now)
        self._waiting.append(self._place[gains & ~now])
        rows = now.nonzero().squeeze(-1)
        if len(rows):
            u, b = taken(self._u, rows), taken(self._b, rows)
            moved = self._last_step(self._system.take(rows), self._linear.take(rows), u, b, self._norm[rows])
            self._u = _put(self._u, rows, moved)

    def _last_step(self, system: System, linear: Linearisation, u: Groups, b: Groups, norm: Tensor) -> Groups:
        """Take a last step from unknowns with the rows whose residual falls by it."""
        if linear.reusable:
            # Scaled: it may be below the absolute tolerance of an iterative linear solve.
            scale = row_norms(b, self._of_r)
            scale = torch.where(scale > 0.0, scale, 1.0)
            unit = linear.solve(_divided(b, scale, self._of_r))
            du = [x * per_row(scale, group) for x, group in zip(unit, self._of_u, strict=True)]
        else:
            du = linear.solve(b)
        moved = _moved(u, du, self._of_u)
        better = row_norms(system.residual(moved), self._of_r) < norm
        return _chosen(better, moved, u, self._of_u)

    def _leave(self, leaving: Tensor, outcome: Tensor) -> None:
        """Let rows leave with their outcomes."""
        if bool(leaving.any()):
            rows, staying = leaving.nonzero().squeeze(-1), (~leaving).nonzero().squeeze(-1)
            place, statistics, outcome = self._place[rows], self._statistics, outcome[rows]
            statistics.outcome[place] = outcome
            statistics.iterations[place] = self.updates - (outcome == Outcome.SINGULAR).long()
            statistics.norm[place] = self._norm[rows]
            for whole, x in zip(self._solution, self._u, strict=True):
                whole[place] = x[rows]
            self._u, self._b = taken(self._u, staying), taken(self._b, staying)
            self._norm, self._norm0, self._place = (x[staying] for x in (self._norm, self._norm0, self._place))
            self._system = self._system.take(staying)
        self._live = len(self._place)

    def _worst(self) -> tuple[float, float]:
        """Those of all rows where none is live."""
        if self._live:
            return super()._worst()
        return _largest(self._statistics.norm), _largest(self._statistics.norm0)

    def _finish(self) -> Solved:
        outcome = torch.full_like(self._place, int(Outcome.OUT_OF_ITERATIONS))
        self._leave(torch.ones_like(outcome, dtype=torch.bool), outcome)
        waiting = torch.cat(self._waiting) if self._waiting else self._place
        if len(waiting):
            u, system = taken(self._solution, waiting), self._whole.take(waiting)
            b, linear = system.linearise(u)
            moved = self._last_step(system, linear, u, b, self._statistics.norm[waiting])
            self._solution = _put(self._solution, waiting, moved)
        statistics = self._statistics
        return Solved(self._solution, replace(statistics, all_converged=bool(statistics.converged.all())))


class LockstepRows(TensorSteps):
    """Rows that move until all of them have converged at the same iterate.

    Where small steps are asked for, a row moves no more once it has converged, so that each fails by itself. The batch
    may have any number of axes, and the initial guess fewer than the residual.
    """

    def _start(self, done: Tensor) -> None:
        self._done = done
        self._judge()
        if self._criteria.small_steps:
            # An initial guess that is common to all rows gets the batch shape.
            batch = self._norm.shape
            groups = zip(self._u, self._of_u, strict=True)
            self._u = [x.expand(batch + x.shape[x.ndim - g.trailing :]).contiguous() for x, g in groups]
            # A finite norm over an infinite one would look converged.
            self._norm0 = torch.where(self._norm0.isfinite(), self._norm0, torch.nan)
            self._frozen = torch.zeros_like(done)

    def _settle(self) -> None:
        before = self._u
        self._u, self._b, self._norm = self._trial, self._trial_b, self._trial_norm
        self._done = self._have_converged(before)
        if self._frozen is not None:
            self._done = self._frozen = self._done | self._frozen
        self._judge()

    def _judge(self) -> None:
        """Tell whether the rows go on: not if all have converged, nor, unless each fails by itself, if one is lost."""
        finite = self._norm.isfinite()
        if self._criteria.small_steps:
            self._live = int((~self._done & finite).count_nonzero())
        else:
            self._live = int((~self._done).count_nonzero()) if bool((self._done | finite).all()) else 0

    def _finish(self) -> Solved:
        outcome = torch.where(self._norm.isfinite(), int(Outcome.OUT_OF_ITERATIONS), int(Outcome.DIVERGED))
        outcome = torch.where(self._done, int(Outcome.CONVERGED), outcome)
        record = torch.stack((outcome, torch.full_like(outcome, self.updates)), -1)
        statistics = RowStatistics(record, torch.stack((self._norm, self._norm0), -1), bool(self._done.all()))
        # A solve that is content with its initial guess must not hand the caller's own tensor back.
        return Solved(self._u if self.updates else [x.clone() for x in self._u], statistics)


def _moved(u: Groups, steps: Groups, layout: Layout) -> Groups:
    """Take a step with the rows where it is finite."""
    return _chosen(finite_rows(steps, layout), [x + d for x, d in zip(u, steps, strict=True)], u, layout)


def _chosen(rows: Tensor, values: Groups, others: Groups, layout: Layout) -> Groups:
    """The values of some rows, and others elsewhere."""
    groups = zip(values, others, layout, strict=True)
    return [torch.where(per_row(rows, group), value, other) for value, other, group in groups]


def _divided(groups: Groups, by_row: Tensor, layout: Layout) -> Groups:
    """Each row divided by its number."""
    return [x / per_row(by_row, group) for x, group in zip(groups, layout, strict=True)]


def _put(groups: Groups, rows: Tensor, values: Groups) -> Groups:
    """Some rows exchanged for others."""
    return [x.index_copy(0, rows, value) for x, value in zip(groups, values, strict=True)]


def _largest(norms: Tensor) -> float:
    return norms.amax().item() if norms.numel() else 0.0
