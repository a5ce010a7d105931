"""Unpack a graph's package into a folder of this process alone, load it from there, and leave nothing behind.

torch's own package loader opens the file once more, after it has been looked over, checks no checksum, runs a compiler
where the library is missing, and leaves its folder behind when the process is killed. Here the bytes that were looked
over are those that run, and the folder is gone as soon as they are loaded.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch

from ..artifact import archive as zipped
from ..errors import AOTIError, ArtifactError
from .native import operators, repacked

if sys.platform != "win32":
    import fcntl

PREFIX = "neml2-aoti-"

# Folders that could not be removed while their library is loaded, as on Windows.
_kept: set[str] = set()
_swept = False


def load_runner(file: Path, data: bytes, device: torch.device) -> tuple[Any, bool]:
    """Load a graph.

    Args:
        file: its package, for messages.
        data: the bytes of the package.
        device: that it runs on.

    Returns:
        torch's object with the method `run`, and whether the graph may call operators that are written in Python.

    Raises:
        ArtifactError: the package cannot be unpacked without harm, or torch cannot load it.
        AOTIError: there is no room to unpack it.
    """
    with zipped.open_archive(file, data) as archive, private_folder(file) as folder:
        faults = zipped.faults(archive)
        if faults:
            raise ArtifactError(f"{file}: {faults[0]}")
        called = operators(archive, device)
        own = getattr(torch._C._aoti, "AOTIModelContainerRunnerCpu", None) if device.type == "cpu" else None
        if own is None:
            # A GPU's kernels are read from the folder later on; torch's loader keeps one of its own for them.
            package = folder / file.name
            _write(package, repacked(archive, called.changed) if called.changed else data, file)
            index = -1 if device.index is None or device.type == "cpu" else device.index
            with _refusals(file, folder):
                return torch._C._aoti.AOTIModelPackageLoader(str(package), "model", False, 1, index), called.python
        library = _unpack(archive, data, folder, file, called.changed)
        with _refusals(file, folder):
            return own(str(library), 1), called.python


@contextmanager
def private_folder(file: Path) -> Iterator[Path]:
    """A new folder that only this user may enter, gone afterwards.

    Args:
        file: what it is for, for messages.

    Raises:
        AOTIError: no folder can be made.
    """
    global _swept
    handle, path = None, ""
    try:
        if not _swept:
            _swept = True
            sweep(tempfile.gettempdir())
        while True:
            path = tempfile.mkdtemp(prefix=PREFIX)
            handle = _lock(path)
            # Between the two lines another process may have taken the folder for one that was left behind.
            if os.path.isdir(path):
                break
    except OSError as error:
        raise AOTIError(f"{file}: cannot make a folder to unpack it to: {error}. {_ELSEWHERE}") from error
    try:
        yield Path(path)
    finally:
        shutil.rmtree(path, ignore_errors=True)
        if os.path.isdir(path):
            _kept.add(path)
        if handle is not None:
            os.close(handle)


def sweep(folder: str) -> None:
    """Remove folders of processes that were killed while they unpacked.

    Args:
        folder: of temporary files.
    """
    if sys.platform == "win32":
        return
    try:
        left = [e.path for e in os.scandir(folder) if e.name.startswith(PREFIX) and e.is_dir(follow_symlinks=False)]
    except OSError:
        return
    for path in left:
        try:
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            # Whoever unpacks holds the lock; the system takes it from a process that is killed.
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except OSError:
            pass
        finally:
            os.close(handle)


@atexit.register
def _remove_kept() -> None:
    for path in _kept:
        shutil.rmtree(path, ignore_errors=True)


def _lock(path: str) -> int | None:
    """Take the lock of a folder; give its handle, None where the folder is gone or there are no locks."""
    if sys.platform == "win32":
        return None
    try:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return None
    # Some network file systems have no locks; nor can anybody sweep there.
    with suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX)
    return handle


def _unpack(archive: ZipFile, data: bytes, folder: Path, file: Path, changed: Mapping[str, bytes]) -> Path:
    """Write the entries that a graph is made of, some of them changed; give the path of its library."""
    libraries = []
    for info in zipped.graph_entries(archive):
        name = info.filename.rpartition("/")[2]
        target = folder / name
        if target.exists():
            raise ArtifactError(f"{file}: archive entry {name!r} is there twice. Do not use this file.")
        entry = changed.get(info.filename)
        _write(target, zipped.read_entry(archive, info, data) if entry is None else entry, file)
        if name.endswith((".so", ".pyd", ".dylib")):
            libraries.append(target)
    if len(libraries) != 1:
        raise ArtifactError(f"{file}: holds {len(libraries)} compiled libraries, expected 1. Compile the model again.")
    return libraries[0]


_ELSEWHERE = "Make room there, or set TMPDIR to a folder that can be written to, and start again."


def _write(target: Path, data: bytes | memoryview, file: Path) -> None:
    try:
        with target.open("xb", buffering=0) as out:
            rest = memoryview(data)
            while rest:
                rest = rest[out.write(rest) :]
    except OSError as error:
        raise AOTIError(
            f"{file}: cannot unpack it to {target.parent} ({error.strerror or error}); it takes {len(data)} bytes. "
            f"{_ELSEWHERE}"
        ) from error


@contextmanager
def _refusals(file: Path, folder: Path) -> Iterator[None]:
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
                f"{file}: {folder.parent} does not let programs run ({text}). Set TMPDIR to a folder of a file system "
                "that is not mounted noexec, and start again."
            ) from error
        raise ArtifactError(
            f"{file}: torch {torch.__version__} cannot load this package ({text}). Install the torch that the model "
            "was compiled with, or a later one, or compile the model again with neml2-compile."
        ) from error
