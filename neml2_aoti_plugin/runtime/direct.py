"""A short way for the commonest call: one forward segment, no parameters, all inputs with the same batch axis.

It asks what `boundary` asks, in the order that is cheapest, and gives up on whatever is not plain; the long way then
says what is wrong, or takes it. At one row the checks would otherwise cost several times the graph.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .boundary import Boundary
from .forward import ForwardStage
from .program import Program


class DirectCall:
    """A call of a model that is one forward graph.

    Args:
        stage: its only segment.
        boundary: what tensors the model takes.
    """

    def __init__(self, stage: ForwardStage, boundary: Boundary) -> None:
        self._graph = stage.value
        names = {port.variable.name: port.name for port in boundary.inputs}
        shapes = {port.name: torch.Size(port.variable.natural_shape) for port in boundary.inputs}
        self._inputs = tuple((names[name], shapes[names[name]]) for name in stage.spec.inputs)
        self._count = len(self._inputs)
        # Places of the model's outputs among those of the graph.
        places = {name: i for i, name in enumerate(stage.spec.outputs)}
        self._outputs = tuple((port.name, places[port.variable.name]) for port in boundary.outputs)
        self._arity = len(stage.spec.outputs)
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
        arguments = []
        dtype = self._dtype
        for (name, _), shape in zip(self._inputs, shapes, strict=True):
            value = inputs.get(name)
            if type(value) is not Tensor or value.shape != shape or value.dtype is not dtype:
                return None
            if value.requires_grad or not value.is_cpu or not value.is_contiguous():
                return None
            arguments.append(value)
        if known < 0:
            outputs = self._graph(arguments)
            if len(outputs) != self._arity:
                return None
        else:
            outputs = self._graph.run(arguments)
        # In one piece, for another thread may read it meanwhile.
        self._shapes = rows, shapes
        found = {}
        for name, place in self._outputs:
            value = outputs[place]
            if value.shape[0] != rows or not value.is_contiguous():
                return None
            found[name] = value
        return found


def direct_call(program: Program, boundary: Boundary) -> DirectCall | None:
    """The short way of a model, if it has one.

    Args:
        program: its segments.
        boundary: what tensors it takes.
    """
    stage = program.stages[0]
    if len(program.stages) > 1 or not isinstance(stage, ForwardStage):
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
    return DirectCall(stage, boundary) if plain and whole else None
