"""What a Newton solve tells of the rows of a batch."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .systems import Groups


@dataclass
class Rows:
    """What became of each row.

    Args:
        unknowns: last iterate, one tensor per group.
        converged: bool, `(rows,)`.
        iterations: number of updates, `(rows,)`.
        norm: last residual norm, `(rows,)`.
        norm0: residual norm at the first iterate, `(rows,)`.
    """

    unknowns: Groups
    converged: Tensor
    iterations: Tensor
    norm: Tensor
    norm0: Tensor
