"""How the rows of a call fared: `Solution`, why rows failed in words, and the error for them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from .. import errors
from .._artifact.schema import Aliases, Shape
from .._program.implicit import ImplicitSegment
from .._program.program import Program, SolveReport
from .._solve.outcome import Outcome, failed_where
from ..settings import NewtonSettings

Tensors = dict[str, Tensor]
Blocks = dict[str, Tensors]

CAPTURE = "NEML2_CAPTURE_SOLVE_FAILURE"
# Of how many rows that failed an error tells.
SHOWN = 5

# What the time is called, with its value before the step; rates divide by their difference.
TIMES = tuple((name, f"{name}~1") for name in ("t", "time"))


@dataclass(frozen=True)
class Solution:
    """Outputs, and derivatives where they were asked for, with how each row fared.

    Args:
        outputs: by name, `(*batch, *sub_batch, *base)`; NaN in rows that failed.
        converged: rows whose solves converged and whose outputs and blocks are finite, `(*batch,)`, bool. All others
            have failed. A residual has converged by either tolerance; by `rtol`, a start that is far off lets it pass
            far from the solution.
        iterations: number of Newton updates that each row took until its residual passed the test, `(*batch,)`, each
            with a linearisation. Chord steps, the trials of a line search and the last step beyond the test are not
            counted; those of several implicit segments, of subincrements and of a second solve without chord steps are
            added. At most `miters - 1` in a solve; 0 for a model without implicit segments.
        outcome: an `Outcome` per row, int64, `(*batch,)`.
        blocks: derivative blocks as `Model.jacobian` gives them; NaN in rows that failed, but for blocks without batch
            axes, which all rows share.
    """

    outputs: Tensors
    converged: Tensor
    iterations: Tensor
    outcome: Tensor
    blocks: Blocks = field(default_factory=dict)


@dataclass(frozen=True)
class GivenTensors:
    """What rows were given, by boundary name: inputs with initial guesses, and parameters, each `(rows or 1, ...)`."""

    inputs: Mapping[str, Tensor]
    parameters: Mapping[str, Tensor]


def reasons(outcome: Tensor, given: GivenTensors, *, step: str = "the time step") -> list[str]:
    """Why rows failed, as far as it can be told, and what helps: sentences for whoever made the call.

    `outcome` has an `Outcome` for each row, of which one at least has failed; `step` is what may be reduced.
    """
    failed = (outcome != Outcome.CONVERGED).nonzero().squeeze(-1)
    outcome = outcome[failed]
    # Rows whose cause is found need no advice about the solver.
    open_ = torch.ones_like(failed, dtype=torch.bool)
    lines = []
    for values in (given.inputs, given.parameters):
        for name, value in values.items():
            if not value.is_floating_point() or bool(value.isfinite().all()):
                continue
            lost = _of(~value.isfinite().reshape(value.shape[0], -1).all(-1), failed)
            if bool(lost.any()):
                lines.append(f"{name!r} is not finite (NaN or infinite) in {int(lost.sum())} of these rows.")
                open_ &= ~lost
    if lines:
        lines[-1] += " Give finite values; no solver setting mends this."
    broken = open_ & ((outcome == Outcome.DIVERGED) | (outcome == Outcome.NOT_FINITE))
    for now, before in TIMES:
        if bool(broken.any()) and {now, before} <= given.inputs.keys():
            still = broken & _of((given.inputs[now] == given.inputs[before]).reshape(-1), failed)
            if bool(still.any()):
                lines.append(
                    f"{now!r} equals {before!r} in {int(still.sum())} of these rows: rates divide by a step of no "
                    "length. Give a later time."
                )
                open_, broken = open_ & ~still, broken & ~still
    if bool((broken & (outcome == Outcome.NOT_FINITE)).any()):
        lines.append(
            "An output or a derivative is NaN or infinite although what was given is finite: look at the state of "
            "these rows, and ask only for the derivatives that you need."
        )
    if bool((open_ & (outcome != Outcome.NOT_FINITE)).any()):
        lines.append(advice(step))
    return lines


def advice(step: str = "the time step") -> str:
    """What helps a solver that fails."""
    return f"Try a better predictor, a line search, or reduce {step}."


def _of(flags: Tensor, rows: Tensor) -> Tensor:
    """Flags `(rows or 1,)` of some rows."""
    return flags[rows] if flags.shape[0] > 1 else flags.expand(len(rows))


def convergence_error(
    report: SolveReport,
    lost: Tensor | None,
    batch: Shape,
    program: Program,
    settings: NewtonSettings | None,
    aliases: Aliases,
    given: GivenTensors,
) -> RuntimeError:
    """The `ConvergenceError` for rows that did not converge; those in `lost` have a derivative that is not finite."""
    statistics, segments = report.statistics()
    outcome = failed_where(statistics.outcome, None if lost is None else lost.flatten())
    failed = (outcome != Outcome.CONVERGED).nonzero().squeeze(-1)
    indices = [int(index) for index in segments[failed].unique() if index >= 0]
    solved = [part for i, part in enumerate(program.segments) if i in indices and isinstance(part, ImplicitSegment)]
    level = max((part.spec.max_substepping_level for part in solved), default=0)
    if solved:
        used = settings or solved[0].spec.newton
        lines = [
            f"Newton solve not converged: {len(failed)} of {prod(batch)} row(s) failed "
            f"after at most {int(statistics.iterations[failed].max())} iteration(s) "
            f"(miters={used.miters}, atol={used.atol:.1e}, rtol={used.rtol:.1e}"
            + (f", max_substepping_level={level}" if level else "")
            + f", segment{'s' * (len(indices) > 1)} {', '.join(map(str, indices))})."
        ]
    else:
        lines = [f"Derivatives are NaN or infinite: {len(failed)} of {prod(batch)} row(s) failed."]
    columns = (statistics.norm, statistics.norm0, statistics.iterations, outcome, segments)
    first = failed[:SHOWN]
    for row, norm, norm0, count, code, index in zip(first.tolist(), *(x[first].tolist() for x in columns), strict=True):
        place = [int(k) for k in torch.unravel_index(torch.tensor(row), batch)] if len(batch) > 1 else row
        line = f"  row {place}: {Outcome(code).words}"
        if index >= 0:
            where = f" in segment {index}" if len(indices) > 1 else ""
            line += f"{where} at iteration {count}, |R| = {norm:.6e}, |R0| = {norm0:.6e}"
        lines.append(line)
    if len(failed) > SHOWN:
        lines.append(f"  ... and {len(failed) - SHOWN} more")
    lines += reasons(outcome, given, step="the outer step" if level else "the time step")
    lines[-1] += " Model.solve returns the rows that converge."
    error = errors.ConvergenceError("\n".join(lines))
    error.converged_mask = (outcome == Outcome.CONVERGED).reshape(batch)  # type: ignore[attr-defined]
    error.outcome = outcome.reshape(batch)  # type: ignore[attr-defined]
    error.rows = failed  # type: ignore[attr-defined]
    if os.environ.get(CAPTURE, "").strip().lower() not in ("", "0", "false", "no", "off"):
        names = {**aliases.inputs, **aliases.outputs}
        # Of the first attempt, as the iterates are, before steps were cut.
        error.converged_mask = report.tried().reshape(batch)  # type: ignore[attr-defined]
        error.unknowns = {  # type: ignore[attr-defined]
            names.get(name, name): value.reshape(batch + tuple(value.shape[1:]))
            for name, value in report.unknowns().items()
        }
    return error
