"""From a path, a device and a dtype to the leaf of an artifact, in the layout of any release.

Since neml2 3.0.7 one `metadata.json` stands above the leaves `<device>/<dtype>`. Before that each device has a metadata
file `<model>_meta.json` with its graphs beside it: up to 3.0.3 in the folder that neml2-compile was given, from 3.0.4
on in a folder per device.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch

from ..errors import ArtifactError, ArtifactNotFoundError, InputError
from .document import DocumentForm, convert, one_of, read_document
from .files import AGAIN, Folder, is_there, reason
from .trust import admit, has_seal, write_seal

METADATA = "metadata.json"
DEVICE_METADATA = "_meta.json"
DEVICES = ("cpu", "cuda", "xpu", "hip", "mps")
DTYPES = {"float64": torch.float64, "float32": torch.float32}


# -- the artifact ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Artifact:
    """An artifact, by a path to it or into it."""

    root: Path  # the folder of the whole artifact
    # The file of all leaves; before neml2 3.0.7 those of the devices that the path leads to.
    metadata: tuple[Path, ...]
    shared: bool = True
    named: tuple[str, ...] = ()  # device and dtype that the path into it names, as far as it does
    inside: bool = False  # whether the path leads to the metadata of single devices

    @property
    def model(self) -> str:
        """Name of the compiled model."""
        if self.shared:
            return self.root.name or self.root.resolve().name
        return self.metadata[0].name.removesuffix(DEVICE_METADATA)

    def of_all_devices(self) -> list[Path]:
        """The metadata files of the model for all devices that have a folder."""
        return [file for file in _files_below(self.root) if file.name == self.metadata[0].name]

    def folders(self) -> list[Path]:
        """The folders of all its leaves; before neml2 3.0.7 those of the model's devices."""
        if self.shared:
            return [self.root / device / dtype for device, dtype in leaves(self.root)]
        return [file.parent for file in self.of_all_devices()]


def absolute(path: str | os.PathLike[str]) -> Path:
    """An artifact's path that stays the same when the working directory changes."""
    try:
        return Path(path).absolute()
    except OSError as error:
        raise ArtifactNotFoundError(
            f"{_short(Path(path))}: a relative path, and the working directory is gone ({reason(error)}). Give an "
            "absolute path, or change to a folder that is there."
        ) from None


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
            if leaf.is_dir() and leaf.name in DTYPES and any(leaf.glob("*.pt2")) != empty
        )
    except OSError as error:
        raise ArtifactError(f"{error.filename}: cannot be read ({reason(error)}). {AGAIN}") from None


def _missing(path: Path) -> str:
    """What to say where there is no artifact."""
    cure = (
        "Give the artifact's folder that neml2-compile wrote: it holds metadata.json and a folder per device, or, from "
        "neml2 before 3.0.7, MODEL_meta.json or DEVICE/MODEL_meta.json."
    )
    is_folder = os.path.isdir(path)
    try:
        names = sorted(os.listdir(path if is_folder else path.parent))
    except OSError:
        names = []
    if is_folder:
        names = [name for name in names if os.path.isdir(path / name) and _find(path / name)]
    few = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    if is_folder:
        return f"no metadata.json in {path}{f', but artifacts below it: {few}' if few else ''}. {cure}"
    if is_there(path) and path.suffix != ".json":
        above = _find(path.parent)
        whole = f" It belongs to the artifact {above.root}: give that." if above and path.suffix == ".pt2" else ""
        return f"no metadata.json in {path}: it is a file{', a graph' if path.suffix == '.pt2' else ''}.{whole} {cure}"
    beside = f" In {path.parent} there are: {few}." if few else ""
    if path.suffix in (".json", ".i"):
        return f"{path}: no such {'stub' if path.suffix == '.i' else 'metadata file'}.{beside} {cure}"
    return f"no metadata.json in {path}: there is no such folder.{beside} {cure}"


def _short(path: Path) -> str:
    text = str(path)
    return text if len(text) <= 300 else f"{text[:120]}...{text[-120:]} ({len(text)} characters)"


def seal(artifact: str | os.PathLike[str]) -> Path:
    """Seal an artifact as it is now: from then on it loads only as long as no byte of it changes.

    Args:
        artifact: the artifact's folder, its metadata file, or a folder inside it.

    Returns:
        The file of the seal, beside the artifact's folder: a list that `sha256sum -c` checks. One that was there is
        replaced.

    Raises:
        ArtifactNotFoundError: there is no artifact at the path.
        ArtifactError: it holds what cannot be sealed, or the seal cannot be written.
    """
    return write_seal(artifact_at(Path(artifact)).root)


def is_sealed(artifact: str | os.PathLike[str]) -> bool:
    """Whether an artifact has a seal; a load compares it with that. Any path that `seal` takes will do."""
    return has_seal(artifact_at(Path(artifact)).root)


# -- the leaf ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where the files of one leaf are, and what they were compiled for."""

    artifact: Artifact  # with the metadata file of this leaf alone
    metadata: Path
    leaf: Path  # the folder of the graphs
    device: torch.device  # with an index where one was asked for
    dtype: torch.dtype  # that the caller's tensors have
    folder: Folder  # of the whole artifact, through which the files are read
    # What the metadata file holds, and its SHA-256: it is read once.
    document: dict[str, Any] = field(repr=False)
    digest: str = field(repr=False)


@dataclass(frozen=True)
class _Leaf:
    device: str
    dtype: str
    metadata: Path
    folder: Path
    document: dict[str, Any] = field(default_factory=dict)  # of the metadata file, where it was read
    digest: str = ""

    def __str__(self) -> str:
        where = "" if self.metadata.name == METADATA else f" ({self.metadata})"
        return f"{self.device}/{self.dtype}{where}"


def locate(path: str | Path, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None) -> Place:
    """Find the leaf of an artifact for a device and a dtype.

    The path is the artifact's folder, its metadata file, or a folder inside it. Where no device is asked for, it is the
    one that the path or the metadata file names, else torch's current default; where no dtype is, float64 if that was
    compiled, else the only one that was. An artifact that may not be loaded, or is not as it was sealed, is refused
    before anything in it is opened.
    """
    found = artifact_at(Path(path))
    folder = admit(found.root, found.metadata)
    wanted = _device_of(device)
    hint, precision = (*found.named, None, None)[:2]
    if found.shared:
        present = [_Leaf(*leaf, found.metadata[0], found.root / "/".join(leaf)) for leaf in leaves(found.root)]
    else:
        present = [_recorded(file, wanted, folder) for file in found.metadata]
        hint = present[0].device if found.inside and len(present) == 1 else None
    wanted = wanted or (torch.device(hint) if hint else torch.get_default_device())
    precision = dtype_name(dtype) or precision
    fitting = [leaf for leaf in present if leaf.device == wanted.type and precision in (None, leaf.dtype)]
    if not fitting:
        if not found.shared:
            present = [_recorded(file, wanted, folder) for file in found.of_all_devices()] or present
        compiled = ", ".join(map(str, present)) or "(none)"
        empty = leaves(found.root, empty=True) if found.shared else []
        if empty:
            compiled += f"; folders without a graph: {', '.join(map('/'.join, empty))}"
        of_dtype, option = (f" and dtype {precision!r}", f" --dtype {precision}") if precision else ("", "")
        raise ArtifactNotFoundError(
            f"no compiled artifact for device '{wanted.type}'{of_dtype} at {path}; compiled leaves: {compiled}. Load "
            "one of these (device=, dtype=, or its path), or compile the one you need, with the options of the others: "
            f"neml2-compile ... --device {wanted.type}{option}"
        )
    if found.shared and len(fitting) > 1:
        fitting = [leaf for leaf in fitting if leaf.dtype == "float64"]
    if len(fitting) > 1:
        raise ArtifactError(
            f"{path} holds several artifacts: {', '.join(map(str, fitting))}. Give the path of one of them."
        )
    (leaf,) = fitting
    document, digest = read_document(leaf.metadata, folder) if found.shared else (leaf.document, leaf.digest)
    artifact = replace(found, metadata=(leaf.metadata,))
    return Place(artifact, leaf.metadata, leaf.folder, wanted, DTYPES[leaf.dtype], folder, document, digest)


def _device_of(device: str | torch.device | None) -> torch.device | None:
    """The device that was asked for, if one was."""
    if device is None or device == "":
        return None
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


class _Label(DocumentForm, frozen=True):
    """What a file of one device records of itself; the dtype is a label there, and no choice."""

    device: Annotated[str, one_of(*DEVICES)] = "cpu"
    dtype: Annotated[str, one_of(*DTYPES)] = "float64"


def _recorded(file: Path, asked: torch.device | None, folder: Folder) -> _Leaf:
    """What a file of one device records; a damaged one of another device than that asked for is passed over.

    So a leaf that is not there is reported, whatever the others are worth.
    """
    try:
        document, digest = read_document(file, folder)
        label = convert(document, _Label, str(file))
        return _Leaf(label.device, label.dtype, file, file.parent, document, digest)
    except ArtifactError:
        if asked is None or file.parent.name not in DEVICES or file.parent.name == asked.type:
            raise
        return _Leaf(file.parent.name, "damaged", file, file.parent)
