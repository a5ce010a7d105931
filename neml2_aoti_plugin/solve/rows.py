"""What a Newton solve tells of the rows of a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from ..program.systems import Groups

# A row whose residual norm is below this part of its limit has nothing to gain from another step.
ROUGH = 1e-4


class Told(NamedTuple):
    """How each row fared.

    Args:
        converged: bool, `(rows,)`.
        iterations: number of updates, `(rows,)`.
        norm: last residual norm, `(rows,)`.
        norm0: residual norm at the first iterate, `(rows,)`.
    """

    converged: Tensor
    iterations: Tensor
    norm: Tensor
    norm0: Tensor


@dataclass
class Rows:
    """What became of the rows.

    Args:
        unknowns: last iterate, one tensor per group.
        tell: how each row fared; asked for by few, so it may be made when it is.
        sound: whether all rows are known to have converged.
    """

    unknowns: Groups
    tell: Callable[[], Told]
    sound: bool = False

    @cached_property
    def told(self) -> Told:
        """How each row fared."""
        return self.tell()

    @property
    def all_converged(self) -> bool:
        """Whether all rows have converged."""
        return self.sound or bool(self.told.converged.all())
