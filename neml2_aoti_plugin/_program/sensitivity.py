"""Derivatives of the unknowns of a solved implicit segment by its givens and its parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._artifact.schema import (
    FusedSensitivity,
    GivenSensitivity,
    GroupInfo,
    ImplicitInfo,
    Pair,
    ParameterSensitivity,
)
from .._solve import choice
from .._solve.block import columns
from .._solve.krylov import solve_linear
from .._solve.system import Groups
from ..errors import AOTIError, DerivativeNotCompiledError
from ..settings import KrylovSettings
from .copies import contiguous, joined
from .packing import width_in
from .systems import GraphOf, SystemGraphs, check_arity, on_sound_rows
from .tangents import Columns, Tangents

if TYPE_CHECKING:
    from .implicit import Solved
    from .parameters import Values

Blocks = list[tuple[Pair, Tensor]]


class Sensitivity:
    """The derivative graphs of an implicit segment.

    Args:
        spec: the segment.
        graphs: of its system.
        graph_of: gives the graph of a file.
    """

    def __init__(self, spec: ImplicitInfo, graphs: SystemGraphs, graph_of: GraphOf) -> None:
        self.spec, self._graphs = spec, graphs
        by_given, by_parameter = spec.sensitivity, spec.parameter_sensitivity
        self._fused = graph_of(by_given.file) if isinstance(by_given, FusedSensitivity) else None
        self._fused_parameter = graph_of(by_parameter.file) if isinstance(by_parameter, FusedSensitivity) else None
        self._jacobian = self._given = self._solve_ift = None
        if isinstance(by_given, GivenSensitivity):
            self._jacobian, self._given = graph_of(by_given.jacobian), graph_of(by_given.jacobian_given)
            self._solve_ift = graph_of(by_given.solver) if isinstance(by_given.solver, str) else None
        # A dense system is solved here, for the columns that the compiled pairs need alone.
        self._dense = graphs.factored and self._all_dense
        self._code = choice.machine()[0] if self._dense else None
        self._offsets = _offsets(spec.unknowns), _offsets(spec.givens)
        self._dr_dparam = self._solve_param = None
        if isinstance(by_parameter, ParameterSensitivity):
            self._dr_dparam = graph_of(by_parameter.dr_dparam)
            self._solve_param = graph_of(by_parameter.solver) if isinstance(by_parameter.solver, str) else None

    @property
    def parameters(self) -> set[str]:
        """Parameters by which the unknowns can be differentiated."""
        return {p.wrt for p in self.spec.parameter_sensitivity.pairs} if self.spec.parameter_sensitivity else set()

    def along(self, solved: Solved, tangents: Tangents, reached: set[str]) -> dict[str, Columns] | None:
        """Derivatives along one direction, by a solve with one right-hand side.

        Args:
            solved: the solve.
            tangents: derivatives of the givens.
            reached: the givens that have one.

        Returns:
            Derivatives of each unknown; None where the graphs or the tangents ask for `blocks` instead.
        """
        seeds = {seed for name in reached for seed in tangents[name]}
        columns = [tangents[name].get(seed) for name in reached for seed in seeds]
        if self._given is None or self._graphs.solve is None or not self._all_dense or len(seeds) != 1:
            return None
        if any(c is None or c.shape[-1] != 1 for c in columns):
            return None
        return self.along_all(solved, tangents, reached)

    def covers(self, reached: set[str]) -> bool:
        """Whether `blocks` has the derivatives of all unknowns by all the givens named."""
        compiled = {(p.out, p.wrt) for p in self.spec.sensitivity.pairs} if self.spec.sensitivity else set()
        return all((v.name, name) in compiled for v in self.spec.unknown_variables for name in reached)

    @property
    def _all_dense(self) -> bool:
        groups = (*self.spec.unknowns, *self.spec.givens, *self.spec.residuals)
        return all(group.structure == "dense" for group in groups)

    def along_all(self, solved: Solved, tangents: Tangents, reached: set[str]) -> dict[str, Columns]:
        """Derivatives by all seeds of the givens, from the whole Jacobians rather than from compiled pairs.

        Args:
            solved: the solve.
            tangents: derivatives of the givens.
            reached: the givens that have one.

        Returns:
            Derivatives of each unknown.

        Raises:
            DerivativeNotCompiledError: the artifact does not hold the graphs.
        """
        if self._given is None or not self._all_dense:
            raise DerivativeNotCompiledError(
                f"the derivative of a step that was cut into substeps leads through {', '.join(sorted(reached))}, by "
                "which the derivatives of the unknowns were not compiled. Compile them: neml2-compile ... -d :."
            )
        rows, u = solved.unknowns[0].shape[0], solved.unknowns
        widths = {
            seed: tangents[v.name][seed].shape[-1] if tangents[v.name][seed] is not None else v.size  # type: ignore[union-attr]
            for group in self.spec.givens
            for v in group.variables
            for seed in tangents.get(v.name, {})
        }
        along = [
            torch.cat([_pack_direction(group, tangents, seed, rows, m, u[0]) for seed, m in widths.items()], -1)
            for group in self.spec.givens
        ]
        by_given = self._given([*u, *solved.givens], solved.parameters)
        count = len(self.spec.givens)
        check_arity(self._given, by_given, len(self.spec.residuals) * count)
        b = []
        for i in range(len(self.spec.residuals)):
            terms = [by_given[i * count + j] @ along[j] for j in range(count)]
            b.append(-sum(terms[1:], start=terms[0]).expand(rows, -1, -1))
        a = self._a(solved)
        if self._dense:
            du = [self._columns(a[0].expand(rows, -1, -1), -b[0], list(range(b[0].shape[-1])))]
        elif self._graphs.solve is not None:
            solve = self._graphs.solve
            single = [on_sound_rows(solve, [*a, *(x[..., k] for x in b)], u) for k in range(b[0].shape[-1])]
            du = [torch.stack([x[i] for x in single], -1) for i in range(len(u))]
        else:
            by = self.spec.sensitivity
            assert isinstance(by, GivenSensitivity) and isinstance(by.solver, KrylovSettings), "without a solve graph"
            whole = _krylov(a, torch.cat(b, 1), by.solver)
            du = list(whole.split([x.shape[-1] for x in u], 1))
        found: dict[str, Columns] = {}
        for group, tensor in zip(self.spec.unknowns, du, strict=True):
            start = 0
            for v in group.variables:
                rows_of_v = tensor[:, start : start + v.size]
                found[v.name] = dict(zip(widths, rows_of_v.split(list(widths.values()), -1), strict=True))
                start += v.size
        return found

    def _a(self, solved: Solved) -> Groups:
        """The Jacobian blocks at the solution, which is a polishing step beyond the last that the solve evaluated."""
        if solved.jacobian:
            return solved.jacobian
        assert self._jacobian is not None, "only asked for where the segment has the graph"
        outputs = self._jacobian([*solved.unknowns, *solved.givens], solved.parameters)
        count = len(self.spec.residuals) * len(self.spec.unknowns)
        check_arity(self._jacobian, outputs, count + len(self.spec.residuals))
        solved.jacobian = outputs[:count]
        return solved.jacobian

    def blocks(self, solved: Solved) -> Blocks:
        """`du/dg` of every compiled pair, `(rows, entries of u, entries of g)`."""
        by_given = self.spec.sensitivity
        if by_given is None:
            return []
        u = solved.unknowns
        if self._fused is not None:
            return _cut(self._fused([*u, *solved.givens], solved.parameters), by_given.pairs)
        assert self._given is not None and isinstance(by_given, GivenSensitivity)
        b = self._given([*u, *solved.givens], solved.parameters)
        a = self._a(solved)
        if isinstance(by_given.solver, KrylovSettings):
            return _cut([-_krylov(a, torch.cat(b, -1), by_given.solver)], by_given.pairs)
        rows = u[0].shape[0]
        if self._dense:
            return self._dense_blocks(a[0].expand(rows, -1, -1), joined(b).expand(rows, -1, -1), by_given.pairs)
        assert self._solve_ift is not None
        a, b = ([x if x.shape[0] == rows else x.expand(rows, *x.shape[1:]) for x in part] for part in (a, b))
        like = [u[0].new_empty((rows, p.rows, p.columns)) for p in by_given.pairs]
        return _cut(on_sound_rows(self._solve_ift, [*a, *b], like), by_given.pairs)

    def _dense_blocks(self, a: Tensor, b: Tensor, pairs: tuple[Pair, ...]) -> Blocks:
        """`-A^-1 B` of the compiled pairs, by the columns of `B` that they need."""
        of_u, of_g = self._offsets
        chosen = [k for wrt in dict.fromkeys(p.wrt for p in pairs) for k in range(*of_g[wrt])]
        places = {k: i for i, k in enumerate(chosen)}
        x = self._columns(a, b, chosen)
        found = []
        for pair in pairs:
            start = places[of_g[pair.wrt][0]]
            found.append((pair, x[:, slice(*of_u[pair.out]), start : start + pair.columns]))
        return found

    def _columns(self, a: Tensor, b: Tensor, chosen: list[int]) -> Tensor:
        """`-A^-1 B` for chosen columns of `B`, `(rows, n, len(chosen))`; NaN in rows whose matrix is singular."""
        if self._code is not None and a.dtype == torch.float64:
            return columns(self._code, contiguous(a), contiguous(b), chosen)
        factors, pivots, info = torch.linalg.lu_factor_ex(a)
        x: Tensor = -torch.linalg.lu_solve(factors, pivots, b[..., chosen])
        return x.masked_fill((info != 0)[:, None, None], torch.nan)

    def parameter_blocks(self, solved: Solved, values: Values) -> Blocks:
        """`du/dp` of every compiled pair, `(rows, entries of u, entries of p)`."""
        by_parameter = self.spec.parameter_sensitivity
        if by_parameter is None:
            return []
        u = solved.unknowns
        rows = u[0].shape[0]
        arguments = [*u, *solved.givens, *values.expanded(self.spec.parameters, rows)]
        if self._fused_parameter is not None:
            found = self._fused_parameter(arguments)
        else:
            assert self._dr_dparam is not None and isinstance(by_parameter, ParameterSensitivity)
            a, dr_dp = (x.expand(rows, *x.shape[1:]) for x in self._dr_dparam(arguments))
            if isinstance(by_parameter.solver, KrylovSettings):
                return _cut([-_krylov([a], dr_dp, by_parameter.solver)], by_parameter.pairs)
            assert self._solve_param is not None
            like = [u[0].new_empty((rows, *p.out_base_shape, *p.wrt_base_shape)) for p in by_parameter.pairs]
            found = on_sound_rows(self._solve_param, [a, dr_dp], like)
        blocks = _cut(found, by_parameter.pairs)
        return [(pair, block.reshape((block.shape[0], pair.rows, pair.columns))) for pair, block in blocks]


def sensitivity_of(spec: ImplicitInfo, graphs: SystemGraphs, graph_of: GraphOf) -> Sensitivity | None:
    """The derivative graphs of a segment; None where it was compiled without any."""
    return Sensitivity(spec, graphs, graph_of) if spec.sensitivity or spec.parameter_sensitivity else None


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


def _pack_direction(
    group: GroupInfo, tangents: Tangents, seed: tuple[str, str], rows: int, width: int, like: Tensor
) -> Tensor:
    """Derivatives of a dense given group by one seed, `(rows, n, width)`; givens without one are zero."""
    parts = []
    for v in group.variables:
        columns = tangents.get(v.name) or {}
        if seed not in columns:
            parts.append(like.new_zeros((rows, width_in(v, group), width)))
            continue
        column = columns[seed]
        if column is None:
            column = torch.eye(v.size, dtype=like.dtype, device=like.device).unsqueeze(0)
        parts.append(column.expand(rows, -1, -1))
    return torch.cat(parts, 1)
