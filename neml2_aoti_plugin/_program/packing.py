"""Put variables into the group tensors of an implicit segment's graphs, and take them out again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .._artifact.schema import GroupInfo, Variable
from .._solve.groups import Group, Layout
from .copies import joined

State = dict[str, Tensor]


def layout_of(groups: Sequence[GroupInfo]) -> Layout:
    """The layout that the solvers work on."""
    return tuple(Group(g.structure, g.sub_batch_shape) for g in groups)


def width_in(variable: Variable, group: GroupInfo) -> int:
    """Number of columns of a variable in its group's tensor."""
    return variable.size if group.structure == "dense" else variable.width


class Packing:
    """The way of variables into the tensors of their groups, and back.

    Args:
        groups: the groups.
    """

    def __init__(self, groups: Sequence[GroupInfo]) -> None:
        self._groups = [
            (
                [(v.name, (*g.sub_batch_shape, width_in(v, g)), v.natural_shape) for v in g.variables],
                [width_in(v, g) for v in g.variables],
            )
            for g in groups
        ]
        self.names = tuple(v.name for g in groups for v in g.variables)

    def pack(self, state: Mapping[str, Tensor], rows: int) -> list[Tensor]:
        """Concatenate variables into one tensor per group.

        Args:
            state: each variable, `(rows, *sub_batch, *base)`.
            rows: the batch.

        Returns:
            Per group `(rows, n)` when dense, `(rows, *sub_batch, n)` when block.
        """
        packed = []
        for variables, _ in self._groups:
            parts = [
                state[name]
                if inside == natural
                else state[name].reshape((rows, *inside))
                if natural
                else state[name].unsqueeze(-1)
                for name, inside, natural in variables
            ]
            packed.append(joined(parts))
        return packed

    def unpack(self, tensors: Sequence[Tensor]) -> State:
        """Slice group tensors into variables, the inverse of `pack`.

        Args:
            tensors: one per group, as `pack` gives them.

        Returns:
            Each variable, `(rows, *sub_batch, *base)`.
        """
        state = {}
        for (variables, widths), tensor in zip(self._groups, tensors, strict=True):
            parts = torch.split_with_sizes(tensor, widths, -1) if len(widths) > 1 else (tensor,)
            for (name, inside, natural), part in zip(variables, parts, strict=True):
                state[name] = part if inside == natural else part.reshape((tensor.shape[0], *natural))
        return state
