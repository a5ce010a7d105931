"""Implicit segments: first iterate, Newton solve, and derivatives by the implicit function theorem."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from .. import _log as log
from .._artifact import schema
from .._graphs.c_interface import Unavailable
from .._solve import block, newton
from .._solve.criteria import criteria_of
from .._solve.lockstep import FrozenRows, LockstepRows
from .._solve.outcome import RowStatistics
from .._solve.system import Groups
from .._solve.tensors import TensorRows
from ..settings import NewtonSettings
from .blocks import MAX_ROWS
from .native_graph import Means, means
from .packing import Packing
from .parameters import Values
from .sensitivity import Sensitivity, sensitivity_of
from .systems import GraphOf, SystemGraphs, check_arity
from .tangents import Columns, Tangents, add, times

# A solve of a segment from packed unknowns and givens; the flag asks for small last steps (`substep_del_tol`).
Solve = Callable[[Groups, Groups, Sequence[Tensor], NewtonSettings, bool], newton.Solved]


@dataclass
class Solved:
    """A solve with what its derivatives need.

    Args:
        unknowns: one tensor per group.
        statistics: how each row fared.
        givens: the givens that were held.
        parameters: promoted parameters as the solve's graphs take them.
        jacobian: blocks at the solution, once they have been asked for.
    """

    unknowns: Groups
    statistics: RowStatistics
    givens: Groups
    parameters: list[Tensor]
    jacobian: Groups = field(default_factory=list)


class ImplicitSegment:
    """An implicit segment with its graphs.

    Args:
        spec: the segment.
        graph_of: gives the graph of a file.
        device: that the graphs run on.
        dtype: that they compute in.
        lockstep: whether all rows iterate until the slowest has converged, as in neml2's C++ runtime.
    """

    def __init__(
        self, spec: schema.ImplicitInfo, graph_of: GraphOf, device: torch.device, dtype: torch.dtype, lockstep: bool
    ) -> None:
        self.spec, self._lockstep = spec, lockstep
        self.graphs = SystemGraphs(spec, graph_of, device, lockstep)
        self.unknowns, self._givens = Packing(spec.unknowns), Packing(spec.givens)
        self.predictor = graph_of(spec.predictor.file) if spec.predictor else None
        # Unknowns that need a first iterate before a predictor speaks.
        predicted = set(spec.predictor.outputs) - set(spec.predictor.inputs) if spec.predictor else set()
        self._unpredicted = [v for v in spec.unknown_variables if v.name not in predicted]
        self.sensitivity: Sensitivity | None = sensitivity_of(spec, self.graphs, graph_of)
        self._solve, self.implementation = _solver(spec, self.graphs, dtype, lockstep)
        log.emit("model", "info", f"Newton loop of {graph_of(spec.residual).file.name}: {self.implementation}")

    @property
    def common_parameters(self) -> tuple[str, ...]:
        """Parameters that the graphs take once for all rows."""
        return self.spec.parameters

    def guess(self, state: dict[str, Tensor], rows: int, given: frozenset[str] = frozenset()) -> None:
        """Put the first iterate of the unknowns into `state`: what the caller gave, else a predictor's, else zero.

        Args:
            state: variables, `(rows, ...)`.
            rows: the batch.
            given: unknowns whose value in `state` the caller gave, so that no predictor has a say in them.
        """
        kept = {v.name: state[v.name] for v in self.spec.unknown_variables if v.name in given}
        like = next(iter(state.values()))
        for unknown in self._unpredicted:
            if unknown.name not in state:
                state[unknown.name] = like.new_zeros((rows, *unknown.natural_shape))
        if self.predictor is not None and self.spec.predictor is not None:
            self._predict(self.spec.predictor, state, rows)
            state.update(kept)

    def _predict(self, spec: schema.Predictor, state: dict[str, Tensor], rows: int) -> None:
        assert self.predictor is not None
        loop = spec.feedback
        if loop is not None:
            state[loop.input.name] = next(iter(state.values())).new_zeros((rows, *loop.input.natural_shape))
        for _ in range(loop.iterations if loop is not None else 1):
            outputs = self.predictor([state[name] for name in spec.inputs])
            check_arity(self.predictor, outputs, len(spec.outputs), "predictor ")
            for name, value in zip(spec.outputs, outputs, strict=True):
                state[name] = value if value.shape[0] == rows else value.expand(rows, *value.shape[1:])
            if loop is not None:
                state[loop.input.name] = state[loop.output]

    def solve(
        self,
        state: dict[str, Tensor],
        values: Values,
        rows: int,
        settings: NewtonSettings,
        *,
        small_steps: bool = False,
    ) -> Solved:
        """Solve for the unknowns from the first iterate in `state`, and write them into it.

        Args:
            state: givens and first iterate, `(rows, ...)` each.
            values: promoted parameters.
            rows: the batch.
            settings: of the Newton solve.
            small_steps: whether the relative test also asks for a small last step (`substep_del_tol`).

        Returns:
            The outcome; rows that have not converged hold their last iterate.
        """
        givens = self._givens.pack(state, rows)
        first = self.unknowns.pack(state, rows)
        parameters = values.common(self.spec.parameters)
        speaks = log.enabled("newton", "info")
        if speaks:
            log.emit("newton", "info", "---- begin newton solve ----")
        found = self._solve_rows(first, givens, parameters, settings, small_steps)
        if speaks:
            log.emit("newton", "info", newton.outcome_line(found.statistics, settings))
            log.emit("newton", "info", "---- end newton solve ----")
        state.update(self.unknowns.unpack(found.unknowns))
        return Solved(found.unknowns, found.statistics, givens, parameters)

    def _solve_rows(
        self, first: Groups, givens: Groups, parameters: Sequence[Tensor], settings: NewtonSettings, small_steps: bool
    ) -> newton.Solved:
        """Solve all rows; those that fail with chord steps are solved again, by Newton's method alone."""
        found = self._solve(first, givens, parameters, settings, small_steps)
        if found.statistics.all_converged or self._lockstep or not settings.chord_steps:
            return found
        # Without an update there was no chord step, and the second solve would end as the first.
        failed = ~found.statistics.converged & (found.statistics.iterations > 0)
        rows = failed.nonzero().squeeze(-1)
        if not len(rows):
            return found
        log.emit("newton", "debug", f"{len(rows)} row(s) failed with chord steps, and are solved again without them")
        first, givens = ([x.index_select(0, rows) for x in groups] for groups in (first, givens))
        again = self._solve(first, givens, parameters, replace(settings, chord_steps=False), small_steps)
        return newton.put(found, rows, again)

    def carry(
        self, solved: Solved, values: Values, tangents: Tangents, parameters: frozenset[str], *, cut: bool = False
    ) -> dict[str, Columns]:
        """Derivatives of the unknowns at the solution.

        Args:
            solved: the solve.
            values: promoted parameters.
            tangents: derivatives of the givens.
            parameters: authored names of the parameters to differentiate by.
            cut: whether the solve is over a part of the increment only. The compiled pairs are those that lead from the
                model's inputs to its outputs over the whole of it; over a part all givens may matter.

        Returns:
            Of each unknown, its derivatives by the seeds of `tangents` and by `parameters`.

        Raises:
            DerivativeNotCompiledError: a derivative over a part of the increment is not in the artifact.
        """
        found: dict[str, Columns] = {v.name: {} for v in self.spec.unknown_variables}
        if self.sensitivity is None:
            return found
        reached = {v.name for g in self.spec.givens for v in g.variables if tangents.get(v.name)}
        if reached:
            whole = cut and not self.sensitivity.covers(reached)
            direction = (self.sensitivity.along_all if whole else self.sensitivity.along)(solved, tangents, reached)
            if direction is not None:
                for name, columns in direction.items():
                    found[name].update(columns)
            else:
                for pair, block in self.sensitivity.blocks(solved):
                    for seed, column in tangents.get(pair.wrt, {}).items():
                        add(found[pair.out], seed, times(block, column))
        if any(name in parameters for name in self.sensitivity.parameters):
            for pair, block in self.sensitivity.parameter_blocks(solved, values):
                if pair.wrt in parameters:
                    add(found[pair.out], ("parameter", pair.wrt), block)
        return found


def _solver(spec: schema.ImplicitInfo, graphs: SystemGraphs, dtype: torch.dtype, lockstep: bool) -> tuple[Solve, str]:
    """How a segment is solved, and the name of the implementation with the reason for it."""
    if lockstep:
        return partial(_in_lockstep, graphs), "torch (lockstep)"
    if not graphs.factored or dtype != torch.float64 or any(g.structure != "dense" for g in spec.givens):
        return partial(_by_tensors, graphs), "torch (not one dense group on a CPU in float64)"
    if len(spec.givens) != 1 or not graphs.residual.takes_one_batch_axis:
        return partial(_by_tensors, graphs), "torch (not one group of givens, or pinned batch axes)"
    found, reason = means()
    if found is None:
        return partial(_by_tensors, graphs), f"torch ({reason})"
    n = sum(v.size for v in spec.unknown_variables)
    q = sum(v.size for g in spec.givens for v in g.variables)
    return _Native(graphs, found, n, q), f"native ({reason})"


class _Native:
    """Solves one dense group on a CPU by machine code; by tensors where its graphs have no C interface.

    Args:
        graphs: of the segment.
        means: what its graphs are called with.
        n: number of unknowns.
        q: number of entries of the givens.
    """

    def __init__(self, graphs: SystemGraphs, means: Means, n: int, q: int) -> None:
        self._graphs, self._means, self._sizes = graphs, means, (n, q)
        self._system: block.System | None = None
        self._by_tensors = False

    def __call__(
        self,
        first: Groups,
        givens: Groups,
        parameters: Sequence[Tensor],
        settings: NewtonSettings,
        small_steps: bool,
    ) -> newton.Solved:
        """See `Solve`."""
        graphs = self._graphs
        assert graphs.jacobian is not None
        if self._system is None and not self._by_tensors:
            self._load()
        if self._system is None or any(p.dtype != torch.float64 or not p.is_contiguous() for p in parameters):
            return _by_tensors(graphs, first, givens, parameters, settings, small_steps)
        arguments = [first[0], givens[0], *parameters]
        graphs.residual.require(arguments)
        graphs.jacobian.require(arguments)
        return self._system.solve(
            first[0], givens[0], parameters, settings, small_steps=small_steps, tell=newton.listener()
        )

    def _load(self) -> None:
        means, libraries = self._means, []
        assert self._graphs.jacobian is not None
        for graph in (self._graphs.residual, self._graphs.jacobian):
            try:
                libraries.append(graph.library())
            except Unavailable as error:
                log.emit("model", "info", f"{graph.file.name}: solved by torch's operations, since {error}")
                self._by_tensors = True
                return
        residual, jacobian = libraries
        self._system = block.System(
            residual, jacobian, means.functions, means.executor, means.code, *self._sizes, 2 * MAX_ROWS
        )


def _by_tensors(
    graphs: SystemGraphs,
    first: Groups,
    givens: Groups,
    parameters: Sequence[Tensor],
    settings: NewtonSettings,
    small_steps: bool,
) -> newton.Solved:
    """Solve any system."""
    criteria = criteria_of(settings, small_steps=small_steps)
    rows = TensorRows(graphs.system(givens, parameters), first, graphs.layouts, criteria)
    return newton.solve(rows, settings, newton.listener())


def _in_lockstep(
    graphs: SystemGraphs,
    first: Groups,
    givens: Groups,
    parameters: Sequence[Tensor],
    settings: NewtonSettings,
    small_steps: bool,
) -> newton.Solved:
    """Iterate as the C++ runtime does; a batch that fails is iterated again, to tell which rows did."""
    tell = newton.listener()
    if not small_steps:
        criteria = criteria_of(settings, as_native=True)
        rows = LockstepRows(graphs.system(givens, parameters), first, graphs.layouts, criteria)
        found = newton.solve(rows, settings, tell)
        if found.statistics.all_converged:
            return found
    criteria = criteria_of(settings, small_steps=True, as_native=True)
    return newton.solve(FrozenRows(graphs.system(givens, parameters), first, graphs.layouts, criteria), settings, tell)
