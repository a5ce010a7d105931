"""From a path, a device and a dtype to the leaf of an artifact."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch

from ..errors import ArtifactError, ArtifactNotFoundError, InputError
from .document import Form, convert, one_of, read_document
from .files import Folder
from .layout import DEVICE_METADATA, DEVICES, DTYPE_NAMES, METADATA, Artifact, artifact_at, leaves
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
    # What the metadata file holds, and its SHA-256: it is read once.
    document: dict[str, Any] = field(repr=False)
    digest: str = field(repr=False)


def locate(path: str | Path, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None) -> Place:
    """Find the leaf of an artifact for a device and a dtype.

    The path is the artifact's folder, its metadata file, or a folder inside it. Where no device is asked for, it is the
    one that the path or the metadata file names, else torch's current default; where no dtype is, float64 if that was
    compiled, else the only one that was. An artifact that may not be loaded, or is not as it was sealed, is refused
    before anything in it is opened.
    """
    found = artifact_at(Path(path))
    folder = admit(found.root, found.metadata)
    asked = device_of(device).type if device is not None and device != "" else None
    if found.shared:
        present = [_Leaf(*leaf, found.metadata[0], found.root / "/".join(leaf)) for leaf in leaves(found.root)]
        hint, precision = (*found.named, None, None)[:2]
    else:
        present = [_recorded(file, asked, folder) for file in found.metadata]
        hint, precision = present[0].device if found.inside and len(present) == 1 else None, None
    wanted, precision = device_of(device, hint), dtype_name(dtype) or precision
    fitting = [leaf for leaf in present if leaf.device == wanted.type and precision in (None, leaf.dtype)]
    if not fitting:
        if not found.shared:
            present = [_recorded(file, wanted.type, folder) for file in found.of_all_devices()] or present
        raise ArtifactNotFoundError(_absent(found, path, present, wanted.type, precision))
    if found.shared and len(fitting) > 1:
        fitting = [leaf for leaf in fitting if leaf.dtype == "float64"]
    if len(fitting) > 1:
        raise ArtifactError(
            f"{path} holds several artifacts: {', '.join(map(str, fitting))}. Give the path of one of them."
        )
    (leaf,) = fitting
    model = found.model if found.shared else leaf.metadata.name.removesuffix(DEVICE_METADATA)
    document, digest = leaf.document, leaf.digest
    if found.shared:
        document, digest = read_document(leaf.metadata, folder)
    return Place(model, leaf.metadata, leaf.folder, wanted, DTYPES[leaf.dtype], folder, document, digest)


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


@dataclass(frozen=True)
class _Leaf:
    device: str
    dtype: str
    metadata: Path
    folder: Path
    # Of the metadata file, where it was read.
    document: dict[str, Any] = field(default_factory=dict)
    digest: str = ""

    def __str__(self) -> str:
        where = "" if self.metadata.name == METADATA else f" ({self.metadata})"
        return f"{self.device}/{self.dtype}{where}"


def _absent(found: Artifact, path: str | Path, present: list[_Leaf], device: str, dtype: str | None) -> str:
    """What to say where there is no leaf of a device and a dtype."""
    compiled = ", ".join(map(str, present)) or "(none)"
    empty = leaves(found.root, empty=True) if found.shared else []
    if empty:
        compiled += f"; folders without a graph: {', '.join(map('/'.join, empty))}"
    options = f"--device {device}" + (f" --dtype {dtype}" if dtype else "")
    return (
        f"no compiled artifact for device '{device}'{f' and dtype {dtype!r}' if dtype else ''} at {path}; compiled "
        f"leaves: {compiled}. Load one of these (device=, dtype=, or its path), or compile the one you need, with the "
        f"options of the others: neml2-compile ... {options}"
    )


class _Label(Form, frozen=True):
    """What such a file records of itself; the dtype is a label there, and no choice."""

    device: Annotated[str, one_of(*DEVICES)] = "cpu"
    dtype: Annotated[str, one_of(*DTYPE_NAMES)] = "float64"


def _recorded(file: Path, asked: str | None, folder: Folder) -> _Leaf:
    """What a file of one device records; a damaged one of another device than that asked for is passed over.

    So a leaf that is not there is reported, whatever the others are worth.
    """
    try:
        document, digest = read_document(file, folder)
        label = convert(document, _Label, str(file))
        return _Leaf(label.device, label.dtype, file, file.parent, document, digest)
    except ArtifactError:
        if asked is None or file.parent.name not in DEVICES or file.parent.name == asked:
            raise
        return _Leaf(file.parent.name, "damaged", file, file.parent)
