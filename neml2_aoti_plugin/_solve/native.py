"""Blocks of rows solved by machine code, which calls the compiled graphs and holds no interpreter.

A block is one dense group of unknowns on a CPU in float64, with graphs that have a C interface.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from ..errors import AOTIError, ArtifactError
from ..settings import NewtonSettings
from . import tables
from .caller import Arguments, CompiledGraph, ContainerOfGraph, GraphCall, Means, failed, filled, require_counts
from .criteria import criteria_of
from .outcome import ITERATION, SECOND_ATTEMPT, TRIALS, Listener, RowStatistics, Solved
from .tables import SolveTable as Table

# Lines for the log that a solve notes at most.
LINES = 4096


class Prediction(NamedTuple):
    """A predictor, and of each output the place of the unknown that it is, and of the argument that it feeds, or -1."""

    graph: CompiledGraph
    outputs: tuple[tuple[int, int], ...]
    # How often the predictor is run.
    times: int = 1


class WantedDerivatives(NamedTuple):
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

    Its graphs stand in the order of `tables`: residual, Jacobian, Jacobian at the solution, derivative by the givens;
    the last two may be missing. They take unknowns, givens and parameters.
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
        self._block, self._means, self._most = block, means, most
        self.n, self.q = sum(block.unknowns), sum(block.givens)
        self.differentiates = block.graphs[tables.BY_GIVENS] is not None
        self._free: list[_Workspace] = []
        for graph, outputs in zip(block.graphs, tables.OUTPUTS, strict=True):
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
        wanted: WantedDerivatives | None = None,
        listener: Listener | None = None,
    ) -> Pass:
        """Solve for the unknowns of all rows from an initial guess, each variable `(rows, ...)`; None stands for zeros.

        Where there are inputs of the predictor, it gives the guess, but for the unknowns at the places `kept`.
        """
        space = self._borrow(rows)
        first = space.put_predictor(unknowns, predicted_from, kept, rows)
        space.put_variables((*first, *givens), rows)
        space.put_parameters(parameters)
        space.put_settings(settings, small_steps)
        derivatives = space.put_wanted(wanted or WantedDerivatives(), rows)
        solution, side = torch.empty(rows, self.n, dtype=torch.float64), torch.empty(rows, self.q, dtype=torch.float64)
        norms, record = torch.empty(rows, 2, dtype=torch.float64), torch.empty(rows, 2, dtype=torch.int64)
        table = space.table
        table[Table.ROWS], table[Table.SOLUTION], table[Table.GIVENS] = rows, solution.data_ptr(), side.data_ptr()
        table[Table.NORMS], table[Table.RECORD] = norms.data_ptr(), record.data_ptr()
        table[Table.HISTORY_LINES] = table[Table.NOTED] = 0
        if listener is not None:
            # The lines of two attempts.
            lines = min(2 * (settings.updates + 1) * (settings.cuts + 2) + 1, LINES)
            history = np.full((lines, tables.HISTORY_COLUMNS), -1.0)
            table[Table.HISTORY], table[Table.HISTORY_LINES] = history.ctypes.data, lines
        fault = self._means.code.solve_block(space.at)
        all_converged = table[Table.FAILED] == 0
        space.alive.clear()
        # One in which an exception has ended a call may be half made, and is dropped.
        if space.capacity <= self._most:
            self._free.append(space)
        if fault != tables.DONE:
            self._complain(fault)
        if listener is not None:
            _report(history, settings, listener)
        return Pass(Solved([solution], RowStatistics(record, norms, all_converged)), side, derivatives)

    def _complain(self, fault: int) -> NoReturn:
        """Raise what is wrong with a graph."""
        place, other = divmod(fault - tables.BROKEN, 2)
        prediction = self._block.prediction
        graph = (*self._block.graphs, prediction and prediction.graph)[place]
        assert graph is not None, "only graphs that are there are run"
        if not other:
            raise failed(graph)
        raise _unfit(graph, UnfitPredictor if place == tables.PREDICTOR else ArtifactError)

    def _borrow(self, rows: int) -> _Workspace:
        """A workspace for so many rows at least, which no other thread has."""
        try:
            found = self._free.pop()
        except IndexError:
            return _Workspace(self._block, self._means, rows)
        return found if found.capacity >= rows else _Workspace(self._block, self._means, rows, found)


class _Workspace:
    """What one thread solves with: memory for so many rows, and a container of each graph, perhaps those of another."""

    def __init__(self, block: Block, means: Means, rows: int, other: _Workspace | None = None) -> None:
        self._block, self._widths = block, (*block.unknowns, *block.givens)
        self._n, self._q = n, q = sum(block.unknowns), sum(block.givens)
        self.capacity = capacity = max(filled(rows), tables.VECTOR)
        self._containers: dict[int, ContainerOfGraph] = other._containers if other else {}
        self._predictor: GraphCall | None = other._predictor if other else None
        if block.prediction is not None and self._predictor is None:
            self._predictor = GraphCall(block.prediction.graph, means)
        graphs = np.zeros((len(block.graphs), tables.GRAPH_COLUMNS), np.int64)
        for row, graph in zip(graphs, block.graphs, strict=True):
            if graph is not None:
                # One for those that are the same.
                if id(graph) not in self._containers:
                    self._containers[id(graph)] = graph.container()
                container = self._containers[id(graph)]
                row[:] = container.run, container.handle
        self._variables = np.zeros((len(self._widths), tables.VARIABLE), np.int64)
        self._variables[:, tables.VARIABLE_WIDTH] = self._widths
        self._steps: list[int] = []
        arrays = {
            Table.GRAPHS_AT: graphs,
            Table.VARIABLES_AT: self._variables,
            Table.VECTORS: np.empty((tables.VECTOR_KINDS, capacity, n)),
            Table.GIVEN_VECTORS: np.empty((tables.GIVEN_KINDS, capacity, q)),
            Table.NUMBERS: np.empty((tables.NUMBER_KINDS, capacity)),
            Table.INDICES: np.empty((tables.INDEX_KINDS, capacity), np.int64),
            Table.FACTORS: np.empty(tables.factors_size(capacity, n)),
            Table.PIVOTS: np.empty(tables.pivots_size(capacity, n), np.int64),
            Table.FUNCTIONS: means.functions,
        }
        self._arrays, self._zeros = list(arrays.values()), torch.zeros(n, dtype=torch.float64)
        words = np.zeros(Table.FIELDS, np.int64)
        self.at = words.ctypes.data
        # An entry of a view is set in half the time that one of an array takes.
        self.table = table = words.data
        for field, array in arrays.items():
            table[field] = array.ctypes.data
        table[Table.CAPACITY], table[Table.N], table[Table.Q] = capacity, n, q
        table[Table.EXECUTOR], table[Table.VARIABLES] = means.executor, len(self._widths)
        if self._predictor is not None:
            table[Table.PREDICTOR_AT] = self._predictor.at
        # What machine code reads and nobody else holds.
        self.alive: list[Tensor] = []
        self._settled: tuple[NewtonSettings, bool] | None = None
        self._shapes: list[torch.Size] | None = None
        # For how many rows, and which unknowns that stay, what comes of the predictor is in its place.
        self._wired: tuple[int, Sequence[int]] | None = None

    def put_predictor(
        self, unknowns: Sequence[Tensor | None], inputs: Sequence[Tensor], kept: Sequence[int], rows: int
    ) -> Sequence[Tensor | None]:
        """Have the predictor run first, if it has inputs; give the unknowns, with what it will give in their places."""
        self.table[Table.PREDICTIONS] = 0
        prediction = self._block.prediction
        if self._predictor is None or prediction is None or not inputs or not rows:
            return unknowns
        given = [_with_rows(x, rows) for x in inputs]
        self.alive += given
        self._predictor.put(given, [True] * len(given), rows)
        if (rows, kept) != self._wired:
            self._wire(self._predictor, prediction, given, kept, rows)
        for argument, x in self._fed:
            self._predictor.feed(argument, x.copy_(given[argument].view_as(x)))
        self.table[Table.PREDICTIONS] = prediction.times
        found = list(unknowns)
        for place, x in self._predicted:
            found[place] = x
        return found

    def _wire(
        self, predictor: GraphCall, to: Prediction, given: Sequence[Tensor], kept: Sequence[int], rows: int
    ) -> None:
        """Find the unknowns among the predictor's outputs, and what it takes again."""
        require_counts(to.graph, len(given), len(to.outputs))
        # All are kept, for the predictor writes all. There is none where their shapes could not be learned; then
        # the call fails, and tells why.
        self._outputs = outputs = predictor.targets(rows)
        self._wired = (rows, list(kept)) if outputs else None
        self._predicted, self._fed = [], []
        for (place, argument), x in zip(to.outputs, outputs, strict=False):
            fits = True
            if place >= 0 and place not in kept:
                fits = prod(x.shape[1:]) == self._block.unknowns[place]
                self._predicted.append((place, x))
            if argument >= 0 and to.times > 1:
                fits = fits and x.numel() == given[argument].numel()
                self._fed.append((argument, x))
            if not fits:
                raise _unfit(to.graph, UnfitPredictor)

    def put_variables(self, variables: Sequence[Tensor | None], rows: int) -> None:
        """Put the unknowns and givens, `(rows or 1, ...)` each, into the table; None stands for zeros."""
        addresses, steps = [], []
        for x, width in zip(variables, self._widths, strict=True):
            if x is None:
                x, width = self._zeros, 0
            elif x.numel() != rows * width or x.dtype != torch.float64 or not x.is_contiguous():
                if x.shape[0] not in (1, rows) or x[:1].numel() != width * min(rows, 1):
                    raise AOTIError(f"a variable of shape {tuple(x.shape)} has not {rows} rows of {width} entries.")
                width = width if x.shape[0] == rows else 0
                x = x.to(torch.float64).contiguous()
                self.alive.append(x)
            addresses.append(x.data_ptr())
            steps.append(width)
        self._variables[:, tables.VARIABLE_ADDRESS] = addresses
        if steps != self._steps:
            self._variables[:, tables.VARIABLE_STEP] = self._steps = steps

    def put_parameters(self, parameters: Sequence[Tensor]) -> None:
        """Put the parameters behind unknowns and givens, whose places the machine code fills in."""
        shapes = [x.shape for x in parameters]
        if shapes != self._shapes:
            self._shapes = shapes
            batched = [True, True, *[False] * len(shapes)]
            self._arguments = Arguments([(self._n,), (self._q,), *shapes], batched, max(tables.OUTPUTS))
            self._arguments.enter(self.table, Table.ARGUMENTS, Table.ARGUMENTS_AT, Table.HANDLES)
        if parameters:
            self._arguments.table[2:, tables.ADDRESS] = [x.data_ptr() for x in parameters]

    def put_wanted(self, wanted: WantedDerivatives, rows: int) -> Tensor | None:
        """Put what is wanted of the derivatives into the table; give the tensor that they will be in."""
        table, along = self.table, wanted.directions
        sides = len(wanted.columns) if along is None else along.shape[-1]
        table[Table.SIDES] = sides
        if not sides:
            return None
        table[Table.DIRECTIONS] = 0
        if along is not None:
            along = along.contiguous()
            self.alive.append(along)
            # One direction for all rows is read again for each.
            step = prod(along.shape[1:]) if len(along) > 1 else 0
            table[Table.DIRECTIONS], table[Table.DIRECTION_ROW] = along.data_ptr(), step
        self._columns = np.array(wanted.columns, np.int64)
        found = torch.empty(rows, sides, self._n, dtype=torch.float64)
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


def _with_rows(x: Tensor, rows: int) -> Tensor:
    """A variable with a row for each, contiguous, in float64; often as it is."""
    if x.shape[0] == rows and x.dtype == torch.float64 and x.is_contiguous():
        return x
    return x.to(torch.float64).expand(rows, *x.shape[1:]).contiguous()


def _unfit(graph: CompiledGraph, kind: type[ArtifactError]) -> ArtifactError:
    """The error for a graph that does not belong to the metadata."""
    return kind(
        f"{graph.file}: returned tensors of other shapes than the metadata tells. The package belongs to another "
        "model or to another compile; compile the model again with neml2-compile."
    )


def _report(history: np.ndarray, settings: NewtonSettings, listener: Listener) -> None:
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
