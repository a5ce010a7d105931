"""What became of the rows of a solve."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from math import isfinite

import torch
from torch import Tensor

from . import tables


class Outcome(IntEnum):
    """How a row ended. `NOT_FINITE` is no verdict of a solve: the row has a result that is NaN or infinite."""

    CONVERGED = tables.CONVERGED
    DIVERGED = tables.DIVERGED
    OUT_OF_ITERATIONS = tables.OUT_OF_ITERATIONS
    SINGULAR = tables.SINGULAR
    NOT_FINITE = 4

    @property
    def words(self) -> str:
        """The outcome as messages put it."""
        return _WORDS[self]


_WORDS = {
    Outcome.CONVERGED: "converged",
    Outcome.DIVERGED: "diverged",
    Outcome.OUT_OF_ITERATIONS: "not converged",
    Outcome.SINGULAR: "singular Jacobian",
    Outcome.NOT_FINITE: "not finite",
}


def not_finite_rows(values: Iterable[Tensor], batch: tuple[int, ...]) -> Tensor | None:
    """Rows in which a value is NaN or infinite."""
    found: Tensor | None = None
    for value in values:
        # The sum answers for all entries at once, but for finite ones whose sum overflows.
        if isfinite(value.sum().item()):
            continue
        rows = ~value.isfinite().reshape(*batch, -1).all(-1)
        found = rows if found is None else found | rows
    return found


def failed_where(outcome: Tensor, rows: Tensor | None) -> Tensor:
    """Outcomes in which those of `rows` that had converged have failed as not finite."""
    if rows is None:
        return outcome
    return outcome.masked_fill(rows & (outcome == Outcome.CONVERGED), int(Outcome.NOT_FINITE))


@dataclass(frozen=True)
class RowStatistics:
    """How each row fared."""

    # An `Outcome` and the number of Newton updates, int64, `(rows, 2)`.
    record: Tensor
    # Last residual norm and that at the initial guess, `(rows, 2)`.
    norms: Tensor
    all_converged: bool

    @property
    def outcome(self) -> Tensor:
        """An `Outcome` per row, `(rows,)`."""
        return self.record[..., 0]

    @property
    def iterations(self) -> Tensor:
        """Number of Newton updates, `(rows,)`."""
        return self.record[..., 1]

    @property
    def norm(self) -> Tensor:
        """Last residual norm, `(rows,)`."""
        return self.norms[..., 0]

    @property
    def norm0(self) -> Tensor:
        """Residual norm at the initial guess, `(rows,)`."""
        return self.norms[..., 1]

    @property
    def converged(self) -> Tensor:
        """Rows that have converged, bool, `(rows,)`."""
        return self.outcome == Outcome.CONVERGED


def statistics_of(
    outcome: Tensor, iterations: Tensor, norm: Tensor, norm0: Tensor, all_converged: bool
) -> RowStatistics:
    """Statistics from their columns, each `(rows,)`."""
    return RowStatistics(torch.stack((outcome, iterations), -1), torch.stack((norm, norm0), -1), all_converged)


def blank(rows: int, like: Tensor) -> RowStatistics:
    """Statistics of rows that have not been solved: none has converged."""
    record = torch.zeros(rows, 2, dtype=torch.int64, device=like.device)
    record[:, 0] = int(Outcome.OUT_OF_ITERATIONS)
    return RowStatistics(record, like.new_zeros(rows, 2), rows == 0)


def first_failure(parts: Sequence[RowStatistics]) -> tuple[RowStatistics, Tensor]:
    """Statistics over several solves of the same rows, one after the other."""
    last = parts[-1]
    outcome, norm, norm0 = last.outcome, last.norm, last.norm0
    index = torch.where(last.converged, -1, len(parts) - 1)
    iterations = last.iterations
    for i, part in reversed(list(enumerate(parts[:-1]))):
        fine = part.converged
        outcome = torch.where(fine, outcome, part.outcome)
        norm, norm0 = torch.where(fine, norm, part.norm), torch.where(fine, norm0, part.norm0)
        index = torch.where(fine, index, i)
        iterations = iterations + part.iterations
    return statistics_of(outcome, iterations, norm, norm0, all(part.all_converged for part in parts)), index
