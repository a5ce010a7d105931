"""Admit a caller's tensors: check names, dtype, device and shapes, and bring them to one flat batch axis.

A compiled graph reads the bytes at a tensor's address and checks nothing, so nothing may pass here that it would read
wrongly. A tensor without such bytes ends the process; one whose bytes are not its values, such as a negative view,
gives wrong numbers.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad
from torch.nn.parameter import Parameter, is_lazy
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from .._artifact.locate import DTYPES, Place
from .._artifact.schema import ImplicitInfo, Metadata, Shape, Variable
from .._checks import require_names
from .._program.values import contiguous
from ..errors import AOTIError, InputError, InputTypeError

# Of how many batch sizes the shapes are kept; callers go on with the batches they have.
FORMS = 32

INITIAL_GUESS = "initial guess"

# Shapes of tensors, with their sizes in bytes.
Form = tuple[tuple[torch.Size, int], ...]

_NO_DISPATCH = Tensor.__torch_dispatch__
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
        self.where, self.model = str(place.metadata.parent), place.model
        self._leaf = place.leaf
        self._authored = tuple(v.name for v in self.inputs.values())
        self._on_cpu = self.device.type == "cpu"
        self._forms: dict[int, Form] = {}

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

    def _form_of(self, rows: object) -> Form | None:
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
        return contiguous(value)

    def to_caller(self, value: Tensor) -> Tensor:
        """Bring a result to the caller's dtype."""
        dtype = self.dtype
        return value if value.dtype is dtype or not value.is_floating_point() else value.to(dtype)


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


# -- memory -----------------------------------------------------------------------------------------------------------


def are_plain(values: Sequence[Any], form: Form, dtype: torch.dtype, on_cpu: bool) -> bool:
    """Whether all values are torch's own dense tensors of that form and dtype, contiguous, without grad, in memory.

    Every tensor must pass this test on its way into a graph, so it is written for speed. Unless `on_cpu`, the device is
    left to the caller.
    """
    place = 0
    try:
        for shape, size in form:
            value = values[place]
            place += 1
            kind = type(value)
            if (
                (kind is not Tensor and kind is not Parameter)
                or value.shape != shape
                or value.dtype is not dtype
                or value.requires_grad
                or (on_cpu and not value.is_cpu)
                or not value.is_contiguous()
                or value.is_neg()
                or not value.data_ptr()
            ):
                return False
            offset = value.storage_offset()
            if value.untyped_storage().nbytes() < (size + offset * dtype.itemsize if offset else size):
                return False
    except RuntimeError:
        # Nested and sparse tensors, and those inside torch.vmap, have no such thing as an address or a storage.
        return False
    return True


def require_unrecorded(where: str) -> None:
    """Refuse a call that a tracer or a mode of torch takes over, since it would see nothing of what a graph does."""
    if torch._C._get_tracing_state() is not None:
        by = "torch.jit.trace (or an export that is based on it) records it"
    elif torch._C._len_torch_dispatch_stack():
        modes = ", ".join(type(mode).__name__ for mode in _get_current_dispatch_mode_stack())
        by = (
            f"the dispatch mode {modes} is active (torch.export, make_fx, fake tensors and the like work by such modes)"
        )
    else:
        return
    raise AOTIError(
        f"a call of {where} cannot be recorded or taken over: {by}, and would keep the numbers of this one call in the "
        "place of the model. Call the model outside of it, or in the form of an operator that torch knows: "
        "neml2_aoti_plugin.model.CustomOp. torch.compile may hold a model as it is, and breaks its graph there."
    )


def with_memory(value: Tensor, name: str, kind: str) -> Tensor:
    """The same values as a plain strided tensor that owns memory; an `InputTypeError` where there is no memory."""
    if _is_plain(value):
        return value
    fault = _fault(value)
    if fault:
        raise InputTypeError(
            f"{kind} {name!r} {fault}, so there are no bytes that a compiled graph could read. Pass a dense "
            "torch.Tensor with memory of its own."
        )
    if type(value) is not Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            value = value.as_subclass(Tensor)
    return value.resolve_neg() if value.is_neg() else value


def _is_plain(value: Tensor) -> bool:
    if type(value) is not Tensor and type(value) is not Parameter:
        return False
    try:
        return are_plain((value,), ((value.shape, value.nbytes),), value.dtype, False)
    except RuntimeError:
        # What has no shape.
        return False


def _fault(value: Tensor) -> str:
    """What keeps a tensor from having plain memory; empty for nothing."""
    kind = type(value)
    if kind is not Tensor and kind is not Parameter:
        if is_lazy(value):
            return f"is an {kind.__name__}, which has no values yet"
        # Its memory may lie in other tensors, and be reached by its own operations only.
        if kind.__torch_dispatch__ is not _NO_DISPATCH:
            return f"is a {kind.__name__}, a class with operations of its own (__torch_dispatch__)"
    with torch._C.DisableTorchFunctionSubclass():
        if _functorch.is_functorch_wrapped_tensor(value):
            return "is a value inside torch.vmap or another transform of torch.func, which only forward follows"
        if value.is_nested:
            return "is a nested tensor"
        if value.layout is not torch.strided:
            return f"has the layout {value.layout}"
        if value.is_quantized:
            return "is quantized"
        if value.device.type == "meta":
            return "is on the meta device"
        if torch._is_functional_tensor(value):
            return "is a functional tensor"
        if value._is_zerotensor():
            return "is a zero tensor without memory (torch._efficientzerotensor)"
        return "" if value.numel() == 0 else _storage_fault(value)


def _storage_fault(value: Tensor) -> str:
    """What is wrong with the storage of a strided tensor that is not empty."""
    last = value.storage_offset() + sum((n - 1) * step for n, step in zip(value.shape, value.stride(), strict=True))
    needed, there = (last + 1) * value.element_size(), value.untyped_storage().nbytes()
    if there < needed:
        return f"has a storage of {there} bytes where {needed} are needed (it was resized or freed)"
    return "" if value.data_ptr() else "has no address in memory"
