"""Blocks of rows solved by machine code, which calls the compiled graphs and holds no interpreter.

A block is one dense group of unknowns on a CPU in float64, with graphs that have a C interface.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple, NoReturn, Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import AOTIError, ArtifactError
from ..settings import NewtonSettings
from . import tables
from .criteria import criteria_of
from .machine_code import MachineCode
from .outcome import ITERATION, SECOND_ATTEMPT, TRIALS, Listener, RowStatistics, Solved
from .tables import VECTOR
from .tables import Solve as Table

# Lines for the log that a solve notes at most.
LINES = 4096


class Container(Protocol):
    """A compiled graph for one thread at a time: its handle, and the address of the function that runs it."""

    handle: int
    run: int


class CompiledGraph(Protocol):
    """A compiled graph that is called by its C interface."""

    inputs: int
    outputs: int
    file: Path

    def container(self) -> Container:
        """A container that nobody else has."""

    def last_error(self) -> str:
        """What the last call in this thread that failed says of itself."""


@dataclass(frozen=True)
class Means:
    """What this process calls graphs with: machine code, addresses of functions for tensors, the proxy executor."""

    code: MachineCode
    functions: np.ndarray
    executor: int


class Prediction(NamedTuple):
    """What a predictor gives: of each output its entries, the column of the unknowns, the argument that it feeds."""

    outputs: tuple[tuple[int, int, int], ...]
    # How often the predictor is run.
    times: int = 1


class Derivatives(NamedTuple):
    """The derivatives by the givens that are wanted: of chosen columns, or along directions `(rows or 1, q, m)`."""

    columns: Sequence[int] = ()
    directions: Tensor | None = None


class Pass(NamedTuple):
    """What came of a block: the solve, the givens side by side `(rows, q)`, the derivatives `(rows, n, m)`."""

    solved: Solved
    givens: Tensor
    derivatives: Tensor | None


class UnfitPredictor(ArtifactError):
    """A predictor gives something else than rows of unknowns, and has to be run in another way."""


@dataclass(frozen=True)
class Block:
    """A system as machine code solves it.

    Its graphs stand in the order of `tables`: residual, Jacobian, Jacobian at the solution, derivative by the givens,
    predictor; the last three may be missing. All but the predictor take unknowns, givens and parameters.
    """

    graphs: Sequence[CompiledGraph | None]
    # Entries of each variable.
    unknowns: Sequence[int]
    givens: Sequence[int]
    parameters: int = 0
    prediction: Prediction | None = None


class BlockSolver:
    """Solves blocks of rows, by any thread; workspaces of up to `most` rows are kept."""

    def __init__(self, block: Block, means: Means, most: int) -> None:
        self.block, self.means, self._most = block, means, most
        self.n, self.q = sum(block.unknowns), sum(block.givens)
        self.differentiates = block.graphs[tables.BY_GIVENS] is not None
        self._free: list[_Workspace] = []
        for graph, outputs in zip(block.graphs, tables.OUTPUTS, strict=False):
            if graph is not None:
                require_counts(graph, 2 + block.parameters, outputs)

    def solve(
        self,
        unknowns: Sequence[Tensor | None],
        givens: Sequence[Tensor],
        rows: int,
        parameters: Sequence[Tensor],
        settings: NewtonSettings,
        *,
        predicted_from: Sequence[Tensor] = (),
        kept: Sequence[int] = (),
        small_steps: bool = False,
        wanted: Derivatives | None = None,
        listener: Listener | None = None,
    ) -> Pass:
        """Solve for the unknowns of all rows from an initial guess, each variable `(rows, ...)`; None stands for zeros.

        Where there are inputs of the predictor, it gives the guess, but for the unknowns at the columns `kept`.
        """
        space = self._borrow(rows)
        # What machine code reads and nobody else holds.
        alive: list[Tensor] = []
        space.put_variables((*unknowns, *givens), rows, alive)
        space.put_parameters(parameters)
        space.put_predictor(predicted_from, kept, rows, alive)
        space.put_settings(settings, small_steps)
        derivatives = space.put_wanted(wanted or Derivatives(), rows, alive)
        solution, side = torch.empty(rows, self.n, dtype=torch.float64), torch.empty(rows, self.q, dtype=torch.float64)
        norms, record = torch.empty(rows, 2, dtype=torch.float64), torch.empty(rows, 2, dtype=torch.int64)
        table = space.table
        table[Table.ROWS], table[Table.SOLUTION], table[Table.GIVENS] = rows, solution.data_ptr(), side.data_ptr()
        table[Table.NORMS], table[Table.RECORD] = norms.data_ptr(), record.data_ptr()
        table[Table.HISTORY_LINES], history = 0, None
        if listener is not None:
            # The lines of two attempts.
            lines = min(2 * (settings.updates + 1) * (settings.cuts + 2) + 1, LINES)
            history = np.full((lines, tables.HISTORY_COLUMNS), -1.0)
            table[Table.HISTORY], table[Table.HISTORY_LINES] = history.ctypes.data, lines
        fault = self.means.code.solve_block(space.at)
        failed = table[Table.FAILED]
        # One in which an exception has ended a call may be half made, and is dropped.
        if space.capacity <= self._most:
            self._free.append(space)
        if fault != tables.DONE:
            self._complain(fault)
        if listener is not None and history is not None:
            _report(history, settings, listener)
        return Pass(Solved([solution], RowStatistics(record, norms, failed == 0)), side, derivatives)

    def _complain(self, fault: int) -> NoReturn:
        """Raise what is wrong with a graph."""
        place, other = divmod(fault - tables.BROKEN, 2)
        graph = self.block.graphs[place]
        assert graph is not None, "only graphs that are there are run"
        if not other:
            raise AOTIError(f"{graph.file}: the compiled graph failed: {graph.last_error()}")
        raise (UnfitPredictor if place == tables.PREDICTOR else ArtifactError)(
            f"{graph.file}: returned tensors of other shapes than the metadata tells. The package belongs to another "
            "model or to another compile; compile the model again with neml2-compile."
        )

    def _borrow(self, rows: int) -> _Workspace:
        """A workspace for so many rows at least, which no other thread has."""
        try:
            found = self._free.pop()
        except IndexError:
            return _Workspace(self, rows)
        return found if found.capacity >= rows else _Workspace(self, rows, found.containers)


class _Workspace:
    """What one thread solves with: memory for so many rows, and a container of each graph."""

    def __init__(self, solver: BlockSolver, rows: int, containers: Sequence[Container | None] = ()) -> None:
        n, q, block, means = solver.n, solver.q, solver.block, solver.means
        self._solver, self._widths = solver, (*block.unknowns, *block.givens)
        # Rows are filled up to whole vectors.
        self.capacity = capacity = max(-(-rows // VECTOR), 1) * VECTOR
        self.containers = containers or _containers(block.graphs)
        graphs = np.zeros((tables.GRAPHS, tables.GRAPH_COLUMNS), np.int64)
        for row, container in zip(graphs, self.containers, strict=False):
            if container is not None:
                row[:] = container.run, container.handle
        self._variables = np.zeros((len(self._widths), tables.VARIABLE), np.int64)
        self._variables[:, tables.VARIABLE_WIDTH] = self._widths
        lu, pivots = np.empty(tables.factors_size(capacity, n)), np.empty(tables.pivots_size(capacity, n), np.int64)
        arrays = {
            Table.GRAPHS_AT: graphs,
            Table.VARIABLES_AT: self._variables,
            Table.VECTORS: np.empty((tables.VECTOR_KINDS, capacity, n)),
            Table.GIVEN_VECTORS: np.empty((tables.GIVEN_KINDS, capacity, q)),
            Table.NUMBERS: np.empty((capacity, tables.NUMBER_COLUMNS)),
            Table.INDICES: np.empty((capacity, tables.INDEX_COLUMNS), np.int64),
            Table.FACTORS: lu,
            Table.PIVOTS: pivots,
            Table.FUNCTIONS: means.functions,
        }
        self._arrays = list(arrays.values())
        words = np.zeros(Table.FIELDS, np.int64)
        self.at = words.ctypes.data
        # An entry of a view is set in half the time that one of an array takes.
        self.table = table = words.data
        for field, array in arrays.items():
            table[field] = array.ctypes.data
        table[Table.CAPACITY], table[Table.N], table[Table.Q] = capacity, n, q
        table[Table.FACTORS_SIZE], table[Table.PIVOTS_SIZE] = lu.size, pivots.size
        table[Table.EXECUTOR], table[Table.VARIABLES] = means.executor, len(self._widths)
        self._settled: tuple[NewtonSettings, bool] | None = None
        # Shapes of the parameters and of what the predictor takes, with the columns that it leaves alone.
        self._shapes: list[torch.Size] | None = None
        self._predictor_shapes: tuple[list[torch.Size], Sequence[int]] | None = None

    def put_variables(self, variables: Sequence[Tensor | None], rows: int, alive: list[Tensor]) -> None:
        """Put the unknowns and givens, `(rows, ...)` each, into the table; None stands for zeros."""
        self._variables[:, tables.VARIABLE_ADDRESS] = _addresses(variables, self._widths, rows, alive)

    def put_parameters(self, parameters: Sequence[Tensor]) -> None:
        """Put the parameters behind unknowns and givens, whose places the machine code fills in."""
        shapes = [x.shape for x in parameters]
        if shapes != self._shapes:
            self._shapes, n, q = shapes, self._solver.n, self._solver.q
            self._arguments = Arguments(
                [(n,), (q,), *shapes], [True, True, *[False] * len(shapes)], max(tables.OUTPUTS)
            )
            self._arguments.enter(self.table, Table.ARGUMENTS, Table.ARGUMENTS_AT, Table.HANDLES)
        if parameters:
            self._arguments.table[2:, tables.ADDRESS] = [x.data_ptr() for x in parameters]

    def put_predictor(self, inputs: Sequence[Tensor], kept: Sequence[int], rows: int, alive: list[Tensor]) -> None:
        """Put what the predictor takes and gives into the table; nothing where it is not run."""
        table, prediction = self.table, self._solver.block.prediction
        table[Table.PREDICTIONS] = 0
        if prediction is None or not inputs:
            return
        shapes = [x.shape[1:] for x in inputs]
        if (shapes, kept) != self._predictor_shapes:
            graph = self._solver.block.graphs[tables.PREDICTOR]
            assert graph is not None, "where there is a prediction, there is a predictor"
            require_counts(graph, len(inputs), len(prediction.outputs))
            self._predictor_shapes = shapes, kept
            self._predictor = Arguments(shapes, [True] * len(shapes), len(prediction.outputs))
            self._predictor.enter(
                table, Table.PREDICTOR_ARGUMENTS, Table.PREDICTOR_ARGUMENTS_AT, Table.PREDICTOR_HANDLES
            )
            # Room for copies of all rows.
            self._room = np.empty(self.capacity * self._predictor.width)
            self._predicted = np.array(
                [(w, -1 if column in kept else column, argument) for w, column, argument in prediction.outputs],
                np.int64,
            )
            table[Table.PREDICTOR_ROOM], table[Table.PREDICTED_AT] = self._room.ctypes.data, self._predicted.ctypes.data
            table[Table.PREDICTED] = len(self._predicted)
        widths = self._predictor.widths
        self._predictor.table[:, tables.ADDRESS] = _addresses(inputs, widths, rows, alive)
        table[Table.PREDICTIONS] = prediction.times

    def put_wanted(self, wanted: Derivatives, rows: int, alive: list[Tensor]) -> Tensor | None:
        """Put what is wanted of the derivatives into the table; give the tensor that they will be in."""
        table, along = self.table, wanted.directions
        sides = len(wanted.columns) if along is None else along.shape[-1]
        table[Table.SIDES] = sides
        if not sides:
            return None
        table[Table.DIRECTIONS] = 0
        if along is not None:
            along = along.contiguous()
            alive.append(along)
            # One direction for all rows is read again for each.
            step = prod(along.shape[1:]) if len(along) > 1 else 0
            table[Table.DIRECTIONS], table[Table.DIRECTION_ROW] = along.data_ptr(), step
        self._columns = np.array(wanted.columns, np.int64)
        found = torch.empty(rows, sides, self._solver.n, dtype=torch.float64)
        table[Table.COLUMNS_AT], table[Table.DERIVATIVES] = self._columns.ctypes.data, found.data_ptr()
        return found.transpose(1, 2)

    def put_settings(self, settings: NewtonSettings, small_steps: bool) -> None:
        """Put the settings of a solve into the table, where they are not there."""
        if (settings, small_steps) == self._settled:
            return
        self._limits = np.array([float(value) for value in criteria_of(settings, small_steps=small_steps)])
        table = self.table
        table[Table.UPDATES], table[Table.CUTS] = settings.updates, settings.cuts
        table[Table.LIMITS] = self._limits.ctypes.data
        self._settled = settings, small_steps


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
            row[:] = 0, len(sizes), at, at + 8 * len(sizes), prod(shape) if has else 0
        self.widths: list[int] = self.table[:, tables.WIDTH].tolist()
        self.width = sum(self.widths)

    def enter(self, table: memoryview, count: int, at: int, handles: int) -> None:
        """Enter their number, their place and that of the handles into a table of a call."""
        table[count], table[at], table[handles] = len(self.table), self.table.ctypes.data, self._handles.ctypes.data


def _containers(graphs: Sequence[CompiledGraph | None]) -> list[Container | None]:
    """A container of each graph; one for those that are the same."""
    made: dict[int, Container | None] = {id(None): None}
    for graph in graphs:
        if graph is not None and id(graph) not in made:
            made[id(graph)] = graph.container()
    return [made[id(graph)] for graph in graphs]


def _addresses(variables: Sequence[Tensor | None], widths: Sequence[int], rows: int, alive: list[Tensor]) -> list[int]:
    """Where the rows of each variable begin, one after the other; those of copies, which are put into `alive`."""
    found = []
    for x, width in zip(variables, widths, strict=True):
        if x is None:
            found.append(0)
            continue
        if x.numel() != rows * width or x.dtype != torch.float64 or not x.is_contiguous():
            if x.shape[0] not in (1, rows) or x[:1].numel() != width * min(rows, 1):
                raise AOTIError(f"a variable of shape {tuple(x.shape)} has not {rows} rows of {width} entries.")
            x = x.to(torch.float64).expand(rows, *x.shape[1:]).contiguous()
            alive.append(x)
        found.append(x.data_ptr())
    return found


def require_counts(graph: CompiledGraph, inputs: int, outputs: int | None = None) -> None:
    """Refuse a graph that takes or returns another number of tensors; called so it would end the process."""
    if graph.inputs != inputs or outputs not in (None, graph.outputs):
        raise ArtifactError(
            f"{graph.file}: takes {graph.inputs} tensors and returns {graph.outputs}; the metadata gives it {inputs}"
            + (f" and expects {outputs}" if outputs is not None else "")
            + ". The package and the metadata do not belong together: copy the whole artifact folder, or compile again."
        )


def _report(history: np.ndarray, settings: NewtonSettings, listener: Callable[[str], None]) -> None:
    """Give the lines of a solve to the log."""
    for kind, number, *figures in history.tolist():
        if kind == tables.ITERATION_LINE:
            listener(ITERATION.format(int(number), *figures[:2]))
        elif kind == tables.TRIAL_LINE and settings.ls_max_iters > 1:
            listener(TRIALS.format(int(number), *figures))
        elif kind == tables.ATTEMPT_LINE:
            listener(SECOND_ATTEMPT.format(int(number)))
    if len(history) == LINES and history[-1, 0] >= 0.0:
        listener(f"... lines beyond {LINES} of this solve are left out")
