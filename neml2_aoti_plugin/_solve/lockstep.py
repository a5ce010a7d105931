"""The rows of a solve that keep step with one another, as neml2's C++ runtime does it.

All rows take every iteration until all have converged, and none takes a last step: the iterates are those of the C++
runtime, operation for operation. What it evaluates without need is left out, and a norm whose square overflows is
taken with scaling (there it is infinite, and makes the next finite norm look converged).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .groups import per_row
from .newton import Solved
from .outcome import Outcome, statistics_of
from .system import Groups
from .tensors import TensorSteps


class LockstepRows(TensorSteps):
    """Rows that move until all of them have converged at the same iterate; see `newton.Rows`.

    The batch may have any number of axes, and the first iterate fewer than the residual.
    """

    @property
    def updates(self) -> int:
        """Number of updates that the rows have taken."""
        return self._update

    def start(self) -> None:
        """See `newton.Rows`."""
        self._done = self._evaluate_first()
        self._judge()

    def settle(self) -> None:
        """See `newton.Rows`."""
        before = self._u
        self._u, self._b, self._norm = self._trial, self._trial_b, self._trial_norm
        self._done = self._have_converged(before)
        self._judge()

    def _judge(self) -> None:
        """Tell whether the rows go on: not if all have converged, nor if one is lost."""
        going = ~self._done
        self.live = int(going.count_nonzero())
        if self.live and bool((going & ~self._norm.isfinite()).any()):
            self.live = 0

    def finish(self) -> Solved:
        """See `newton.Rows`."""
        outcome = torch.where(self._norm.isfinite(), int(Outcome.OUT_OF_ITERATIONS), int(Outcome.DIVERGED))
        outcome = torch.where(self._done, int(Outcome.CONVERGED), outcome)
        updates = torch.full_like(outcome, self._update)
        statistics = statistics_of(outcome, updates, self._norm, self._norm0, bool(self._done.all()))
        # A solve that is content with its first iterate must not hand the caller's own tensor back.
        return Solved(self._u if self._update else [x.clone() for x in self._u], statistics)


class FrozenRows(LockstepRows):
    """Rows that move no more once they have converged, so that each fails by itself.

    The relative test also asks that the last step of the row was small (`substep_del_tol`), for the first iterate of a
    subincrement may be so far off that the relative test alone means little.
    """

    _frozen: Tensor | None = None

    def start(self) -> None:
        """See `newton.Rows`; a first iterate that is common to all rows gets the batch shape."""
        super().start()
        batch = self._norm.shape
        groups = zip(self._u, self._of_u, strict=True)
        self._u = [x.expand(batch + x.shape[x.ndim - g.trailing :]).contiguous() for x, g in groups]
        # A finite norm over an infinite one would look converged.
        self._norm0 = torch.where(self._norm0.isfinite(), self._norm0, torch.nan)

    def _direction(self, du: Groups) -> Groups:
        frozen = self._frozen
        if frozen is None:
            return du
        return [d.masked_fill(per_row(frozen, group), 0.0) for d, group in zip(du, self._of_u, strict=True)]

    def _must_stand(self) -> Tensor:
        stands = super()._must_stand()
        return stands if self._frozen is None else stands | self._frozen

    def _have_converged(self, before: Groups) -> Tensor:
        found = super()._have_converged(before)
        self._frozen = found if self._frozen is None else found | self._frozen
        return self._frozen

    def _judge(self) -> None:
        self.live = int((~self._done & self._norm.isfinite()).count_nonzero())
