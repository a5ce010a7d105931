"""What became of the rows of a solve, and the lines of the log about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from math import isfinite

import torch
from torch import Tensor

from .. import _log as log
from ..settings import NewtonSettings
from . import tables
from .system import Groups

Listener = Callable[[str], None]

# The lines of the log: of each iteration, of each trial of the line search, and before a second attempt.
ITERATION = "ITERATION {:3d}, |R| = {:.6e}, |R0| = {:.6e}"
TRIALS = "  LS ITERATION {:3d}, min(alpha) = {:.6e}, max(||R||) = {:.6e}, min(||Rc||) = {:.6e}"
SECOND_ATTEMPT = "{} row(s) failed with chord steps, and are solved again without them"


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


@dataclass(frozen=True)
class Solved:
    """What a solve came to: the solution of the rows that have converged, the last iterate of the others."""

    unknowns: Groups
    statistics: RowStatistics


def blank(rows: int, like: Tensor) -> RowStatistics:
    """Statistics of rows that have not been solved: none has converged."""
    record = torch.zeros(rows, 2, dtype=torch.int64, device=like.device)
    record[:, 0] = int(Outcome.OUT_OF_ITERATIONS)
    return RowStatistics(record, like.new_zeros(rows, 2), rows == 0)


def first_failure(parts: Sequence[RowStatistics]) -> tuple[RowStatistics, Tensor]:
    """Statistics over several solves of the same rows, one after the other, and which solve failed first, else -1."""
    record, norms = parts[-1].record.clone(), parts[-1].norms
    index = torch.where(parts[-1].converged, -1, len(parts) - 1)
    for i, part in reversed(list(enumerate(parts[:-1]))):
        failed = ~part.converged
        record[:, 0] = torch.where(failed, part.outcome, record[:, 0])
        record[:, 1] += part.iterations
        norms = torch.where(failed.unsqueeze(-1), part.norms, norms)
        index = torch.where(failed, i, index)
    return RowStatistics(record, norms, all(part.all_converged for part in parts)), index


def listener() -> Listener | None:
    """What takes the lines of a solve: the channel `newton` at level `debug`, or nothing where that is off."""
    return (lambda line: log.emit("newton", "debug", line)) if log.enabled("newton", "debug") else None


def outcome_line(statistics: RowStatistics, settings: NewtonSettings) -> str:
    """The line that ends a solve in the log."""
    updates = int(statistics.iterations.max()) if statistics.iterations.numel() else 0
    norm, norm0 = statistics.norm, statistics.norm0
    if statistics.all_converged:
        absolute, relative = bool((norm < settings.atol).all()), bool((norm < settings.rtol * norm0).all())
        reason = "both" if absolute and relative else "abs_tol" if absolute else "rel_tol" if relative else "mixed"
        return f"{'converged' if updates else 'converged at predictor'} (iters={updates}, reason={reason})"
    if not bool(norm.isfinite().all()):
        return f"diverged at iter {updates} (non-finite residual)"
    worst, worst0 = norm.max().item(), norm0.max().item()
    return f"NOT converged (max_iters={settings.miters}, |R|={worst:.6e}, |R0|={worst0:.6e})"
