"""Whether a tensor's bytes in memory are its values.

A compiled graph reads the bytes at a tensor's address and checks nothing, so nothing may pass here that it would read
wrongly. A tensor without such bytes ends the process; one whose bytes are not its values, such as a negative view,
gives wrong numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.nn.parameter import Parameter, is_lazy

from ..errors import InputTypeError

# Shapes of tensors, with their sizes in bytes.
MemoryForm = tuple[tuple[torch.Size, int], ...]


def are_plain(values: Sequence[Any], form: MemoryForm, dtype: torch.dtype, on_cpu: bool) -> bool:
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


def with_memory(value: Tensor, name: str, kind: str) -> Tensor:
    """The same values as a plain strided tensor that owns memory; an `InputTypeError` where there is no memory."""
    own = type(value)
    # What has no shape raises.
    with suppress(RuntimeError):
        if own in (Tensor, Parameter) and are_plain((value,), ((value.shape, value.nbytes),), value.dtype, False):
            return value
    fault = _fault(value)
    if fault:
        raise InputTypeError(
            f"{kind} {name!r} {fault}, so there are no bytes that a compiled graph could read. Pass a dense "
            "torch.Tensor with memory of its own."
        )
    if own is not Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            value = value.as_subclass(Tensor)
    return value.resolve_neg() if value.is_neg() else value


def _fault(value: Tensor) -> str:
    """What keeps a tensor from having plain memory; empty for nothing."""
    kind = type(value)
    if is_lazy(value):
        return f"is an {kind.__name__}, which has no values yet"
    # Its memory may lie in other tensors, and be reached by its own operations only.
    if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
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
        if value.numel() == 0:
            return ""
        last = value.storage_offset() + sum((n - 1) * k for n, k in zip(value.shape, value.stride(), strict=True))
        needed, there = (last + 1) * value.element_size(), value.untyped_storage().nbytes()
        if there < needed:
            return f"has a storage of {there} bytes where {needed} are needed (it was resized or freed)"
        return "" if value.data_ptr() else "has no address in memory"
