"""The leaf of an artifact that a call asks for, and the devices and dtypes that there are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import InputError
from .folder import Folder

DTYPES = {"float64": torch.float64, "float32": torch.float32}
DEVICES = ("cpu", "cuda", "xpu", "hip", "mps")


@dataclass(frozen=True)
class Place:
    """Where the files of one leaf are, and what they were compiled for.

    Args:
        model: name of the compiled model.
        metadata: the metadata file.
        leaf: the folder of the graphs.
        device: that the graphs run on; with an index where one was asked for.
        dtype: that the caller's tensors have.
        folder: of the whole artifact, through which the files are read.
        digest: of the metadata file, where it was read to find the leaf; empty where it was not.
    """

    model: str
    metadata: Path
    leaf: Path
    device: torch.device
    dtype: torch.dtype
    folder: Folder
    digest: str = ""


def device_of(device: str | torch.device | None, hint: str | None = None) -> torch.device:
    """The device that was asked for, else `hint`, else torch's current default device."""
    if device is None or device == "":
        return torch.device(hint) if hint is not None else torch.get_default_device()
    if isinstance(device, str) and device.split(":")[0] == "hip":
        device = device.replace("hip", "cuda", 1)
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"device={device!r} is not a torch device; expected one of {', '.join(DEVICES)}.") from error
    if found.type not in DEVICES:
        raise InputError(
            f"device={str(device)!r}: neml2-compile has no such device; expected one of {', '.join(DEVICES)}."
        )
    return found


def dtype_name(dtype: str | torch.dtype | None) -> str | None:
    """The folder name of a dtype; None when none was asked for."""
    if dtype is None or dtype == "":
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise InputError(f"dtype={dtype!r}: expected one of {', '.join(DTYPES)}.")
    return name
