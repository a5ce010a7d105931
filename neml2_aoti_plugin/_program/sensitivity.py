"""Derivatives of the unknowns of a solved implicit segment by its givens and its parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._artifact.schema import DerivativePair, DirectStep, ImplicitInfo, PairGraph, SolvedSensitivity
from .._graphs.graph import Graph
from .._solve.krylov import solve_linear
from .._solve.native import WantedDerivatives
from .._solve.outcome import RowStatistics
from .._solve.system import Groups
from ..errors import AOTIError, DerivativeNotCompiledError
from ..settings import KrylovSettings
from .systems import check_arity, jacobian_blocks, on_sound_rows
from .values import Columns, Seed, Tangents, Values, add, dense, places_in, times, width_in

PairBlocks = Iterable[tuple[DerivativePair, Tensor]]


@dataclass(frozen=True)
class SolvedSegment:
    """A solve with what its derivatives need: `unknowns` and `givens` have one tensor per group."""

    unknowns: Groups
    statistics: RowStatistics
    givens: Groups
    # Promoted parameters as the solve's graphs take them.
    parameters: list[Tensor]
    # What the solve gave of its derivatives, `(rows, n, m)`.
    derivatives: Tensor | None = None


class Sensitivity:
    """The derivatives of an implicit segment, as far as they were compiled."""

    def __init__(self, spec: ImplicitInfo, graphs: Mapping[str, Graph], factored: bool) -> None:
        self.spec, self._graphs = spec, graphs
        all_dense = all(group.structure == "dense" for group in (*spec.unknowns, *spec.givens, *spec.residuals))
        # The whole Jacobians, where there are graphs of them.
        self.whole = spec.sensitivity if isinstance(spec.sensitivity, SolvedSensitivity) and all_dense else None
        # A dense system is solved here, for the columns that the compiled pairs need alone.
        self.dense = factored and self.whole is not None and isinstance(self.whole.solver, str)
        self._unknowns, self._givens = places_in(spec.unknowns), places_in(spec.givens)
        self._compiled = {(p.out, p.wrt) for p in spec.sensitivity.pairs} if spec.sensitivity else set()
        wrts = dict.fromkeys(p.wrt for p in spec.sensitivity.pairs) if spec.sensitivity else ()
        self._chosen = [k for wrt in wrts for k in range(self._givens[wrt].start, self._givens[wrt].stop)]

    def wanted(self, tangents: Tangents, rows: int, like: Tensor, cut: bool) -> WantedDerivatives | None:
        """What `carry` will ask of a dense system; None where it is not solved here."""
        reached = self._reached(tangents)
        if not reached or not self.dense:
            return None
        if self._goes_along(tangents, reached, cut):
            return WantedDerivatives(directions=self._directions(tangents, rows, like)[0])
        return WantedDerivatives(self._chosen)

    def carry(
        self, solved: SolvedSegment, values: Values, tangents: Tangents, parameters: frozenset[str], cut: bool = False
    ) -> dict[str, Columns]:
        """Derivatives of each unknown at the solution, by the seeds of `tangents` and by `parameters`.

        `cut` says that the solve is over a part of the increment only. The compiled pairs are those that lead from the
        model's inputs to its outputs over the whole of it; over a part all givens may matter.
        """
        found: dict[str, Columns] = {v.name: {} for v in self.spec.unknown_variables}
        reached = self._reached(tangents)
        if reached and self._goes_along(tangents, reached, cut):
            along, widths = self._directions(tangents, solved.unknowns[0].shape[0], solved.unknowns[0])
            du = self._along(solved, along) if solved.derivatives is None else [solved.derivatives]
            for group, tensor in zip(self.spec.unknowns, du, strict=True):
                parts = tensor.split([v.size for v in group.variables], 1)
                for v, part in zip(group.variables, parts, strict=True):
                    found[v.name].update(zip(widths, part.split(list(widths.values()), -1), strict=True))
        elif reached and self.spec.sensitivity is not None:
            for pair, block in self._by_givens(self.spec.sensitivity, solved):
                for seed, column in tangents.get(pair.wrt, {}).items():
                    add(found[pair.out], seed, times(block, column))
        own = self.spec.parameter_sensitivity
        if own is not None and any(pair.wrt in parameters for pair in own.pairs):
            for pair, block in self._by_parameters(own, solved, values):
                if pair.wrt in parameters:
                    term = block.reshape((block.shape[0], pair.rows, pair.columns))
                    add(found[pair.out], ("parameter", pair.wrt), term)
        return found

    def _reached(self, tangents: Tangents) -> list[str]:
        """The givens that have a derivative."""
        return [name for name in self._givens if tangents.get(name)]

    def _goes_along(self, tangents: Tangents, reached: list[str], cut: bool) -> bool:
        """Whether derivatives are taken along the tangents from the whole Jacobians, rather than from compiled pairs.

        So it is where there is one direction, which takes one right-hand side; and over a part of an increment, where
        not all pairs are compiled.
        """
        seeds = {seed for name in reached for seed in tangents[name]}
        if len(seeds) == 1 and self.whole is not None and isinstance(self.spec.step, DirectStep):
            (seed,) = seeds
            columns = [tangents[name].get(seed) for name in reached]
            if all(column is not None and column.shape[-1] == 1 for column in columns):
                return True
        if not cut or all((out, name) in self._compiled for out in self._unknowns for name in reached):
            return False
        if self.whole is None:
            raise DerivativeNotCompiledError(
                f"the derivative of a step that was cut into substeps leads through {', '.join(sorted(reached))}, by "
                "which the derivatives of the unknowns were not compiled. Compile them: neml2-compile ... -d :."
            )
        return True

    def _directions(self, tangents: Tangents, rows: int, like: Tensor) -> tuple[Tensor, dict[Seed, int]]:
        """The tangents of all givens by all seeds side by side, `(rows, q, m)`, and the columns of each seed."""
        variables = [v for group in self.spec.givens for v in group.variables]
        widths: dict[Seed, int] = {}
        for v in variables:
            for seed, column in tangents.get(v.name, {}).items():
                widths[seed] = v.size if column is None else column.shape[-1]
        parts = []
        for v in variables:
            columns = dense(tangents.get(v.name, {}), like.new_empty(0, v.size))
            line = [columns.get(seed, like.new_zeros((1, v.size, width))) for seed, width in widths.items()]
            parts.append(torch.cat([x.expand(rows, -1, -1) for x in line], -1))
        return torch.cat(parts, 1), widths

    def _along(self, solved: SolvedSegment, along: Tensor) -> Groups:
        """Derivatives of the unknowns along directions of the givens, `(rows, n, m)` per group."""
        rows, u, spec, of = along.shape[0], solved.unknowns, self.spec, self.whole
        assert of is not None, "only asked for where there are such graphs"
        a, by_given = self._jacobians(of, solved)
        count = len(spec.givens)
        check_arity(self._graphs[of.file], by_given, len(spec.residuals) * count)
        parts = along.split([sum(width_in(v, g) for v in g.variables) for g in spec.givens], 1)
        b = []
        for i in range(len(spec.residuals)):
            terms = [by_given[i * count + j] @ parts[j] for j in range(count)]
            b.append(-sum(terms[1:], start=terms[0]).expand(rows, -1, -1))
        if self.dense:
            return [_solved(a[0].expand(rows, -1, -1), -b[0])]
        if isinstance(spec.step, DirectStep):
            solve = self._graphs[spec.step.solve]
            single = [on_sound_rows(solve, [*a, *(x[..., k] for x in b)], u) for k in range(b[0].shape[-1])]
            return [torch.stack([x[i] for x in single], -1) for i in range(len(u))]
        assert isinstance(of.solver, KrylovSettings), "without a solve graph"
        return list(_krylov(a, torch.cat(b, 1), of.solver).split([x.shape[-1] for x in u], 1))

    def _jacobians(self, of: SolvedSensitivity, solved: SolvedSegment) -> tuple[Groups, Groups]:
        """The blocks of the Jacobian at the solution, a last step beyond what the solve saw; those by the givens."""
        variables = [*solved.unknowns, *solved.givens]
        b = self._graphs[of.file](variables, solved.parameters)
        return jacobian_blocks(self.spec, self._graphs[of.jacobian], variables, solved.parameters)[0], b

    def _by_givens(self, of: PairGraph | SolvedSensitivity, solved: SolvedSegment) -> PairBlocks:
        """`du/dg` of every compiled pair, `(rows, entries of u, entries of g)`."""
        u = solved.unknowns
        rows, x = u[0].shape[0], solved.derivatives
        if isinstance(of, PairGraph):
            return _cut(self._graphs[of.file]([*u, *solved.givens], solved.parameters), of.pairs)
        if x is None:
            a, b = self._jacobians(of, solved)
            if not self.dense:
                like = [u[0].new_empty((rows, p.rows, p.columns)) for p in of.pairs]
                return self._solved_pairs(of, a, b, like)
            x = _solved(a[0].expand(rows, -1, -1), torch.cat(b, -1).expand(rows, -1, -1)[..., self._chosen])
        starts = [self._chosen.index(self._givens[pair.wrt].start) for pair in of.pairs]
        return [
            (p, x[:, self._unknowns[p.out], start : start + p.columns])
            for p, start in zip(of.pairs, starts, strict=True)
        ]

    def _by_parameters(self, of: PairGraph | SolvedSensitivity, solved: SolvedSegment, values: Values) -> PairBlocks:
        """`du/dp` of every compiled pair, `(rows, entries of u, ...)`."""
        u = solved.unknowns
        rows = u[0].shape[0]
        found = self._graphs[of.file]([*u, *solved.givens, *values.expanded(self.spec.parameters, rows)])
        if isinstance(of, PairGraph):
            return _cut(found, of.pairs)
        like = [u[0].new_empty((rows, *p.out_base_shape, *p.wrt_base_shape)) for p in of.pairs]
        return self._solved_pairs(of, found[:1], found[1:], like)

    def _solved_pairs(self, of: SolvedSensitivity, a: Groups, b: Groups, like: Groups) -> PairBlocks:
        """Blocks of the pairs by the solver that was compiled, for Jacobians `(rows or 1, ...)`."""
        rows = like[0].shape[0]
        a, b = ([x if x.shape[0] == rows else x.expand(rows, *x.shape[1:]) for x in part] for part in (a, b))
        if isinstance(of.solver, KrylovSettings):
            return _cut([-_krylov(a, torch.cat(b, -1), of.solver)], of.pairs)
        return _cut(on_sound_rows(self._graphs[of.solver], [*a, *b], like), of.pairs)


def _solved(a: Tensor, b: Tensor) -> Tensor:
    """`-A^-1 B`; NaN in rows whose matrix is singular."""
    factors, pivots, info = torch.linalg.lu_factor_ex(a)
    x: Tensor = -torch.linalg.lu_solve(factors, pivots, b)
    return x.masked_fill((info != 0)[:, None, None], torch.nan)


def _cut(outputs: Groups, pairs: Sequence[DerivativePair]) -> PairBlocks:
    """The blocks among the outputs of a graph; where they are parts of one, sites stand before its rows."""
    for pair in pairs:
        block = outputs[pair.output]
        if pair.row is not None and pair.column is not None:
            block = block[..., pair.row : pair.row + pair.rows, pair.column : pair.column + pair.columns]
            block = block.flatten(1, -2) if block.ndim > 3 else block
        yield pair, block


def _krylov(a: Groups, b: Tensor, settings: KrylovSettings) -> Tensor:
    """`A^-1 B` column by column, as rows of one batch."""
    if len(a) != 1:
        raise AOTIError(
            f"an iterative sensitivity solve takes one dense group of unknowns, this model has {len(a)} blocks; "
            "compile it with a direct linear solver"
        )
    rows, n, columns = b.shape
    matrix = a[0].expand(rows, n, n)
    flat = b.transpose(1, 2).reshape(rows * columns, n)

    def product(v: Tensor) -> Tensor:
        return torch.matmul(matrix, v.reshape(rows, columns, n).transpose(1, 2)).transpose(1, 2).reshape(-1, n)

    return solve_linear(product, flat, settings).x.reshape(rows, columns, n).transpose(1, 2)
