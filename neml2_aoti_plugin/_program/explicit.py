"""Explicit segments: one graph call for the values, or one for values and derivative blocks together."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .._artifact.schema import ExplicitInfo, Pair, PairGraph, Variable
from .._graphs.graph import Graph
from .packing import Values
from .systems import GraphOf, check_arity
from .tangents import PER_SITE, Columns, Tangents, add, contract, forward_block, per_site


class ExplicitSegment:
    """An explicit segment (neml2 calls it forward) with its graphs."""

    def __init__(self, spec: ExplicitInfo, graph_of: GraphOf, per_row: bool, known: Mapping[str, Variable]) -> None:
        self.spec = spec
        self.value = graph_of(spec.value)
        self.jacobian = graph_of(spec.jacobian.file) if spec.jacobian else None
        self.parameter_jacobian = graph_of(spec.parameter_jacobian.file) if spec.parameter_jacobian else None
        self.parameter_vjp = graph_of(spec.parameter_vjp.file) if spec.parameter_vjp else None
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
        wanted = self.spec.jacobian is not None and any(tangents.get(name) for name in self.spec.inputs)
        found: dict[str, Columns] = {name: {} for name in self.spec.outputs}
        if wanted:
            blocks = self.blocks(state, values, rows)
            assert self.spec.jacobian is not None
            for pair, block in blocks:
                value = state[pair.out]
                sites = tuple(value.shape[1 : value.ndim - len(pair.out_base_shape)])
                for seed, column in tangents.get(pair.wrt, {}).items():
                    if seed[0] == PER_SITE:
                        term = per_site(block, pair, sites, self.spec.jacobian.file)
                    else:
                        term = contract(block, pair, sites, column, self.spec.jacobian.file)
                    add(found[pair.out], seed, term)
        else:
            self.run(state, values, rows)
        own = self.spec.parameter_jacobian
        if own is not None and any(pair.wrt in parameters for pair in own.pairs):
            for pair, block in self.parameter_blocks(state, values, rows):
                if pair.wrt in parameters:
                    add(found[pair.out], ("parameter", pair.wrt), block.flatten(1, -2))
        tangents.update(found)

    def blocks(self, state: dict[str, Tensor], values: Values, rows: int) -> list[tuple[Pair, Tensor]]:
        """Evaluate the outputs into `state`; give the derivative blocks `(rows or 1, *sites, out, wrt)`."""
        assert self.jacobian is not None and self.spec.jacobian is not None
        outputs = self.call(self.jacobian, state, values, rows)
        given = self.with_rows(outputs[: self.spec.jacobian.skip], rows)
        state.update(zip(self.spec.outputs, given, strict=False))
        return self._cut(self.jacobian, self.spec.jacobian, outputs)

    def parameter_blocks(self, state: dict[str, Tensor], values: Values, rows: int) -> list[tuple[Pair, Tensor]]:
        """The derivative blocks by parameters, `(rows or 1, *sites, out, parameter)`."""
        assert self.parameter_jacobian is not None and self.spec.parameter_jacobian is not None
        outputs = self.call(self.parameter_jacobian, state, values, rows)
        return self._cut(self.parameter_jacobian, self.spec.parameter_jacobian, outputs)

    def _cut(self, graph: Graph, of: PairGraph, outputs: list[Tensor]) -> list[tuple[Pair, Tensor]]:
        indices = {pair.output for pair in of.pairs}
        check_arity(graph, outputs, of.skip + (max(indices) + 1 if indices else 0))
        return [(pair, forward_block(outputs[of.skip + pair.output], pair, of.file)) for pair in of.pairs]
