"""Implicit segments: predictor, Newton solve, and derivatives by the implicit function theorem."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import log
from ..artifact.schema import ImplicitSegment
from ..errors import ConvergenceError
from ..settings import NewtonSettings
from ..solve import lockstep, newton
from ..solve.groups import norms
from ..solve.linesearch import Residual
from ..solve.rows import Rows, Told
from .packing import Packing, layout_of
from .parameters import Values
from .sensitivity import Sensitivity, sensitivity_of
from .systems import GraphOf, Groups, System, check_arity, system_of
from .tangents import Columns, Tangents, add, times


@dataclass
class Solved:
    """A solve with what its derivatives need.

    Args:
        rows: outcome of each row; the unknowns are `rows.unknowns`.
        givens: the givens that were held.
        tail: promoted parameters as the solve's graphs take them.
        jacobian: blocks at the solution, once they have been asked for.
    """

    rows: Rows
    givens: Groups
    tail: list[Tensor]
    jacobian: Groups = field(default_factory=list)


class ImplicitStage:
    """An implicit segment with its graphs.

    Args:
        spec: the segment.
        graph_of: gives the graph of a file.
        device: that the graphs run on.
        in_lockstep: whether all rows iterate until the slowest has converged, as in neml2's C++ runtime.
    """

    def __init__(self, spec: ImplicitSegment, graph_of: GraphOf, device: torch.device, in_lockstep: bool) -> None:
        self.spec = spec
        self.system: System = system_of(spec, graph_of, device, as_native=in_lockstep)
        self.layouts = layout_of(spec.unknowns), layout_of(spec.residuals)
        self.unknowns, self._givens = Packing(spec.unknowns), Packing(spec.givens)
        self.predictor = graph_of(spec.predictor.file) if spec.predictor else None
        # Unknowns that need a first iterate before a predictor speaks.
        told = set(spec.predictor.outputs) - set(spec.predictor.inputs) if spec.predictor else set()
        self._untold = [v for v in spec.unknown_variables if v.name not in told]
        self.sensitivity: Sensitivity | None = sensitivity_of(spec, graph_of)
        self.in_lockstep = in_lockstep

    @property
    def common_parameters(self) -> tuple[str, ...]:
        """Parameters that the graphs take once for all rows."""
        return self.spec.parameters

    def guess(self, state: dict[str, Tensor], rows: int) -> None:
        """Put the first iterate of the unknowns into `state`: what is there, else zero, else what a predictor says."""
        like = next(iter(state.values()))
        for unknown in self._untold:
            if unknown.name not in state:
                state[unknown.name] = like.new_zeros((rows, *unknown.natural_shape))
        if self.predictor is None or self.spec.predictor is None:
            return
        spec, loop = self.spec.predictor, self.spec.predictor.feedback
        if loop is not None:
            state[loop.input.name] = like.new_zeros((rows, *loop.input.natural_shape))
        for _ in range(loop.iterations if loop is not None else 1):
            outputs = self.predictor([state[name] for name in spec.inputs])
            check_arity(self.predictor, outputs, len(spec.outputs))
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
        gated: bool = False,
    ) -> Solved:
        """Solve for the unknowns from the guess in `state`, and write them into it.

        Args:
            state: givens and first iterate, `(rows, ...)` each.
            values: promoted parameters.
            rows: the batch.
            settings: of the Newton solve.
            gated: see `newton.solve_rows`.

        Returns:
            The outcome; rows that have not converged hold their last iterate.
        """
        givens = self._givens.pack(state, rows)
        # A solve that is content with its guess must not hand the caller's own tensor back.
        first = self.unknowns.pack(state, rows, own=True)
        tail = values.common(self.spec.parameters)
        # A lockstep solve that is not gated writes these lines itself.
        speaks = log.enabled("newton", "info") and (gated or not self.in_lockstep)
        if speaks:
            log.emit("newton", "info", "---- begin newton solve ----")
        if self.in_lockstep:
            found = self._in_lockstep(first, givens, tail, settings, gated)
        else:
            found = newton.solve_rows(self.system.fresh(), first, givens, tail, self.layouts, settings, gated=gated)
        if speaks:
            log.emit("newton", "info", _outcome(found, settings))
            log.emit("newton", "info", "---- end newton solve ----")
        state.update(self.unknowns.unpack(found.unknowns))
        return Solved(found, givens, tail)

    def _in_lockstep(
        self, first: Groups, givens: Groups, tail: list[Tensor], settings: NewtonSettings, gated: bool
    ) -> Rows:
        """Iterate as the C++ runtime does; a batch that fails is iterated again, to tell which rows did."""
        system = self.system.fresh()

        def residual(u: Groups) -> Groups:
            return system.residual(u, givens, tail)

        def step(u: Groups) -> tuple[Groups, Groups]:
            b, linear = system.evaluate(u, givens, tail)
            return system.direction(u, givens, tail, b, linear), b

        of_u, of_r = self.layouts
        rows = first[0].shape[0]
        if not gated:
            try:
                u, steps = lockstep.solve(residual, step, first, of_u, of_r, settings)
                converged = torch.ones(rows, dtype=torch.bool, device=first[0].device)
                return self._rows(u, converged, steps, residual, first)
            except ConvergenceError:
                system = self.system.fresh()
        u, converged, steps = lockstep.solve_masked(residual, step, first, of_u, of_r, settings)
        return self._rows(u, converged, steps, residual, first)

    def _rows(self, u: Groups, converged: Tensor, steps: int, residual: Residual, first: Groups) -> Rows:
        iterations = torch.full_like(converged, steps, dtype=torch.int64)
        norm, norm0 = (norms(residual(x), self.layouts[1]) for x in (u, first))
        told = Told(converged, iterations, norm, norm0)
        return Rows(u, lambda: told)

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


def _outcome(found: Rows, settings: NewtonSettings) -> str:
    """The line that ends a solve in the log."""
    told = found.told
    steps = int(told.iterations.max()) if told.iterations.numel() else 0
    if found.all_converged:
        absolute = told.norm < settings.atol
        relative = told.norm / told.norm0 < settings.rtol
        reason = "mixed"
        if bool(absolute.all()):
            reason = "both" if bool(relative.all()) else "abs_tol"
        elif bool(relative.all()):
            reason = "rel_tol"
        return f"{'converged' if steps else 'converged at predictor'} (iters={steps}, reason={reason})"
    if not bool(told.norm.isfinite().all()):
        return f"diverged at iter {steps} (non-finite residual)"
    worst, worst0 = told.norm.max().item(), told.norm0.max().item()
    return f"NOT converged (max_iters={settings.miters}, |R|={worst:.6e}, |R0|={worst0:.6e})"
