"""Implicit segments: initial guess, Newton solve, and derivatives by the implicit function theorem."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .. import _log as log
from .._artifact.schema import DirectStep, ImplicitInfo, Predictor
from .._graphs.c_interface import Library, Unavailable
from .._graphs.graph import Graph, means
from .._graphs.loaded import require_one_thread
from .._solve.caller import Means
from .._solve.native import Block, BlockSolver, Prediction, UnfitPredictor, WantedDerivatives
from .._solve.outcome import listener, outcome_line
from .._solve.system import System, taken
from .._solve.tensors import solve_in_lockstep, solve_rows
from ..settings import NewtonSettings
from .sensitivity import Sensitivity, SolvedSegment
from .systems import check_arity, is_factored, layout_of, system_of
from .values import Packing, State, Tangents, Values

# Rows of a block at most; workspaces for more are not kept.
MAX_ROWS = 1024


class ImplicitSegment:
    """An implicit segment with its graphs; `lockstep` has all rows iterate until the slowest has converged.

    One dense group on a CPU is solved by machine code, where the graphs have a C interface; all others by tensors.
    """

    def __init__(
        self, spec: ImplicitInfo, graphs: Mapping[str, Graph], device: torch.device, dtype: torch.dtype, lockstep: bool
    ) -> None:
        self.spec, self.graphs = spec, graphs
        self.unknowns, self.givens = Packing(spec.unknowns), Packing(spec.givens)
        self.layouts = layout_of(spec.unknowns), layout_of(spec.residuals)
        # Parameters that the graphs take once for all rows.
        self.common_parameters = spec.parameters
        # Unknowns that need an initial guess before a predictor speaks.
        predicted = set(spec.predictor.outputs) - set(spec.predictor.inputs) if spec.predictor else set()
        self._unpredicted = [v for v in spec.unknown_variables if v.name not in predicted]
        factored = is_factored(spec, device, lockstep)
        self.sensitivity = Sensitivity(spec, graphs, factored)
        self._lockstep = lockstep
        self._means, self.implementation = self._choose(factored, dtype)
        # Made at the first call; None where a graph has no C interface.
        self._solver: BlockSolver | None = None
        self._looked_for = self._predicts = False
        # Shapes of parameters that the graphs are known to take.
        self._required: set[tuple[torch.Size, ...]] = set()
        log.emit("model", "info", f"Newton loop of {graphs[spec.residual].file.name}: {self.implementation}")

    def _choose(self, factored: bool, dtype: torch.dtype) -> tuple[Means | None, str]:
        """What machine code solves with, None for tensors; the name of the implementation with the reason."""
        givens = [group.structure for group in self.spec.givens]
        if self._lockstep:
            return None, "torch (lockstep)"
        if not factored or dtype != torch.float64 or "block" in givens:
            return None, "torch (not one dense group on a CPU in float64)"
        if len(givens) != 1 or not self.graphs[self.spec.residual].takes_one_batch_axis:
            return None, "torch (not one group of givens, or pinned batch axes)"
        found, reason = means()
        return found, f"torch ({reason})" if found is None else f"native ({reason})"

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
        gave. Where there are `tangents`, what their derivatives need of the solve is evaluated with it; `small_steps`
        asks for small last steps, and `cut` says that this is a part of the increment only.
        """
        parameters = values.common(self.spec.parameters)
        speaks = log.enabled("newton", "info")
        if speaks:
            log.emit("newton", "info", "---- begin newton solve ----")
        solved = None
        if self._means is not None:
            wanted = None
            if tangents is not None:
                wanted = self.sensitivity.wanted(tangents, rows, next(iter(state.values())), cut)
            solved = self._by_machine_code(state, rows, parameters, settings, given, small_steps, wanted)
        if solved is None:
            self.guess(state, rows, given)
            unknowns, givens = self.unknowns.pack(state, rows), self.givens.pack(state, rows)

            def system(some: Tensor | None) -> System:
                chosen = givens if some is None else taken(givens, some)
                return system_of(self.spec, self.graphs, chosen, parameters, self.layouts, self._lockstep)

            loop = solve_in_lockstep if self._lockstep else solve_rows
            found = loop(system, unknowns, self.layouts, settings, small_steps=small_steps, listener=listener())
            solved = SolvedSegment(found.unknowns, found.statistics, givens, parameters)
        if speaks:
            log.emit("newton", "info", outcome_line(solved.statistics, settings))
            log.emit("newton", "info", "---- end newton solve ----")
        state.update(self.unknowns.unpack(solved.unknowns))
        return solved

    # -- initial guess ----------------------------------------------------------------------------------------------

    def guess(self, state: State, rows: int, given: frozenset[str] = frozenset()) -> None:
        """Put the initial guess of the unknowns into `state`: what the caller gave, else a predictor's, else zero."""
        kept = {name: state[name] for name in self.unknowns.names if name in given}
        self._put_zeros(state, rows)
        spec = self.spec.predictor
        if spec is None:
            return
        predictor, loop = self.graphs[spec.file], spec.feedback
        for _ in range(loop.iterations if loop is not None else 1):
            outputs = predictor([state[name] for name in spec.inputs])
            check_arity(predictor, outputs, len(spec.outputs), "predictor ")
            for name, value in zip(spec.outputs, outputs, strict=True):
                state[name] = value if value.shape[0] == rows else value.expand(rows, *value.shape[1:])
            if loop is not None:
                state[loop.name] = state[loop.output]
        state.update(kept)

    def _put_zeros(self, state: State, rows: int) -> None:
        """Put zeros into `state` for unknowns that nobody gives, and for what a predictor gives itself."""
        like = next(iter(state.values()))
        for unknown in self._unpredicted:
            if unknown.name not in state:
                state[unknown.name] = like.new_zeros((rows, *unknown.natural_shape))
        loop = self.spec.predictor.feedback if self.spec.predictor else None
        if loop is not None:
            state[loop.name] = like.new_zeros((rows, *loop.natural_shape))

    # -- machine code -----------------------------------------------------------------------------------------------

    def _by_machine_code(
        self,
        state: State,
        rows: int,
        parameters: list[Tensor],
        settings: NewtonSettings,
        given: frozenset[str],
        small_steps: bool,
        wanted: WantedDerivatives | None,
    ) -> SolvedSegment | None:
        """Solve for the unknowns of all rows; None where that is to be done by tensors."""
        if not self._looked_for:
            self._solver, self._looked_for = self._make_solver(), True
        solver, spec = self._solver, self.spec.predictor
        if solver is None or any(p.dtype != torch.float64 or not p.is_contiguous() for p in parameters):
            return None
        kept = [place for place, name in enumerate(self.unknowns.names) if name in given]
        predicted_from: list[Tensor] = []
        if spec is not None and len(kept) < len(self.unknowns.names):
            if self._predicts:
                self._put_zeros(state, rows)
                predicted_from = [state[name] for name in spec.inputs]
                self.graphs[spec.file].require(predicted_from)
            else:
                self.guess(state, rows, given)
        self._require(solver, rows, parameters)
        try:
            found = solver.solve(
                [state.get(name) for name in self.unknowns.names],
                [state[name] for name in self.givens.names],
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
            return self._by_machine_code(state, rows, parameters, settings, given, small_steps, wanted)
        solved = found.solved
        return SolvedSegment(solved.unknowns, solved.statistics, [found.givens], parameters, found.derivatives)

    def _make_solver(self) -> BlockSolver | None:
        """The solver with the graphs behind their C interface; None where those of the system have none."""
        spec, means, whole = self.spec, self._means, self.sensitivity.whole
        assert means is not None and isinstance(spec.step, DirectStep), "only asked for where it is solved directly"
        system = []
        for file in (spec.residual, spec.step.jacobian):
            try:
                system.append(self.graphs[file].library())
            except Unavailable as error:
                log.emit("model", "info", f"{file}: solved by torch's operations, since {error}")
                return None
        derivatives = self._libraries(whole.jacobian, whole.file) if whole and self.sensitivity.dense else []
        predictor = self._libraries(spec.predictor.file) if spec.predictor else []
        self._predicts = bool(predictor)
        block = Block(
            [*system, *(derivatives or (None, None))],
            [v.size for v in spec.unknown_variables],
            [v.size for group in spec.givens for v in group.variables],
            len(spec.parameters),
            self._prediction(spec.predictor, *predictor) if spec.predictor and predictor else None,
        )
        return BlockSolver(block, means, 2 * MAX_ROWS)

    def _libraries(self, *files: str) -> list[Library]:
        """Graphs behind their C interface; none where one has none, which says why when it is called otherwise."""
        try:
            return [self.graphs[file].library() for file in files]
        except Unavailable:
            return []

    def _prediction(self, spec: Predictor, graph: Library) -> Prediction:
        """Where the predictor's outputs go."""
        loop, names, outputs = spec.feedback, self.unknowns.names, []
        for name in spec.outputs:
            fed = loop.name if loop is not None and loop.output == name else name
            unknown = names.index(name) if name in names else -1
            outputs.append((unknown, spec.inputs.index(fed) if fed in spec.inputs else -1))
        return Prediction(graph, tuple(outputs), loop.iterations if loop is not None else 1)

    def _require(self, solver: BlockSolver, rows: int, parameters: list[Tensor]) -> None:
        """Refuse what the graphs would read wrongly; shapes of parameters are compared once."""
        spec, whole = self.spec, self.sensitivity.whole
        require_one_thread(self.graphs[spec.residual].file)
        shapes = tuple(p.shape for p in parameters)
        if shapes in self._required:
            return
        variables = [torch.empty(rows, width, dtype=torch.float64) for width in (solver.n, solver.q)]
        assert isinstance(spec.step, DirectStep), "only asked for where it is solved directly"
        files = [spec.residual, spec.step.jacobian]
        files += [whole.jacobian, whole.file] if whole and solver.differentiates else []
        for file in files:
            self.graphs[file].require([*variables, *parameters])
        self._required.add(shapes)
