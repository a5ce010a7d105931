"""Find an artifact's metadata and the leaf `<device>/<dtype>` that a call asks for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import ArtifactNotFoundError, InputError

METADATA = "metadata.json"
DTYPES = {"float64": torch.float64, "float32": torch.float32}
DEVICES = ("cpu", "cuda", "xpu", "hip", "mps")


@dataclass(frozen=True)
class Place:
    """Where the files of one leaf are, and what they were compiled for.

    Args:
        metadata: the metadata file.
        leaf: the folder of the graphs.
        device: that the graphs run on; with an index where one was asked for.
        dtype: that the caller's tensors have.
    """

    metadata: Path
    leaf: Path
    device: torch.device
    dtype: torch.dtype


def locate(path: str | Path, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None) -> Place:
    """Find the leaf of an artifact for a device and a dtype.

    Args:
        path: the artifact's folder, its metadata file, or a folder inside it.
        device: device to run on; torch's current default device if not given.
        dtype: dtype of the tensors; if not given, float64 where compiled, else the only one compiled.

    Returns:
        The place of the leaf.

    Raises:
        ArtifactNotFoundError: there is no artifact at the path, or no such leaf.
        InputError: the device or the dtype is not one that neml2-compile knows.
    """
    root, hint = find_root(Path(path))
    wanted = device_of(device, hint[0] if hint else None)
    precision = dtype_name(dtype) or (hint[1] if len(hint) > 1 else None)
    present = leaves(root)
    here = [d for family, d in present if family == wanted.type]
    if precision is None:
        precision = "float64" if "float64" in here or len(here) != 1 else here[0]
    if (wanted.type, precision) not in present:
        found = ", ".join(f"{a}/{b}" for a, b in present) or "(none)"
        raise ArtifactNotFoundError(
            f"no compiled artifact for device '{wanted.type}' and dtype '{precision}' in {root}; compiled leaves: {found}. "
            f"Load one of these (device=, dtype=), or compile the one you need: "
            f"neml2-compile INPUT --model {root.name} --device {wanted.type} --dtype {precision}"
        )
    return Place(root / METADATA, root / wanted.type / precision, wanted, DTYPES[precision])


def find_root(path: Path) -> tuple[Path, tuple[str, ...]]:
    """Find the artifact's folder from a path to it or into it.

    Args:
        path: given by the caller.

    Returns:
        The folder that holds the metadata, and the device and dtype that the path itself names, if it does.
    """
    if path.name == METADATA:
        if not path.is_file():
            raise ArtifactNotFoundError(_missing(path.parent))
        return path.parent, ()
    for root, hint in ((path, ()), (path.parent, (path.name,)), (path.parent.parent, (path.parent.name, path.name))):
        if (root / METADATA).is_file() and (not hint or hint[0] in DEVICES) and path.is_dir():
            return root, hint
    raise ArtifactNotFoundError(_missing(path))


def _missing(path: Path) -> str:
    if not path.exists():
        there = sorted(p.name for p in path.parent.iterdir())[:8] if path.parent.is_dir() else []
        beside = f" Beside it: {', '.join(there)}." if there else ""
        return (
            f"no metadata.json in {path}: there is no such folder.{beside} Give the artifact's folder that "
            "neml2-compile wrote (it holds metadata.json)."
        )
    return (
        f"no metadata.json in {path}. Give the artifact's folder that neml2-compile wrote (it holds metadata.json and "
        "one folder per device)."
    )


def leaves(root: Path) -> list[tuple[str, str]]:
    """List the leaves of an artifact as (device, dtype)."""
    return sorted(
        (family.name, leaf.name)
        for family in root.iterdir()
        if family.is_dir() and family.name in DEVICES
        for leaf in family.iterdir()
        if leaf.is_dir() and leaf.name in DTYPES
    )


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
        raise InputError(f"device={str(device)!r}: neml2-compile has no such device; expected one of {', '.join(DEVICES)}.")
    return found


def dtype_name(dtype: str | torch.dtype | None) -> str | None:
    """The folder name of a dtype; None when none was asked for."""
    if dtype is None or dtype == "":
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise InputError(f"dtype={dtype!r}: expected one of {', '.join(DTYPES)}.")
    return name
