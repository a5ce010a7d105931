"""Implicit segments: initial guess, Newton solve, and derivatives by the implicit function theorem."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _log as log
from .._artifact import schema
from .._graphs.c_interface import Library, Unavailable
from .._graphs.graph import Graph, means
from .._graphs.loaded import require_one_thread
from .._solve.caller import Means
from .._solve.native import Block, BlockSolver, Derivatives, Prediction, UnfitPredictor
from .._solve.outcome import listener, outcome_line
from .._solve.system import System
from .._solve.tensors import solve_in_lockstep, solve_rows
from ..settings import NewtonSettings
from .sensitivity import Sensitivity, SolvedSegment
from .systems import GraphOf, SystemGraphs, check_arity
from .values import Columns, Packing, State, Tangents, Values

# Rows of a block at most; workspaces for more are not kept.
MAX_ROWS = 1024


class ImplicitSegment:
    """An implicit segment with its graphs; `lockstep` has all rows iterate until the slowest has converged."""

    def __init__(
        self, spec: schema.ImplicitInfo, graph_of: GraphOf, device: torch.device, dtype: torch.dtype, lockstep: bool
    ) -> None:
        self.spec = spec
        self.graphs = SystemGraphs(spec, graph_of, device, lockstep)
        self.unknowns, self.givens = Packing(spec.unknowns), Packing(spec.givens)
        self.predictor = graph_of(spec.predictor.file) if spec.predictor else None
        # Unknowns that need an initial guess before a predictor speaks.
        predicted = set(spec.predictor.outputs) - set(spec.predictor.inputs) if spec.predictor else set()
        self._unpredicted = [v for v in spec.unknown_variables if v.name not in predicted]
        # None where the segment was compiled without derivatives.
        differentiable = spec.sensitivity or spec.parameter_sensitivity
        self.sensitivity = Sensitivity(spec, self.graphs, graph_of) if differentiable else None
        self._lockstep = lockstep
        found, self.implementation = _means_of(spec, self.graphs, dtype, lockstep)
        self._by_machine_code = None if found is None else _MachineCode(self, found)
        log.emit("model", "info", f"Newton loop of {graph_of(spec.residual).file.name}: {self.implementation}")

    @property
    def common_parameters(self) -> tuple[str, ...]:
        """Parameters that the graphs take once for all rows."""
        return self.spec.parameters

    def guess(self, state: State, rows: int, given: frozenset[str] = frozenset()) -> None:
        """Put the initial guess of the unknowns into `state`: what the caller gave, else a predictor's, else zero."""
        kept = {name: state[name] for name in self.unknowns.names if name in given}
        self.put_zeros(state, rows)
        if self.predictor is not None and self.spec.predictor is not None:
            self._predict(self.spec.predictor, self.predictor, state, rows)
            state.update(kept)

    def put_zeros(self, state: State, rows: int) -> None:
        """Put zeros into `state` for unknowns that nobody gives, and for what a predictor gives itself."""
        like = next(iter(state.values()))
        for unknown in self._unpredicted:
            if unknown.name not in state:
                state[unknown.name] = like.new_zeros((rows, *unknown.natural_shape))
        loop = self.spec.predictor.feedback if self.spec.predictor else None
        if loop is not None:
            state[loop.name] = like.new_zeros((rows, *loop.natural_shape))

    def _predict(self, spec: schema.Predictor, predictor: Graph, state: State, rows: int) -> None:
        loop = spec.feedback
        for _ in range(loop.iterations if loop is not None else 1):
            outputs = predictor([state[name] for name in spec.inputs])
            check_arity(predictor, outputs, len(spec.outputs), "predictor ")
            for name, value in zip(spec.outputs, outputs, strict=True):
                state[name] = value if value.shape[0] == rows else value.expand(rows, *value.shape[1:])
            if loop is not None:
                state[loop.name] = state[loop.output]

    def solve(
        self,
        state: State,
        values: Values,
        rows: int,
        settings: NewtonSettings,
        given: frozenset[str] = frozenset(),
        tangents: Tangents | None = None,
        *,
        small_steps: bool = False,
        cut: bool = False,
    ) -> SolvedSegment:
        """Solve for the unknowns of the variables in `state`, and write them into it.

        Rows that have not converged hold their last iterate. `given` names the unknowns whose initial guess the caller
        gave. Where there are `tangents`, what `carry` needs of the solve is evaluated with it.
        """
        parameters = values.common(self.spec.parameters)
        speaks = log.enabled("newton", "info")
        if speaks:
            log.emit("newton", "info", "---- begin newton solve ----")
        solved = None
        if self._by_machine_code is not None:
            wanted = None
            if tangents is not None and self.sensitivity is not None:
                wanted = self.sensitivity.wanted(tangents, rows, next(iter(state.values())), cut)
            solved = self._by_machine_code.solve(state, rows, parameters, settings, given, small_steps, wanted)
        if solved is None:
            self.guess(state, rows, given)
            solved = self._by_tensors(state, rows, parameters, settings, small_steps)
        if speaks:
            log.emit("newton", "info", outcome_line(solved.statistics, settings))
            log.emit("newton", "info", "---- end newton solve ----")
        state.update(self.unknowns.unpack(solved.unknowns))
        return solved

    def _by_tensors(
        self, state: State, rows: int, parameters: list[Tensor], settings: NewtonSettings, small_steps: bool
    ) -> SolvedSegment:
        """Solve any system from the initial guess in `state`; `small_steps` asks for small last steps."""
        unknowns, givens = self.unknowns.pack(state, rows), self.givens.pack(state, rows)

        def system(some: Tensor | None) -> System:
            chosen = givens if some is None else [x.index_select(0, some) for x in givens]
            return self.graphs.system(chosen, parameters)

        solve = solve_in_lockstep if self._lockstep else solve_rows
        found = solve(system, unknowns, self.graphs.layouts, settings, small_steps=small_steps, listener=listener())
        return SolvedSegment(found.unknowns, found.statistics, givens, parameters)

    def carry(
        self,
        solved: SolvedSegment,
        values: Values,
        tangents: Tangents,
        parameters: frozenset[str],
        *,
        cut: bool = False,
    ) -> dict[str, Columns]:
        """Derivatives of the unknowns at the solution; see `Sensitivity.carry`."""
        if self.sensitivity is None:
            return {name: {} for name in self.unknowns.names}
        return self.sensitivity.carry(solved, values, tangents, parameters, cut)


def _means_of(
    spec: schema.ImplicitInfo, graphs: SystemGraphs, dtype: torch.dtype, lockstep: bool
) -> tuple[Means | None, str]:
    """What machine code solves a segment with, None for tensors; the name of the implementation with the reason."""
    if lockstep:
        return None, "torch (lockstep)"
    if not graphs.factored or dtype != torch.float64 or any(g.structure != "dense" for g in spec.givens):
        return None, "torch (not one dense group on a CPU in float64)"
    if len(spec.givens) != 1 or not graphs.residual.takes_one_batch_axis:
        return None, "torch (not one group of givens, or pinned batch axes)"
    found, reason = means()
    return found, f"torch ({reason})" if found is None else f"native ({reason})"


class _MachineCode:
    """Solves a segment of one dense group on a CPU by machine code, where the graphs have a C interface."""

    def __init__(self, segment: ImplicitSegment, means: Means) -> None:
        self._segment, self._means = segment, means
        self._unknowns = segment.spec.unknown_variables
        self._places = {v.name: place for place, v in enumerate(self._unknowns)}
        # Made at the first call; None where a graph has no C interface.
        self._solver: BlockSolver | None = None
        self._looked_for = self._predicts = False
        # Shapes of parameters that the graphs are known to take.
        self._required: set[tuple[torch.Size, ...]] = set()

    def solve(
        self,
        state: State,
        rows: int,
        parameters: list[Tensor],
        settings: NewtonSettings,
        given: frozenset[str],
        small_steps: bool,
        wanted: Derivatives | None,
    ) -> SolvedSegment | None:
        """Solve for the unknowns of all rows; None where that is to be done by tensors."""
        if not self._looked_for:
            self._solver, self._looked_for = self._make(), True
        solver, segment = self._solver, self._segment
        if solver is None or any(p.dtype != torch.float64 or not p.is_contiguous() for p in parameters):
            return None
        kept = [place for name, place in self._places.items() if name in given]
        predicted_from: list[Tensor] = []
        if segment.predictor is not None and len(kept) < len(self._places):
            if self._predicts and segment.spec.predictor is not None:
                segment.put_zeros(state, rows)
                predicted_from = [state[name] for name in segment.spec.predictor.inputs]
                segment.predictor.require(predicted_from)
            else:
                segment.guess(state, rows, given)
        self._require(solver, rows, parameters)
        try:
            found = solver.solve(
                [state.get(v.name) for v in self._unknowns],
                [state[name] for name in segment.givens.names],
                rows,
                parameters,
                settings,
                predicted_from=predicted_from,
                kept=kept,
                small_steps=small_steps,
                wanted=wanted if solver.differentiates else None,
                listener=listener(),
            )
        except UnfitPredictor:
            # It is run as the graph of an explicit segment is, from now on.
            self._predicts = False
            return self.solve(state, rows, parameters, settings, given, small_steps, wanted)
        solved = found.solved
        return SolvedSegment(solved.unknowns, solved.statistics, [found.givens], parameters, found.derivatives)

    def _make(self) -> BlockSolver | None:
        """The solver with the graphs behind their C interface; None where that of the system have none."""
        segment, graphs, sensitivity = self._segment, self._segment.graphs, self._segment.sensitivity
        assert graphs.jacobian is not None, "only asked for where the segment is solved directly"
        system = []
        for graph in (graphs.residual, graphs.jacobian):
            try:
                system.append(graph.library())
            except Unavailable as error:
                log.emit("model", "info", f"{graph.file.name}: solved by torch's operations, since {error}")
                return None
        derivatives: list[Library] = []
        if sensitivity is not None and sensitivity.dense:
            assert sensitivity.jacobian is not None and sensitivity.by_givens is not None
            derivatives = _libraries(sensitivity.jacobian, sensitivity.by_givens)
        predictor = _libraries(segment.predictor) if segment.predictor else []
        self._predicts = bool(predictor)
        block = Block(
            [*system, *(derivatives or (None, None))],
            [v.size for v in self._unknowns],
            [v.size for group in segment.spec.givens for v in group.variables],
            len(segment.spec.parameters),
            predictor[0] if predictor else None,
            self._prediction(segment.spec.predictor) if segment.spec.predictor else None,
        )
        return BlockSolver(block, self._means, 2 * MAX_ROWS)

    def _prediction(self, spec: schema.Predictor) -> Prediction:
        """Where the predictor's outputs go."""
        loop = spec.feedback
        outputs = []
        for name in spec.outputs:
            fed = loop.name if loop is not None and loop.output == name else name
            outputs.append((self._places.get(name, -1), spec.inputs.index(fed) if fed in spec.inputs else -1))
        return Prediction(tuple(outputs), loop.iterations if loop is not None else 1)

    def _require(self, solver: BlockSolver, rows: int, parameters: Sequence[Tensor]) -> None:
        """Refuse what the graphs would read wrongly; shapes of parameters are compared once."""
        graphs, sensitivity = self._segment.graphs, self._segment.sensitivity
        require_one_thread(graphs.residual.file)
        shapes = tuple(p.shape for p in parameters)
        if shapes in self._required:
            return
        arguments = [torch.empty(rows, solver.n), torch.empty(rows, solver.q)]
        arguments = [*(x.to(torch.float64) for x in arguments), *parameters]
        of_derivatives = (sensitivity.jacobian, sensitivity.by_givens) if sensitivity and solver.differentiates else ()
        for graph in (graphs.residual, graphs.jacobian, *of_derivatives):
            if graph is not None:
                graph.require(arguments)
        self._required.add(shapes)


def _libraries(*graphs: Graph) -> list[Library]:
    """The graphs behind their C interface; none where one has none, which says why when it is called otherwise."""
    try:
        return [graph.library() for graph in graphs]
    except Unavailable:
        return []
