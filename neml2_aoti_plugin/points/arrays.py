"""Arrays of callers, of NumPy, torch or anything with DLPack, as tensors that share their memory, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from ..errors import InputError, InputTypeError

# An array of a caller: numpy.ndarray, torch.Tensor, or what has `__dlpack__`.
Array = Any


@dataclass(frozen=True)
class Arrays:
    """What a caller's arrays must be.

    Args:
        dtype: of all arrays; that of the model.
        device: of the model.
    """

    dtype: torch.dtype
    device: torch.device

    def tensor(self, value: Array, name: str) -> Tensor:
        """A caller's value as a tensor on the model's device, without a copy where that can be done.

        Args:
            value: an array or a number.
            name: of it, for messages.

        Raises:
            InputTypeError: it is no array, or has another dtype or device.
        """
        if isinstance(value, (bool, int, float, np.floating, np.integer)):
            return torch.tensor(float(value), dtype=self.dtype, device=self.device)
        if isinstance(value, Tensor):
            found = value.detach()
            if found.device.type != self.device.type:
                raise InputTypeError(
                    f"{name!r} is on device {found.device}, expected {self.device}: {name}.to({str(self.device)!r})."
                )
        elif isinstance(value, np.ndarray):
            self._require_dtype(str(value.dtype), name)
            # torch takes no negative strides, and warns of memory that must not be written.
            found = torch.from_numpy(value if value.flags.writeable and _positive(value) else np.array(value))
        elif hasattr(value, "__dlpack__"):
            found = from_dlpack(value)
        else:
            raise InputTypeError(
                f"{name!r} is a {type(value).__name__}, expected an array of NumPy or torch, or one with DLPack: "
                f"numpy.asarray({name}, dtype=float)."
            )
        self._require_dtype(str(found.dtype).removeprefix("torch."), name)
        return found.to(self.device)

    def target(self, value: Array, shape: tuple[int, ...], name: str) -> Tensor:
        """A caller's array that a result is to be written to, as a tensor of the same memory.

        Args:
            value: the array.
            shape: of the result.
            name: of the result, for messages.

        Raises:
            InputError: its shape is another one, or it can't be written to.
            InputTypeError: as for `tensor`.
        """
        if isinstance(value, np.ndarray):
            self._require_dtype(str(value.dtype), f"out[{name}]")
            if not value.flags.writeable or not _positive(value):
                raise InputError(f"out[{name}] is read-only or has negative strides; pass an array of your own memory.")
            found = torch.from_numpy(value)
        elif isinstance(value, Tensor):
            found = value.detach()
        elif hasattr(value, "__dlpack__"):
            found = from_dlpack(value)
        else:
            raise InputTypeError(f"out[{name}] is a {type(value).__name__}, expected an array that can be written to.")
        self._require_dtype(str(found.dtype).removeprefix("torch."), f"out[{name}]")
        if tuple(found.shape) != shape:
            raise InputError(f"out[{name}] has shape {tuple(found.shape)}, expected {shape}.")
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


def to_caller(value: Tensor, *, torch_kind: bool) -> Array:
    """A result as the caller's kind of array: a tensor, or a NumPy array of the same memory where it is on a CPU."""
    return value if torch_kind else value.cpu().numpy()
