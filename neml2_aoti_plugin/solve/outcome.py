"""What became of the rows of a solve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor


class Outcome(IntEnum):
    """How the solve of a row ended."""

    CONVERGED = 0
    DIVERGED = 1
    OUT_OF_ITERATIONS = 2
    SINGULAR = 3

    @property
    def words(self) -> str:
        """The outcome as messages put it."""
        return _WORDS[self]


_WORDS = {
    Outcome.CONVERGED: "converged",
    Outcome.DIVERGED: "diverged",
    Outcome.OUT_OF_ITERATIONS: "not converged",
    Outcome.SINGULAR: "singular Jacobian",
}


@dataclass(frozen=True)
class RowStatistics:
    """How each row fared.

    Args:
        outcome: an `Outcome` per row, int8, `(rows,)`.
        iterations: number of Newton updates, int64, `(rows,)`.
        norm: last residual norm, `(rows,)`.
        norm0: residual norm at the first iterate, `(rows,)`.
        all_converged: whether all rows have converged.
    """

    outcome: Tensor
    iterations: Tensor
    norm: Tensor
    norm0: Tensor
    all_converged: bool

    @property
    def converged(self) -> Tensor:
        """Rows that have converged, bool, `(rows,)`."""
        return self.outcome == Outcome.CONVERGED


def blank(rows: int, like: Tensor) -> RowStatistics:
    """Statistics of rows that have not been solved: none has converged.

    Args:
        rows: how many.
        like: has the dtype and the device of the norms.
    """
    return RowStatistics(
        torch.full((rows,), Outcome.OUT_OF_ITERATIONS, dtype=torch.int8, device=like.device),
        torch.zeros(rows, dtype=torch.int64, device=like.device),
        like.new_zeros(rows),
        like.new_zeros(rows),
        rows == 0,
    )


def first_failure(parts: Sequence[RowStatistics]) -> tuple[RowStatistics, Tensor]:
    """Statistics over several solves of the same rows, one after the other.

    Args:
        parts: the statistics of each solve; one at least.

    Returns:
        Of each row the outcome and the norms of the first solve that failed, or those of the last one, with the
        updates of all; and the index of the solve that failed, -1 for none, `(rows,)`.
    """
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
    return RowStatistics(outcome, iterations, norm, norm0, all(part.all_converged for part in parts)), index
