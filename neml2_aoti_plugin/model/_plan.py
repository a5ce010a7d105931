"""A cached plan of the commonest calls: plain inputs of a model of one explicit segment, straight into its graph.

At one row, the checks and the walk over segments would cost several times the graph. So the first call with a number of
rows notes which of the graph's tensors are the caller's results as they are; where all are, later calls take them from
there. All others go the way of every model, which gives the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor

from .._artifact.schema import Shape
from .._program.explicit import ExplicitSegment
from .._program.program import Program
from ._admission import FORMS, Boundary
from ._outcomes import Blocks, Tensors

# Up to so many rows torch's runner, which looks at nothing, is the shortest way.
SHORT = 1 << 16

# Of a block: the output and input, its place among the graph's outputs, whether it comes once for all rows, and whether
# it is to be made contiguous.
Way = tuple[str, str, int, bool, bool]
T = TypeVar("T")


class Plan:
    """Where the results of a model of one explicit segment lie in what its graphs give."""

    def __init__(self, program: Program, segment: ExplicitSegment, boundary: Boundary) -> None:
        self._boundary = boundary
        # The graph of values, and that of values and blocks, if any were compiled.
        self._value, self._both = segment.value, segment.jacobian or segment.value
        spec = segment.spec
        order = [variable.name for variable in boundary.inputs.values()]
        # Which inputs the graph takes.
        self._taken = tuple(order.index(name) for name in spec.inputs)
        self._as_given = self._taken == tuple(range(len(order)))
        self._names = tuple(enumerate(boundary.outputs))
        # Which of the graph's outputs are the model's.
        self._places = tuple(spec.outputs.index(v.name) for v in boundary.outputs.values())
        self._in_order = self._places == tuple(range(len(spec.outputs)))
        self._shapes = tuple(v.natural_shape for v in boundary.outputs.values())
        # Of each pair, names, place, base shape of the block, and whether it does not depend on the row.
        self._pairs: list[tuple[str, str, int, Shape, bool]] = []
        # Whether all pairs come from the graph as callers get them.
        self._has_blocks = bool(program.metadata.derivatives) and spec.jacobian is not None
        known = {(pair.out, pair.wrt): pair for pair in spec.jacobian.pairs} if spec.jacobian else {}
        for authored_out, authored_by in program.metadata.derivatives:
            out, by = boundary.output_names[authored_out], boundary.input_names[authored_by]
            sites = boundary.outputs[out].sub_batch_shape or boundary.inputs[by].sub_batch_shape
            pair = known.get((authored_out, authored_by))
            if spec.jacobian is None or pair is None or pair.row is not None or pair.wrt_sub_batch_shape or sites:
                self._has_blocks = False
                break
            base = boundary.outputs[out].base_shape + boundary.inputs[by].base_shape
            self._pairs.append((out, by, spec.jacobian.skip + pair.output, base, pair.constant))
        # By number of rows: for the same shapes a graph gives the same shapes and layouts.
        self._simple: dict[int, bool] = {}
        self._ways: dict[int, tuple[Way, ...] | None] = {}

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensors | None:
        """As `Model.forward`; None where the plan does not hold."""
        outputs = self.values(self._boundary.listed(inputs))
        if outputs is None:
            return None
        found = {}
        for number, name in self._names:
            found[name] = outputs[number]
        return found

    def values(self, inputs: list[Any]) -> list[Tensor] | None:
        """The outputs for inputs, both in the model's order; None where the plan does not hold."""
        rows = self._boundary.plain(inputs)
        simple = self._simple.get(rows)
        if not rows or simple is False:
            return None
        outputs = self._call(self._value, inputs, rows, seen=simple is not None)
        if simple is None:
            simple = _note(self._simple, rows, self._are_simple(outputs, rows))
        if not simple:
            return None
        return outputs if self._in_order else [outputs[place] for place in self._places]

    def jacobian(self, inputs: Mapping[str, Tensor]) -> tuple[Tensors, Blocks] | None:
        """As `Model.jacobian`; None where the plan does not hold."""
        if not self._has_blocks:
            return None
        given = self._boundary.listed(inputs)
        rows = self._boundary.plain(given)
        ways = self._ways.get(rows, ())
        if not rows or ways is None:
            return None
        outputs = self._call(self._both, given, rows, seen=bool(ways))
        if not ways:
            ways = _note(self._ways, rows, self._ways_of(outputs, rows))
            if ways is None:
                return None
        values = {}
        for number, name in self._names:
            values[name] = outputs[self._places[number]]
        blocks: Blocks = {}
        for out, by, place, once, copied in ways:
            block = outputs[place]
            if once:
                block = block[0]
            blocks.setdefault(out, {})[by] = block.contiguous() if copied else block
        return values, blocks

    def _call(self, graph: Any, inputs: list[Any], rows: int, *, seen: bool) -> list[Tensor]:
        """What a graph gives; one that has `seen` so many rows compares no more what it takes."""
        arguments = inputs if self._as_given else [inputs[place] for place in self._taken]
        if rows > SHORT:
            return graph(arguments)  # type: ignore[no-any-return]
        return graph.again(arguments) if seen else graph.run_short(arguments)  # type: ignore[no-any-return]

    def _are_simple(self, outputs: list[Tensor], rows: int) -> bool:
        """Whether the outputs are what callers get; the general way complains of those that are too few."""
        if len(outputs) <= max(self._places):
            return False
        found = [(outputs[place], shape) for place, shape in zip(self._places, self._shapes, strict=True)]
        return all(
            x.shape == (rows, *shape) and x.dtype == self._boundary.dtype and x.is_contiguous() for x, shape in found
        )

    def _ways_of(self, outputs: list[Tensor], rows: int) -> tuple[Way, ...] | None:
        """How the caller's blocks come from the graph's outputs; None where it takes more."""
        if len(outputs) <= max(place for _, _, place, _, _ in self._pairs) or not self._are_simple(outputs, rows):
            return None
        ways = []
        for out, by, place, base, constant in self._pairs:
            given = outputs[place]
            once = constant and given.shape[0] == 1
            if given.dtype != self._boundary.dtype or tuple(given.shape) != ((1 if once else rows), *base):
                return None
            ways.append((out, by, place, once, not (given[0] if once else given).is_contiguous()))
        return tuple(ways)


def _note(kept: dict[int, T], rows: int, value: T) -> T:
    """Keep what was found for a number of rows."""
    if len(kept) >= FORMS:
        kept.clear()
    kept[rows] = value
    return value


def plan_of(program: Program, boundary: Boundary) -> Plan | None:
    """The plan of a model whose plain inputs can go straight into one graph, if it is such a model."""
    segment = program.segments[0]
    if len(program.segments) > 1 or not isinstance(segment, ExplicitSegment):
        return None
    spec = segment.spec
    taken, given = {v.name for v in boundary.inputs.values()}, {v.name for v in boundary.outputs.values()}
    straight = (
        boundary.device.type == "cpu"
        and program.batch_axes == (None,)
        and spec.order is None
        and bool(spec.inputs)
        and not spec.parameters
        and taken.issuperset(spec.inputs)
        and given.issubset(spec.outputs)
    )
    return Plan(program, segment, boundary) if straight else None
