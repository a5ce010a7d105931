"""A short way for the commonest call: one forward segment, no parameters, all inputs with the same batch axis.

It asks what `boundary` asks, in the order that is cheapest, and gives up on whatever is not plain; the long way then
says what is wrong, or takes it. At one row the checks would otherwise cost several times the graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..artifact.schema import Shape
from ..program.explicit import ExplicitSegment
from ..program.program import Program
from .admission import Boundary


class DirectCall:
    """Calls of a model that is one forward graph: for the outputs, or for these and the derivative blocks.

    Args:
        stage: its only segment.
        boundary: what tensors the model takes.
        derivatives: the compiled pairs of the model, by authored names.
    """

    def __init__(self, stage: ExplicitSegment, boundary: Boundary, derivatives: Sequence[tuple[str, str]]) -> None:
        self._value, self._jacobian = stage.value, stage.jacobian
        names = {port.variable.name: port.name for port in boundary.inputs}
        shapes = {port.name: torch.Size(port.variable.natural_shape) for port in boundary.inputs}
        self._inputs = tuple((names[name], shapes[names[name]]) for name in stage.spec.inputs)
        self._count = len(self._inputs)
        # Places of the model's outputs among those of the graph.
        places = {name: i for i, name in enumerate(stage.spec.outputs)}
        self._outputs = tuple((port.name, places[port.variable.name]) for port in boundary.outputs)
        self._arity = len(stage.spec.outputs)
        self._blocks = _blocks(stage, boundary, derivatives)
        self._dtype = boundary.dtype
        # The number of rows of the last call, and the shapes that its inputs had; -1 before the first.
        self._shapes: tuple[int, tuple[torch.Size, ...]] = (-1, ())

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """Evaluate the outputs.

        Args:
            inputs: as for `Model.forward`.

        Returns:
            Outputs by name, `(rows, *base)`; None where the call is not of the plain kind.
        """
        arguments = self._plain(inputs)
        if arguments is None:
            return None
        outputs = self._value.again(arguments)
        return self._named(outputs, arguments[0].shape[0]) if len(outputs) == self._arity else None

    def jacobian(self, inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]] | None:
        """Evaluate the outputs and the derivative blocks.

        Args:
            inputs: as for `Model.jacobian`.

        Returns:
            As `Model.jacobian`; None where the call or the model is not of the plain kind.
        """
        if self._jacobian is None or not self._blocks:
            return None
        arguments = self._plain(inputs)
        if arguments is None:
            return None
        outputs = self._jacobian.again(arguments)
        rows = arguments[0].shape[0]
        if len(outputs) != self._arity + len(self._blocks):
            return None
        found = self._named(outputs, rows)
        if found is None:
            return None
        blocks: dict[str, dict[str, Tensor]] = {}
        for out, name, place, shape, constant in self._blocks:
            block = outputs[place]
            lead = 1 if constant else rows
            if block.shape != (lead, *shape):
                return None
            block = block[0] if constant else block
            blocks.setdefault(out, {})[name] = block if block.is_contiguous() else block.contiguous()
        return found, blocks

    def _plain(self, inputs: Mapping[str, Tensor]) -> list[Tensor] | None:
        """The arguments of the graph; None where the call is not of the plain kind."""
        if type(inputs) is not dict or len(inputs) != self._count:
            return None
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            return None
        first = inputs.get(self._inputs[0][0])
        if type(first) is not Tensor or first.ndim == 0:
            return None
        rows = first.shape[0]
        known, shapes = self._shapes
        if known != rows:
            if rows == 0:
                return None
            shapes = tuple([torch.Size((rows, *natural)) for _, natural in self._inputs])
            # In one piece, for another thread may read it meanwhile.
            self._shapes = rows, shapes
        arguments = []
        dtype = self._dtype
        for (name, _), shape in zip(self._inputs, shapes, strict=True):
            value = inputs.get(name)
            if type(value) is not Tensor or value.shape != shape or value.dtype is not dtype:
                return None
            if value.requires_grad or not value.is_cpu or not value.is_contiguous():
                return None
            arguments.append(value)
        return arguments

    def _named(self, outputs: list[Tensor], rows: int) -> dict[str, Tensor] | None:
        found = {}
        for name, place in self._outputs:
            value = outputs[place]
            if value.shape[0] != rows or not value.is_contiguous():
                return None
            found[name] = value
        return found


def _blocks(
    stage: ExplicitSegment, boundary: Boundary, derivatives: Sequence[tuple[str, str]]
) -> tuple[tuple[str, str, int, Shape, bool], ...]:
    """Of each compiled pair: output, input, place among the graph's outputs, shape, and whether it is constant.

    Nothing where the graph's outputs are not the values and the blocks of all pairs, one by one.
    """
    of = stage.spec.jacobian
    if of is None or of.skip != len(stage.spec.outputs) or [(p.out, p.wrt) for p in of.pairs] != list(derivatives):
        return ()
    outs = {port.variable.name: port for port in boundary.outputs}
    ins = {port.variable.name: port for port in boundary.inputs}
    found = []
    for place, pair in enumerate(of.pairs):
        if pair.out not in outs or pair.wrt not in ins or pair.row is not None or pair.output != place:
            return ()
        out, wrt = outs[pair.out], ins[pair.wrt]
        if out.variable.sub_batch_shape or wrt.variable.sub_batch_shape:
            return ()
        found.append((out.name, wrt.name, of.skip + place, pair.out_base_shape + pair.wrt_base_shape, pair.constant))
    return tuple(found)


def direct_call(program: Program, boundary: Boundary) -> DirectCall | None:
    """The short way of a model, if it has one.

    Args:
        program: its segments.
        boundary: what tensors it takes.
    """
    stage = program.segments[0]
    if len(program.segments) > 1 or not isinstance(stage, ExplicitSegment):
        return None
    plain = (
        not stage.spec.parameters
        and stage.spec.order is None
        and program.batch_axes == (None,)
        and boundary.dtype == boundary.compute_dtype
        and boundary.device.type == "cpu"
    )
    known = {port.variable.name for port in boundary.inputs}
    made = set(stage.spec.outputs)
    whole = known == set(stage.spec.inputs) != set() and all(port.variable.name in made for port in boundary.outputs)
    return DirectCall(stage, boundary, program.metadata.derivatives) if plain and whole else None
