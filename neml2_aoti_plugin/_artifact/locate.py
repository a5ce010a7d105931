"""Find an artifact's metadata and the leaf `<device>/<dtype>` that a call asks for.

Since neml2 3.0.7 one `metadata.json` stands above the leaves; `perdevice` knows the layout before that.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ..errors import ArtifactError, ArtifactNotFoundError
from . import perdevice
from .admit import admit
from .files import AGAIN, is_there
from .folder import Folder
from .place import DEVICES, DTYPES, Place, device_of, dtype_name
from .telling import reason

METADATA = "metadata.json"


def locate(path: str | Path, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None) -> Place:
    """Find the leaf of an artifact for a device and a dtype.

    An artifact that may not be loaded, or is not as it was sealed, is refused before anything in it is opened.

    Args:
        path: the artifact's folder, its metadata file, or a folder inside it.
        device: device to run on; if not given, what the path or the metadata file names, else torch's current default
            device.
        dtype: dtype of the tensors; if not given, float64 where compiled, else the only one compiled.

    Returns:
        The place of the leaf.

    Raises:
        ArtifactNotFoundError: there is no artifact at the path, or no such leaf.
        ArtifactError: the path leads to several artifacts, or the artifact may not be loaded.
        InputError: the device or the dtype is not one that neml2-compile knows.
    """
    path = Path(path)
    _require_reach(path)
    found = find_root(path)
    if found is not None:
        folder = admit(found[0], [found[0] / METADATA])
        return choose(*found, device, dtype, folder)
    above = perdevice.root_of(path)
    if above is not None:
        folder = admit(above, perdevice.files_at(path) or perdevice.files_below(path))
        place = perdevice.locate(path, device, dtype, folder)
        if place is not None:
            return place
    raise ArtifactNotFoundError(_missing(path))


def absolute(path: str | os.PathLike[str]) -> Path:
    """An artifact's path that stays the same when the working directory changes.

    Raises:
        ArtifactNotFoundError: the path is relative, and the working directory is gone.
    """
    try:
        return Path(path).absolute()
    except OSError as error:
        raise ArtifactNotFoundError(
            f"{_short(Path(path))}: a relative path, and the working directory is gone ({reason(error)}). Give an "
            "absolute path, or change to a folder that is there."
        ) from None


def root_of(path: Path) -> Path:
    """Find the folder of a whole artifact.

    Args:
        path: as for `locate`.

    Returns:
        The folder, in either layout.

    Raises:
        ArtifactNotFoundError: there is no artifact at the path.
    """
    _require_reach(path)
    found = find_root(path)
    root = perdevice.root_of(path) if found is None else found[0]
    if root is None:
        raise ArtifactNotFoundError(_missing(path))
    return root


def choose(
    root: Path,
    hint: tuple[str, ...],
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
    folder: Folder,
) -> Place:
    """Choose a leaf of an artifact.

    Args:
        root: the folder that holds the metadata.
        hint: the device, and perhaps the dtype, that the caller's path names.
        device: see `locate`.
        dtype: see `locate`.
        folder: through which the files are read.

    Returns:
        The place of the leaf.

    Raises:
        ArtifactNotFoundError: there is no such leaf.
    """
    wanted = device_of(device, hint[0] if hint else None)
    precision = dtype_name(dtype) or (hint[1] if len(hint) > 1 else None)
    present = leaves(root)
    here = [d for family, d in present if family == wanted.type]
    if precision is None:
        precision = "float64" if "float64" in here or len(here) != 1 else here[0]
    model = root.name or root.resolve().name
    if (wanted.type, precision) not in present:
        found = ", ".join(f"{a}/{b}" for a, b in present) or "(none)"
        empty = ", ".join(f"{a}/{b}" for a, b in leaves(root, empty=True))
        found += f"; folders without a graph: {empty}" if empty else ""
        raise ArtifactNotFoundError(
            f"no compiled artifact for device '{wanted.type}' and dtype '{precision}' in {root}; compiled leaves: "
            f"{found}. Load one of these (device=, dtype=), or compile the one you need, with the options of the "
            f"others: neml2-compile ... --device {wanted.type} --dtype {precision}"
        )
    return Place(model, root / METADATA, root / wanted.type / precision, wanted, DTYPES[precision], folder)


def find_root(path: Path) -> tuple[Path, tuple[str, ...]] | None:
    """Find the folder of `metadata.json` from a path to it or into it.

    Args:
        path: given by the caller; also `<model>/<device>/<model>_meta.json`, where releases before 3.0.7 had their
            metadata, when there is none any more.

    Returns:
        The folder, and the device and dtype that the path itself names, if it does; None where there is no such folder.
    """
    if path.name == METADATA:
        return (path.parent, ()) if is_there(path) else None
    if path.name == f"{path.parent.parent.name}{perdevice.SUFFIX}" and not path.exists():
        path = path.parent
        return (path.parent, (path.name,)) if is_there(path.parent / METADATA) and path.name in DEVICES else None
    for root, hint in ((path, ()), (path.parent, (path.name,)), (path.parent.parent, (path.parent.name, path.name))):
        if is_there(root / METADATA) and (not hint or hint[0] in DEVICES) and os.path.isdir(path):
            return root, hint
    return None


def leaves(root: Path, *, empty: bool = False) -> list[tuple[str, str]]:
    """List the leaves of an artifact as (device, dtype): the folders that hold packages, or those that hold none."""
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


def _require_reach(path: Path) -> None:
    """Refuse a path that the system does not even look at: too long, in a ring of links, in a closed folder."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        raise ArtifactNotFoundError(
            f"{_short(path)}: cannot be reached ({reason(error)}). Give the artifact's folder that neml2-compile wrote."
        ) from None


def _short(path: Path) -> str:
    text = str(path)
    return text if len(text) <= 300 else f"{text[:120]}...{text[-120:]} ({len(text)} characters)"


def _missing(path: Path) -> str:
    """What to say where there is no artifact."""
    cure = (
        "Give the artifact's folder that neml2-compile wrote: it holds metadata.json and a folder per device, or, from "
        "neml2 before 3.0.7, MODEL_meta.json or DEVICE/MODEL_meta.json."
    )
    if os.path.isdir(path):
        below = (path / name for name in _names(path))
        inside = [p.name for p in below if os.path.isdir(p) and (find_root(p) or perdevice.holds(p))]
        return f"no metadata.json in {path}{f', but artifacts below it: {_few(inside)}' if inside else ''}. {cure}"
    folder = path.parent
    if is_there(path) and path.suffix != ".json":
        found = find_root(path.parent)
        above = perdevice.root_of(path.parent) if found is None else found[0]
        whole = f" It belongs to the artifact {above}: give that." if above and path.suffix == ".pt2" else ""
        return f"no metadata.json in {path}: it is a file{', a graph' if path.suffix == '.pt2' else ''}.{whole} {cure}"
    if path.suffix == ".json":
        return f"{path}: no such metadata file.{_beside(folder)} {cure}"
    return f"no metadata.json in {path}: there is no such folder.{_beside(folder)} {cure}"


def _beside(folder: Path) -> str:
    there = _names(folder)
    return f" In {folder} there are: {_few(there)}." if there else ""


def _names(folder: Path) -> list[str]:
    """What is in a folder; nothing where that cannot be told."""
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _few(names: list[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
