"""Arrays of callers, of NumPy, torch or anything with DLPack, as tensors that share their memory, and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.utils.dlpack import from_dlpack

from ..errors import InputError, InputTypeError
from ..model._memory import with_memory

# An array of a caller: numpy.ndarray, torch.Tensor, or what has `__dlpack__`.
Array = Any


@dataclass(frozen=True)
class Arrays:
    """What a caller's arrays must be: of the model's dtype, and on its device."""

    dtype: torch.dtype
    device: torch.device

    def tensor(self, value: Array, name: str) -> Tensor:
        """A caller's array or number as a tensor on the model's device, without a copy where that can be done."""
        if isinstance(value, (int, float, np.floating, np.integer)) and not isinstance(value, bool):
            try:
                return torch.tensor(float(value), dtype=self.dtype, device=self.device)
            except OverflowError:
                raise InputError(f"{name!r} is a whole number larger than any {self.dtype}.") from None
        if isinstance(value, Tensor):
            found = value.detach()
            if found.device.type != self.device.type:
                raise InputTypeError(
                    f"{name!r} is on device {found.device}, expected {self.device}: {name}.to({str(self.device)!r})."
                )
        elif isinstance(value, np.ndarray):
            require_unmasked(value, name)
            self._require_dtype(str(value.dtype), name)
            # torch takes no negative strides, and warns of memory that must not be written.
            found = torch.from_numpy(value if value.flags.writeable and _positive(value) else np.array(value))
        elif hasattr(value, "__dlpack__"):
            found = _taken(value, repr(name), from_dlpack)
        else:
            raise InputTypeError(
                f"{name!r} is a {type(value).__name__}, expected an array of NumPy or torch, or one with DLPack: "
                f"numpy.asarray({name}, dtype=float)."
            )
        self._require_dtype(str(found.dtype).removeprefix("torch."), name)
        return found.to(self.device)

    def target(self, value: Array, shape: tuple[int, ...], name: str) -> Tensor:
        """A caller's array that a result of a shape is to be written to, as a tensor of the same memory."""
        what = f"out[{name}]"
        if isinstance(value, Tensor):
            found = value.detach()
            if value.requires_grad or (value.is_inference() and not torch.is_inference_mode_enabled()):
                why = "requires grad" if value.requires_grad else "was made under torch.inference_mode"
                raise InputError(f"{what} {why} and must not be written to; pass a tensor of your own.")
            if with_memory(found, what, "the tensor for").data_ptr() != found.data_ptr():
                raise InputError(f"{what} is a view whose memory does not hold its values; pass a plain tensor.")
        else:
            # NumPy knows whether the owner of the memory allows to write to it; torch does not.
            other = hasattr(value, "__dlpack__") and not isinstance(value, np.ndarray)
            array = _taken(value, what, np.from_dlpack) if other else value
            if not isinstance(array, np.ndarray):
                raise InputTypeError(f"{what} is a {type(value).__name__}, expected an array that can be written to.")
            require_unmasked(array, what)
            self._require_dtype(str(array.dtype), what)
            if not array.flags.writeable or not _positive(array):
                raise InputError(
                    f"{what} is a {type(value).__name__} that is read-only or has negative strides; pass an array of "
                    "NumPy or a tensor of your own."
                )
            found = torch.from_numpy(array)
        self._require_dtype(str(found.dtype).removeprefix("torch."), what)
        if tuple(found.shape) != shape:
            raise InputError(f"{what} has shape {tuple(found.shape)}, expected {shape}.")
        if _overlaps_itself(found):
            raise InputError(f"{what} has entries that share memory (strides {found.stride()}); pass a copy of it.")
        return found

    def _require_dtype(self, dtype: str, name: str) -> None:
        wanted = str(self.dtype).removeprefix("torch.")
        if dtype != wanted:
            raise InputTypeError(
                f"{name!r} has dtype {dtype}, expected {wanted}, which the model computes in: numpy.asarray(value, "
                f"dtype={wanted!r}), or value.to(torch.{wanted})."
            )


def _positive(value: np.ndarray[Any, Any]) -> bool:
    return all(step >= 0 for step in value.strides)


def is_followed(value: Array, what: str) -> bool:
    """Whether autograd follows a value in reverse mode; one in forward mode is refused, or its tangent were lost."""
    if not isinstance(value, Tensor):
        return False
    if unpack_dual(value).tangent is not None:
        raise InputError(
            f"{what} carries a forward-mode tangent, and autograd follows Points in reverse mode alone: pass its "
            "detach(). PointsResult.tangent has derivatives; Model.forward is followed."
        )
    return value.requires_grad and torch.is_grad_enabled()


def require_unmasked(value: Array, name: str) -> None:
    """Refuse an array with masked entries, which a model has no notion of."""
    if isinstance(value, np.ma.MaskedArray):
        raise InputTypeError(f"{name!r} is a masked array, and a model has no masked points: {name}.filled(...).")


def share_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two arrays for results have an entry in common."""
    if one.device.type != "cpu" or other.device.type != "cpu":
        return one.device == other.device and one.data_ptr() == other.data_ptr()
    return np.shares_memory(one.numpy(), other.numpy())


def _taken(value: Array, what: str, take: Callable[[Array], Any]) -> Any:
    """An array of another library, taken over by DLPack; what that library raises is of any type."""
    try:
        return take(value)
    except Exception as error:
        raise InputTypeError(
            f"{what} is a {type(value).__name__}, which DLPack does not hand over ({type(error).__name__}: {error}). "
            "Pass an array of NumPy or a tensor of torch."
        ) from None


def _overlaps_itself(value: Tensor) -> bool:
    """Whether two entries may be one; never so for a slice of an array whose entries are all its own."""
    reach = 0
    for step, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size > 1:
            if step <= reach:
                return True
            reach += step * (size - 1)
    return False


def to_caller(value: Tensor, *, torch_kind: bool) -> Array:
    """A result as the caller's kind of array: a tensor, or a NumPy array of the same memory where it is on a CPU."""
    return value if torch_kind else value.cpu().numpy()


def rows_of(given: Array | slice, n: int, what: str) -> Tensor:
    """Points, given as a mask `(n,)`, by their indices or by a slice, as indices in the order given."""
    require_unmasked(given, what)
    wanted = f"expected a mask of bool ({n},), indices or a slice"
    try:
        chosen = np.arange(n)[given] if isinstance(given, slice) else given
        found = np.asarray(chosen.detach().cpu() if isinstance(chosen, Tensor) else chosen)
    except (TypeError, ValueError) as error:
        raise InputError(f"{what} is no array of points ({error}), {wanted}.") from None
    if found.dtype == np.bool_ and found.shape == (n,):
        found = np.flatnonzero(found)
    if not found.size:
        return torch.zeros(0, dtype=torch.int64)
    if found.dtype.kind not in "iu" or found.ndim != 1:
        raise InputError(f"{what} has shape {found.shape} and dtype {found.dtype}, {wanted}.")
    if found.min() < 0 or found.max() >= n:
        raise InputError(f"{what} has indices from {found.min()} to {found.max()}, expected 0 to {n - 1}.")
    return torch.from_numpy(found.astype(np.int64))
