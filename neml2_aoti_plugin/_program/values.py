"""What segments take and hand on: variables, parameters as one call sees them, derivatives; and copies of tensors.

A *seed* is what is differentiated by: an input, a parameter, or a given direction of all inputs. `Tangents[v][seed]`
has shape `(rows, entries of v, m)`, or `(1, ...)` where it is the same for all rows; None stands for the identity. A
seed that is absent does not reach the variable.

Copies stay in the calling thread: torch copies a large tensor with all its threads. For the blocks of rows here that
wins next to nothing; and where other programs use the processors too, the call waits at each copy until its helpers
have had their turn. Nothing is recorded for autograd here, whatever the tensors ask for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

from .._artifact.schema import GroupInfo, Variable

State = dict[str, Tensor]
Seed = tuple[str, str]
Columns = dict[Seed, Tensor | None]
Tangents = dict[str, Columns]
# Of seeds (PER_SITE, input), which are the identity: blocks of an explicit segment stay as they are, site by site.
PER_SITE = "per site"

# Up to so many entries torch's operators use one thread (at::internal::GRAIN_SIZE).
GRAIN = 32768


def width_in(variable: Variable, group: GroupInfo) -> int:
    """Number of columns of a variable in its group's tensor."""
    return variable.size if group.structure == "dense" else variable.width


class Packing:
    """The way of variables into the tensors of their groups, `(rows, *sub_batch if block, n)`, and back."""

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
        """Concatenate variables `(rows, *sub_batch, *base)` into one tensor per group."""
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
        """Slice group tensors into variables, the inverse of `pack`."""
        state = {}
        for (variables, widths), tensor in zip(self._groups, tensors, strict=True):
            parts = torch.split_with_sizes(tensor, widths, -1) if len(widths) > 1 else (tensor,)
            for (name, inside, natural), part in zip(variables, parts, strict=True):
                state[name] = part if inside == natural else part.reshape((tensor.shape[0], *natural))
        return state


class Values:
    """The parameters in force during one call, by authored name: `base_shape`, or `(rows, *base_shape)`."""

    def __init__(self, tensors: Mapping[str, Tensor], base_ranks: Mapping[str, int]) -> None:
        self._tensors = dict(tensors)
        self._base_ranks = base_ranks

    def per_row(self, names: Iterable[str]) -> list[str]:
        """Those of the names whose value differs from row to row."""
        return [name for name in names if self._tensors[name].ndim > self._base_ranks[name]]

    def common(self, names: Iterable[str]) -> list[Tensor]:
        """Values without a batch axis, for graphs that were traced so."""
        return [self._tensors[name] for name in names]

    def expanded(self, names: Iterable[str], rows: int) -> list[Tensor]:
        """Values with one entry per row, `(rows, *base_shape)`."""
        found = []
        for name in names:
            value = self._tensors[name]
            found.append(value if value.ndim > self._base_ranks[name] else value.expand(rows, *value.shape))
        return found

    def take(self, rows: Tensor | slice, fixed: Mapping[str, Tensor] | None = None) -> Values:
        """The values of some rows, with `fixed` ones in the place of those that differ from row to row."""
        if not self._tensors:
            return self
        tensors = {n: t[rows] if t.ndim > self._base_ranks[n] else t for n, t in self._tensors.items()}
        return Values({**tensors, **(fixed or {})}, self._base_ranks)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]


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


def combine(terms: list[tuple[float, dict[Seed, Tensor]]]) -> Columns:
    """A linear combination of derivatives, as substepping makes of variables."""
    total: Columns = {}
    for factor, columns in terms:
        for seed, value in columns.items() if factor else ():
            add(total, seed, value if factor == 1.0 else factor * value)
    return total


def times(block: Tensor, column: Tensor | None) -> Tensor:
    """`block @ column`, both with the rows leading."""
    return block if column is None else torch.matmul(block, column)


def select(tangents: Mapping[str, Columns], rows: Tensor | slice) -> Tangents:
    """The derivatives of some rows."""
    return {
        name: {seed: value if value is None or value.shape[0] == 1 else value[rows] for seed, value in columns.items()}
        for name, columns in tangents.items()
    }


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Tensors side by side along their last axis; a single one is given as it is."""
    if len(parts) == 1:
        return parts[0]
    if _stays(parts[0]):
        return torch.cat(list(parts), -1)
    return torch.from_numpy(np.concatenate([part.detach().numpy() for part in parts], -1))


def contiguous(x: Tensor) -> Tensor:
    """A tensor, or its copy with rows one after the other in memory."""
    if x.is_contiguous():
        return x
    return x.contiguous() if _stays(x) else torch.from_numpy(np.ascontiguousarray(x.detach().numpy()))


def put(target: Tensor, index: Tensor | slice, x: Tensor) -> None:
    """Write rows `(as many, ...)`, or `(1, ...)` for all of them, in their places in `target`."""
    if isinstance(index, Tensor) or _stays(x):
        target[index] = x
    else:
        target.numpy()[index] = x.detach().numpy()


def _stays(x: Tensor) -> bool:
    """Whether torch copies it in the calling thread, or must do it in any case."""
    return x.numel() < GRAIN or not x.is_cpu
