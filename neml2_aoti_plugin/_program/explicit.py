"""Explicit segments: one graph call for the values, or one for values and derivative blocks together."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from .._artifact.schema import ExplicitInfo, Pair, PairGraph, Variable
from .._graphs.graph import Graph
from ..errors import DerivativeNotCompiledError
from .systems import GraphOf, check_arity
from .values import PER_SITE, Columns, Tangents, Values, add, times


class ExplicitSegment:
    """An explicit segment (neml2 calls it forward) with its graphs."""

    def __init__(self, spec: ExplicitInfo, graph_of: GraphOf, per_row: bool, known: Mapping[str, Variable]) -> None:
        self.spec = spec
        self.value = graph_of(spec.value)
        self.jacobian = graph_of(spec.jacobian.file) if spec.jacobian else None
        self.parameter_jacobian = graph_of(spec.parameter_jacobian.file) if spec.parameter_jacobian else None
        self._per_row = per_row
        self._ranks = [(i, len(known[name].base_shape)) for i, name in enumerate(spec.outputs) if name in known]

    @property
    def common_parameters(self) -> tuple[str, ...]:
        """Parameters that the graphs take once for all rows."""
        return () if self._per_row else self.spec.parameters

    def call(self, graph: Graph, state: dict[str, Tensor], values: Values, rows: int) -> list[Tensor]:
        """What one of its graphs gives, each output `(rows or 1, ...)`."""
        inputs = [state[name] for name in self.spec.inputs]
        if self._per_row:
            return graph(inputs + values.expanded(self.spec.parameters, rows), order=self.spec.order)
        return graph(inputs, values.common(self.spec.parameters), order=self.spec.order)

    def with_rows(self, outputs: list[Tensor], rows: int) -> list[Tensor]:
        """What one of its graphs gives, with rows in those outputs that depend on no input and so have none."""
        bare = {place for place, rank in self._ranks if place < len(outputs) and outputs[place].ndim == rank}
        return [x.expand((rows, *x.shape)) if i in bare else x for i, x in enumerate(outputs)] if bare else outputs

    def run(self, state: dict[str, Tensor], values: Values, rows: int) -> None:
        """Evaluate the outputs into `state`."""
        outputs = self.call(self.value, state, values, rows)
        check_arity(self.value, outputs, len(self.spec.outputs))
        state.update(zip(self.spec.outputs, self.with_rows(outputs, rows), strict=True))

    def run_with_tangents(
        self, state: dict[str, Tensor], values: Values, rows: int, tangents: Tangents, parameters: frozenset[str]
    ) -> None:
        """Evaluate the outputs into `state`, and their derivatives by the seeds and `parameters` into `tangents`."""
        of, own = self.spec.jacobian, self.spec.parameter_jacobian
        found: dict[str, Columns] = {name: {} for name in self.spec.outputs}
        if of is not None and self.jacobian is not None and any(tangents.get(name) for name in self.spec.inputs):
            outputs = self.call(self.jacobian, state, values, rows)
            state.update(zip(self.spec.outputs, self.with_rows(outputs[: of.skip], rows), strict=False))
            for pair, block in blocks_of(self.jacobian, of, outputs):
                value = state[pair.out]
                sites = tuple(value.shape[1 : value.ndim - len(pair.out_base_shape)])
                for seed, column in tangents.get(pair.wrt, {}).items():
                    if seed[0] == PER_SITE:
                        term = per_site(block, pair, sites, of.file)
                    else:
                        term = contract(block, pair, sites, column, of.file)
                    add(found[pair.out], seed, term)
        else:
            self.run(state, values, rows)
        if own is not None and self.parameter_jacobian is not None and any(p.wrt in parameters for p in own.pairs):
            outputs = self.call(self.parameter_jacobian, state, values, rows)
            for pair, block in blocks_of(self.parameter_jacobian, own, outputs):
                if pair.wrt in parameters:
                    add(found[pair.out], ("parameter", pair.wrt), block.flatten(1, -2))
        tangents.update(found)


def blocks_of(graph: Graph, of: PairGraph, outputs: list[Tensor]) -> list[tuple[Pair, Tensor]]:
    """The derivative blocks among a graph's outputs, `(rows or 1, *sites, out, wrt)`."""
    indices = {pair.output for pair in of.pairs}
    check_arity(graph, outputs, of.skip + (max(indices) + 1 if indices else 0))
    return [(pair, forward_block(outputs[of.skip + pair.output], pair, of.file)) for pair in of.pairs]


def forward_block(output: Tensor, pair: Pair, file: str) -> Tensor:
    """View an explicit graph's output as `(rows or 1, *sites, out, wrt)`.

    It is `(rows or 1, *sites, *out_base, *wrt_base)`, or a matrix that the pair is cut out of.
    """
    if pair.row is not None and pair.column is not None:
        return output[..., pair.row : pair.row + pair.rows, pair.column : pair.column + pair.columns]
    base = len(pair.out_base_shape) + len(pair.wrt_base_shape)
    lead = output.shape[: output.ndim - base]
    if tuple(output.shape[output.ndim - base :]) != pair.out_base_shape + pair.wrt_base_shape:
        raise DerivativeNotCompiledError(
            f"{file}: the block d({pair.out})/d({pair.wrt}) has shape {tuple(output.shape)}, which does not end in "
            f"{pair.out_base_shape + pair.wrt_base_shape}: this kind of sub-batched derivative is not supported."
        )
    return output.reshape((*lead, pair.rows, pair.columns))


def contract(block: Tensor, pair: Pair, out_sites: tuple[int, ...], column: Tensor | None, file: str) -> Tensor:
    """Multiply an explicit block `(rows or 1, *sites, out, wrt)` with the derivative of the variable it is by.

    `column` is `(rows or 1, entries of wrt, m)`, None for the identity; gives `(rows or 1, entries of out, m)`.
    """
    if block.ndim == 3 and not out_sites and not pair.wrt_sub_batch_shape:
        return times(block, column)
    sites, wrt_sites = tuple(block.shape[1:-2]), pair.wrt_sub_batch_shape
    if not wrt_sites:
        spread = _on_sites(block, out_sites, pair, file)
        return times(spread.reshape((block.shape[0], prod(out_sites) * pair.rows, pair.columns)), column)
    if out_sites and out_sites != wrt_sites:
        raise DerivativeNotCompiledError(
            f"{file}: d({pair.out})/d({pair.wrt}) leads from sites {wrt_sites} to sites {out_sites} (block over "
            f"{sites}): this kind of sub-batched derivative is not supported."
        )
    spread = _on_sites(block, wrt_sites, pair, file)
    count = prod(wrt_sites)
    flat = spread.reshape((block.shape[0], count, pair.rows, pair.columns))
    if column is None:
        if not out_sites:
            return flat.permute(0, 2, 1, 3).reshape((block.shape[0], pair.rows, count * pair.columns))
        diagonal = flat.new_zeros((block.shape[0], count, pair.rows, count, pair.columns))
        k = torch.arange(count, device=flat.device)
        diagonal[:, k, :, k, :] = flat.transpose(0, 1)
        return diagonal.reshape((block.shape[0], count * pair.rows, count * pair.columns))
    by_site = torch.matmul(flat, column.reshape((column.shape[0], count, pair.columns, column.shape[-1])))
    if not out_sites:
        return by_site.sum(1)
    return by_site.reshape((by_site.shape[0], count * pair.rows, column.shape[-1]))


def per_site(block: Tensor, pair: Pair, out_sites: tuple[int, ...], file: str) -> Tensor:
    """An explicit block over the sites of its variables, `(rows or 1, *sites, *out_base, *wrt_base)`."""
    spread = _on_sites(block, out_sites or pair.wrt_sub_batch_shape, pair, file)
    return spread.reshape((*spread.shape[:-2], *pair.out_base_shape, *pair.wrt_base_shape))


def _on_sites(block: Tensor, sites: tuple[int, ...], pair: Pair, file: str) -> Tensor:
    """Bring a block's site axes to the given ones; surplus axes must have extent 1."""
    have = list(block.shape[1:-2])
    while len(have) > len(sites) and 1 in have:
        have.reverse()
        have.remove(1)
        have.reverse()
    fits = len(have) <= len(sites) and all(h in (1, s) for h, s in zip(have[::-1], sites[::-1], strict=False))
    if not fits:
        raise DerivativeNotCompiledError(
            f"{file}: the block d({pair.out})/d({pair.wrt}) lies over sites {tuple(block.shape[1:-2])}, not {sites}: "
            "this kind of sub-batched derivative is not supported."
        )
    lead = (1,) * (len(sites) - len(have))
    shaped = block.reshape((block.shape[0], *lead, *have, pair.rows, pair.columns))
    return shaped.expand((block.shape[0], *sites, pair.rows, pair.columns))
