"""Where the files of an artifact are, by names alone: its folder, its metadata, its leaves.

Since neml2 3.0.7 one `metadata.json` stands above the leaves `<device>/<dtype>`. Before that each device has a metadata
file `<model>_meta.json` with its graphs beside it: up to 3.0.3 in the folder that neml2-compile was given, from 3.0.4
on in a folder per device.
"""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import ArtifactError, ArtifactNotFoundError
from .files import AGAIN, is_there, reason

METADATA = "metadata.json"
DEVICE_METADATA = "_meta.json"
DEVICES = ("cpu", "cuda", "xpu", "hip", "mps")
DTYPE_NAMES = ("float64", "float32")


def absolute(path: str | os.PathLike[str]) -> Path:
    """An artifact's path that stays the same when the working directory changes."""
    try:
        return Path(path).absolute()
    except OSError as error:
        raise ArtifactNotFoundError(
            f"{_short(Path(path))}: a relative path, and the working directory is gone ({reason(error)}). Give an "
            "absolute path, or change to a folder that is there."
        ) from None


def root_of(path: Path) -> Path:
    """The folder of the whole artifact, in either layout; an ArtifactNotFoundError where there is none at the path."""
    require_reach(path)
    root = _root_at(path)
    if root is None:
        raise ArtifactNotFoundError(missing(path))
    return root


def _root_at(path: Path) -> Path | None:
    found = find_root(path)
    return device_root(path) if found is None else found[0]


def find_root(path: Path) -> tuple[Path, tuple[str, ...]] | None:
    """The folder of `metadata.json`, and the device and dtype that the path into it names; None for another layout.

    The path may also be `<model>/<device>/<model>_meta.json`, where releases before 3.0.7 had their metadata, when
    there is none any more.
    """
    if path.name == METADATA:
        return (path.parent, ()) if is_there(path) else None
    if path.name == f"{path.parent.parent.name}{DEVICE_METADATA}" and not path.exists():
        path = path.parent
        return (path.parent, (path.name,)) if is_there(path.parent / METADATA) and path.name in DEVICES else None
    for root, hint in ((path, ()), (path.parent, (path.name,)), (path.parent.parent, (path.parent.name, path.name))):
        if is_there(root / METADATA) and (not hint or hint[0] in DEVICES) and os.path.isdir(path):
            return root, hint
    return None


def device_root(path: Path) -> Path | None:
    """The folder of an artifact whose devices have a metadata file each; None where there is none."""
    here = device_files_at(path)
    if here:
        folder = here[0].parent
        return folder.parent if folder.name in DEVICES else folder
    return path if device_files_below(path) else None


def device_files(path: Path) -> list[Path]:
    """The metadata files of devices at a path, or below it."""
    return device_files_at(path) or device_files_below(path)


def device_files_at(path: Path) -> list[Path]:
    """The metadata file of a device at a path, or those right in the folder at that path."""
    if path.name.endswith(DEVICE_METADATA) and is_there(path):
        return [path]
    return sorted(path.glob(f"?*{DEVICE_METADATA}")) if os.path.isdir(path) else []


def device_files_below(path: Path) -> list[Path]:
    """The metadata files in the device folders below a folder."""
    return [file for device in DEVICES if os.path.isdir(path / device) for file in device_files_at(path / device)]


def leaves(root: Path, *, empty: bool = False) -> list[tuple[str, str]]:
    """The leaves below `metadata.json` as (device, dtype): the folders that hold packages, or those that hold none."""
    try:
        return sorted(
            (family.name, leaf.name)
            for family in root.iterdir()
            if family.is_dir() and family.name in DEVICES
            for leaf in family.iterdir()
            if leaf.is_dir() and leaf.name in DTYPE_NAMES and any(leaf.glob("*.pt2")) != empty
        )
    except OSError as error:
        raise ArtifactError(f"{error.filename}: cannot be read ({reason(error)}). {AGAIN}") from None


def require_reach(path: Path) -> None:
    """Refuse a path that the system does not even look at: too long, in a ring of links, in a closed folder."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        raise ArtifactNotFoundError(
            f"{_short(path)}: cannot be reached ({reason(error)}). Give the artifact's folder that neml2-compile wrote."
        ) from None


def missing(path: Path) -> str:
    """What to say where there is no artifact."""
    cure = (
        "Give the artifact's folder that neml2-compile wrote: it holds metadata.json and a folder per device, or, from "
        "neml2 before 3.0.7, MODEL_meta.json or DEVICE/MODEL_meta.json."
    )
    if os.path.isdir(path):
        inside = [name for name in _names(path) if os.path.isdir(path / name) and _root_at(path / name)]
        return f"no metadata.json in {path}{f', but artifacts below it: {_few(inside)}' if inside else ''}. {cure}"
    if is_there(path) and path.suffix != ".json":
        above = _root_at(path.parent)
        whole = f" It belongs to the artifact {above}: give that." if above and path.suffix == ".pt2" else ""
        return f"no metadata.json in {path}: it is a file{', a graph' if path.suffix == '.pt2' else ''}.{whole} {cure}"
    there = _names(path.parent)
    beside = f" In {path.parent} there are: {_few(there)}." if there else ""
    if path.suffix == ".json":
        return f"{path}: no such metadata file.{beside} {cure}"
    return f"no metadata.json in {path}: there is no such folder.{beside} {cure}"


def _short(path: Path) -> str:
    text = str(path)
    return text if len(text) <= 300 else f"{text[:120]}...{text[-120:]} ({len(text)} characters)"


def _names(folder: Path) -> list[str]:
    """What is in a folder; nothing where it cannot be read."""
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _few(names: list[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
