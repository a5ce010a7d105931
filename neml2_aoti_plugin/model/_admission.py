"""Admit a caller's tensors: check names, dtype, device and shapes, and bring them to one flat batch axis.

Compiled graphs check nothing, so nothing may pass here that they would read wrongly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._artifact.locate import DTYPES, Place
from .._artifact.schema import ImplicitInfo, Metadata, Shape, Variable
from .._program.copies import contiguous
from ..errors import InputError, InputTypeError, UnknownNameError
from ._broadcasting import warn_of_columns
from ._memory import Form, are_plain, require_unrecorded, with_memory

# Forms are few, for callers go on with the batches they have.
FORMS = 32

INITIAL_GUESS = "initial guess"

_transforms = torch._C._are_functorch_transforms_active
_modes = torch._C._len_torch_dispatch_stack


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
        place: the leaf: its device, and the dtype that callers' tensors have.
        compute_dtype: that the graphs take.
    """

    def __init__(self, metadata: Metadata, place: Place, compute_dtype: torch.dtype) -> None:
        aliases = metadata.aliases
        self.inputs = tuple(Port(aliases.inputs.get(v.name, v.name), v) for v in metadata.inputs)
        self.outputs = tuple(Port(aliases.outputs.get(v.name, v.name), v) for v in metadata.outputs)
        self.by_name = {port.name: port for port in self.inputs}
        self.output_by_name = {port.name: port for port in self.outputs}
        authored = {v.name for v in metadata.inputs}
        # The unknowns that a caller may give as initial guesses; one that is an input is there already.
        self.iterates = {
            port.name: port
            for segment in metadata.segments
            if isinstance(segment, ImplicitInfo)
            for port in (Port(aliases.outputs.get(v.name, v.name), v) for v in segment.unknown_variables)
            if port.name not in self.by_name and port.variable.name not in authored
        }
        self.device, self.dtype, self.compute_dtype = place.device, place.dtype, compute_dtype
        self.where, self.model = str(place.metadata.parent), place.model
        self._leaf = place.leaf
        self.names = tuple(port.name for port in self.inputs)
        self._authored = tuple(port.variable.name for port in self.inputs)
        self._on_cpu = self.device.type == "cpu"
        self._forms: dict[int, Form] = {}

    # -- plain inputs -----------------------------------------------------------------------------------------------

    def plain(self, values: Sequence[Any]) -> int:
        """The number of rows, if the inputs can go into graphs as they are.

        That is: dense tensors of the right dtype, device and shape, with the same one batch axis, which neither
        autograd nor a transform or mode of torch has to do with. They are the commonest; all others go through
        `admit`, which tells what is wrong.

        Args:
            values: the inputs in the model's order; anything may be among them.

        Returns:
            The number of rows; 0 where the inputs are others.
        """
        if _transforms() or _modes() or forward_ad._current_level >= 0:
            return 0
        try:
            rows = values[0].shape[0]
            # While torch.jit traces, extents are tensors, which are no keys of this dict.
            form = self._forms.get(rows) or self._form_of(rows)
        except (AttributeError, IndexError, RuntimeError, TypeError):
            # What has no shape, or one that is no tuple of numbers.
            return 0
        if form is None or not are_plain(values, form, self.dtype, self._on_cpu):
            return 0
        return rows if self._on_cpu or all(self._on_device(value.device) for value in values) else 0

    def _form_of(self, rows: object) -> Form | None:
        if type(rows) is not int or rows == 0 or self.dtype != self.compute_dtype:
            return None
        size = self.dtype.itemsize * rows
        form = tuple(
            (torch.Size((rows, *port.variable.natural_shape)), size * port.variable.size) for port in self.inputs
        )
        if len(self._forms) >= FORMS:
            self._forms.clear()
        self._forms[rows] = form
        return form

    # -- all others -------------------------------------------------------------------------------------------------

    def admit(self, inputs: Mapping[str, Tensor], batches: Mapping[str, Shape] = {}) -> tuple[dict[str, Tensor], Shape]:
        """Check the inputs and give them one flat batch axis.

        Args:
            inputs: by boundary name, each `(*batch, *sub_batch, *base)`; batch shapes that broadcast. Beside the inputs
                any unknown of an implicit segment, as the initial guess.
            batches: further batch shapes to broadcast with, those of parameters by name.

        Returns:
            The inputs and initial guesses by authored name, `(rows, *sub_batch, *base)`, and the common batch shape.

        Raises:
            UnknownNameError: an input is absent, or a name is neither that of an input nor that of an unknown.
            InputTypeError: a value is no tensor, has no memory, or has the wrong dtype or device.
            InputError: a shape does not fit, or an initial guess is not finite.
            AOTIError: torch records the call, or a mode takes the place of its operations.
        """
        if type(inputs) is dict and len(inputs) == len(self.names) and not batches:
            values: list[Any] = [inputs.get(name) for name in self.names]
            rows = self.plain(values) if values else 0
            if rows:
                return dict(zip(self._authored, values, strict=True)), (rows,)
        require_unrecorded(self.where)
        self.require_names(inputs)
        checked = [(port, *self.batch_of(inputs[port.name], port.name, port.variable)) for port in self.inputs]
        checked += [(port, *self._iterate(inputs[name], port)) for name, port in self._given_iterates(inputs)]
        batch = checked[0][2] if checked else ()
        if any(other != batch for _, _, other in checked) or any(other != batch for other in batches.values()):
            batch = self._common_batch([(port.name, own) for port, _, own in checked], batches)
        rows = prod(batch)
        return {
            port.variable.name: self.flatten(tensor, own, batch, rows, port.variable) for port, tensor, own in checked
        }, batch

    def require_names(self, inputs: Mapping[str, Tensor]) -> None:
        """Refuse inputs that are not those of the model, and perhaps initial guesses."""
        if not isinstance(inputs, Mapping) or any(name not in inputs for name in self.by_name):
            self._refuse_names(inputs)
        if len(inputs) != len(self.inputs) and any(n not in self.by_name and n not in self.iterates for n in inputs):
            self._refuse_names(inputs)

    def _given_iterates(self, inputs: Mapping[str, Tensor]) -> list[tuple[str, Port]]:
        """The initial guesses among the inputs."""
        if len(inputs) == len(self.inputs):
            return []
        return [(name, port) for name, port in self.iterates.items() if name in inputs]

    def _iterate(self, value: Tensor, port: Port) -> tuple[Tensor, Shape]:
        """Check an initial guess, as `batch_of` does; one that is not finite would only fail later and less clearly."""
        checked, own = self.batch_of(value, port.name, port.variable, INITIAL_GUESS)
        finite = checked.isfinite()
        if not bool(finite.all()):
            raise InputError(
                f"{INITIAL_GUESS} {port.name!r} is not finite in {int((~finite).sum())} of {finite.numel()} entries. A "
                "Newton solve cannot start there: pass finite values, or leave it out."
            )
        return checked, own

    def batch_of(self, value: Tensor, name: str, variable: Variable, kind: str = "input") -> tuple[Tensor, Shape]:
        """Check one tensor; give it at its natural shape, with its batch shape."""
        value = self.check(value, name, kind)
        natural = variable.natural_shape
        rank = value.ndim - len(natural)
        shape = tuple(value.shape)
        if rank >= 0 and shape[rank:] == natural:
            return value, shape[:rank]
        if variable.sub_batch_shape and shape == variable.base_shape:
            # A plain value stands for all sites.
            return value.expand(natural), ()
        raise InputError(self._shape_message(name, variable, shape, kind))

    def check(self, value: object, name: str, kind: str) -> Tensor:
        """Refuse what is no tensor with memory, or has the wrong dtype or device; give it as torch's own class."""
        if not isinstance(value, Tensor):
            raise InputTypeError(
                f"{kind} {name!r} is a {type(value).__name__}, expected a torch.Tensor of {self.dtype} on "
                f"{self.device}: torch.as_tensor(value, dtype={self.dtype}), or its .data if it is a neml2 typed "
                "tensor."
            )
        if value.dtype != self.dtype:
            raise InputTypeError(
                f"{kind} {name!r} has dtype {value.dtype}, expected {self.dtype} (the compiled graphs of "
                f"{self.where} would misread it). Pass {name}.to({self.dtype}){self._or_load(value.dtype)}."
            )
        if not self._on_device(value.device):
            raise InputTypeError(
                f"{kind} {name!r} is on device {value.device}, expected {self.device} (where {self.where} was loaded). "
                f"Pass {name}.to({str(self.device)!r}), or load the model with device={value.device.type!r}."
            )
        return with_memory(value, name, kind)

    def _or_load(self, dtype: torch.dtype) -> str:
        """The other cure for a wrong dtype, where the model was compiled for it."""
        for name, known in DTYPES.items():
            if known == dtype and any(part.name == name and part.is_dir() for part in self._leaf.parent.iterdir()):
                return f", or load the model with dtype={name!r}"
        return ""

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

    # -- results ----------------------------------------------------------------------------------------------------

    def unflatten(self, value: Tensor, batch: Shape) -> Tensor:
        """Bring a result `(rows or 1, ...)` to the caller's batch shape and dtype."""
        value = self.to_caller(value)
        if len(batch) != 1:
            rows = prod(batch)
            if value.shape[0] != rows:
                value = value.expand((rows, *value.shape[1:]))
            value = value.reshape(batch + tuple(value.shape[1:]))
        elif value.shape[0] != batch[0]:
            value = value.expand((batch[0], *value.shape[1:]))
        return contiguous(value)

    def to_caller(self, value: Tensor) -> Tensor:
        """Bring a result to the caller's dtype."""
        dtype = self.dtype
        return value if value.dtype is dtype or not value.is_floating_point() else value.to(dtype)

    # -- messages ---------------------------------------------------------------------------------------------------

    def _common_batch(self, named: list[tuple[str, Shape]], batches: Mapping[str, Shape]) -> Shape:
        try:
            common = tuple(torch.broadcast_shapes(*(b for _, b in named), *batches.values()))
        except RuntimeError:
            listed = ", ".join(f"{name} {list(b)}" for name, b in named)
            more = f"; parameters {[list(b) for b in batches.values()]}" if batches else ""
            raise InputError(f"the batch shapes of the inputs do not broadcast: {listed}{more}.") from None
        warn_of_columns([*named, *batches.items()], common)
        return common

    def _refuse_names(self, inputs: Mapping[str, Tensor]) -> None:
        if not isinstance(inputs, Mapping):
            raise InputTypeError(
                f"inputs are a {type(inputs).__name__}, expected a dict from name to tensor: {', '.join(self.by_name)}."
            )
        absent = [name for name in self.by_name if name not in inputs]
        unknown = [str(name) for name in inputs if name not in self.by_name and name not in self.iterates]
        authored = {port.variable.name: port.name for port in self.inputs if port.variable.name != port.name}
        renamed = [f"{name!r} was renamed to {authored[name]!r}" for name in unknown if name in authored]
        parts = [
            f"missing {', '.join(map(repr, absent))}" if absent else "",
            f"unknown {', '.join(map(repr, unknown))}" if unknown else "",
            *renamed,
        ]
        iterates = f" As initial guesses it also takes: {', '.join(self.iterates)}." if self.iterates else ""
        raise UnknownNameError(
            f"inputs of {self.where}: {'; '.join(p for p in parts if p)}. The model's inputs are: "
            f"{', '.join(self.by_name)}.{iterates}"
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
        if base == (6,) and shape[-2:] == (3, 3):
            fault += "; Mandel's notation is expected: neml2_aoti_plugin.notation.convert(value, 'tensor', 'mandel')"
        return f"{kind} {name!r} has shape {tuple(shape)}, expected {expected}: {kind_of}{parts}; {fault}."
