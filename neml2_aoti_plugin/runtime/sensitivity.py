"""Derivatives of the unknowns of a solved implicit segment by its givens and its parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..artifact.schema import (
    DirectParameterSensitivity,
    DirectSensitivity,
    DirectStep,
    FusedSensitivity,
    GroupInfo,
    ImplicitSegment,
    KrylovParameterSensitivity,
    KrylovSensitivity,
    Pair,
)
from ..errors import AOTIError
from ..settings import KrylovSettings
from .krylov import solve_linear
from .packing import width_in
from .systems import GraphOf, Groups, check_arity, on_sound_rows, solve_rows
from .tangents import Columns, Tangents

if TYPE_CHECKING:
    from .implicit import Solved
    from .parameters import Values

Blocks = list[tuple[Pair, Tensor]]


class Sensitivity:
    """The derivative graphs of an implicit segment.

    Args:
        spec: the segment.
        graph_of: gives the graph of a file.
    """

    def __init__(self, spec: ImplicitSegment, graph_of: GraphOf) -> None:
        self.spec = spec
        by_given, by_parameter = spec.sensitivity, spec.parameter_sensitivity
        self._fused = graph_of(by_given.file) if isinstance(by_given, FusedSensitivity) else None
        self._fused_parameter = graph_of(by_parameter.file) if isinstance(by_parameter, FusedSensitivity) else None
        self._jacobian = self._given = self._solve_ift = self._solve = None
        if isinstance(by_given, (DirectSensitivity, KrylovSensitivity)):
            self._jacobian, self._given = graph_of(by_given.jacobian), graph_of(by_given.jacobian_given)
        if isinstance(by_given, DirectSensitivity):
            self._solve_ift = graph_of(by_given.solve)
        if isinstance(spec.step, DirectStep):
            self._solve = graph_of(spec.step.solve)
        self._dr_dparam = self._solve_param = None
        if isinstance(by_parameter, (DirectParameterSensitivity, KrylovParameterSensitivity)):
            self._dr_dparam = graph_of(by_parameter.dr_dparam)
        if isinstance(by_parameter, DirectParameterSensitivity):
            self._solve_param = graph_of(by_parameter.solve)

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
        dense_groups = all(
            g.structure == "dense" for g in (*self.spec.unknowns, *self.spec.givens, *self.spec.residuals)
        )
        seeds = {seed for name in reached for seed in tangents[name]}
        if self._given is None or self._solve is None or len(seeds) != 1 or not dense_groups:
            return None
        (seed,) = seeds
        columns = [tangents[name][seed] for name in reached]
        if any(c is None or c.shape[-1] != 1 for c in columns):
            return None
        rows, u = solved.rows.unknowns[0].shape[0], solved.rows.unknowns
        along = [_pack_direction(group, tangents, seed, rows, u[0]) for group in self.spec.givens]
        by_given = self._given([*u, *solved.givens], solved.tail)
        count = len(self.spec.givens)
        check_arity(self._given, by_given, len(self.spec.residuals) * count)
        b = []
        for i in range(len(self.spec.residuals)):
            terms = [by_given[i * count + j] @ along[j] for j in range(count)]
            b.append(-sum(terms[1:], start=terms[0]).squeeze(-1).expand(rows, -1))
        du = solve_rows(self._solve, self._a(solved), b, u)
        found: dict[str, Columns] = {}
        for group, tensor in zip(self.spec.unknowns, du, strict=True):
            start = 0
            for v in group.variables:
                found[v.name] = {seed: tensor[:, start : start + v.size].unsqueeze(-1)}
                start += v.size
        return found

    def _a(self, solved: Solved) -> Groups:
        """The Jacobian blocks at the solution: those of the last iterate, if the solve kept them."""
        if solved.rows.linear:
            return solved.rows.linear
        assert self._jacobian is not None, "only asked for where the segment has the graph"
        outputs = self._jacobian([*solved.rows.unknowns, *solved.givens], solved.tail)
        count = len(self.spec.residuals) * len(self.spec.unknowns)
        check_arity(self._jacobian, outputs, count + len(self.spec.residuals))
        return outputs[:count]

    def blocks(self, solved: Solved) -> Blocks:
        """`du/dg` of every compiled pair, `(rows, entries of u, entries of g)`."""
        by_given = self.spec.sensitivity
        if by_given is None:
            return []
        u = solved.rows.unknowns
        if self._fused is not None:
            return _cut(self._fused([*u, *solved.givens], solved.tail), by_given.pairs)
        assert self._given is not None
        b = self._given([*u, *solved.givens], solved.tail)
        a = self._a(solved)
        if isinstance(by_given, KrylovSensitivity):
            return _cut([-_krylov(a, torch.cat(b, -1), by_given.settings)], by_given.pairs)
        assert self._solve_ift is not None
        rows = u[0].shape[0]
        arguments = [x if x.shape[0] == rows else x.expand(rows, *x.shape[1:]) for x in (*a, *b)]
        like = [u[0].new_empty((rows, p.rows, p.columns)) for p in by_given.pairs]
        return _cut(on_sound_rows(self._solve_ift, arguments, like), by_given.pairs)

    def parameter_blocks(self, solved: Solved, values: Values) -> Blocks:
        """`du/dp` of every compiled pair, `(rows, entries of u, entries of p)`."""
        by_parameter = self.spec.parameter_sensitivity
        if by_parameter is None:
            return []
        u = solved.rows.unknowns
        rows = u[0].shape[0]
        arguments = [*u, *solved.givens, *values.expanded(self.spec.parameters, rows)]
        if self._fused_parameter is not None:
            found = self._fused_parameter(arguments)
        else:
            assert self._dr_dparam is not None
            a, dr_dp = (x.expand(rows, *x.shape[1:]) for x in self._dr_dparam(arguments))
            if isinstance(by_parameter, KrylovParameterSensitivity):
                return _cut([-_krylov([a], dr_dp, by_parameter.settings)], by_parameter.pairs)
            assert self._solve_param is not None
            like = [u[0].new_empty((rows, *p.out_base_shape, *p.wrt_base_shape)) for p in by_parameter.pairs]
            found = on_sound_rows(self._solve_param, [a, dr_dp], like)
        blocks = _cut(found, by_parameter.pairs)
        return [(pair, block.reshape((block.shape[0], pair.rows, pair.columns))) for pair, block in blocks]


def sensitivity_of(spec: ImplicitSegment, graph_of: GraphOf) -> Sensitivity | None:
    """The derivative graphs of a segment; None where it was compiled without any."""
    return Sensitivity(spec, graph_of) if spec.sensitivity or spec.parameter_sensitivity else None


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
            "compile it "
            "with a direct linear solver"
        )
    rows, n, columns = b.shape
    matrix = a[0].expand(rows, n, n)
    flat = b.transpose(1, 2).reshape(rows * columns, n)

    def product(v: Tensor) -> Tensor:
        return torch.matmul(matrix, v.reshape(rows, columns, n).transpose(1, 2)).transpose(1, 2).reshape(-1, n)

    return solve_linear(product, flat, settings).x.reshape(rows, columns, n).transpose(1, 2)


def _pack_direction(group: GroupInfo, tangents: Tangents, seed: tuple[str, str], rows: int, like: Tensor) -> Tensor:
    """One direction of a dense given group, `(rows, n, 1)`; givens without a tangent are zero."""
    parts = []
    for v in group.variables:
        columns = tangents.get(v.name) or {}
        column = columns.get(seed)
        parts.append(
            column.expand(rows, -1, -1) if column is not None else like.new_zeros((rows, width_in(v, group), 1))
        )
    return torch.cat(parts, 1)
