"""Unpack a graph's package into a folder of this process alone, load it from there, and leave nothing behind.

torch's own package loader opens the file once more, after it has been looked over, checks no checksum, runs a compiler
where the library is missing, and leaves its folder behind when the process is killed. Here the bytes that were looked
over are those that run, and the folder is gone as soon as they are loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch

from .._artifact.files import named
from .._artifact.package import (
    LIBRARIES,
    archive_faults,
    graph_entries,
    libraries_in,
    open_archive,
    operators_in,
    read_entry,
)
from ..errors import AOTIError, ArtifactError
from .c_interface import Library, Unavailable
from .c_interface import obstacle as obstacle_in_library
from .native import PYTHON_POWER, operators, repacked, same_as_torch
from .scratch import Scratch, scratch_folder


def load_runner(file: Path, data: bytes, device: torch.device) -> tuple[Any, bool]:
    """Load a graph."""
    with _sound(file, data) as archive, scratch_folder(file) as folder:
        called = operators(archive, device)
        own = getattr(torch._C._aoti, "AOTIModelContainerRunnerCpu", None) if device.type == "cpu" else None
        if own is None:
            # A GPU's kernels are read from the folder later on; torch's loader keeps one of its own for them.
            content = repacked(archive, called.changed) if called.changed else data
            package = folder.write(file.name, content, file)
            index = -1 if device.index is None or device.type == "cpu" else device.index
            with _refusals(file, folder):
                return torch._C._aoti.AOTIModelPackageLoader(str(package), "model", False, 1, index), called.python
        library = _unpack(archive, data, folder, file, called.changed)
        with _refusals(file, folder):
            return own(str(library), 1), called.python


def load_library(file: Path, data: bytes) -> Library:
    """Load the library of a graph for a CPU, to be called by its C interface."""
    reason = obstacle(file, data)
    if reason:
        raise Unavailable(reason)
    with _sound(file, data) as archive, scratch_folder(file) as folder:
        return Library(_unpack(archive, data, folder, file, {}), file)


def obstacle(file: Path, data: bytes) -> str:
    """Why a graph for a CPU cannot be called by its C interface, as far as its package tells; nothing of it is run."""
    with _sound(file, data) as archive:
        names = set(operators_in(archive))
        if names - {PYTHON_POWER}:
            return f"it calls {', '.join(sorted(names - {PYTHON_POWER}))}"
        if names and not same_as_torch(torch.device("cpu")):
            return f"{PYTHON_POWER} is not torch's power"
        obstacles = (obstacle_in_library(bytes(read_entry(archive, info))) for info in libraries_in(archive))
        return next(filter(None, obstacles), "")


@contextmanager
def _sound(file: Path, data: bytes) -> Iterator[ZipFile]:
    """Open a package that can be unpacked without harm."""
    with open_archive(file, data) as archive:
        faults = archive_faults(archive)
        if faults:
            raise ArtifactError(f"{file}: {faults[0]}")
        yield archive


def _unpack(archive: ZipFile, data: bytes, folder: Scratch, file: Path, changed: Mapping[str, bytes]) -> Path:
    """Write the entries that a graph is made of, some of them changed; give the path of its library."""
    libraries = []
    for info in graph_entries(archive):
        name = info.filename.rpartition("/")[2]
        if name in folder.names:
            raise ArtifactError(f"{file}: archive entry {named(name)} is there twice. Do not use this file.")
        entry = changed.get(info.filename)
        target = folder.write(name, read_entry(archive, info, data) if entry is None else entry, file)
        if name.endswith(LIBRARIES):
            libraries.append(target)
    if len(libraries) != 1:
        raise ArtifactError(f"{file}: holds {len(libraries)} compiled libraries, expected 1. Compile the model again.")
    return libraries[0]


@contextmanager
def _refusals(file: Path, folder: Scratch) -> Iterator[None]:
    """Say of which package torch complains, and what mends it."""
    try:
        yield
    except AOTIError:
        raise
    except RuntimeError as error:
        lines = str(error).strip().splitlines()
        text = lines[0] if lines else "no reason given"
        if "failed to map" in text or "Operation not permitted" in text:
            raise AOTIError(
                f"{file}: {folder.temporary} does not let programs run ({text}). Set TMPDIR to a folder of a file "
                "system that is not mounted noexec, and start again."
            ) from error
        raise ArtifactError(
            f"{file}: torch {torch.__version__} cannot load this package ({text}). Install the torch that the model "
            "was compiled with, or a later one, or compile the model again with neml2-compile."
        ) from error
