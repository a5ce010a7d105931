"""Admit a caller's tensors: check names, dtype, device and shapes, and bring them to one flat batch axis."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._artifact.locate import DTYPES, Place
from .._artifact.schema import ImplicitInfo, Metadata, Shape, Variable
from .._checks import require_names
from ..errors import InputError, InputTypeError
from ._guard import require_unrecorded
from ._memory import MemoryForm, are_plain, with_memory

# Of how many batch sizes the shapes are kept; callers go on with the batches they have.
FORMS = 32

# Up to so many entries torch's operators use one thread (at::internal::GRAIN_SIZE).
GRAIN = 32768

INITIAL_GUESS = "initial guess"

_NO_BATCHES: Mapping[str, Shape] = {}
_OURS = (__name__.partition(".")[0], "torch")

_transforms = torch._C._are_functorch_transforms_active
_modes = torch._C._len_torch_dispatch_stack


class Boundary:
    """The names, shapes, dtype and device that a model's callers deal with; graphs take `compute_dtype`.

    `inputs`, `outputs` and `guesses` (unknowns that may be given as initial guesses) hold variables, which have their
    authored names, by the names at the boundary; `names` leads from the former to the latter.
    """

    def __init__(self, metadata: Metadata, place: Place, compute_dtype: torch.dtype) -> None:
        aliases = metadata.aliases
        self.inputs = {aliases.inputs.get(v.name, v.name): v for v in metadata.inputs}
        self.outputs = {aliases.outputs.get(v.name, v.name): v for v in metadata.outputs}
        # An unknown that is an input is there already.
        taken = {*self.inputs, *(v.name for v in metadata.inputs)}
        solved = [segment for segment in metadata.segments if isinstance(segment, ImplicitInfo)]
        unknowns = [(aliases.outputs.get(v.name, v.name), v) for part in solved for v in part.unknown_variables]
        self.guesses = {name: v for name, v in unknowns if taken.isdisjoint((name, v.name))}
        self.input_names = {v.name: name for name, v in (*self.guesses.items(), *self.inputs.items())}
        self.output_names = {v.name: name for name, v in self.outputs.items()}
        self.device, self.dtype, self.compute_dtype = place.device, place.dtype, compute_dtype
        self.where, self.model = str(place.metadata.parent), place.artifact.model
        self._leaf = place.leaf
        self._authored = tuple(v.name for v in self.inputs.values())
        self._on_cpu = self.device.type == "cpu"
        self._forms: dict[int, MemoryForm] = {}

    # -- plain inputs -----------------------------------------------------------------------------------------------

    def plain(self, values: Sequence[Any]) -> int:
        """The number of rows, if inputs (in the model's order) can go into graphs as they are; else 0.

        That is: dense tensors of the right dtype, device and shape, with the same one batch axis, which neither
        autograd nor a transform or mode of torch has to do with. They are the commonest; all others go through
        `admit`, which tells what is wrong.
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

    def listed(self, inputs: Mapping[str, Tensor]) -> list[Any]:
        """The inputs in the model's order; nothing where it is no dict of so many."""
        if type(inputs) is not dict or len(inputs) != len(self.inputs):
            return []
        return [inputs.get(name) for name in self.inputs]

    def _form_of(self, rows: object) -> MemoryForm | None:
        if type(rows) is not int or rows == 0 or self.dtype != self.compute_dtype:
            return None
        size = self.dtype.itemsize * rows
        form = tuple((torch.Size((rows, *v.natural_shape)), size * v.size) for v in self.inputs.values())
        if len(self._forms) >= FORMS:
            self._forms.clear()
        self._forms[rows] = form
        return form

    # -- all others -------------------------------------------------------------------------------------------------

    def admit(
        self, inputs: Mapping[str, Tensor], batches: Mapping[str, Shape] = _NO_BATCHES
    ) -> tuple[dict[str, Tensor], Shape]:
        """Check the inputs; give them by authored name, `(rows, *sub_batch, *base)`, with the common batch shape.

        They may have batch shapes that broadcast, with each other and with `batches` of parameters. Beside the inputs
        there may be initial guesses.
        """
        if not batches:
            values = self.listed(inputs)
            rows = self.plain(values) if values else 0
            if rows:
                return dict(zip(self._authored, values, strict=True)), (rows,)
        require_unrecorded(self.where)
        self.require_names(inputs)
        checked = [(name, v, *self.batch_of(inputs[name], name, v)) for name, v in self.inputs.items()]
        if len(inputs) > len(self.inputs):
            guesses = [(name, variable) for name, variable in self.guesses.items() if name in inputs]
            checked += [(name, v, *self._guess(inputs[name], name, v)) for name, v in guesses]
        batch = checked[0][3] if checked else ()
        if any(own != batch for *_, own in checked) or any(own != batch for own in batches.values()):
            batch = _common_batch([(name, own) for name, *_, own in checked], batches)
        return {v.name: self.flatten(tensor, own, batch, v) for _, v, tensor, own in checked}, batch

    def require_names(self, inputs: Mapping[str, Tensor]) -> None:
        """Refuse inputs that are not those of the model, and perhaps initial guesses."""
        if not isinstance(inputs, Mapping):
            raise InputTypeError(
                f"inputs are a {type(inputs).__name__}, expected a dict from name to tensor: {', '.join(self.inputs)}."
            )
        if inputs.keys() == self.inputs.keys():
            return
        hints = {a: f"{a!r} was renamed to {name!r}." for a, name in self.input_names.items() if a != name}
        more = f"As initial guesses it also takes: {', '.join(self.guesses)}." if self.guesses else ""
        require_names(
            [name for name in inputs if name not in self.guesses],
            self.inputs,
            f"inputs of {self.where}",
            "inputs",
            needed=self.inputs,
            hints=hints,
            more=more,
        )

    def _guess(self, value: Tensor, name: str, variable: Variable) -> tuple[Tensor, Shape]:
        """Check an initial guess, as `batch_of` does; one that is not finite would only fail later and less clearly."""
        checked, own = self.batch_of(value, name, variable, INITIAL_GUESS)
        finite = checked.isfinite()
        if not bool(finite.all()):
            raise InputError(
                f"{INITIAL_GUESS} {name!r} is not finite in {int((~finite).sum())} of {finite.numel()} entries. A "
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
        raise InputError(_shape_message(name, variable, shape, kind))

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

    def flatten(self, tensor: Tensor, own: Shape, batch: Shape, variable: Variable) -> Tensor:
        """Broadcast a checked tensor to the batch and fold that onto one axis."""
        natural = variable.natural_shape
        if own != batch:
            tensor = tensor.expand(batch + natural)
        if len(batch) != 1:
            tensor = tensor.reshape((prod(batch), *natural))
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
        return _contiguous(value)

    def to_caller(self, value: Tensor) -> Tensor:
        """Bring a result to the caller's dtype."""
        dtype = self.dtype
        return value if value.dtype is dtype or not value.is_floating_point() else value.to(dtype)


def _contiguous(x: Tensor) -> Tensor:
    """A tensor, or its copy with rows one after the other in memory.

    The copy is made in this thread. torch would copy a large tensor with all its threads, which wins next to nothing;
    and where other programs use the processors too, the call waits until the helpers have had their turn.
    """
    if x.is_contiguous():
        return x
    large = x.is_cpu and x.numel() >= GRAIN
    return torch.from_numpy(np.ascontiguousarray(x.detach().numpy())) if large else x.contiguous()


def _shape_message(name: str, variable: Variable, shape: Shape, kind: str) -> str:
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


def _common_batch(inputs: Sequence[tuple[str, Shape]], parameters: Mapping[str, Shape]) -> Shape:
    """What the batch shapes of inputs and parameters broadcast to."""
    named = [*inputs, *parameters.items()]
    try:
        common = tuple(torch.broadcast_shapes(*(batch for _, batch in named)))
    except RuntimeError:
        listed = ", ".join(f"{name} {list(batch)}" for name, batch in inputs)
        more = f"; parameters {[list(batch) for batch in parameters.values()]}" if parameters else ""
        raise InputError(f"the batch shapes of the inputs do not broadcast: {listed}{more}.") from None
    _warn_of_columns(named, common)
    return common


def _warn_of_columns(named: Sequence[tuple[str, Shape]], common: Shape) -> None:
    """Warn where a batch like `(N, 1)` meets one like `(N,)`, and makes N times N rows of them.

    That is a grid when it is meant. More often a column was given in the place of one value per row.
    """
    for name, column in named:
        for other, batch in named:
            lead = len(column) - len(batch)
            if batch and lead > 0 and column[0] == batch[0] > 1 and column[lead] == 1:
                shown = ", ".join(f"{n} {tuple(b)}" for n, b in named if b)
                warnings.warn(
                    f"{name!r} has the batch shape {tuple(column)} and {other!r} {tuple(batch)}: they broadcast "
                    f"against each other, and all to {tuple(common)} (batch shapes: {shown}). If {name!r} holds one "
                    f"value for each of the {batch[0]} rows, pass it with the batch shape {tuple(batch)}, such as "
                    f"{name}.reshape(({batch[0]}, *base)). If a grid is meant, ignore this warning with "
                    "warnings.filterwarnings, or expand one of the two to the common batch shape.",
                    UserWarning,
                    stacklevel=callers_level(),
                )
                return


def callers_level() -> int:
    """The stack level, as the caller must give it to `warnings.warn`, of the line that called this package."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _OURS:
        frame, level = frame.f_back, level + 1
    return level
