"""From a path, a device and a dtype to the leaf of an artifact."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch

from ..errors import ArtifactError, ArtifactNotFoundError, InputError
from .document import Form, convert, one_of, read_document
from .files import Folder
from .layout import (
    DEVICE_METADATA,
    DEVICES,
    DTYPE_NAMES,
    METADATA,
    device_files,
    device_files_at,
    device_files_below,
    device_root,
    find_root,
    leaves,
    missing,
    require_reach,
)
from .trust import admit

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_NAMES}


@dataclass(frozen=True)
class Place:
    """Where the files of one leaf are, and what they were compiled for."""

    # Name of the compiled model.
    model: str
    metadata: Path
    # The folder of the graphs.
    leaf: Path
    # With an index where one was asked for.
    device: torch.device
    # That the caller's tensors have.
    dtype: torch.dtype
    # Of the whole artifact, through which the files are read.
    folder: Folder
    # Of the metadata file, where it was read to find the leaf; empty where it was not.
    digest: str = ""


def locate(path: str | Path, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None) -> Place:
    """Find the leaf of an artifact for a device and a dtype.

    The path is the artifact's folder, its metadata file, or a folder inside it. Where no device is asked for, it is the
    one that the path or the metadata file names, else torch's current default; where no dtype is, float64 if that was
    compiled, else the only one that was. An artifact that may not be loaded, or is not as it was sealed, is refused
    before anything in it is opened.
    """
    path = Path(path)
    require_reach(path)
    found = find_root(path)
    if found is not None:
        folder = admit(found[0], [found[0] / METADATA])
        return _chosen(*found, device, dtype, folder)
    above = device_root(path)
    if above is None:
        raise ArtifactNotFoundError(missing(path))
    return _of_device(path, device, dtype, admit(above, device_files(path)))


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


def _chosen(
    root: Path,
    hint: tuple[str, ...],
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
    folder: Folder,
) -> Place:
    """A leaf below `metadata.json`; `hint` is the device, and perhaps the dtype, that the caller's path names."""
    wanted = device_of(device, hint[0] if hint else None)
    precision = dtype_name(dtype) or (hint[1] if len(hint) > 1 else None)
    present = leaves(root)
    here = [d for family, d in present if family == wanted.type]
    if precision is None:
        precision = "float64" if "float64" in here or len(here) != 1 else here[0]
    if (wanted.type, precision) not in present:
        found = ", ".join(f"{a}/{b}" for a, b in present) or "(none)"
        empty = ", ".join(f"{a}/{b}" for a, b in leaves(root, empty=True))
        found += f"; folders without a graph: {empty}" if empty else ""
        raise ArtifactNotFoundError(
            f"no compiled artifact for device '{wanted.type}' and dtype '{precision}' in {root}; compiled leaves: "
            f"{found}. Load one of these (device=, dtype=), or compile the one you need, with the options of the "
            f"others: neml2-compile ... --device {wanted.type} --dtype {precision}"
        )
    model = root.name or root.resolve().name
    return Place(model, root / METADATA, root / wanted.type / precision, wanted, DTYPES[precision], folder)


# -- where each device has its own metadata file, which records device and dtype ---------------------------------------


class _Label(Form, frozen=True):
    """What such a file records of itself; the dtype is a label there, and no choice."""

    device: Annotated[str, one_of(*DEVICES)] = "cpu"
    dtype: Annotated[str, one_of(*DTYPE_NAMES)] = "float64"


@dataclass(frozen=True)
class _Recorded:
    file: Path
    device: str
    dtype: str
    digest: str

    def __str__(self) -> str:
        return f"{self.device}/{self.dtype} ({self.file})"


def _of_device(path: Path, device: str | torch.device | None, dtype: str | torch.dtype | None, folder: Folder) -> Place:
    """The leaf of a device."""
    here = device_files_at(path)
    asked = None if device is None or device == "" else device_of(device).type
    present = [_recorded(file, asked, folder) for file in here or device_files_below(path)]
    wanted = device_of(device, present[0].device if here and len(present) == 1 else None)
    precision = dtype_name(dtype)
    fitting = [leaf for leaf in present if leaf.device == wanted.type and precision in (None, leaf.dtype)]
    if not fitting:
        beside = device_files_below(here[0].parent.parent) if here and here[0].parent.name in DEVICES else []
        files = [file for file in beside if file.name == here[0].name]
        listed = ", ".join(str(_recorded(file, wanted.type, folder)) for file in files) or ", ".join(map(str, present))
        leaf_asked = f"device '{wanted.type}'" + (f" and dtype '{precision}'" if precision else "")
        raise ArtifactNotFoundError(
            f"no compiled artifact for {leaf_asked} at {path}; compiled leaves: {listed}. Load one of these (device=, "
            "dtype=, or its path), or compile the one you need with neml2-compile."
        )
    if len(fitting) > 1:
        raise ArtifactError(
            f"{path} holds several artifacts: {', '.join(map(str, fitting))}. Give the path of one of them."
        )
    leaf = fitting[0]
    model = leaf.file.name.removesuffix(DEVICE_METADATA)
    return Place(model, leaf.file, leaf.file.parent, wanted, DTYPES[leaf.dtype], folder, leaf.digest)


def _recorded(file: Path, asked: str | None, folder: Folder) -> _Recorded:
    """What a file records; a damaged one of another device than that asked for is passed over.

    So a leaf that is not there is reported, whatever the others are worth.
    """
    try:
        document, digest = read_document(file, folder)
        label = convert(document, _Label, str(file))
        return _Recorded(file, label.device, label.dtype, digest)
    except ArtifactError:
        if asked is None or file.parent.name not in DEVICES or file.parent.name == asked:
            raise
        return _Recorded(file, file.parent.name, "damaged", "")
