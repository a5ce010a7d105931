"""A cached plan of the commonest calls: plain inputs of a model of one explicit segment, straight into its graph.

At one row, the checks and the walk over segments would cost several times the graph. So the first call with a number of
rows notes which of the graph's tensors are the caller's results as they are; where all are, later calls take them from
there. All others go the way of every model, which gives the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .._artifact.schema import Shape
from .._program.explicit import ExplicitSegment
from .._program.program import Program
from ._admission import FORMS, Boundary
from ._outcomes import Blocks, Tensors

# Up to so many rows torch's runner, which looks at nothing, is the shortest way.
SHORT = 1 << 16

# Of a result: its place among the graph's outputs, its shape in a row, and whether all rows may share it.
Wanted = tuple[int, Shape, bool]
# Of a result: its place, whether it comes once for all rows, and whether it is to be made contiguous.
Way = tuple[int, bool, bool]
UNKNOWN: tuple[Way, ...] = ((-1, False, False),)


class Plan:
    """Where callers' results lie in what one graph gives."""

    def __init__(self, graph: Any, taken: tuple[int, ...], wanted: list[Wanted], boundary: Boundary) -> None:
        self._graph, self._boundary, self._wanted = graph, boundary, wanted
        # Which inputs the graph takes; None for all, in the model's order.
        self._taken = None if taken == tuple(range(len(boundary.inputs))) else taken
        # By number of rows, since a graph gives the same shapes and layouts for the same shapes; none where the results
        # are the graph's outputs as they are, None where one takes more than that.
        self._ways: dict[int, tuple[Way, ...] | None] = {}

    def __call__(self, inputs: list[Any]) -> list[Tensor] | None:
        """The results for inputs in the model's order; None where the plan does not hold."""
        rows = self._boundary.plain(inputs)
        ways = self._ways.get(rows, UNKNOWN)
        if not rows or ways is None:
            return None
        arguments = inputs if self._taken is None else [inputs[place] for place in self._taken]
        if rows > SHORT:
            outputs: list[Tensor] = self._graph(arguments)
        elif ways is UNKNOWN:
            outputs = self._graph.run_short(arguments)
        else:
            # A graph that has seen so many rows compares no more what it takes.
            outputs = self._graph.again(arguments)
        if ways is UNKNOWN:
            if len(self._ways) >= FORMS:
                self._ways.clear()
            ways = self._ways[rows] = self._found(outputs, rows)
            if ways is None:
                return None
        if not ways:
            return outputs
        results = []
        for place, once, copied in ways:
            value = outputs[place]
            if once:
                value = value[0]
            results.append(value.contiguous() if copied else value)
        return results

    def _found(self, outputs: list[Tensor], rows: int) -> tuple[Way, ...] | None:
        """How the results come; the general way complains of outputs that are too few."""
        if len(outputs) <= max(place for place, *_ in self._wanted):
            return None
        ways = []
        for place, shape, constant in self._wanted:
            value = outputs[place]
            once = constant and value.shape[0] == 1
            if value.dtype != self._boundary.dtype or tuple(value.shape) != ((1 if once else rows), *shape):
                return None
            ways.append((place, once, not (value[0] if once else value).is_contiguous()))
        as_they_are = [(place, False, False) for place in range(len(outputs))]
        return () if ways == as_they_are else tuple(ways)


class Plans:
    """The plans of a model's values, and of its values with blocks."""

    def __init__(self, program: Program, segment: ExplicitSegment, boundary: Boundary) -> None:
        self._boundary = boundary
        spec, graphs = segment.spec, segment.graphs
        order = [variable.name for variable in boundary.inputs.values()]
        taken = tuple(order.index(name) for name in spec.inputs)
        wanted: list[Wanted] = [(spec.outputs.index(v.name), v.natural_shape, False) for v in boundary.outputs.values()]
        self.values = Plan(graphs[spec.value], taken, list(wanted), boundary)
        self._names = tuple(enumerate(boundary.outputs))
        # Of each block its place among the results.
        self._pairs: list[tuple[int, str, str]] = []
        self._blocks: Plan | None = None
        known = {(pair.out, pair.wrt): pair for pair in spec.jacobian.pairs} if spec.jacobian is not None else {}
        for authored in program.metadata.derivatives:
            pair, out, by = known.get(authored), boundary.output_names[authored[0]], boundary.input_names[authored[1]]
            sites = boundary.outputs[out].sub_batch_shape or boundary.inputs[by].sub_batch_shape
            if spec.jacobian is None or pair is None or pair.row is not None or pair.wrt_sub_batch_shape or sites:
                return
            self._pairs.append((len(wanted), out, by))
            base = boundary.outputs[out].base_shape + boundary.inputs[by].base_shape
            wanted.append((spec.jacobian.skip + pair.output, base, pair.constant))
        if spec.jacobian is not None and self._pairs:
            self._blocks = Plan(graphs[spec.jacobian.file], taken, wanted, boundary)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensors | None:
        """As `Model.forward`; None where the plan does not hold."""
        found = self.values(self._boundary.listed(inputs))
        if found is None:
            return None
        # Half the time of `dict(zip(...))`.
        outputs = {}
        for place, name in self._names:
            outputs[name] = found[place]
        return outputs

    def jacobian(self, inputs: Mapping[str, Tensor]) -> tuple[Tensors, Blocks] | None:
        """As `Model.jacobian`; None where the plan does not hold."""
        found = self._blocks(self._boundary.listed(inputs)) if self._blocks is not None else None
        if found is None:
            return None
        outputs, blocks = {}, Blocks()
        for place, name in self._names:
            outputs[name] = found[place]
        for place, out, by in self._pairs:
            blocks.setdefault(out, {})[by] = found[place]
        return outputs, blocks


def plans_of(program: Program, boundary: Boundary) -> Plans | None:
    """The plans of a model whose plain inputs can go straight into one graph, if it is such a model."""
    segment, *others = program.segments
    if others or not isinstance(segment, ExplicitSegment):
        return None
    spec = segment.spec
    taken, given = {v.name for v in boundary.inputs.values()}, {v.name for v in boundary.outputs.values()}
    alone = bool(spec.inputs) and not spec.parameters and spec.order is None
    fits = taken.issuperset(spec.inputs) and given.issubset(spec.outputs)
    on_cpu = boundary.device.type == "cpu" and program.batch_axes == (None,)
    return Plans(program, segment, boundary) if alone and fits and on_cpu else None
