"""Single graphs called by their C interface for rows of any number, by machine code that holds no interpreter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import AOTIError, ArtifactError
from . import tables
from .machine_code import MachineCode
from .tables import VECTOR
from .tables import CallTable as Table


class ContainerOfGraph(Protocol):
    """A compiled graph for one thread at a time: its handle, and the address of the function that runs it."""

    handle: int
    run: int


class CompiledGraph(Protocol):
    """A compiled graph that is called by its C interface."""

    inputs: int
    outputs: int
    file: Path

    def container(self) -> ContainerOfGraph:
        """A container that nobody else has."""

    def last_error(self) -> str:
        """What the last call in this thread that failed says of itself."""


@dataclass(frozen=True)
class Means:
    """What this process calls graphs with: machine code, addresses of functions for tensors, the proxy executor."""

    code: MachineCode
    functions: np.ndarray
    executor: int


class GraphCaller:
    """Calls a graph for rows of any number, by any thread."""

    def __init__(self, graph: CompiledGraph, means: Means) -> None:
        self._graph, self._means = graph, means
        self._free: list[GraphCall] = []

    def __call__(
        self, arguments: Sequence[Tensor], batched: Sequence[bool], rows: int, into: Sequence[Tensor] | None = None
    ) -> list[Tensor] | None:
        """Run the graph for at least one row, with arguments in its order: contiguous, float64, rows leading.

        Outputs are `(rows, ...)`, or `(1, ...)` where they are the same for all rows, in `into` if that is given; None
        where one is no tensor of float64 with the rows leading, as one that depends on no input.
        """
        try:
            call = self._free.pop()
        except IndexError:
            call = GraphCall(self._graph, self._means)
        outputs, fault = call.run(arguments, batched, rows, into)
        # One in which an exception has ended a call may be half made, and is dropped.
        self._free.append(call)
        if fault == tables.FAILED:
            raise failed(self._graph)
        return outputs if fault == tables.CALLED else None


class GraphCall:
    """The calls of a graph by one thread: a container, and the table that tells machine code of a call."""

    def __init__(self, graph: CompiledGraph, means: Means) -> None:
        self._graph, self._code, self._container = graph, means.code, graph.container()
        self._outputs = np.zeros((graph.outputs, tables.OUTPUT), np.int64)
        # Trailing shape of each output, and whether it comes once; as the last call has told.
        self._told: list[tuple[bool, tuple[int, ...]]] | None = None
        # Shapes of the arguments that the table tells of, and which of them have rows.
        self._shapes: list[torch.Size] | None = None
        self._batched: Sequence[bool] = ()
        words = np.zeros(Table.FIELDS, np.int64)
        self.at, self._table = words.ctypes.data, words.data
        table = self._table
        table[Table.RUN], table[Table.CONTAINER] = self._container.run, self._container.handle
        table[Table.EXECUTOR], table[Table.FUNCTIONS] = means.executor, means.functions.ctypes.data
        table[Table.OUTPUTS], table[Table.OUTPUTS_AT] = graph.outputs, self._outputs.ctypes.data

    def run(
        self, arguments: Sequence[Tensor], batched: Sequence[bool], rows: int, into: Sequence[Tensor] | None
    ) -> tuple[list[Tensor], int]:
        """Run the graph; give its outputs, and what the call came to."""
        for _ in range(2):
            self.put(arguments, batched, rows)
            outputs = self.targets(rows, into)
            fault = self._code.call_graph(self.at)
            if fault != tables.OTHER:
                break
            # Sites of another number than before.
            self._told = None
        return outputs, fault

    def put(self, arguments: Sequence[Tensor], batched: Sequence[bool], rows: int) -> None:
        """Put the arguments of a call into the table; learn the shapes of the outputs if they are not known."""
        shapes = [x.shape for x in arguments]
        if shapes != self._shapes or batched != self._batched:
            require_counts(self._graph, len(shapes))
            self._shapes, self._batched = shapes, batched
            behind = [shape[1:] if has else shape for shape, has in zip(shapes, batched, strict=True)]
            table = self._table
            self._arguments = Arguments(behind, batched, len(self._outputs))
            self._arguments.enter(table, Table.ARGUMENTS, Table.ARGUMENTS_AT, Table.HANDLES)
            table[Table.ROWS], table[Table.FILLED] = rows, filled(rows)
            # Room for copies of all rows, those that a call has more that learns among them.
            self._room = np.empty(self._arguments.width * (rows + 2 * VECTOR))
            table[Table.ROOM] = self._room.ctypes.data
        self._arguments.table[:, tables.GIVEN] = [x.data_ptr() for x in arguments]
        if self._told is None:
            self._learn()

    def targets(self, rows: int, into: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Where the outputs go: to new tensors if no others are given; nowhere while their shapes are not known."""
        if self._told is None:
            return []
        shapes = [(1 if once else rows, *shape) for once, shape in self._told]
        if into is not None and [tuple(x.shape) for x in into] != shapes:
            raise AOTIError(f"{self._graph.file}: returns tensors of another shape for some rows than for others.")
        found = [torch.empty(shape, dtype=torch.float64) for shape in shapes] if into is None else list(into)
        self._outputs[:, tables.TARGET] = [x.data_ptr() for x in found]
        return found

    def feed(self, place: int, x: Tensor) -> None:
        """Have a call take an argument from elsewhere."""
        self._arguments.table[place, tables.GIVEN] = x.data_ptr()

    def _learn(self) -> None:
        """Learn the shapes of the outputs, by a call for more rows: what leads with rows has as many more of them."""
        table = self._table
        self._outputs[:, tables.TARGET] = 0
        table[Table.FILLED] += VECTOR
        fault = self._code.call_graph(self.at)
        table[Table.FILLED] -= VECTOR
        if fault in (tables.CALLED, tables.OTHER):
            self._told = [
                (bool(sizes[0]), tuple(sizes[1:axes])) for _, axes, *sizes in (row.tolist() for row in self._outputs)
            ]


class Arguments:
    """The table of a graph's arguments, of these shapes behind the rows, and room for handles of all its tensors."""

    def __init__(self, shapes: Sequence[Sequence[int]], batched: Sequence[bool], outputs: int) -> None:
        self.table = np.zeros((len(shapes), tables.ARGUMENT), np.int64)
        self._handles = np.zeros(len(shapes) + outputs + tables.SCRATCH, np.int64)
        self._extents = []
        for row, shape, has in zip(self.table, shapes, batched, strict=True):
            # The number of rows is filled in at each call.
            sizes = (0, *shape) if has else tuple(shape)
            strides = [prod(sizes[k + 1 :]) for k in range(len(sizes))]
            extents = np.array([*sizes, *strides], np.int64)
            self._extents.append(extents)
            at = extents.ctypes.data
            row[tables.AXES :] = len(sizes), at, at + 8 * len(sizes), prod(shape) if has else 0
        # Entries of a row of all that have rows.
        self.width = int(self.table[:, tables.WIDTH].sum())

    def enter(self, table: memoryview, count: int, at: int, handles: int) -> None:
        """Enter their number, their place and that of the handles into a table of a call."""
        table[count], table[at], table[handles] = len(self.table), self.table.ctypes.data, self._handles.ctypes.data


def filled(rows: int) -> int:
    """So many rows with those that fill them up to whole vectors."""
    return -(-rows // VECTOR) * VECTOR


def require_counts(graph: CompiledGraph, inputs: int, outputs: int | None = None) -> None:
    """Refuse a graph that takes or returns another number of tensors; called so it would end the process."""
    if graph.inputs != inputs or outputs not in (None, graph.outputs):
        raise ArtifactError(
            f"{graph.file}: takes {graph.inputs} tensors and returns {graph.outputs}; the metadata gives it {inputs}"
            + (f" and expects {outputs}" if outputs is not None else "")
            + ". The package and the metadata do not belong together: copy the whole artifact folder, or compile again."
        )


def failed(graph: CompiledGraph) -> AOTIError:
    """The error for a graph whose last call in this thread has failed."""
    return AOTIError(f"{graph.file}: the compiled graph failed: {graph.last_error()}")
