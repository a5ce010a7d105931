"""What a Newton solve asks of a system of equations, and reductions over what belongs to one row of its vectors.

A vector of the system (unknowns or residual) is a list of tensors, one per group. A dense group has shape
`(*batch, n)`: all its variables and their sites flattened onto one axis. A block group has shape
`(*batch, *sub_batch, n)`: the sites keep their axes. One row is one entry of `batch`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Literal, Protocol

import torch
from torch import Tensor

from .criteria import LEAST_SQUARES, MOST_SQUARES

Groups = list[Tensor]
Structure = Literal["dense", "block"]


@dataclass(frozen=True)
class Group:
    """One group of a vector of the system."""

    # `dense` (sites flattened onto the last axis) or `block` (sites on axes of their own).
    structure: Structure
    sub_batch_shape: tuple[int, ...] = ()

    @cached_property
    def trailing(self) -> int:
        """Number of trailing axes that belong to a row."""
        return 1 if self.structure == "dense" else len(self.sub_batch_shape) + 1

    @cached_property
    def axes(self) -> tuple[int, ...]:
        """The trailing axes, counted from the end."""
        return tuple(range(-self.trailing, 0))


Layout = tuple[Group, ...]


def per_row(values: Tensor, group: Group) -> Tensor:
    """View row values `(*batch,)` so that they broadcast against a tensor of `group`."""
    return values.reshape(values.shape + (1,) * group.trailing)


def taken(groups: Sequence[Tensor], rows: Tensor) -> Groups:
    """Some rows of tensors with one batch axis."""
    return [x.index_select(0, rows) for x in groups]


def row_norm_squares(groups: Sequence[Tensor], layout: Layout) -> Tensor:
    """Sum the squares of each row over all groups, one tensor each, whose batch shapes broadcast; `(*batch,)`."""
    return reduce(torch.add, (x.square().sum(group.axes) for x, group in zip(groups, layout, strict=True)))


def row_norms(groups: Sequence[Tensor], layout: Layout) -> Tensor:
    """Euclidean norm of each row over all groups, `(*batch,)`; squares that overflow or vanish are scaled first."""
    squares = row_norm_squares(groups, layout)
    norm = squares.sqrt()
    doubtful = ~((squares > LEAST_SQUARES) & (squares < MOST_SQUARES))
    return torch.where(doubtful, _scaled_row_norms(groups, layout), norm) if bool(doubtful.any()) else norm


def _scaled_row_norms(groups: Sequence[Tensor], layout: Layout) -> Tensor:
    """As `row_norms`, with each row divided by its largest entry first."""
    largest = reduce(torch.maximum, (x.abs().amax(group.axes) for x, group in zip(groups, layout, strict=True)))
    # A zero row must not become 0/0; an infinite or NaN row must stay non-finite.
    scale = torch.where(largest > 0, largest, 1.0)
    scale = torch.where(largest.isfinite(), scale, 1.0)
    scaled = [tensor / per_row(scale, group) for tensor, group in zip(groups, layout, strict=True)]
    return row_norm_squares(scaled, layout).sqrt() * scale


def finite_rows(groups: Sequence[Tensor], layout: Layout) -> Tensor:
    """Rows whose entries are all finite, bool, `(*batch,)`."""
    found: Tensor = reduce(torch.logical_and, (x.isfinite().all(g.axes) for x, g in zip(groups, layout, strict=True)))
    return found


def row_dots(left: Sequence[Tensor], right: Sequence[Tensor], left_layout: Layout, right_layout: Layout) -> Tensor:
    """Dot product of each row of two vectors, group `k` of one with group `k` of the other.

    Groups that are paired may differ in batch rank (an unbatched residual and a batched step) and in structure
    (one dense, one block); each is then flattened to one trailing axis.
    """
    found: list[Tensor] = []
    for a, b, a_group, b_group in zip(left, right, left_layout, right_layout, strict=True):
        if a_group.trailing == b_group.trailing == 1:
            found.append(torch.linalg.vecdot(a, b))
        else:
            found.append((a.flatten(-a_group.trailing) * b.flatten(-b_group.trailing)).sum(-1))
    return reduce(torch.add, found)


class Linearisation(Protocol):
    """The system `A du = b` at some unknowns: factored once, applied often."""

    @property
    def reusable(self) -> bool:
        """Whether it takes other right-hand sides than that at its own unknowns."""

    def solve(self, b: Groups) -> Groups:
        """The step `du`; not finite in rows where `A` is singular."""

    def take(self, rows: Tensor) -> Linearisation:
        """The same for some rows; asked only of one that is reusable."""


class System(Protocol):
    """A system of nonlinear equations `r(u) = 0`, a problem per row, with everything but the unknowns bound."""

    def residual(self, u: Groups) -> Groups:
        """`b = -r` at `u`."""

    def linearise(self, u: Groups) -> tuple[Groups, Linearisation]:
        """`b = -r` at `u`, and the linearisation there."""

    def take(self, rows: Tensor) -> System:
        """The system of some rows."""


@dataclass(frozen=True)
class Direction:
    """A step that was evaluated with the residual, and serves no other right-hand side; see `Linearisation`."""

    du: Groups
    reusable: bool = False

    def solve(self, b: Groups) -> Groups:
        return self.du

    def take(self, rows: Tensor) -> Linearisation:
        return Direction(taken(self.du, rows))
