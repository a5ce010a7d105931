"""Where the files of an artifact are, by names alone: its folder, its metadata, its leaves.

Since neml2 3.0.7 one `metadata.json` stands above the leaves `<device>/<dtype>`. Before that each device has a metadata
file `<model>_meta.json` with its graphs beside it: up to 3.0.3 in the folder that neml2-compile was given, from 3.0.4
on in a folder per device.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Artifact:
    """An artifact, by a path to it or into it."""

    # The folder of the whole artifact.
    root: Path
    # The file of all leaves; before neml2 3.0.7 those of the devices that the path leads to.
    metadata: tuple[Path, ...]
    shared: bool = True
    # Device and dtype that the path into it names, as far as it does.
    named: tuple[str, ...] = ()
    # Whether the path leads to the metadata of single devices.
    inside: bool = False

    @property
    def model(self) -> str:
        """Name of the compiled model."""
        if self.shared:
            return self.root.name or self.root.resolve().name
        return self.metadata[0].name.removesuffix(DEVICE_METADATA)

    def of_all_devices(self) -> list[Path]:
        """The metadata files of the model for all devices that have a folder."""
        return [file for file in _files_below(self.root) if file.name == self.metadata[0].name]


def artifact_at(path: Path) -> Artifact:
    """The artifact that a path leads to, in any layout; an ArtifactNotFoundError where there is none."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        # Too long, in a ring of links, in a closed folder.
        raise ArtifactNotFoundError(
            f"{_short(path)}: cannot be reached ({reason(error)}). Give the artifact's folder that neml2-compile wrote."
        ) from None
    found = _find(path)
    if found is None:
        raise ArtifactNotFoundError(_missing(path))
    return found


def _find(path: Path) -> Artifact | None:
    if path.name == METADATA:
        return Artifact(path.parent, (path,)) if is_there(path) else None
    # Where an old release had its metadata, when there is none any more.
    moved = path.name == f"{path.parent.parent.name}{DEVICE_METADATA}" and not path.exists()
    device = path.parent if moved else path
    for root, named in (
        (device, ()),
        (device.parent, (device.name,)),
        (device.parent.parent, (device.parent.name, device.name)),
    ):
        if is_there(root / METADATA) and (not named or named[0] in DEVICES) and (moved or os.path.isdir(path)):
            return Artifact(root, (root / METADATA,), named=named)
    here = _files_at(path)
    if here:
        folder = here[0].parent
        return Artifact(folder.parent if folder.name in DEVICES else folder, here, shared=False, inside=True)
    below = _files_below(path)
    return Artifact(path, below, shared=False) if below else None


def _files_at(path: Path) -> tuple[Path, ...]:
    """The metadata file of a device at a path, or those right in the folder at that path."""
    if path.name.endswith(DEVICE_METADATA) and is_there(path):
        return (path,)
    return tuple(sorted(path.glob(f"?*{DEVICE_METADATA}"))) if os.path.isdir(path) else ()


def _files_below(path: Path) -> tuple[Path, ...]:
    """The metadata files in the device folders below a folder."""
    return tuple(f for device in DEVICES if os.path.isdir(path / device) for f in _files_at(path / device))


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


def _missing(path: Path) -> str:
    """What to say where there is no artifact."""
    cure = (
        "Give the artifact's folder that neml2-compile wrote: it holds metadata.json and a folder per device, or, from "
        "neml2 before 3.0.7, MODEL_meta.json or DEVICE/MODEL_meta.json."
    )
    if os.path.isdir(path):
        inside = [name for name in _names(path) if os.path.isdir(path / name) and _find(path / name)]
        return f"no metadata.json in {path}{f', but artifacts below it: {_few(inside)}' if inside else ''}. {cure}"
    if is_there(path) and path.suffix != ".json":
        above = _find(path.parent)
        whole = f" It belongs to the artifact {above.root}: give that." if above and path.suffix == ".pt2" else ""
        return f"no metadata.json in {path}: it is a file{', a graph' if path.suffix == '.pt2' else ''}.{whole} {cure}"
    there = _names(path.parent)
    beside = f" In {path.parent} there are: {_few(there)}." if there else ""
    if path.suffix in (".json", ".i"):
        return f"{path}: no such {'stub' if path.suffix == '.i' else 'metadata file'}.{beside} {cure}"
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
