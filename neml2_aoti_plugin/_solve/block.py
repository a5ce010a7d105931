"""Blocks of rows solved by machine code: one dense group on a CPU in float64, by graphs with a C interface."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import AOTIError, ArtifactError
from ..settings import NewtonSettings
from . import tables
from .criteria import criteria_of
from .machine_code import MachineCode
from .newton import ITERATION, TRIALS, Solved, Tell
from .outcome import RowStatistics
from .tables import ARGUMENT, VECTOR, Columns
from .tables import Solve as Table

# Lines for the log that a solve notes at most.
LINES = 4096


class Container(Protocol):
    """A compiled graph for one thread at a time."""

    @property
    def handle(self) -> int:
        """Of the container."""
        ...

    @property
    def run(self) -> int:
        """Address of the function that runs it."""
        ...


class CompiledGraph(Protocol):
    """A compiled graph that is called by its C interface."""

    def container(self) -> Container:
        """A container that nobody else has."""
        ...

    def last_error(self) -> str:
        """What the last call in this thread that failed says of itself."""
        ...

    @property
    def inputs(self) -> int:
        """How many tensors it takes."""
        ...

    @property
    def outputs(self) -> int:
        """How many tensors it returns."""
        ...

    @property
    def file(self) -> Path:
        """Its package, for messages."""
        ...


class System:
    """A system of one dense group of unknowns and one of givens.

    Args:
        residual: takes unknowns, givens and parameters, and gives `-r`.
        jacobian: takes the same, and gives the Jacobian and `-r`.
        functions: addresses of the functions for tensors, see `tables.CREATE`.
        executor: address of the proxy executor of the graphs.
        code: the machine code.
        n: number of unknowns.
        q: number of entries of the givens.
        most: rows of the largest workspace that is kept.
    """

    def __init__(
        self,
        residual: CompiledGraph,
        jacobian: CompiledGraph,
        functions: np.ndarray,
        executor: int,
        code: MachineCode,
        n: int,
        q: int,
        most: int,
    ) -> None:
        self.residual, self.jacobian = residual, jacobian
        self.functions, self.executor, self.code = functions, executor, code
        self.n, self.q, self._most = n, q, most
        self._free: list[_Workspace] = []
        # The number of parameters for which it is known that the graphs take them.
        self._counted = -1

    def solve(
        self,
        guess: Tensor,
        givens: Tensor,
        parameters: Sequence[Tensor],
        settings: NewtonSettings,
        *,
        small_steps: bool = False,
        tell: Tell | None = None,
    ) -> Solved:
        """Solve for the unknowns of all rows.

        Args:
            guess: initial guess, `(rows, n)`, float64.
            givens: `(rows, q)`, float64.
            parameters: promoted parameters as the graphs take them, contiguous and float64.
            settings: of the solve.
            small_steps: whether the relative test also asks for a small last step.
            tell: takes the lines for the log; None where nobody reads them.

        Returns:
            The unknowns, and how each row fared.

        Raises:
            AOTIError: a graph failed.
        """
        rows = guess.shape[0]
        if self._counted != len(parameters):
            require_counts(self.residual, 2 + len(parameters), 1)
            require_counts(self.jacobian, 2 + len(parameters), 2)
            self._counted = len(parameters)
        space = self._borrow(rows)
        found = space.solve(guess.contiguous(), givens.contiguous(), parameters, settings, small_steps, tell)
        # One in which an exception has ended a call may be half made, and is dropped.
        if space.capacity <= self._most:
            self._free.append(space)
        return found if isinstance(found, Solved) else self._complain(found)

    def _complain(self, fault: int) -> NoReturn:
        """Raise what is wrong with a graph."""
        graph = self.residual if fault in (tables.RESIDUAL_FAILED, tables.RESIDUAL_IS_OTHER) else self.jacobian
        if fault in (tables.RESIDUAL_FAILED, tables.JACOBIAN_FAILED):
            raise AOTIError(f"{graph.file}: the compiled graph failed: {graph.last_error()}")
        raise ArtifactError(
            f"{graph.file}: returned tensors of other shapes than the metadata tells. The package belongs to another "
            "model or to another compile; compile the model again with neml2-compile."
        )

    def _borrow(self, rows: int) -> _Workspace:
        """A workspace for so many rows at least, which no other thread has."""
        try:
            found = self._free.pop()
        except IndexError:
            return _Workspace(self, rows)
        return found if found.capacity >= rows else _Workspace(self, rows, found)


class _Workspace:
    """What one thread solves with: memory for the live rows, and a container of each graph.

    Args:
        system: that is solved.
        rows: at most, at a time.
        smaller: one that is given up, whose containers are taken.
    """

    def __init__(self, system: System, rows: int, smaller: _Workspace | None = None) -> None:
        self._system = system
        n, q = system.n, system.q
        # Rows are filled up to whole vectors.
        self.capacity = capacity = max(-(-rows // VECTOR), 1) * VECTOR
        self._graphs: tuple[Container, Container] = (
            smaller._graphs if smaller else (system.residual.container(), system.jacobian.container())
        )
        lu = np.empty(tables.factors_size(capacity, n))
        pivots = np.empty(tables.pivots_size(capacity, n), np.int64)
        self._kept = [
            np.empty((tables.VECTOR_KINDS, capacity, n)),
            np.empty((tables.GIVEN_KINDS, capacity, q)),
            np.empty((capacity, tables.NUMBER_COLUMNS)),
            np.empty((capacity, tables.INDEX_COLUMNS), np.int64),
            lu,
            pivots,
        ]
        vectors, givens, numbers, indices, *_ = self._kept
        self._table = np.zeros(Table.FIELDS, np.int64)
        residual, jacobian = self._graphs
        for field, value in {
            Table.CAPACITY: capacity,
            Table.N: n,
            Table.Q: q,
            Table.RESIDUAL: residual.run,
            Table.RESIDUAL_CONTAINER: residual.handle,
            Table.JACOBIAN: jacobian.run,
            Table.JACOBIAN_CONTAINER: jacobian.handle,
            Table.EXECUTOR: system.executor,
            Table.FUNCTIONS: system.functions.ctypes.data,
            Table.VECTORS: vectors.ctypes.data,
            Table.GIVENS: givens.ctypes.data,
            Table.NUMBERS: numbers.ctypes.data,
            Table.INDICES: indices.ctypes.data,
            Table.FACTORS: lu.ctypes.data,
            Table.FACTORS_SIZE: lu.size,
            Table.PIVOTS: pivots.ctypes.data,
            Table.PIVOTS_SIZE: pivots.size,
        }.items():
            self._table[field] = value
        self._at = self._table.ctypes.data
        self._shapes: list[tuple[int, ...]] = []
        self._settled: tuple[NewtonSettings, bool] | None = None
        self._take_arguments([(0, n), (0, q)])

    def _take_arguments(self, shapes: list[tuple[int, ...]]) -> None:
        """Make the table of the graphs' arguments; the machine code fills in what changes with the rows."""
        self._shapes = shapes
        self._arguments = np.zeros((len(shapes), ARGUMENT), np.int64)
        self._handles = np.zeros(len(shapes) + tables.OUTPUTS + tables.SCRATCH, np.int64)
        # Of each argument the sizes of its axes, and behind them their strides.
        self._extents = [
            np.array([*shape, *(int(np.prod(shape[k + 1 :], dtype=np.int64)) for k in range(len(shape)))], np.int64)
            for shape in shapes
        ]
        for row, shape, extents in zip(self._arguments, shapes, self._extents, strict=True):
            row[:] = 0, len(shape), extents.ctypes.data, extents.ctypes.data + 8 * len(shape)
        table = self._table
        table[Table.ARGUMENTS] = len(shapes)
        table[Table.ARGUMENTS_AT], table[Table.HANDLES] = self._arguments.ctypes.data, self._handles.ctypes.data

    def solve(
        self,
        guess: Tensor,
        givens: Tensor,
        parameters: Sequence[Tensor],
        settings: NewtonSettings,
        small_steps: bool,
        tell: Tell | None,
    ) -> Solved | int:
        """Solve for the unknowns of all rows, or give what is wrong with a graph; see `System.solve`."""
        rows, n = guess.shape
        if parameters:
            shapes = [tuple(x.shape) for x in parameters]
            if shapes != self._shapes[2:]:
                self._take_arguments([*self._shapes[:2], *shapes])
            self._arguments[2:, 0] = [x.data_ptr() for x in parameters]
        table = self._table
        if (settings, small_steps) != self._settled:
            self._settle(settings, small_steps)
        unknowns, norms = torch.empty(rows, n, dtype=torch.float64), torch.empty(rows, 2, dtype=torch.float64)
        record = torch.empty(rows, 2, dtype=torch.int64)
        history = None
        table[Table.HISTORY_LINES] = 0
        if tell is not None:
            lines = min((settings.updates + 1) * (settings.cuts + 2), LINES)
            history = np.full((lines, tables.HISTORY_COLUMNS), -1.0)
            table[Table.HISTORY_LINES] = lines
        table[Table.ROWS] = rows
        table[Table.FIRST_GUESS], table[Table.FIRST_GIVENS] = guess.data_ptr(), givens.data_ptr()
        table[Table.NORMS], table[Table.RECORD] = norms.data_ptr(), record.data_ptr()
        table[Table.SOLUTION] = unknowns.data_ptr()
        table[Table.HISTORY] = 0 if history is None else history.ctypes.data
        fault = self._system.code.solve_block(self._at)
        if fault != tables.DONE:
            return fault
        if tell is not None and history is not None:
            _tell(history, settings, tell)
        return Solved([unknowns], RowStatistics(record, norms, bool(table[Table.FAILED] == 0)))

    def _settle(self, settings: NewtonSettings, small_steps: bool) -> None:
        """Put the settings of a solve into the table."""
        criteria = criteria_of(settings, small_steps=small_steps)
        self._limits = np.array([float(value) for value in criteria])
        table = self._table
        table[Table.UPDATES], table[Table.CUTS] = settings.updates, settings.cuts
        table[Table.LIMITS] = self._limits.ctypes.data
        self._settled = settings, small_steps


def require_counts(graph: CompiledGraph, inputs: int, outputs: int | None = None) -> None:
    """Refuse a graph that takes or returns another number of tensors; called so it would end the process.

    Args:
        graph: that is to be called.
        inputs: number of tensors that it is given.
        outputs: number of tensors that it is to return; None for any.

    Raises:
        ArtifactError: it is another number.
    """
    if graph.inputs != inputs or outputs not in (None, graph.outputs):
        raise ArtifactError(
            f"{graph.file}: takes {graph.inputs} tensors and returns {graph.outputs}; the metadata gives it {inputs}"
            + (f" and expects {outputs}" if outputs is not None else "")
            + ". The package and the metadata do not belong together: copy the whole artifact folder, or compile again."
        )


def _tell(history: np.ndarray, settings: NewtonSettings, tell: Tell) -> None:
    """Give the lines of a solve to the log."""
    for kind, number, *figures in history.tolist():
        if kind == 0.0:
            tell(ITERATION.format(int(number), *figures[:2]))
        elif kind == 1.0 and settings.ls_max_iters > 1:
            tell(TRIALS.format(int(number), *figures))
    if len(history) == LINES and history[-1, 0] >= 0.0:
        tell(f"... lines beyond {LINES} of this solve are left out")


def columns(code: MachineCode, a: Tensor, b: Tensor, chosen: Sequence[int]) -> Tensor:
    """Solve `A X = -B` row by row for chosen columns of `B`.

    Args:
        code: the machine code.
        a: `(rows, n, n)`, contiguous and float64.
        b: `(rows, n, q)`, contiguous and float64.
        chosen: indices of columns.

    Returns:
        `(rows, n, len(chosen))`; NaN in rows whose matrix is singular.
    """
    rows, n, q = b.shape
    found = torch.empty(rows, len(chosen), n, dtype=torch.float64)
    lu, pivots = np.empty(tables.factors_size(1, n)), np.empty(tables.pivots_size(1, n), np.int64)
    indices = np.array(chosen, np.int64)
    table = np.zeros(Columns.FIELDS, np.int64)
    table[Columns.ROWS], table[Columns.N], table[Columns.Q], table[Columns.COUNT] = rows, n, q, len(chosen)
    table[Columns.MATRICES], table[Columns.SIDES], table[Columns.FOUND] = a.data_ptr(), b.data_ptr(), found.data_ptr()
    table[Columns.CHOSEN] = indices.ctypes.data
    table[Columns.FACTORS], table[Columns.FACTORS_SIZE] = lu.ctypes.data, lu.size
    table[Columns.PIVOTS], table[Columns.PIVOTS_SIZE] = pivots.ctypes.data, pivots.size
    code.solve_columns(table.ctypes.data)
    return found.transpose(1, 2)
