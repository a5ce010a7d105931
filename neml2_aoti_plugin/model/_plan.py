"""The plan of a model that is one forward segment: where its values and blocks lie in what its graphs give.

The plan is made once, at load. Plain inputs go straight into the graph; all others are admitted first and then take the
same way. At one row the checks would otherwise cost several times the graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .._artifact.schema import Pair, Shape
from .._program.explicit import ExplicitSegment
from .._program.parameters import Values
from .._program.program import Program
from .._program.systems import check_arity
from .._program.tangents import forward_block, per_site
from ._admission import FORMS, Boundary
from ._call import Admitted, Tensors

if TYPE_CHECKING:
    from .._graphs.graph import Graph

Blocks = dict[str, dict[str, Tensor]]

# Up to so many rows torch's runner, which looks at nothing, is the shortest way.
SHORT = 1 << 16

# Of a block: the boundary names, its place among the graph's outputs, whether it comes once for all rows, and whether
# it is to be made contiguous.
Way = tuple[str, str, int, bool, bool]


@dataclass(frozen=True)
class Block:
    """One derivative block of the model.

    Args:
        out: boundary name of the output.
        wrt: boundary name of the input.
        value: place of the output among the graph's outputs.
        base: base shape of the output, then of the input.
        place: place of the block among the graph's outputs; None where the segment does not depend on the input.
        pair: what the artifact tells of it.
        whole: whether the graph gives the block as it is, without sites and not as a part of a matrix.
        constant: whether it is known not to depend on the row.
    """

    out: str
    wrt: str
    value: int
    base: Shape
    place: int | None
    pair: Pair | None
    whole: bool
    constant: bool


class ForwardPlan:
    """Values and derivative blocks of a model of one forward segment.

    Args:
        program: of the model.
        segment: its only one, which gives all outputs.
        boundary: what tensors the model takes.
    """

    def __init__(self, program: Program, segment: ExplicitSegment, boundary: Boundary) -> None:
        self._program, self._segment, self._boundary = program, segment, boundary
        # The graph of values, and that of values and blocks, if any were compiled.
        self._value, self._both = segment.value, segment.jacobian or segment.value
        spec, metadata = segment.spec, program.metadata
        self._base_ranks = {p.name: len(p.base_shape) for p in metadata.parameters}
        self._file = spec.jacobian.file if spec.jacobian else spec.value
        # How many outputs the graph of values has, and how many more that of values and blocks.
        self._arity = len(spec.outputs)
        self._count = max((pair.output + 1 for pair in spec.jacobian.pairs), default=0) if spec.jacobian else 0
        # Places of the model's outputs among those of the graph.
        places = {name: i for i, name in enumerate(spec.outputs)}
        self._outputs = tuple((port.name, places[port.variable.name]) for port in boundary.outputs)
        self._names = tuple((name, place) for place, (name, _) in enumerate(self._outputs))
        self._input_names = boundary.names
        self._blocks = tuple(_block(out, wrt, segment, boundary, places) for out, wrt in metadata.derivatives)
        # Of plain inputs, those that the graph takes; None where they can't go into it as they are.
        order = [port.variable.name for port in boundary.inputs]
        plain = (
            not spec.parameters
            and spec.order is None
            and program.batch_axes == (None,)
            and boundary.device.type == "cpu"
            and bool(spec.inputs)
        )
        self._taken = tuple(order.index(name) for name in spec.inputs) if plain else None
        self._as_given = self._taken == tuple(range(len(order)))
        # By number of rows, how a caller's values and blocks come from the graph's outputs: for the same shapes a graph
        # gives the same shapes and layouts.
        self._settled_values: set[int] = set()
        self._settled: dict[int, tuple[Way, ...]] = {}

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensors | None:
        """Evaluate the outputs for plain inputs.

        Args:
            inputs: as for `Model.forward`.

        Returns:
            Outputs by name; None where the inputs are not plain.
        """
        outputs = self.values(self._listed(inputs))
        if outputs is None:
            return None
        found = {}
        for name, place in self._names:
            found[name] = outputs[place]
        return found

    def values(self, inputs: list[Any]) -> list[Tensor] | None:
        """Evaluate the outputs for plain inputs.

        Args:
            inputs: in the model's order; anything may be among them.

        Returns:
            Outputs in the model's order; None where the inputs are not plain.
        """
        taken = self._taken
        if taken is None:
            return None
        rows = self._boundary.plain(inputs)
        if not rows:
            return None
        outputs = self._call(self._value, inputs if self._as_given else [inputs[place] for place in taken], rows)
        return outputs if rows in self._settled_values else self._settle_values(outputs, rows)

    def jacobian(self, inputs: Mapping[str, Tensor]) -> tuple[Tensors, Blocks] | None:
        """Evaluate the outputs and the derivative blocks for plain inputs.

        Args:
            inputs: as for `Model.jacobian`.

        Returns:
            As `Model.jacobian`; None where the inputs are not plain.
        """
        taken = self._taken
        if taken is None:
            return None
        given = self._listed(inputs)
        rows = self._boundary.plain(given)
        if not rows:
            return None
        outputs = self._call(self._both, given if self._as_given else [given[place] for place in taken], rows)
        settled = self._settled.get(rows)
        if settled is None:
            return self._settle(outputs, rows)
        values = {}
        for name, place in self._outputs:
            values[name] = outputs[place]
        blocks: Blocks = {}
        for out, wrt, place, once, copied in settled:
            block = outputs[place]
            if once:
                block = block[0]
            blocks.setdefault(out, {})[wrt] = block.contiguous() if copied else block
        return values, blocks

    def jacobian_of(self, call: Admitted, *, expand: bool = False) -> tuple[Tensors, Blocks]:
        """Evaluate the outputs and the derivative blocks for admitted inputs.

        Args:
            call: the admitted arguments.
            expand: whether constant blocks have the batch axes too.

        Returns:
            As `Model.jacobian`.
        """
        return self._results(self._run(self._both, call), call.batch, expand=expand)

    def _listed(self, inputs: Mapping[str, Tensor]) -> list[Any]:
        """The inputs in the model's order; nothing where names are to be complained of."""
        names = self._input_names
        if type(inputs) is not dict or len(inputs) != len(names):
            return []
        listed: list[Any] = []
        for name in names:
            listed.append(inputs.get(name))
        return listed

    def _settle_values(self, outputs: list[Tensor], rows: int) -> list[Tensor]:
        """Bring outputs to the caller's order and form; note the number of rows where they had both."""
        check_arity(self._value, outputs, self._arity)
        whole = self._segment.with_rows(outputs, rows)
        found = [self._boundary.unflatten(whole[place], (rows,)) for _, place in self._outputs]
        if len(found) == len(outputs) and all(a is b for a, b in zip(found, outputs, strict=True)):
            if len(self._settled_values) >= FORMS:
                self._settled_values.clear()
            self._settled_values.add(rows)
        return found

    def _settle(self, outputs: list[Tensor], rows: int) -> tuple[Tensors, Blocks]:
        """Bring outputs and blocks to the caller's form; note how, where it is simple."""
        values, blocks = self._results(outputs, (rows,))
        simple = [self._simple(known, outputs, rows) for known in self._blocks]
        if all(values[name] is outputs[place] for name, place in self._outputs) and None not in simple:
            if len(self._settled) >= FORMS:
                self._settled.clear()
            self._settled[rows] = tuple(way for way in simple if way is not None)
        return values, blocks

    def _simple(self, known: Block, outputs: list[Tensor], rows: int) -> Way | None:
        """How a caller's block comes from the graph's; None where it takes more."""
        if known.place is None or not known.whole or self._boundary.dtype != outputs[known.place].dtype:
            return None
        given = outputs[known.place]
        once = known.constant and given.shape[0] == 1
        if tuple(given.shape) != ((1 if once else rows), *known.base):
            return None
        return known.out, known.wrt, known.place, once, not (given[0] if once else given).is_contiguous()

    @staticmethod
    def _call(graph: Graph, arguments: list[Tensor], rows: int) -> list[Tensor]:
        """Call a graph with plain inputs: few rows by the shortest way, many in blocks."""
        return graph.again(arguments) if rows <= SHORT else graph(arguments)

    def _run(self, graph: Graph, call: Admitted) -> list[Tensor]:
        """What a graph gives for all rows; in parts where it takes a parameter once that differs from row to row."""
        values = Values(call.parameters, self._base_ranks)
        whole: list[Tensor] = []
        for index, fixed in self._program.parts(values, call.rows):
            if index is None:
                return self._segment.call(graph, call.state, values, call.rows)
            state = {name: value[index] for name, value in call.state.items()}
            rows = next(iter(state.values())).shape[0]
            found = self._segment.with_rows(self._segment.call(graph, state, values.take(index, fixed), rows), rows)
            whole = whole or [value.new_empty((call.rows, *value.shape[1:])) for value in found]
            for into, value in zip(whole, found, strict=True):
                into[index] = value
        return whole

    def _results(self, outputs: list[Tensor], batch: Shape, *, expand: bool = False) -> tuple[Tensors, Blocks]:
        """Values and blocks in the caller's terms.

        Args:
            outputs: of the graph of values and blocks, each `(rows or 1, ...)`.
            batch: the caller's batch shape.
            expand: whether constant blocks have the batch axes too.
        """
        check_arity(self._both, outputs, self._arity + self._count)
        outputs = self._segment.with_rows(outputs, prod(batch))
        unflatten = self._boundary.unflatten
        values = {name: unflatten(outputs[place], batch) for name, place in self._outputs}
        blocks: Blocks = {}
        for known in self._blocks:
            block = self._cut(known, outputs)
            once = known.constant and block.shape[0] == 1 and not expand
            shaped = self._boundary.to_caller(block[0]).contiguous() if once else unflatten(block, batch)
            blocks.setdefault(known.out, {})[known.wrt] = shaped
        return values, blocks

    def _cut(self, known: Block, outputs: list[Tensor]) -> Tensor:
        """A block `(rows or 1, *sites, *out_base, *wrt_base)`."""
        value = outputs[known.value]
        if known.place is None or known.pair is None:
            return value.new_zeros((1, *known.base))
        block = outputs[known.place]
        if known.whole and block.ndim == 1 + len(known.base) and block.shape[1:] == known.base:
            return block
        sites = tuple(value.shape[1 : value.ndim - len(known.pair.out_base_shape)])
        return per_site(forward_block(block, known.pair, self._file), known.pair, sites, self._file)


def _block(out: str, wrt: str, segment: ExplicitSegment, boundary: Boundary, places: Mapping[str, int]) -> Block:
    """One compiled pair of the model, by authored names."""
    output = next(port for port in boundary.outputs if port.variable.name == out)
    source = next(port for port in boundary.inputs if port.variable.name == wrt)
    graph = segment.spec.jacobian
    pair = next((p for p in graph.pairs if (p.out, p.wrt) == (out, wrt)), None) if graph else None
    whole = (
        pair is not None
        and pair.row is None
        and not (output.variable.sub_batch_shape or source.variable.sub_batch_shape or pair.wrt_sub_batch_shape)
    )
    return Block(
        out=output.name,
        wrt=source.name,
        value=places[out],
        base=output.variable.base_shape + source.variable.base_shape,
        place=None if pair is None or graph is None else graph.skip + pair.output,
        pair=pair,
        whole=whole,
        constant=pair is not None and pair.constant,
    )


def forward_plan(program: Program, boundary: Boundary) -> ForwardPlan | None:
    """The plan of a model, if it is one forward segment that takes inputs only and gives all outputs.

    Args:
        program: its segments.
        boundary: what tensors it takes.
    """
    segment = program.segments[0]
    if len(program.segments) > 1 or not isinstance(segment, ExplicitSegment):
        return None
    known = {port.variable.name for port in boundary.inputs}
    made = set(segment.spec.outputs)
    fits = known.issuperset(segment.spec.inputs) and made.issuperset(port.variable.name for port in boundary.outputs)
    return ForwardPlan(program, segment, boundary) if fits else None
