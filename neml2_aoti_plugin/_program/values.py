"""What segments take and hand on: variables, parameters as one call sees them, and derivatives.

A *seed* is what is differentiated by: an input, a parameter, or a given direction of all inputs. `Tangents[v][seed]`
has shape `(rows, entries of v, m)`, or `(1, ...)` where it is the same for all rows; None stands for the identity. A
seed that is absent does not reach the variable.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from .._artifact.schema import GroupInfo, Variable

State = dict[str, Tensor]
Seed = tuple[str, str]
Columns = dict[Seed, Tensor | None]
Tangents = dict[str, Columns]
# Of seeds (PER_SITE, input), which are the identity: blocks of an explicit segment stay as they are, site by site.
PER_SITE = "per site"


def width_in(variable: Variable, group: GroupInfo) -> int:
    """Number of columns of a variable in its group's tensor."""
    return variable.size if group.structure == "dense" else variable.width


def places_in(groups: Sequence[GroupInfo]) -> dict[str, slice]:
    """The places of each variable's entries, group after group."""
    found, start = {}, 0
    for v in (v for group in groups for v in group.variables):
        found[v.name] = slice(start, start + v.size)
        start += v.size
    return found


class Packing:
    """The way of variables into the tensors of their groups, `(rows, *sub_batch if block, n)`, and back."""

    def __init__(self, groups: Sequence[GroupInfo]) -> None:
        # Of each group the columns of its variables; of these their names, shapes in the group's tensor and own shapes.
        self._groups = [
            (
                [width_in(v, g) for v in g.variables],
                [(v.name, (*g.sub_batch_shape, width_in(v, g)), v.natural_shape) for v in g.variables],
            )
            for g in groups
        ]
        self.names = tuple(v.name for g in groups for v in g.variables)

    def pack(self, state: Mapping[str, Tensor], rows: int) -> list[Tensor]:
        """Concatenate variables `(rows, *sub_batch, *base)` into one tensor per group."""
        packed = []
        for _, variables in self._groups:
            parts = [
                state[name] if inside == natural else state[name].reshape((rows, *inside))
                for name, inside, natural in variables
            ]
            packed.append(parts[0] if len(parts) == 1 else torch.cat(parts, -1))
        return packed

    def unpack(self, tensors: Sequence[Tensor]) -> State:
        """Slice group tensors into variables, the inverse of `pack`."""
        state = {}
        for (widths, variables), tensor in zip(self._groups, tensors, strict=True):
            parts = tensor.split_with_sizes(widths, -1) if len(widths) > 1 else (tensor,)
            for (name, inside, natural), part in zip(variables, parts, strict=True):
                state[name] = part if inside == natural else part.reshape((tensor.shape[0], *natural))
        return state


class Values:
    """The parameters in force during one call, by authored name: `base_shape`, or `(rows, *base_shape)`."""

    def __init__(self, tensors: Mapping[str, Tensor], base_ranks: Mapping[str, int]) -> None:
        self._tensors, self._base_ranks = tensors, base_ranks

    def per_row(self, names: Iterable[str]) -> list[str]:
        """Those of the names whose value differs from row to row."""
        return [name for name in names if self._tensors[name].ndim > self._base_ranks[name]]

    def common(self, names: Iterable[str]) -> list[Tensor]:
        """Values without a batch axis, for graphs that were traced so."""
        return [self._tensors[name] for name in names]

    def expanded(self, names: Sequence[str], rows: int) -> list[Tensor]:
        """Values with one entry per row, `(rows, *base_shape)`."""
        pairs = [(self._tensors[name], self._base_ranks[name]) for name in names]
        return [value if value.ndim > rank else value.expand(rows, *value.shape) for value, rank in pairs]

    def take(self, rows: Tensor | slice, fixed: Mapping[str, Tensor]) -> Values:
        """The values of some rows, with `fixed` ones in the place of those that differ from row to row."""
        tensors = {n: t[rows] if t.ndim > self._base_ranks[n] else t for n, t in self._tensors.items()}
        return Values({**tensors, **fixed}, self._base_ranks)


def add(columns: Columns, seed: Seed, term: Tensor) -> None:
    """Add a term to the derivative by a seed."""
    present = columns.get(seed)
    columns[seed] = term if present is None else present + term


def dense(columns: Columns, like: Tensor) -> dict[Seed, Tensor]:
    """The derivatives of a variable like `(rows, ...)`, with identities written out as matrices, `(1, n, n)`."""
    return {
        seed: torch.eye(prod(like.shape[1:]), dtype=like.dtype, device=like.device).unsqueeze(0)
        if value is None
        else value
        for seed, value in columns.items()
    }


def times(block: Tensor, column: Tensor | None) -> Tensor:
    """`block @ column`, both with the rows leading."""
    return block if column is None else torch.matmul(block, column)


def select(tangents: Mapping[str, Columns], rows: Tensor | slice) -> Tangents:
    """The derivatives of some rows."""
    return {
        name: {seed: value if value is None or value.shape[0] == 1 else value[rows] for seed, value in columns.items()}
        for name, columns in tangents.items()
    }
