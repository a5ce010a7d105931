"""Graphs called from Python by their C interface: without the interpreter, and with the same bits for any rows."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

from ..errors import AOTIError, ArtifactError
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
    ) -> list[Tensor]:
        """Run the graph.

        Args:
            arguments: in its order, each contiguous, float64 and on the CPU; the rows lead.
            batched: of each, whether it has rows.
            rows: how many, at least one.
            into: where the outputs go, each contiguous, of the shapes that an earlier call gave.

        Returns:
            Its outputs, each `(rows, ...)`, or `(1, ...)` where it is the same for all rows.

        Raises:
            AOTIError: the graph failed.
            ArtifactError: its outputs are no such tensors.
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
        file = self._graph.file
        if outputs == tables.FAILED:
            raise AOTIError(f"{file}: the compiled graph failed: {self._graph.last_error()}")
        raise ArtifactError(
            f"{file}: returned tensors that are not of float64 with the rows leading. The package and the metadata do "
            "not belong together: copy the whole artifact folder, or compile again."
        )


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
        self._table[Table.ROWS] = rows
        if rows % tables.VECTOR:
            needed = self._width * (rows + tables.VECTOR)
            if self._room.size < needed:
                self._room = np.empty(needed)
                self._table[Table.ROOM] = self._room.ctypes.data
        outputs = self._targets(rows, into)
        fault = self._code.call_graph(self._at)
        if fault == tables.OTHER:
            # The first call, or one with sites of another number: now their shapes are known.
            self._told = [
                (
                    bool(row[tables.OUTPUT_SIZES]),
                    tuple(row[tables.OUTPUT_SIZES + 1 : tables.OUTPUT_SIZES + axes].tolist()),
                )
                for row, axes in zip(self._outputs, self._outputs[:, tables.OUTPUT_AXES].tolist(), strict=True)
            ]
            self._arguments[:, tables.ADDRESS] = addresses
            outputs = self._targets(rows, into)
            fault = self._code.call_graph(self._at)
        return outputs if fault == tables.CALLED else int(fault)

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
