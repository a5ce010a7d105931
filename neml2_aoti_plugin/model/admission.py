"""Admit a caller's tensors: check names, dtype, device and shapes, and bring them to one flat batch axis.

Compiled graphs check nothing, so nothing may pass here that they would read wrongly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ..artifact.schema import Metadata, Shape, Variable
from ..errors import InputError, InputTypeError, UnknownNameError


@dataclass(frozen=True)
class Port:
    """A variable as callers know it.

    Args:
        name: boundary name.
        variable: with its authored name.
    """

    name: str
    variable: Variable


class Boundary:
    """The names, shapes, dtype and device that a model's callers deal with.

    Args:
        metadata: of the artifact.
        device: of the model.
        dtype: that callers' tensors have.
        compute_dtype: that the graphs take.
        where: the artifact, for messages.
    """

    def __init__(
        self, metadata: Metadata, device: torch.device, dtype: torch.dtype, compute_dtype: torch.dtype, where: str
    ) -> None:
        aliases = metadata.aliases
        self.inputs = tuple(Port(aliases.inputs.get(v.name, v.name), v) for v in metadata.inputs)
        self.outputs = tuple(Port(aliases.outputs.get(v.name, v.name), v) for v in metadata.outputs)
        self.by_name = {port.name: port for port in self.inputs}
        self.output_by_name = {port.name: port for port in self.outputs}
        self.device, self.dtype, self.compute_dtype, self.where = device, dtype, compute_dtype, where
        self._ports = [
            (p.name, p.variable.name, p.variable.natural_shape, 1 + len(p.variable.natural_shape)) for p in self.inputs
        ]

    def admit(self, inputs: Mapping[str, Tensor], batches: Sequence[Shape] = ()) -> tuple[dict[str, Tensor], Shape]:
        """Check the inputs and give them one flat batch axis.

        Args:
            inputs: by boundary name, each `(*batch, *sub_batch, *base)`; batch shapes that broadcast.
            batches: further batch shapes to broadcast with, those of parameters.

        Returns:
            The inputs by authored name, `(rows, *sub_batch, *base)`, and the common batch shape.

        Raises:
            UnknownNameError: an input is absent, or a name is not that of an input.
            InputTypeError: a value is no tensor, or has the wrong dtype or device.
            InputError: a shape does not fit.
        """
        plain = self._plain(inputs)
        if plain is not None and all(other == plain[1] for other in batches):
            return plain
        self.require_names(inputs)
        checked = [(port, *self.batch_of(inputs[port.name], port.name, port.variable)) for port in self.inputs]
        batch = checked[0][2] if checked else ()
        for _, _, other in checked:
            if other != batch:
                batch = self._common_batch([(p.name, b) for p, _, b in checked], batches)
                break
        else:
            if any(other != batch for other in batches):
                batch = self._common_batch([(p.name, b) for p, _, b in checked], batches)
        rows = prod(batch)
        return {
            port.variable.name: self.flatten(tensor, own, batch, rows, port.variable) for port, tensor, own in checked
        }, batch

    def _plain(self, inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Shape] | None:
        """The commonest inputs: all right, and all with the same one batch axis. None where they are others."""
        if type(inputs) is not dict or len(inputs) != len(self.inputs) or not inputs:
            return None
        if self.dtype != self.compute_dtype:
            return None
        batch: Shape | None = None
        found = {}
        for name, authored, natural, base in self._ports:
            value = inputs.get(name)
            if not isinstance(value, Tensor) or value.dtype is not self.dtype or not self._on_device(value.device):
                return None
            shape = tuple(value.shape)
            if batch is None:
                batch = shape[:1]
            if len(shape) != base or shape != batch + natural:
                return None
            found[authored] = value
        assert batch is not None
        return found, batch

    def require_names(self, inputs: Mapping[str, Tensor]) -> None:
        """Refuse inputs that are not exactly those of the model."""
        if len(inputs) != len(self.inputs) or any(name not in inputs for name in self.by_name):
            self._refuse_names(inputs)

    def batch_of(self, value: Tensor, name: str, variable: Variable, kind: str = "input") -> tuple[Tensor, Shape]:
        """Check one tensor; give it detached, at its natural shape, and its batch shape."""
        self.check_type(value, name, kind)
        natural = variable.natural_shape
        rank = value.ndim - len(natural)
        shape = tuple(value.shape)
        if rank >= 0 and shape[rank:] == natural:
            return value, shape[:rank]
        if variable.sub_batch_shape and shape == variable.base_shape:
            # A plain value stands for all sites.
            return value.expand(natural), ()
        raise InputError(self._shape_message(name, variable, shape, kind))

    def check_type(self, value: object, name: str, kind: str) -> None:
        """Refuse what is no tensor or has the wrong dtype or device."""
        if not isinstance(value, Tensor):
            raise InputTypeError(
                f"{kind} {name!r} is a {type(value).__name__}, expected a torch.Tensor of {self.dtype} on "
                f"{self.device}: "
                f"torch.as_tensor(value, dtype={self.dtype}), or its .data if it is a neml2 typed tensor."
            )
        if value.dtype != self.dtype:
            raise InputTypeError(
                f"{kind} {name!r} has dtype {value.dtype}, expected {self.dtype} (the compiled graphs of "
                f"{self.where} would "
                f"misread it). Pass {name}.to({self.dtype}), or load the model with dtype=."
            )
        if not self._on_device(value.device):
            raise InputTypeError(
                f"{kind} {name!r} is on device {value.device}, expected {self.device} (where {self.where} was loaded). "
                f"Pass {name}.to({str(self.device)!r}), or load the model with device={value.device.type!r}."
            )

    def _on_device(self, device: torch.device) -> bool:
        wanted = self.device
        return device.type == wanted.type and (wanted.index is None or device.index in (None, wanted.index))

    def flatten(self, tensor: Tensor, own: Shape, batch: Shape, rows: int, variable: Variable) -> Tensor:
        """Broadcast a checked tensor to the batch and fold that onto one axis."""
        natural = variable.natural_shape
        if own != batch:
            tensor = tensor.expand(batch + natural)
        if len(batch) != 1:
            tensor = tensor.reshape((rows, *natural))
        return tensor if tensor.dtype == self.compute_dtype else tensor.to(self.compute_dtype)

    def _common_batch(self, named: list[tuple[str, Shape]], batches: Sequence[Shape]) -> Shape:
        try:
            return tuple(torch.broadcast_shapes(*(b for _, b in named), *batches))
        except RuntimeError:
            listed = ", ".join(f"{name} {list(b)}" for name, b in named)
            more = f"; parameters {[list(b) for b in batches]}" if batches else ""
            raise InputError(f"the batch shapes of the inputs do not broadcast: {listed}{more}.") from None

    def _refuse_names(self, inputs: Mapping[str, Tensor]) -> None:
        if not isinstance(inputs, Mapping):
            raise InputTypeError(
                f"inputs are a {type(inputs).__name__}, expected a dict from name to tensor: {', '.join(self.by_name)}."
            )
        absent = [name for name in self.by_name if name not in inputs]
        unknown = [str(name) for name in inputs if name not in self.by_name]
        authored = {port.variable.name: port.name for port in self.inputs if port.variable.name != port.name}
        renamed = [f"{name!r} was renamed to {authored[name]!r}" for name in unknown if name in authored]
        parts = [
            f"missing {', '.join(map(repr, absent))}" if absent else "",
            f"unknown {', '.join(map(repr, unknown))}" if unknown else "",
            *renamed,
        ]
        raise UnknownNameError(
            f"inputs of {self.where}: {'; '.join(p for p in parts if p)}. The model's inputs are: "
            f"{', '.join(self.by_name)}."
        )

    def _shape_message(self, name: str, variable: Variable, shape: Shape, kind: str) -> str:
        base, sub = variable.base_shape, variable.sub_batch_shape
        kind_of = f"{variable.type} " if variable.type else ""
        expected = f"(*batch, {', '.join(map(str, variable.natural_shape))})" if variable.natural_shape else "(*batch,)"
        parts = f"base shape {base}" + (f", sub-batch shape {sub}" if sub else "")
        if len(shape) < len(base) or shape[len(shape) - len(base) :] != base:
            fault = "its trailing axes are not the base shape"
        else:
            fault = f"its axes before the base are not the sub-batch shape {sub}"
        return f"{kind} {name!r} has shape {tuple(shape)}, expected {expected}: {kind_of}{parts}; {fault}."
