"""Blocks of rows solved by machine code: one dense group on a CPU in float64, by graphs with a C interface."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import AOTIError, ArtifactError
from ..settings import NewtonSettings
from . import elimination, native
from .calls import ARGUMENT, VECTOR
from .criteria import criteria_of
from .newton import ITERATION, TRIALS, Solved, Tell
from .outcome import RowStatistics


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
        functions: addresses of the functions for tensors, see `calls.CREATE`.
        executor: address of the proxy executor of the graphs.
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
        n: int,
        q: int,
        most: int,
    ) -> None:
        self.residual, self.jacobian = residual, jacobian
        self.functions, self.executor = functions, executor
        self.n, self.q, self._most = n, q, most
        self._free: list[_Workspace] = []

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
        space = self._borrow(rows)
        try:
            return space.solve(guess.contiguous(), givens.contiguous(), parameters, settings, small_steps, tell)
        finally:
            if space.capacity <= self._most:
                self._free.append(space)

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
        lu, pivots = elimination.room_for(capacity, n)
        self._kept = [
            np.empty((native.VECTOR_KINDS, capacity, n)),
            np.empty((native.GIVEN_KINDS, capacity, q)),
            np.empty((capacity, native.NUMBER_COLUMNS)),
            np.empty((capacity, native.INDEX_COLUMNS), np.int64),
            lu,
            pivots,
        ]
        vectors, givens, numbers, indices, *_ = self._kept
        self._table = np.zeros(native.FIELDS, np.int64)
        residual, jacobian = self._graphs
        for field, value in {
            native.CAPACITY: capacity,
            native.N: n,
            native.Q: q,
            native.RESIDUAL: residual.run,
            native.RESIDUAL_CONTAINER: residual.handle,
            native.JACOBIAN: jacobian.run,
            native.JACOBIAN_CONTAINER: jacobian.handle,
            native.EXECUTOR: system.executor,
            native.FUNCTIONS: system.functions.ctypes.data,
            native.VECTORS: vectors.ctypes.data,
            native.GIVENS: givens.ctypes.data,
            native.NUMBERS: numbers.ctypes.data,
            native.INDICES: indices.ctypes.data,
            native.FACTORS: lu.ctypes.data,
            native.FACTORS_SIZE: lu.size,
            native.PIVOTS: pivots.ctypes.data,
            native.PIVOTS_SIZE: pivots.size,
        }.items():
            self._table[field] = value
        self._at = self._table.ctypes.data
        self._shapes: list[tuple[int, ...]] = []
        self._settled: tuple[NewtonSettings, bool] | None = None
        self._take_arguments([(0, n), (0, q)])

    def _take_arguments(self, shapes: list[tuple[int, ...]]) -> None:
        """Make the table of the graphs' arguments; the machine code fills in what changes with the rows."""
        for graph, outputs in ((self._system.residual, 1), (self._system.jacobian, 2)):
            require_counts(graph, len(shapes), outputs)
        self._shapes = shapes
        self._arguments = np.zeros((len(shapes), ARGUMENT), np.int64)
        self._handles = np.zeros(len(shapes) + native.OUTPUTS + native.SCRATCH, np.int64)
        # Of each argument the sizes of its axes, and behind them their strides.
        self._extents = [
            np.array([*shape, *(int(np.prod(shape[k + 1 :], dtype=np.int64)) for k in range(len(shape)))], np.int64)
            for shape in shapes
        ]
        for row, shape, extents in zip(self._arguments, shapes, self._extents, strict=True):
            row[:] = 0, len(shape), extents.ctypes.data, extents.ctypes.data + 8 * len(shape)
        table = self._table
        table[native.ARGUMENTS] = len(shapes)
        table[native.ARGUMENTS_AT], table[native.HANDLES] = self._arguments.ctypes.data, self._handles.ctypes.data

    def solve(
        self,
        guess: Tensor,
        givens: Tensor,
        parameters: Sequence[Tensor],
        settings: NewtonSettings,
        small_steps: bool,
        tell: Tell | None,
    ) -> Solved:
        """See `System.solve`."""
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
        if tell is not None:
            history = np.full(((settings.updates + 1) * (settings.cuts + 2), native.HISTORY_COLUMNS), -1.0)
        table[native.ROWS] = rows
        table[native.FIRST_GUESS], table[native.FIRST_GIVENS] = guess.data_ptr(), givens.data_ptr()
        table[native.NORMS], table[native.RECORD] = norms.data_ptr(), record.data_ptr()
        table[native.SOLUTION] = unknowns.data_ptr()
        table[native.HISTORY] = 0 if history is None else history.ctypes.data
        self._require_done(native.solve_block(self._at))
        if tell is not None and history is not None:
            _tell(history, settings, tell)
        return Solved([unknowns], RowStatistics(record, norms, bool(table[native.FAILED] == 0)))

    def _settle(self, settings: NewtonSettings, small_steps: bool) -> None:
        """Put the settings of a solve into the table."""
        criteria = criteria_of(settings, small_steps=small_steps)
        self._limits = np.array([float(value) for value in criteria])
        table = self._table
        table[native.UPDATES], table[native.CUTS] = settings.updates, settings.cuts
        table[native.LIMITS] = self._limits.ctypes.data
        self._settled = settings, small_steps

    def _require_done(self, fault: int) -> None:
        if fault == native.DONE:
            return
        system = self._system
        graph = system.residual if fault in (native.RESIDUAL_FAILED, native.RESIDUAL_IS_OTHER) else system.jacobian
        if fault in (native.RESIDUAL_FAILED, native.JACOBIAN_FAILED):
            raise AOTIError(f"{graph.file}: the compiled graph failed: {graph.last_error()}")
        raise ArtifactError(
            f"{graph.file}: returned tensors of other shapes than the metadata tells. The package belongs to another "
            "model or to another compile; compile the model again with neml2-compile."
        )


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


def columns(a: Tensor, b: Tensor, chosen: Sequence[int]) -> Tensor:
    """Solve `A X = -B` row by row for chosen columns of `B`.

    Args:
        a: `(rows, n, n)`.
        b: `(rows, n, q)`.
        chosen: indices of columns.

    Returns:
        `(rows, n, len(chosen))`; NaN in rows whose matrix is singular.
    """
    rows, n = a.shape[:2]
    found = np.empty((rows, len(chosen), n))
    lu, pivots = elimination.room_for(1, n)
    native.solve_columns(a.numpy(), b.numpy(), np.asarray(chosen, np.int64), lu, pivots, found)
    return torch.from_numpy(found).transpose(1, 2)
