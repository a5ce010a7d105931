"""Tell which rows did not converge, and hand on their iterates where that is asked for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from .. import errors
from ..artifact.schema import Aliases, Shape
from ..program.implicit import ImplicitSegment
from ..program.program import Program
from ..program.report import Report
from ..settings import NewtonSettings
from ..solve.outcome import Outcome, RowStatistics, failed_where, statistics_of

CAPTURE = "NEML2_CAPTURE_SOLVE_FAILURE"
SHOWN = 5

_KINDS = {
    Outcome.DIVERGED: "diverged (non-finite residual)",
    Outcome.OUT_OF_ITERATIONS: "not converged",
    Outcome.SINGULAR: "stopped at a singular Jacobian",
    Outcome.NOT_FINITE: "ended where derivatives are not finite",
}


def capturing() -> bool:
    """Whether failed solves hand on their iterates; read anew at each failure."""
    return os.environ.get(CAPTURE, "").strip().lower() not in ("", "0", "false", "no", "off")


def convergence_error(
    report: Report,
    lost: Tensor | None,
    batch: Shape,
    program: Program,
    settings: NewtonSettings | None,
    aliases: Aliases,
    given: Mapping[str, Tensor],
) -> RuntimeError:
    """The error for an evaluation in which rows did not converge.

    Args:
        report: of the evaluation.
        lost: rows with a derivative that is not finite, `(*batch,)`; None for none.
        batch: the caller's batch shape.
        program: that was evaluated.
        settings: Newton settings in place of the artifact's.
        aliases: names at the boundary.
        given: inputs and parameters of the call by authored name, `(rows or 1, ...)`.

    Returns:
        A `ConvergenceError` with `converged_mask` and `rows`; with `unknowns` too if failures are captured.
    """
    statistics, segments = report.statistics()
    if lost is not None:
        outcome = failed_where(statistics.outcome, lost.flatten())
        last = program.segments.index(program.implicit[-1])
        segments = segments.masked_fill(outcome == Outcome.NOT_FINITE, last)
        statistics = statistics_of(outcome, statistics.iterations, statistics.norm, statistics.norm0, False)
    error = error_for(statistics, segments, batch, program, settings, aliases, given)
    if capturing():
        names = {**aliases.inputs, **aliases.outputs}
        # Of the first try, as the iterates are, before steps were cut.
        error.converged_mask = report.tried().reshape(batch)  # type: ignore[attr-defined]
        error.unknowns = {  # type: ignore[attr-defined]
            names.get(name, name): value.reshape(batch + tuple(value.shape[1:]))
            for name, value in report.unknowns().items()
        }
    return error


def error_for(
    statistics: RowStatistics,
    segments: Tensor,
    batch: Shape,
    program: Program,
    settings: NewtonSettings | None,
    aliases: Aliases,
    given: Mapping[str, Tensor],
) -> RuntimeError:
    """The error for rows that fared so, at least one of which has failed.

    Args:
        statistics: how the rows fared.
        segments: index of the segment that failed first, else -1, `(rows,)`.
        batch: as for `convergence_error`.
        program: as for `convergence_error`.
        settings: as for `convergence_error`.
        aliases: as for `convergence_error`.
        given: as for `convergence_error`.

    Returns:
        A `ConvergenceError` with `converged_mask` and `rows`.
    """
    failed = (~statistics.converged).nonzero().squeeze(-1)
    first = failed[:SHOWN]
    index = int(segments[first[0]])
    segment = program.segments[index]
    assert isinstance(segment, ImplicitSegment), "only implicit segments fail to converge"
    used = settings or segment.spec.newton
    total = prod(batch)
    kinds = {Outcome(int(code)) for code in statistics.outcome[failed].unique()}
    kind = _KINDS[kinds.pop()] if len(kinds) == 1 else "not converged"
    steps = int(statistics.iterations[failed].max())
    level = segment.spec.max_substepping_level
    lines = [
        f"Newton solve {kind}: {len(failed)} of {total} row(s) failed after at most {steps} iteration(s) "
        f"(miters={used.miters}, atol={used.atol:.1e}, rtol={used.rtol:.1e}"
        + (f", max_substepping_level={level}" if level else "")
        + f", segment {index})."
    ]
    columns = (statistics.norm, statistics.norm0, statistics.iterations, statistics.outcome)
    for row, norm, norm0, count, code in zip(first.tolist(), *(x[first].tolist() for x in columns), strict=True):
        place = [int(k) for k in torch.unravel_index(torch.tensor(row), batch)] if len(batch) > 1 else row
        words = Outcome(code).words
        lines.append(f"  row {place}: {words} at iteration {count}, |R| = {norm:.6e}, |R0| = {norm0:.6e}")
    if len(failed) > SHOWN:
        lines.append(f"  ... and {len(failed) - SHOWN} more")
    shown, explained = not_finite(given, failed, {**aliases.parameters, **aliases.inputs})
    lines += shown
    if not explained:
        remedy = "reduce the outer step" if level else "reduce the time step"
        lines.append(f"Try a better predictor, a line search, or {remedy}; Model.solve returns the rows that converge.")
    error = errors.ConvergenceError("\n".join(lines))
    error.converged_mask = statistics.converged.reshape(batch)  # type: ignore[attr-defined]
    error.rows = failed  # type: ignore[attr-defined]
    # What a pool of processes makes one error of, for rows that were evaluated apart.
    error._fared = (statistics, segments)  # type: ignore[attr-defined]
    return error


def not_finite(given: Mapping[str, Tensor], failed: Tensor, names: Mapping[str, str]) -> tuple[list[str], bool]:
    """Name what was given with NaN or infinite entries to rows that failed; looked for only when a solve has failed.

    Args:
        given: inputs and parameters by authored name, `(rows or 1, ...)`.
        failed: indices of the failed rows.
        names: boundary names, where they differ.

    Returns:
        A line for each, and whether they explain the failure of all these rows.
    """
    lines, explained = [], torch.zeros_like(failed, dtype=torch.bool)
    for name, value in given.items():
        if not value.is_floating_point() or bool(value.isfinite().all()):
            continue
        lost = ~value.isfinite().reshape(value.shape[0], -1).all(-1)
        lost = lost[failed] if value.shape[0] > 1 else lost.expand(len(failed))
        if bool(lost.any()):
            lines.append(
                f"{names.get(name, name)!r} is not finite (NaN or infinite) in {int(lost.sum())} of these rows."
            )
            explained = explained | lost
    if lines:
        lines[-1] += " Give finite values; no solver setting mends this. Model.solve returns the rows that converge."
    return lines, bool(explained.all())
