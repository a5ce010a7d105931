"""Evaluate all rows and say how each fared: what `Model.solve` gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .._artifact.schema import Shape
from .._program.report import Report
from .._solve.outcome import Outcome, failed_where, not_finite_rows
from . import _derivatives as derivatives
from ._call import Caller, Tensors
from ._derivatives import Blocks


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


def solve(
    caller: Caller,
    inputs: Mapping[str, Tensor],
    overrides: Mapping[str, Tensor] | None,
    *,
    jacobian: bool = False,
    pairs: Sequence[tuple[str, str]] | None = None,
    expand: bool = True,
) -> Solution:
    """See `Model.solve`."""
    chosen = derivatives.input_pairs(caller, pairs) if jacobian or pairs is not None else None
    call = caller.admit(inputs, overrides)
    blocks: Blocks = {}
    if chosen is None:
        found = caller.evaluate(call)
        outputs, report = caller.outputs(found.values, call.batch), found.report
    else:
        outputs, blocks, report = derivatives.with_blocks(caller, call, chosen, expand=False)
    shared = _without_batch(caller, blocks) if caller.plan is not None and call.batch else set()
    own = [x for out, row in blocks.items() for by, x in row.items() if (out, by) not in shared]
    lost = not_finite_rows([*outputs.values(), *own], call.batch)
    if not_finite_rows((blocks[out][by] for out, by in shared), ()) is not None:
        lost = torch.ones(call.batch, dtype=torch.bool, device=caller.boundary.device)
    outcome, iterations = _fared(report, call.batch, caller.boundary.device)
    outcome = failed_where(outcome, lost)
    converged = outcome == Outcome.CONVERGED
    if expand:
        for out, by in shared:
            blocks[out][by] = caller.boundary.unflatten(blocks[out][by].unsqueeze(0), call.batch)
        shared = set()
    if lost is not None or (report is not None and not report.all_converged):
        outputs = {name: _masked(value, converged) for name, value in outputs.items()}
        blocks = {
            out: {by: x if (out, by) in shared else _masked(x, converged) for by, x in row.items()}
            for out, row in blocks.items()
        }
    return Solution(outputs, converged, iterations, outcome, blocks)


def _without_batch(caller: Caller, blocks: Blocks) -> set[tuple[str, str]]:
    """The pairs whose blocks have no batch axes, as only a plan gives them."""
    found: set[tuple[str, str]] = set()
    for out, row in blocks.items():
        output = caller.boundary.output_by_name[out].variable
        for by, block in row.items():
            source = caller.boundary.by_name[by].variable
            sites = output.sub_batch_shape or source.sub_batch_shape
            if block.ndim == len(sites) + len(output.base_shape) + len(source.base_shape):
                found.add((out, by))
    return found


def _fared(report: Report | None, batch: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
    """Outcome and number of updates of each row."""
    if report is None:
        none = torch.zeros(batch, dtype=torch.int64, device=device)
        return none, none.clone()
    statistics, _ = report.statistics()
    return statistics.outcome.reshape(batch), statistics.iterations.reshape(batch)


def _masked(value: Tensor, converged: Tensor) -> Tensor:
    """NaN in the rows that have not converged."""
    return value.masked_fill(~converged.reshape(converged.shape + (1,) * (value.ndim - converged.ndim)), torch.nan)
