"""Evaluate all rows and say how each fared: what `Model.solve` gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..artifact.schema import Shape
from ..program.report import Report
from ..solve.outcome import Outcome
from . import derivatives
from .call import Caller, Tensors
from .derivatives import Blocks


@dataclass(frozen=True)
class Solution:
    """Outputs, and derivatives where they were asked for, with how each row fared.

    Args:
        outputs: by name, `(*batch, *sub_batch, *base)`; NaN in rows that did not converge.
        converged: `(*batch,)`, bool.
        iterations: number of Newton updates of each row, each with a linearisation, `(*batch,)`; 0 for a model without
            implicit segments.
        outcome: an `Outcome` per row, int64, `(*batch,)`.
        blocks: derivative blocks as `Model.jacobian` gives them; NaN in rows that did not converge.
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
        outputs, blocks, report = derivatives.with_blocks(caller, call, chosen, expand=expand)
    outcome, iterations, all_converged = _fared(report, call.batch, caller.boundary.device)
    converged = outcome == Outcome.CONVERGED
    if not all_converged:
        outputs = {name: _masked(value, converged) for name, value in outputs.items()}
        blocks = {out: {by: _masked(x, converged) for by, x in row.items()} for out, row in blocks.items()}
    return Solution(outputs, converged, iterations, outcome, blocks)


def _fared(report: Report | None, batch: Shape, device: torch.device) -> tuple[Tensor, Tensor, bool]:
    """Outcome and number of updates of each row, and whether all have converged."""
    if report is None:
        none = torch.zeros(batch, dtype=torch.int64, device=device)
        return none, none.clone(), True
    statistics, _ = report.statistics()
    return statistics.outcome.reshape(batch), statistics.iterations.reshape(batch), report.all_converged


def _masked(value: Tensor, converged: Tensor) -> Tensor:
    """NaN in the rows that have not converged."""
    return value.masked_fill(~converged.reshape(converged.shape + (1,) * (value.ndim - converged.ndim)), torch.nan)
