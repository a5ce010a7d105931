"""Single graphs called by their C interface for rows of any number, which machine code does without the interpreter."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .._solve import tables
from .._solve.native import Arguments, CompiledGraph, Means, require_counts
from .._solve.tables import VECTOR
from .._solve.tables import Call as CallTable
from ..errors import AOTIError


class GraphCaller:
    """Calls a graph for rows of any number, by any thread."""

    def __init__(self, graph: CompiledGraph, means: Means) -> None:
        self._graph, self._means = graph, means
        self._free: list[_Frame] = []

    def __call__(
        self, arguments: Sequence[Tensor], batched: Sequence[bool], rows: int, into: Sequence[Tensor] | None = None
    ) -> list[Tensor] | None:
        """Run the graph for at least one row, with arguments in its order: contiguous, float64, rows leading.

        Outputs are `(rows, ...)`, or `(1, ...)` where they are the same for all rows, in `into` if that is given; None
        where one is no tensor of float64 with the rows leading, as one that depends on no input.
        """
        try:
            frame = self._free.pop()
        except IndexError:
            frame = _Frame(self._graph, self._means)
        outputs = frame.call(arguments, batched, rows, into)
        # One in which an exception has ended a call may be half made, and is dropped.
        self._free.append(frame)
        if isinstance(outputs, list):
            return outputs
        if outputs == tables.FAILED:
            raise AOTIError(f"{self._graph.file}: the compiled graph failed: {self._graph.last_error()}")
        return None


class _Frame:
    """What one thread calls a graph with."""

    def __init__(self, graph: CompiledGraph, means: Means) -> None:
        self._graph, self._means = graph, means
        self._container, outputs = graph.container(), graph.outputs
        self._outputs = np.zeros((outputs, tables.OUTPUT), np.int64)
        # Trailing shape of each output, and whether it comes once; as the last call has told.
        self._told: list[tuple[bool, tuple[int, ...]]] | None = None
        self._forms: list[tuple[bool, Sequence[int]]] | None = None
        self._room = np.empty(0)
        words = np.zeros(CallTable.FIELDS, np.int64)
        self._at, self._table = words.ctypes.data, words.data
        table = self._table
        table[CallTable.RUN], table[CallTable.CONTAINER] = self._container.run, self._container.handle
        table[CallTable.EXECUTOR], table[CallTable.FUNCTIONS] = means.executor, means.functions.ctypes.data
        table[CallTable.OUTPUTS], table[CallTable.OUTPUTS_AT] = outputs, self._outputs.ctypes.data

    def call(
        self, arguments: Sequence[Tensor], batched: Sequence[bool], rows: int, into: Sequence[Tensor] | None
    ) -> list[Tensor] | int:
        """Run the graph; give its outputs, or what was wrong."""
        forms: list[tuple[bool, Sequence[int]]] = []
        addresses = []
        for x, has in zip(arguments, batched, strict=True):
            forms.append((has, x.shape[1:] if has else x.shape))
            addresses.append(x.data_ptr())
        if forms != self._forms:
            require_counts(self._graph, len(forms))
            self._forms = forms
            self._arguments = Arguments([shape for _, shape in forms], batched, len(self._outputs))
            self._arguments.enter(self._table, CallTable.ARGUMENTS, CallTable.ARGUMENTS_AT, CallTable.HANDLES)
        self._arguments.table[:, tables.ADDRESS] = addresses
        table = self._table
        table[CallTable.ROWS], table[CallTable.FILLED] = rows, -(-rows // VECTOR) * VECTOR
        # Room for copies of all rows, those that a first call has more among them.
        needed = self._arguments.width * (rows + 2 * VECTOR)
        if (rows % VECTOR or self._told is None) and self._room.size < needed:
            self._room = np.empty(needed)
            table[CallTable.ROOM] = self._room.ctypes.data
        if self._told is None:
            self._learn(addresses)
        outputs = self._targets(rows, into)
        fault = self._means.code.call_graph(self._at)
        if fault == tables.OTHER:
            # Sites of another number than before.
            self._learn(addresses)
            outputs = self._targets(rows, into)
            fault = self._means.code.call_graph(self._at)
        return outputs if fault == tables.CALLED else int(fault)

    def _learn(self, addresses: Sequence[int]) -> None:
        """Learn the shapes of the outputs, by a call for more rows: what leads with rows has as many more of them."""
        self._told, table = None, self._table
        self._outputs[:, tables.TARGET] = 0
        table[CallTable.FILLED] += VECTOR
        fault = self._means.code.call_graph(self._at)
        table[CallTable.FILLED] -= VECTOR
        self._arguments.table[:, tables.ADDRESS] = addresses
        if fault in (tables.CALLED, tables.OTHER):
            self._told = [
                (bool(sizes[0]), tuple(sizes[1:axes])) for _, axes, *sizes in (row.tolist() for row in self._outputs)
            ]

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
