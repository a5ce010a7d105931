"""Put variables into the group tensors of an implicit segment's graphs, and take them out again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from ..artifact.schema import GroupInfo, Variable
from .layout import Group, Layout

State = dict[str, Tensor]


def layout_of(groups: Sequence[GroupInfo]) -> Layout:
    """The layout that the solvers work on."""
    return tuple(Group(g.structure, g.sub_batch_shape) for g in groups)


def width_in(variable: Variable, group: GroupInfo) -> int:
    """Number of columns of a variable in its group's tensor."""
    return variable.size if group.structure == "dense" else variable.width


def pack(groups: Sequence[GroupInfo], state: Mapping[str, Tensor], rows: int) -> list[Tensor]:
    """Concatenate variables into one tensor per group.

    Args:
        groups: the groups.
        state: each variable, `(rows, *sub_batch, *base)`.
        rows: the batch.

    Returns:
        Per group `(rows, n)` when dense, `(rows, *sub_batch, n)` when block.
    """
    packed = []
    for group in groups:
        parts = [state[v.name].reshape((rows, *group.sub_batch_shape, width_in(v, group))) for v in group.variables]
        packed.append(parts[0] if len(parts) == 1 else torch.cat(parts, -1))
    return packed


def unpack(groups: Sequence[GroupInfo], tensors: Sequence[Tensor]) -> State:
    """Slice group tensors into variables, the inverse of `pack`.

    Args:
        groups: the groups.
        tensors: one per group, as `pack` gives them.

    Returns:
        Each variable, `(rows, *sub_batch, *base)`.
    """
    state = {}
    for group, tensor in zip(groups, tensors, strict=True):
        start = 0
        for v in group.variables:
            width = width_in(v, group)
            state[v.name] = tensor[..., start : start + width].reshape((tensor.shape[0], *v.natural_shape))
            start += width
    return state


def group_shape(group: GroupInfo) -> tuple[int, ...]:
    """Shape of a group's tensor without the batch."""
    return (*group.sub_batch_shape, sum(width_in(v, group) for v in group.variables))


def row_entries(groups: Sequence[GroupInfo]) -> int:
    """Number of entries of one row over all groups."""
    return sum(prod(group_shape(g)) for g in groups)
