"""The layout of neml2 3.0.0 to 3.0.6: a metadata file per device, `<model>_meta.json`, with its graphs beside it.

The file itself records its device and dtype. Up to 3.0.3 there is one in the folder that neml2-compile was told; from
3.0.4 on there is a folder per device: `<model>/<device>/<model>_meta.json`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import ArtifactError, ArtifactNotFoundError
from .files import is_there
from .folder import Folder
from .place import DEVICES, DTYPES, Place, device_of, dtype_name
from .reading import read_json
from .telling import shown

SUFFIX = "_meta.json"


@dataclass(frozen=True)
class Leaf:
    """A metadata file and what it records.

    Args:
        file: the metadata file.
        device: `cpu` or `cuda`.
        dtype: `float64` or `float32`.
        digest: of the file.
    """

    file: Path
    device: str
    dtype: str
    digest: str

    def __str__(self) -> str:
        return f"{self.device}/{self.dtype} ({self.file})"


def locate(
    path: Path, device: str | torch.device | None, dtype: str | torch.dtype | None, folder: Folder
) -> Place | None:
    """Find the leaf of an artifact in this layout.

    Args:
        path: a metadata file, the folder that holds it, or the folder of the device folders.
        device: device to run on; if not given, that of the file at the path, else torch's current default device.
        dtype: dtype of the tensors; if not given, that of the file.
        folder: of the whole artifact.

    Returns:
        The place of the leaf; None where there is no such layout at the path.

    Raises:
        ArtifactNotFoundError: there is no leaf for that device and dtype.
        ArtifactError: it cannot be told which of several metadata files is meant, or the file is damaged.
    """
    here = files_at(path)
    found = here or files_below(path)
    if not found:
        return None
    present = _readable(found, device, folder)
    wanted = device_of(device, present[0].device if here and len(present) == 1 else None)
    precision = dtype_name(dtype)
    fitting = [leaf for leaf in present if leaf.device == wanted.type and precision in (None, leaf.dtype)]
    if not fitting:
        listed = ", ".join(map(str, _beside(present[0], wanted, folder) if here else present))
        asked = f"device '{wanted.type}'" + (f" and dtype '{precision}'" if precision else "")
        raise ArtifactNotFoundError(
            f"no compiled artifact for {asked} at {path}; compiled leaves: {listed}. Load one of these (device=, "
            "dtype=, or its path), or compile the one you need with neml2-compile."
        )
    if len(fitting) > 1:
        raise ArtifactError(
            f"{path} holds several artifacts: {', '.join(map(str, fitting))}. Give the path of one of them."
        )
    leaf = fitting[0]
    model = leaf.file.name.removesuffix(SUFFIX)
    return Place(model, leaf.file, leaf.file.parent, wanted, DTYPES[leaf.dtype], folder, leaf.digest)


def holds(path: Path) -> bool:
    """Whether there is an artifact in this layout at a path."""
    return bool(files_at(path) or files_below(path))


def root_of(path: Path) -> Path | None:
    """The folder of the whole artifact at a path; None where there is none in this layout."""
    here = files_at(path)
    if here:
        folder = here[0].parent
        return folder.parent if folder.name in DEVICES else folder
    return path if files_below(path) else None


def files_at(path: Path) -> list[Path]:
    """The metadata file at a path, or those right in the folder at that path."""
    if path.name.endswith(SUFFIX) and is_there(path):
        return [path]
    return sorted(path.glob(f"?*{SUFFIX}")) if os.path.isdir(path) else []


def files_below(path: Path) -> list[Path]:
    """The metadata files in the device folders below a folder."""
    return [file for device in DEVICES if os.path.isdir(path / device) for file in files_at(path / device)]


def read(file: Path, folder: Folder) -> Leaf:
    """Read what a metadata file records of itself.

    Args:
        file: the file.
        folder: of the whole artifact.

    Returns:
        The leaf.

    Raises:
        ArtifactError: it records a device or a dtype that is not known.
    """
    document, digest = read_json(file, folder)
    device, dtype = document.get("device", "cpu"), document.get("dtype", "float64")
    if device not in DEVICES or dtype not in list(DTYPES):
        raise ArtifactError(
            f"{file}: records {_recorded('device', device, DEVICES)} and {_recorded('dtype', dtype, DTYPES)}, expected "
            f"one of {', '.join(DEVICES)} and one of {', '.join(DTYPES)}. The metadata is damaged or was edited; "
            "compile the model again with neml2-compile."
        )
    return Leaf(file, device, dtype, digest)


def _recorded(key: str, value: object, known: Iterable[str]) -> str:
    return f"{key} {value!r}" if value in list(known) else f"{shown(value)} as the {key}"


def _readable(found: list[Path], device: str | torch.device | None, folder: Folder) -> list[Leaf]:
    """Read what the files record; a damaged one of another device than that asked for is passed over.

    So a leaf that is not there is told, whatever the others are worth.
    """
    wanted = None if device is None or device == "" else device_of(device).type
    leaves = []
    for file in found:
        try:
            leaves.append(read(file, folder))
        except ArtifactError:
            if wanted is None or file.parent.name not in DEVICES or file.parent.name == wanted:
                raise
            leaves.append(Leaf(file, file.parent.name, "damaged", ""))
    return leaves


def _beside(leaf: Leaf, wanted: torch.device, folder: Folder) -> list[Leaf]:
    """The leaves of the same model: those in the neighbouring device folders as well, where there are such folders."""
    if leaf.file.parent.name not in DEVICES:
        return [leaf]
    files = [file for file in files_below(leaf.file.parent.parent) if file.name == leaf.file.name]
    return _readable(files, wanted, folder) or [leaf]
