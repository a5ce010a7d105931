"""What a Newton solve asks of a system of equations.

A vector of the system (unknowns, residual) is a list of tensors, one per group, with the rows leading.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

Groups = list[Tensor]


class Linearisation(Protocol):
    """The system `A du = b` at some unknowns: factored once, applied often."""

    @property
    def reusable(self) -> bool:
        """Whether it takes other right-hand sides than that at its own unknowns."""
        ...

    def solve(self, b: Groups) -> Groups:
        """The step `du`; not finite in rows where `A` is singular."""
        ...

    def take(self, rows: Tensor) -> Linearisation:
        """The same for some rows; asked only of one that is reusable."""
        ...


class System(Protocol):
    """A system of nonlinear equations `r(u) = 0`, a problem per row, with everything but the unknowns bound."""

    def residual(self, u: Groups) -> Groups:
        """`b = -r` at `u`."""
        ...

    def linearise(self, u: Groups) -> tuple[Groups, Linearisation]:
        """`b = -r` at `u`, and the linearisation there."""
        ...

    def take(self, rows: Tensor) -> System:
        """The system of some rows."""
        ...


@dataclass(frozen=True)
class Direction:
    """A step that was evaluated with the residual, and serves no other right-hand side; see `Linearisation`."""

    du: Groups
    reusable: bool = False

    def solve(self, b: Groups) -> Groups:
        """See `Linearisation`."""
        return self.du

    def take(self, rows: Tensor) -> Linearisation:
        """See `Linearisation`."""
        return Direction([x.index_select(0, rows) for x in self.du])
