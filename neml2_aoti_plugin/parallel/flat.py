"""The arguments of a call as flat rows, so that any range of rows can be cut from them; and results put together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..artifact.schema import Shape
from ..model import Model
from ..model.call import Admitted, Caller
from .exchange import Arrays, Entry, Key
from .remote import Reply


@dataclass(frozen=True)
class Arguments:
    """Checked arguments of a call.

    Args:
        call: as the model admitted it.
        along: what differs from row to row, `(rows, ...)`.
        common: what all rows have in common.
    """

    call: Admitted
    along: Arrays
    common: Arrays

    def of(self, rows: slice) -> Arrays:
        """The arguments of some rows."""
        return {**{key: value[rows] for key, value in self.along.items()}, **self.common}


def rows_of(model: Model, inputs: object, overrides: object) -> int:
    """The number of rows of a call, found cheaply; 0 where its arguments do not fit, which the model will tell."""
    boundary, specs = model._caller.boundary, model._promoted.specs
    batches: set[Shape] = set()
    try:
        for name, value in inputs.items():  # type: ignore[attr-defined]
            port = boundary.by_name.get(name) or boundary.iterates[name]
            batches.add(tuple(value.shape[: max(value.ndim - len(port.variable.natural_shape), 0)]))
        for name, value in (overrides or {}).items():  # type: ignore[attr-defined]
            batches.add(tuple(value.shape[: max(value.ndim - len(specs[name].base_shape), 0)]))
        for name, value in model._promoted.values.items() if specs else ():
            batches.add(tuple(value.shape[: max(value.ndim - len(specs[name].base_shape), 0)]))
        return prod(batches.pop() if len(batches) == 1 else torch.broadcast_shapes(*batches))
    except (AttributeError, KeyError, RuntimeError, TypeError):
        return 0


def arguments(
    caller: Caller, call: Admitted, tangents: Mapping[str, Tensor] = {}, cotangents: Mapping[str, Tensor] = {}
) -> Arguments:
    """Arguments as flat rows.

    Args:
        caller: of the model.
        call: as the model admitted it.
        tangents: checked ones, `(rows, ...)`.
        cotangents: checked ones, `(rows, ...)`.
    """
    boundary = caller.boundary
    names = {port.variable.name: port.name for port in (*boundary.iterates.values(), *boundary.inputs)}
    values: Arrays = {}
    for authored, value in call.state.items():
        values["input", names[authored]] = boundary.to_caller(value)
    values.update({("tangent", name): boundary.to_caller(value) for name, value in tangents.items()})
    values.update({("cotangent", name): value for name, value in cotangents.items()})
    along = {key: value for key, value in values.items() if value.shape[0] == 1 or value.stride(0) != 0}
    common = {key: value[0] for key, value in values.items() if key not in along}
    for name, spec in caller.promoted.specs.items():
        value = call.parameters[spec.name].to(call.in_force[name].dtype)
        (along if value.ndim > len(spec.base_shape) else common)["parameter", name] = value
    if not along:
        # The rows are all the same; there must be as many nevertheless.
        key = next(iter(values))
        along[key] = values[key]
        del common[key]
    return Arguments(call, along, common)


class Results:
    """Results of a call, filled in as chunks come back.

    Args:
        rows: of the whole batch.
        chunks: number of chunks.
    """

    def __init__(self, rows: int, chunks: int) -> None:
        self.rows = rows
        self.along: Arrays = {}
        self.once: Arrays = {}
        self._sums: dict[Key, list[Tensor | None]] = {}
        self._chunks = chunks

    def place(self, entry: Entry, reply: Reply, rows: slice) -> Tensor:
        """Where an array of a chunk goes: to its rows, or to the side where it is one for all of them."""
        dtype = getattr(torch, entry.dtype)
        if entry.key in reply.once:
            return self.once.setdefault(entry.key, torch.empty(entry.shape, dtype=dtype))
        if entry.key not in self.along:
            self.along[entry.key] = torch.empty((self.rows, *entry.shape[1:]), dtype=dtype)
        return self.along[entry.key][rows]

    def place_sum(self, entry: Entry, index: int) -> Tensor:
        """Where what is to be summed over the chunks goes."""
        parts = self._sums.setdefault(entry.key, [None] * self._chunks)
        part = parts[index] = torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
        return part

    def sums(self) -> Arrays:
        """Sums over the chunks, in their order, so that they do not depend on which came first."""
        return {key: torch.stack([p for p in parts if p is not None]).sum(0) for key, parts in self._sums.items()}

    def shaped(self, batch: Shape) -> Arrays:
        """All results, with the caller's batch shape."""
        shaped = {key: value.reshape(batch + tuple(value.shape[1:])) for key, value in self.along.items()}
        return {**shaped, **self.once}


def named(found: Mapping[Key, Any], kind: str) -> dict[str, Any]:
    """The results of a kind by name."""
    return {key[1]: value for key, value in found.items() if key[0] == kind}


def blocks_of(found: Mapping[Key, Any]) -> dict[str, dict[str, Any]]:
    """Derivative blocks by output and input."""
    blocks: dict[str, dict[str, Any]] = {}
    for key, value in found.items():
        if key[0] == "block":
            blocks.setdefault(key[1], {})[key[2]] = value
    return blocks
