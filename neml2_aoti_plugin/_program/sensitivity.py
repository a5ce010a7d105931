"""Derivatives of the unknowns of a solved implicit segment by its givens and its parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .._artifact.schema import GroupInfo, ImplicitInfo, Pair, PairGraph, SolvedSensitivity
from .._solve.krylov import solve_linear
from .._solve.native import Derivatives
from .._solve.outcome import RowStatistics
from .._solve.system import Groups
from ..errors import AOTIError, DerivativeNotCompiledError
from ..settings import KrylovSettings
from .systems import GraphOf, SystemGraphs, check_arity, on_sound_rows
from .values import Columns, Tangents, Values, add, dense, joined, times, width_in

Blocks = list[tuple[Pair, Tensor]]


@dataclass
class SolvedSegment:
    """A solve with what its derivatives need: `unknowns`, `givens` and `jacobian` have one tensor per group."""

    unknowns: Groups
    statistics: RowStatistics
    givens: Groups
    # Promoted parameters as the solve's graphs take them.
    parameters: list[Tensor]
    # What the solve gave of its derivatives, `(rows, n, m)`.
    derivatives: Tensor | None = None
    # Blocks at the solution, once they have been asked for.
    jacobian: Groups = field(default_factory=list)


class Sensitivity:
    """The derivative graphs of an implicit segment."""

    def __init__(self, spec: ImplicitInfo, graphs: SystemGraphs, graph_of: GraphOf) -> None:
        self.spec, self._graphs = spec, graphs
        by_given, by_parameter = spec.sensitivity, spec.parameter_sensitivity
        self._fused = graph_of(by_given.file) if isinstance(by_given, PairGraph) else None
        self._fused_parameter = graph_of(by_parameter.file) if isinstance(by_parameter, PairGraph) else None
        self.jacobian = self.by_givens = self._solve_ift = None
        if isinstance(by_given, SolvedSensitivity):
            self.jacobian, self.by_givens = graph_of(by_given.jacobian), graph_of(by_given.file)
            self._solve_ift = graph_of(by_given.solver) if isinstance(by_given.solver, str) else None
        groups = (*spec.unknowns, *spec.givens, *spec.residuals)
        self._all_dense = all(group.structure == "dense" for group in groups)
        # A dense system is solved here, for the columns that the compiled pairs need alone.
        self.dense = graphs.factored and self._all_dense and self._solve_ift is not None
        self._of_unknowns, self._of_givens = _offsets(spec.unknowns), _offsets(spec.givens)
        self._chosen = (
            [k for wrt in dict.fromkeys(p.wrt for p in by_given.pairs) for k in range(*self._of_givens[wrt])]
            if by_given and self.dense
            else []
        )
        self._dr_dparam = self._solve_param = None
        if isinstance(by_parameter, SolvedSensitivity):
            self._dr_dparam = graph_of(by_parameter.file)
            self._solve_param = graph_of(by_parameter.solver) if isinstance(by_parameter.solver, str) else None

    def wanted(self, tangents: Tangents, rows: int, like: Tensor, cut: bool) -> Derivatives | None:
        """What `carry` will ask of a dense system; None where it is not solved here."""
        reached = self._reached(tangents)
        if not reached or not self.dense:
            return None
        if self._goes_along(tangents, reached, cut):
            return Derivatives(directions=self._directions(tangents, rows, like)[0])
        return Derivatives(self._chosen)

    def carry(
        self, solved: SolvedSegment, values: Values, tangents: Tangents, parameters: frozenset[str], cut: bool
    ) -> dict[str, Columns]:
        """Derivatives of each unknown at the solution, by the seeds of `tangents` and by `parameters`.

        `cut` says that the solve is over a part of the increment only. The compiled pairs are those that lead from the
        model's inputs to its outputs over the whole of it; over a part all givens may matter.
        """
        found: dict[str, Columns] = {v.name: {} for v in self.spec.unknown_variables}
        reached = self._reached(tangents)
        if reached and self._goes_along(tangents, reached, cut):
            for name, columns in self._along(solved, tangents).items():
                found[name].update(columns)
        elif reached:
            for pair, block in self._blocks(solved):
                for seed, column in tangents.get(pair.wrt, {}).items():
                    add(found[pair.out], seed, times(block, column))
        by_parameter = self.spec.parameter_sensitivity
        if by_parameter and any(pair.wrt in parameters for pair in by_parameter.pairs):
            for pair, block in self._parameter_blocks(solved, values):
                if pair.wrt in parameters:
                    add(found[pair.out], ("parameter", pair.wrt), block)
        return found

    def _reached(self, tangents: Tangents) -> set[str]:
        """The givens that have a derivative."""
        return {v.name for g in self.spec.givens for v in g.variables if tangents.get(v.name)}

    def _goes_along(self, tangents: Tangents, reached: set[str], cut: bool) -> bool:
        """Whether derivatives are taken along the tangents from the whole Jacobians, rather than from compiled pairs.

        So it is where there is one direction, which takes one right-hand side; and over a part of an increment, where
        not all pairs are compiled.
        """
        seeds = {seed for name in reached for seed in tangents[name]}
        columns = [tangents[name].get(seed) for name in reached for seed in seeds]
        one = len(seeds) == 1 and all(c is not None and c.shape[-1] == 1 for c in columns)
        if one and self.by_givens is not None and self._graphs.solve is not None and self._all_dense:
            return True
        compiled = {(p.out, p.wrt) for p in self.spec.sensitivity.pairs} if self.spec.sensitivity else set()
        if not cut or all((v.name, name) in compiled for v in self.spec.unknown_variables for name in reached):
            return False
        if self.by_givens is None or not self._all_dense:
            raise DerivativeNotCompiledError(
                f"the derivative of a step that was cut into substeps leads through {', '.join(sorted(reached))}, by "
                "which the derivatives of the unknowns were not compiled. Compile them: neml2-compile ... -d :."
            )
        return True

    def _directions(self, tangents: Tangents, rows: int, like: Tensor) -> tuple[Tensor, dict[tuple[str, str], int]]:
        """The tangents of all givens by all seeds side by side, `(rows, q, m)`, and the columns of each seed."""
        variables = [v for group in self.spec.givens for v in group.variables]
        widths: dict[tuple[str, str], int] = {}
        for v in variables:
            for seed, column in tangents.get(v.name, {}).items():
                widths[seed] = v.size if column is None else column.shape[-1]
        parts = []
        for v in variables:
            columns = dense(tangents.get(v.name, {}), like.new_empty(0, v.size))
            line = [columns.get(seed, like.new_zeros((1, v.size, width))) for seed, width in widths.items()]
            parts.append(torch.cat([x.expand(rows, -1, -1) for x in line], -1))
        return torch.cat(parts, 1), widths

    def _along(self, solved: SolvedSegment, tangents: Tangents) -> dict[str, Columns]:
        """Derivatives by all seeds of the givens, from the whole Jacobians."""
        rows, u = solved.unknowns[0].shape[0], solved.unknowns
        along, widths = self._directions(tangents, rows, u[0])
        du = self._solve_along(solved, along) if solved.derivatives is None else [solved.derivatives]
        found: dict[str, Columns] = {}
        for group, tensor in zip(self.spec.unknowns, du, strict=True):
            parts = tensor.split([v.size for v in group.variables], 1)
            for v, part in zip(group.variables, parts, strict=True):
                found[v.name] = dict(zip(widths, part.split(list(widths.values()), -1), strict=True))
        return found

    def _solve_along(self, solved: SolvedSegment, along: Tensor) -> Groups:
        """Derivatives of the unknowns along directions of the givens, `(rows, n, m)` per group."""
        rows, u = along.shape[0], solved.unknowns
        assert self.by_givens is not None
        by_given = self.by_givens([*u, *solved.givens], solved.parameters)
        count = len(self.spec.givens)
        check_arity(self.by_givens, by_given, len(self.spec.residuals) * count)
        parts = along.split([sum(width_in(v, g) for v in g.variables) for g in self.spec.givens], 1)
        b = []
        for i in range(len(self.spec.residuals)):
            terms = [by_given[i * count + j] @ parts[j] for j in range(count)]
            b.append(-sum(terms[1:], start=terms[0]).expand(rows, -1, -1))
        a = self._a(solved)
        if self.dense:
            return [_solved(a[0].expand(rows, -1, -1), -b[0])]
        if self._graphs.solve is not None:
            solve = self._graphs.solve
            single = [on_sound_rows(solve, [*a, *(x[..., k] for x in b)], u) for k in range(b[0].shape[-1])]
            return [torch.stack([x[i] for x in single], -1) for i in range(len(u))]
        by = self.spec.sensitivity
        assert isinstance(by, SolvedSensitivity) and isinstance(by.solver, KrylovSettings), "without a solve graph"
        whole = _krylov(a, torch.cat(b, 1), by.solver)
        return list(whole.split([x.shape[-1] for x in u], 1))

    def _a(self, solved: SolvedSegment) -> Groups:
        """The Jacobian blocks at the solution, which is a polishing step beyond the last that the solve evaluated."""
        if not solved.jacobian:
            assert self.jacobian is not None, "only asked for where the segment has the graph"
            of = solved.unknowns, solved.givens, solved.parameters
            solved.jacobian = self._graphs.linearised(self.jacobian, *of)[0]
        return solved.jacobian

    def _blocks(self, solved: SolvedSegment) -> Blocks:
        """`du/dg` of every compiled pair, `(rows, entries of u, entries of g)`."""
        by_given = self.spec.sensitivity
        if by_given is None:
            return []
        u = solved.unknowns
        if self._fused is not None:
            return _cut(self._fused([*u, *solved.givens], solved.parameters), by_given.pairs)
        if solved.derivatives is not None:
            return self._of_columns(solved.derivatives, by_given.pairs)
        assert self.by_givens is not None and isinstance(by_given, SolvedSensitivity)
        b = self.by_givens([*u, *solved.givens], solved.parameters)
        a = self._a(solved)
        if isinstance(by_given.solver, KrylovSettings):
            return _cut([-_krylov(a, torch.cat(b, -1), by_given.solver)], by_given.pairs)
        rows = u[0].shape[0]
        if self.dense:
            sides = joined(b).expand(rows, -1, -1)[..., self._chosen]
            return self._of_columns(_solved(a[0].expand(rows, -1, -1), sides), by_given.pairs)
        assert self._solve_ift is not None
        a, b = ([x if x.shape[0] == rows else x.expand(rows, *x.shape[1:]) for x in part] for part in (a, b))
        like = [u[0].new_empty((rows, p.rows, p.columns)) for p in by_given.pairs]
        return _cut(on_sound_rows(self._solve_ift, [*a, *b], like), by_given.pairs)

    def _of_columns(self, x: Tensor, pairs: Sequence[Pair]) -> Blocks:
        """The compiled pairs out of `(rows, n, chosen columns)`."""
        places = {k: i for i, k in enumerate(self._chosen)}
        found = []
        for pair in pairs:
            start = places[self._of_givens[pair.wrt][0]]
            found.append((pair, x[:, slice(*self._of_unknowns[pair.out]), start : start + pair.columns]))
        return found

    def _parameter_blocks(self, solved: SolvedSegment, values: Values) -> Blocks:
        """`du/dp` of every compiled pair, `(rows, entries of u, entries of p)`."""
        by_parameter = self.spec.parameter_sensitivity
        assert by_parameter is not None, "only asked for where there are such pairs"
        u = solved.unknowns
        rows = u[0].shape[0]
        arguments = [*u, *solved.givens, *values.expanded(self.spec.parameters, rows)]
        if self._fused_parameter is not None:
            found = self._fused_parameter(arguments)
        else:
            assert self._dr_dparam is not None and isinstance(by_parameter, SolvedSensitivity)
            a, dr_dp = (x.expand(rows, *x.shape[1:]) for x in self._dr_dparam(arguments))
            if isinstance(by_parameter.solver, KrylovSettings):
                return _cut([-_krylov([a], dr_dp, by_parameter.solver)], by_parameter.pairs)
            assert self._solve_param is not None
            like = [u[0].new_empty((rows, *p.out_base_shape, *p.wrt_base_shape)) for p in by_parameter.pairs]
            found = on_sound_rows(self._solve_param, [a, dr_dp], like)
        blocks = _cut(found, by_parameter.pairs)
        return [(pair, block.reshape((block.shape[0], pair.rows, pair.columns))) for pair, block in blocks]


def _solved(a: Tensor, b: Tensor) -> Tensor:
    """`-A^-1 B`; NaN in rows whose matrix is singular."""
    factors, pivots, info = torch.linalg.lu_factor_ex(a)
    x: Tensor = -torch.linalg.lu_solve(factors, pivots, b)
    return x.masked_fill((info != 0)[:, None, None], torch.nan)


def _offsets(groups: tuple[GroupInfo, ...]) -> dict[str, tuple[int, int]]:
    """First and last-but-one place of each variable's entries, group after group."""
    found, start = {}, 0
    for group in groups:
        for v in group.variables:
            found[v.name] = (start, start + v.size)
            start += v.size
    return found


def _cut(outputs: Groups, pairs: tuple[Pair, ...]) -> Blocks:
    found = []
    for pair in pairs:
        block = outputs[pair.output]
        if pair.row is not None and pair.column is not None:
            block = block[..., pair.row : pair.row + pair.rows, pair.column : pair.column + pair.columns]
        if block.ndim > 3 and pair.row is not None:
            # The sites of a block group stand before its rows.
            block = block.flatten(1, -2)
        found.append((pair, block))
    return found


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
