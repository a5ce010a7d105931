"""The rows of a solve as arrays: one dense group on a CPU in float64, with numba kernels between the graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ..settings import NewtonSettings
from . import elimination, kernels
from .criteria import Criteria, criteria_of
from .newton import Solved
from .outcome import Outcome, RowStatistics

# `u` and `g`, `(rows, n)` and `(rows, q)` -> `b = -r`, `(rows, n)`.
Residual = Callable[[Tensor, Tensor], Tensor]
# The same -> `b` and the Jacobian `(rows, n, n)`.
Jacobian = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Workspace:
    """Arrays for the live rows of a solve, and the tensors over them that graphs take.

    Args:
        rows: at most.
        n: number of unknowns.
        q: number of entries of the givens.
    """

    def __init__(self, rows: int, n: int, q: int) -> None:
        self.rows = rows
        vectors, givens = torch.empty(5, rows, n, dtype=torch.float64), torch.empty(2, rows, q, dtype=torch.float64)
        self._kept = vectors[kernels.U], givens[kernels.GIVENS], vectors[kernels.TRIAL]
        self._more = vectors[kernels.FURTHER], givens[kernels.FURTHER_GIVENS]
        self.vectors, self.givens = vectors.numpy(), givens.numpy()
        self.numbers, self.indices = np.empty((rows, 4)), np.empty((rows, 3), np.int64)
        self.lu, self.pivots = np.empty((rows, n, n)), np.empty((rows, n), np.int64)
        self._live, self._further = (rows, self._kept), (rows, self._more)

    def live(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Unknowns, givens and trials of the live rows; the same tensors as long as their number is the same."""
        if self._live[0] != count:
            u, g, trial = self._kept
            self._live = count, (u[:count], g[:count], trial[:count])
        return self._live[1]

    def further(self, count: int) -> tuple[Tensor, Tensor]:
        """Further trials, and the givens of their rows."""
        if self._further[0] != count:
            u, g = self._more
            self._further = count, (u[:count], g[:count])
        return self._further[1]


class Workspaces:
    """Workspaces of one system, kept from call to call; each is in the hands of one call at a time.

    Args:
        n: number of unknowns.
        q: number of entries of the givens.
        most: rows of the largest that is kept.
    """

    def __init__(self, n: int, q: int, most: int) -> None:
        self._n, self._q, self._most = n, q, most
        self._free: list[Workspace] = []

    def borrow(self, rows: int) -> Workspace:
        """A workspace for so many rows at least, which nobody else has."""
        try:
            found = self._free.pop()
        except IndexError:
            return Workspace(rows, self._n, self._q)
        return found if found.rows >= rows else Workspace(rows, self._n, self._q)

    def give_back(self, workspace: Workspace) -> None:
        """Keep a workspace for the next call."""
        if workspace.rows <= self._most and len(self._free) < 2:
            self._free.append(workspace)


class ArrayRows:
    """The rows of a solve, moved and decided by kernels; see `newton.Rows`.

    Args:
        residual: of the system.
        jacobian: of the system.
        u: first iterate, `(rows, n)`.
        g: givens, `(rows, q)`.
        settings: of the solve.
        small_steps: whether the relative test also asks for a small last step.
        workspace: for as many rows.
        hold: whether to settle only when asked to, so that the log can look at trials.
    """

    def __init__(
        self,
        residual: Residual,
        jacobian: Jacobian,
        u: Tensor,
        g: Tensor,
        settings: NewtonSettings,
        workspace: Workspace,
        *,
        small_steps: bool = False,
        hold: bool = False,
    ) -> None:
        self._residual, self._jacobian = residual, jacobian
        self._first, self._givens = u, g
        self._criteria, self._limits = _criteria(settings, small_steps)
        self._cuts, self._hold = settings.cuts, hold
        rows, n = u.shape
        self._rows = rows
        self._norms = np.empty((rows, 2))
        self._record = np.empty((rows, 2), np.int64)
        self._unknowns = torch.empty(rows, n, dtype=torch.float64)
        self._solution = self._unknowns.numpy()
        self._space = workspace
        self.live, self.refused, self._followed, self._update, self._cut = rows, 0, 0, 0, 0
        self._settled = True
        self._b: np.ndarray
        self._a: np.ndarray
        self._further_b = workspace.vectors[kernels.FURTHER]
        self._arrays = (
            workspace.vectors,
            workspace.givens,
            workspace.numbers,
            workspace.indices,
            workspace.lu,
            workspace.pivots,
            self._norms,
            self._record,
            self._solution,
        )

    def start(self) -> None:
        """See `newton.Rows`."""
        space = self._space
        space.vectors[kernels.U, : self._rows] = self._first.numpy()
        space.givens[kernels.GIVENS, : self._rows] = self._givens.numpy()
        if self._rows:
            self._linearise()
            self.live = kernels.begin(self._b, *self._arrays, self._limits)

    def _linearise(self) -> None:
        u, g, _ = self._space.live(self.live)
        b, a = self._jacobian(u, g)
        self._b, self._a = b.numpy(), a.numpy()

    def step(self) -> None:
        """See `newton.Rows`."""
        space = self._space
        if self._update:
            self._linearise()
        self._update += 1
        self._cut = 0
        self.live = live = kernels.advance(self._a, self._b, self.live, self._update, *self._arrays, self._limits)
        if not live:
            self.refused = 0
            return
        _, g, trial = space.live(live)
        b = self._residual(trial, g).numpy()
        self.live, self.refused, self._followed = kernels.judge(
            b, live, self._update, self._hold, *self._arrays, self._limits
        )
        self._settled = not (self.refused or self._followed or self._hold)

    def cut_back(self) -> None:
        """See `newton.Rows`."""
        self._cut += 1
        b = self._residual(*self._space.further(self.refused)).numpy()
        more = self._cut < self._cuts
        self.refused, self._followed = kernels.judge_again(
            b, self.refused, more, self.live, *self._arrays, self._limits
        )

    def chord(self) -> None:
        """See `newton.Rows`; `settle` judges it."""
        if self._followed:
            self._further_b = self._residual(*self._space.further(self._followed)).numpy()

    def settle(self) -> None:
        """See `newton.Rows`."""
        if self._settled or not self.live:
            return
        self.live = kernels.settle(
            self._further_b, self._followed, self.live, self._update, *self._arrays, self._limits
        )
        self._followed, self._settled = 0, True

    def finish(self) -> Solved:
        """See `newton.Rows`."""
        record = self._record
        if self.live:
            self._abandon()
        outcome = record[:, kernels.OUTCOME]
        failures = int(np.count_nonzero(outcome)) if self._rows > 1 else int(self._rows and outcome[0] != 0)
        if failures:
            waiting = (outcome == kernels.WAITING).nonzero()[0]
            failures -= len(waiting)
            if len(waiting):
                self._last_steps(waiting)
        statistics = RowStatistics(torch.from_numpy(record), torch.from_numpy(self._norms), failures == 0)
        return Solved([self._unknowns], statistics)

    def _abandon(self) -> None:
        """Rows that are live after the last update stay where they are."""
        space, live = self._space, self.live
        places = space.indices[:live, kernels.PLACE]
        self._solution[places] = space.vectors[kernels.U, :live]
        self._record[places, kernels.OUTCOME] = Outcome.OUT_OF_ITERATIONS
        self._record[places, kernels.UPDATES] = self._update
        self._norms[places, kernels.LAST] = space.numbers[:live, kernels.NORM]

    def _last_steps(self, waiting: np.ndarray) -> None:
        rows = torch.from_numpy(waiting)
        b, a = self._jacobian(self._unknowns.index_select(0, rows), self._givens.index_select(0, rows))
        space = self._space
        kernels.last_steps(
            a.numpy(), b.numpy(), waiting, space.vectors, space.lu, space.pivots, self._record, self._solution
        )

    def worst(self) -> tuple[float, float]:
        """See `newton.Rows`."""
        if not self.live:
            return _largest(self._norms[:, kernels.LAST]), _largest(self._norms[:, kernels.FIRST])
        live = slice(0, self.live)
        places = self._space.indices[live, kernels.PLACE]
        return _largest(self._space.numbers[live, kernels.NORM]), _largest(self._norms[places, kernels.FIRST])

    def trials(self) -> tuple[float, float, float]:
        """See `newton.Rows`."""
        numbers = self._space.numbers[: self.live]
        if not len(numbers):
            return 1.0, 0.0, 0.0
        slope = 1.0 if self._criteria.strong_wolfe else 2.0 * numbers[:, kernels.SLOPE]
        most = 1.0 - self._criteria.c * numbers[:, kernels.ALPHA] * slope
        least = numbers[:, kernels.NORM] * np.sqrt(np.maximum(most, 0.0))
        return float(numbers[:, kernels.ALPHA].min()), _largest(numbers[:, kernels.TRIAL_NORM]), float(least.min())


@lru_cache(maxsize=64)
def _criteria(settings: NewtonSettings, small_steps: bool) -> tuple[Criteria, np.ndarray]:
    criteria = criteria_of(settings, small_steps=small_steps)
    return criteria, kernels.packed(criteria)


def _largest(norms: np.ndarray) -> float:
    return float(norms.max()) if len(norms) else 0.0


def columns(a: Tensor, b: Tensor, chosen: Sequence[int]) -> Tensor:
    """Solve `A X = -B` row by row for chosen columns of `B`.

    Args:
        a: `(rows, n, n)`.
        b: `(rows, n, q)`.
        chosen: indices of columns.

    Returns:
        `(rows, n, len(chosen))`; NaN in rows whose matrix is singular.
    """
    rows, n = a.shape[:2]
    found, lu, pivots, x = (
        np.empty((rows, len(chosen), n)),
        np.empty((1, n, n)),
        np.empty((1, n), np.int64),
        np.empty((1, n)),
    )
    elimination.columns(a.numpy(), b.numpy(), np.asarray(chosen, np.int64), lu, pivots, x, found)
    return torch.from_numpy(found).transpose(1, 2)
