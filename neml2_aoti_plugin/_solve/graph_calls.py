"""Graphs called from Python by their C interface: without the interpreter, and with the same bits for any rows."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

from ..errors import AOTIError
from . import tables
from .block import CompiledGraph, require_counts
from .machine_code import MachineCode
from .tables import Call as Table


class GraphCaller:
    """Calls a graph for rows of any number, by any thread.

    Args:
        graph: to be called.
        functions: addresses of the functions for tensors, see `tables.CREATE`.
        executor: address of its proxy executor.
        code: the machine code.
    """

    def __init__(self, graph: CompiledGraph, functions: np.ndarray, executor: int, code: MachineCode) -> None:
        self._graph, self._functions, self._executor, self._code = graph, functions, executor, code
        self._free: list[_Frame] = []

    def __call__(
        self,
        arguments: Sequence[Tensor],
        batched: Sequence[bool],
        rows: int,
        into: Sequence[Tensor] | None = None,
    ) -> list[Tensor] | None:
        """Run the graph.

        Args:
            arguments: in its order, each contiguous, float64 and on the CPU; the rows lead.
            batched: of each, whether it has rows.
            rows: how many, at least one.
            into: where the outputs go, each contiguous, of the shapes that an earlier call gave.

        Returns:
            Its outputs, each `(rows, ...)`, or `(1, ...)` where it is the same for all rows; None where an output is no
            tensor of float64 with the rows leading, as one that depends on no input.

        Raises:
            AOTIError: the graph failed.
            ArtifactError: the graph takes another number of tensors.
        """
        try:
            frame = self._free.pop()
        except IndexError:
            frame = _Frame(self._graph, self._functions, self._executor, self._code)
        outputs = frame.call(arguments, batched, rows, into)
        # One in which an exception has ended a call may be half made, and is dropped.
        self._free.append(frame)
        if isinstance(outputs, list):
            return outputs
        if outputs == tables.FAILED:
            raise AOTIError(f"{self._graph.file}: the compiled graph failed: {self._graph.last_error()}")
        return None


class _Frame:
    """What one thread calls a graph with: a container, and tables for the machine code.

    Args:
        graph: as for `GraphCaller`.
        functions: as for `GraphCaller`.
        executor: as for `GraphCaller`.
        code: as for `GraphCaller`.
    """

    def __init__(self, graph: CompiledGraph, functions: np.ndarray, executor: int, code: MachineCode) -> None:
        self._graph, self._functions, self._code = graph, functions, code
        self._container, outputs = graph.container(), graph.outputs
        self._outputs = np.zeros((outputs, tables.OUTPUT), np.int64)
        # Trailing shape of each output, and whether it comes once; as the last call has told.
        self._told: list[tuple[bool, tuple[int, ...]]] | None = None
        self._shapes: list[Sequence[int]] | None = None
        self._room = np.empty(0)
        self._table = np.zeros(Table.FIELDS, np.int64)
        table = self._table
        table[Table.RUN], table[Table.CONTAINER] = self._container.run, self._container.handle
        table[Table.EXECUTOR], table[Table.FUNCTIONS] = executor, functions.ctypes.data
        table[Table.OUTPUTS], table[Table.OUTPUTS_AT] = outputs, self._outputs.ctypes.data
        self._at = table.ctypes.data

    def call(
        self, arguments: Sequence[Tensor], batched: Sequence[bool], rows: int, into: Sequence[Tensor] | None
    ) -> list[Tensor] | int:
        """Run the graph; give its outputs, or what was wrong."""
        shapes: list[Sequence[int]] = []
        addresses = []
        for x, has in zip(arguments, batched, strict=True):
            shapes.append(x.shape[1:] if has else (-1, *x.shape))
            addresses.append(x.data_ptr())
        if shapes != self._shapes:
            self._take(shapes)
        self._arguments[:, tables.ADDRESS] = addresses
        table = self._table
        table[Table.ROWS], table[Table.FILLED] = rows, -(-rows // tables.VECTOR) * tables.VECTOR
        # Room for copies of all rows, those that a first call has more among them.
        needed = self._width * (rows + 2 * tables.VECTOR)
        if (rows % tables.VECTOR or self._told is None) and self._room.size < needed:
            self._room = np.empty(needed)
            table[Table.ROOM] = self._room.ctypes.data
        if self._told is None:
            self._learn(addresses)
        outputs = self._targets(rows, into)
        fault = self._code.call_graph(self._at)
        if fault == tables.OTHER:
            # Sites of another number than before.
            self._learn(addresses)
            outputs = self._targets(rows, into)
            fault = self._code.call_graph(self._at)
        return outputs if fault == tables.CALLED else int(fault)

    def _learn(self, addresses: Sequence[int]) -> None:
        """Learn the shapes of the outputs, by a call for more rows: what leads with rows has as many more of them."""
        self._told, table = None, self._table
        self._outputs[:, tables.TARGET] = 0
        table[Table.FILLED] += tables.VECTOR
        fault = self._code.call_graph(self._at)
        table[Table.FILLED] -= tables.VECTOR
        self._arguments[:, tables.ADDRESS] = addresses
        if fault in (tables.CALLED, tables.OTHER):
            self._told = [
                (
                    bool(row[tables.OUTPUT_SIZES]),
                    tuple(row[tables.OUTPUT_SIZES + 1 : tables.OUTPUT_SIZES + axes].tolist()),
                )
                for row, axes in zip(self._outputs, self._outputs[:, tables.OUTPUT_AXES].tolist(), strict=True)
            ]

    def _take(self, shapes: list[Sequence[int]]) -> None:
        """Make the table of arguments; the first size of one with rows is filled in at each call."""
        require_counts(self._graph, len(shapes))
        self._shapes, self._width = shapes, 0
        self._arguments = np.zeros((len(shapes), tables.GRAPH_ARGUMENT), np.int64)
        self._handles = np.zeros(len(shapes) + len(self._outputs) + tables.SCRATCH, np.int64)
        self._extents = []
        for row, shape in zip(self._arguments, shapes, strict=True):
            has_rows = not shape or shape[0] != -1
            sizes = (0, *shape) if has_rows else shape[1:]
            strides = [prod(sizes[k + 1 :]) for k in range(len(sizes))]
            extents = np.array([*sizes, *strides], np.int64)
            self._extents.append(extents)
            width = prod(shape) if has_rows else 0
            row[:] = 0, len(sizes), extents.ctypes.data, extents.ctypes.data + 8 * len(sizes), width
            self._width += width
        table = self._table
        table[Table.ARGUMENTS], table[Table.ARGUMENTS_AT] = len(shapes), self._arguments.ctypes.data
        table[Table.HANDLES] = self._handles.ctypes.data

    def _targets(self, rows: int, into: Sequence[Tensor] | None) -> list[Tensor]:
        """Where the outputs go: to new tensors if no others are given; nowhere while their shapes are not known."""
        if self._told is None:
            return []
        shapes = [(1 if once else rows, *shape) for once, shape in self._told]
        if into is not None and [tuple(x.shape) for x in into] != shapes:
            raise AOTIError(f"{self._graph.file}: returns tensors of another shape for some rows than for others.")
        found = [torch.empty(shape, dtype=torch.float64) for shape in shapes] if into is None else list(into)
        self._outputs[:, tables.TARGET] = [x.data_ptr() for x in found]
        return found
