"""Newton's method over the rows of a batch: the loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from .. import _log as log
from ..settings import NewtonSettings
from .outcome import RowStatistics
from .system import Groups

Tell = Callable[[str], None]

# The lines of the log: of each iteration, of each trial of the line search, and before a second attempt.
ITERATION = "ITERATION {:3d}, |R| = {:.6e}, |R0| = {:.6e}"
TRIALS = "  LS ITERATION {:3d}, min(alpha) = {:.6e}, max(||R||) = {:.6e}, min(||Rc||) = {:.6e}"
SECOND_ATTEMPT = "{} row(s) failed with chord steps, and are solved again without them"


@dataclass(frozen=True)
class Solved:
    """What a solve came to: the solution of the rows that have converged, the last iterate of the others."""

    unknowns: Groups
    statistics: RowStatistics


class Rows(Protocol):
    """The rows of a solve, and what is done with them.

    `live` is the number of rows that still move, and `refused` the number of those whose trial may not stand.
    """

    live: int
    refused: int

    def start(self) -> None:
        """Evaluate the residual at the initial guess."""
        ...

    def step(self) -> None:
        """Linearise, solve for the direction, and judge the trial at full step length."""
        ...

    def cut_back(self) -> None:
        """Shorten the steps of the refused rows, and judge their trials."""
        ...

    def chord(self) -> None:
        """Take a second step by the factors at hand with the rows that gain by it."""
        ...

    def settle(self) -> None:
        """Accept the trials; rows that are done leave."""
        ...

    def finish(self) -> Solved:
        """Take the last steps that are left, and give the outcome of all rows."""
        ...

    def worst(self) -> tuple[float, float]:
        """The largest residual norm of the live rows, and the largest first one, for the log."""
        ...

    def trials(self) -> tuple[float, float, float]:
        """The least step length, the largest trial norm and the least that would be accepted, for the log."""
        ...


def iterate(rows: Rows, settings: NewtonSettings, tell: Tell | None = None) -> Solved:
    """Solve `r(u) = 0` for each row; `tell` takes the lines of the log, None where nobody reads them."""
    rows.start()
    for i in range(settings.updates + 1):
        if tell is not None:
            tell(ITERATION.format(i, *rows.worst()))
        if not rows.live or i == settings.updates:
            break
        rows.step()
        for k in range(1, settings.ls_max_iters):
            if tell is not None:
                tell(TRIALS.format(k, *rows.trials()))
            if not rows.refused or k > settings.cuts:
                break
            rows.cut_back()
        rows.chord()
        rows.settle()
    return rows.finish()


def listener() -> Tell | None:
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
