"""Unpack a graph's package into a folder of this process alone, load it from there, and leave nothing behind.

torch's own package loader opens the file once more, after it has been looked over, checks no checksum, runs a compiler
where the library is missing, and leaves its folder behind when the process is killed. Here the bytes that were looked
over are those that run, and the folder is gone as soon as they are loaded.

Each folder is of one process, gone when it is done with, and swept up after a process that was killed. They lie in a
folder of this user alone in the temporary folder. Nothing is ever removed but what this module made: a folder of its
name form in that parent, of this user and closed to others, that holds a marker and plain files only, and that no
living process has locked. Where the parent may be somebody else's, there is no parent and no sweep.
"""

from __future__ import annotations

import atexit
import errno
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
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
from .._checks import first_line
from .._files import open_plain
from ..errors import AOTIError, ArtifactError
from .c_interface import Library, Unavailable
from .c_interface import obstacle as obstacle_in_library
from .operators import PYTHON_POWER, operators, repacked, same_as_torch

if sys.platform != "win32":
    import fcntl

PARENT = "neml2-aoti-plugin"
MARKER = ".neml2-aoti-plugin-unpacked"
MARK = b"This folder was made by neml2-aoti-plugin for one process. It may be removed once no process uses it.\n"
FORM = re.compile(r"unpacked-[0-9]{1,10}-[0-9a-f]{32}")

# Folders that could not be removed while their library is loaded, as on Windows.
_kept: set[str] = set()
_swept: set[str] = set()


class Scratch:
    """A new folder that only this user may enter."""

    def __init__(self, temporary: str) -> None:
        self.temporary = temporary
        self.names: list[str] = []
        # Of the folder, locked from before it is marked: from then on it may be swept up, but not while it is locked.
        self._handle: int | None = None
        while (parent := _parent_in(temporary)) is not None and sys.platform != "win32":
            self.path = os.path.join(parent, f"unpacked-{os.getpid()}-{secrets.token_hex(16)}")
            # Somebody may tidy up the temporary folder meanwhile.
            with suppress(FileNotFoundError):
                os.mkdir(self.path, 0o700)
                break
        else:
            self.path = tempfile.mkdtemp(prefix=f"{PARENT}-", dir=temporary)
            return
        try:
            self._handle = _open_folder(self.path)
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                # Some network file systems have no locks; then nobody may sweep there, and there is no marker.
                return
            self._create(MARKER, MARK)
        except BaseException:
            self.remove()
            raise

    def write(self, name: str, data: bytes | memoryview, file: Path) -> Path:
        """Write a file that is not there yet."""
        try:
            return self._create(name, data)
        except OSError as error:
            raise AOTIError(
                f"{file}: cannot unpack it to {self.path} ({error.strerror or error}); it takes {len(data)} bytes. "
                f"{_cure(error)}"
            ) from error

    def _create(self, name: str, data: bytes | memoryview) -> Path:
        target = Path(self.path, name)
        self.names.append(name)
        with target.open("xb") as out:
            out.write(data)
        return target

    def remove(self) -> None:
        """Remove the folder, also where no more files can be opened, which a walk through it would need."""
        for name in self.names:
            with suppress(OSError):
                os.unlink(os.path.join(self.path, name))
        try:
            os.rmdir(self.path)
        except OSError:
            shutil.rmtree(self.path, ignore_errors=True)
        if os.path.isdir(self.path):
            _kept.add(self.path)
        if self._handle is not None:
            os.close(self._handle)


@contextmanager
def scratch_folder(file: Path) -> Iterator[Scratch]:
    """A new folder that only this user may enter, gone afterwards."""
    try:
        folder = Scratch(tempfile.gettempdir())
    except OSError as error:
        raise AOTIError(f"{file}: cannot make a folder to unpack it to: {error}. {_cure(error)}") from error
    try:
        yield folder
    finally:
        folder.remove()


def _parent_in(temporary: str) -> str | None:
    """The folder of this user alone in the temporary folder, made and swept where need be; None where there is none."""
    if sys.platform == "win32":
        return None
    parent = os.path.join(temporary, f"{PARENT}-{os.getuid()}")
    with suppress(OSError):
        with suppress(FileExistsError):
            os.mkdir(parent, 0o700)
        if _is_private(os.lstat(parent)):
            if temporary not in _swept:
                _swept.add(temporary)
                sweep(parent)
            return parent
    return None


def _is_private(status: os.stat_result) -> bool:
    """Whether what was looked at is a folder of this user that is closed to all others."""
    return (
        sys.platform != "win32"
        and stat.S_ISDIR(status.st_mode)
        and status.st_uid == os.getuid()
        and stat.S_IMODE(status.st_mode) == 0o700
    )


def _open_folder(path: str, above: int | None = None) -> int:
    """Open a folder, no link to one."""
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)


def sweep(parent: str) -> None:
    """Remove folders of processes that were killed while they had them."""
    if os.listdir not in os.supports_fd:
        return
    with suppress(OSError), _opened(parent) as above:
        if _is_private(os.fstat(above)):
            for name in filter(FORM.fullmatch, os.listdir(above)):
                with suppress(OSError), _opened(name, above) as folder:
                    _sweep_one(name, folder, above)


@contextmanager
def _opened(path: str, above: int | None = None) -> Iterator[int]:
    handle = _open_folder(path, above)
    try:
        yield handle
    finally:
        os.close(handle)


def _sweep_one(name: str, folder: int, above: int) -> None:
    """Remove one folder, if it is one that this module made and nobody uses."""
    if sys.platform == "win32" or not _is_private(os.fstat(folder)):
        return
    # Whoever made it holds the lock; the system takes it from a process that is killed.
    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    inside = os.listdir(folder)
    for entry in inside:
        status = os.stat(entry, dir_fd=folder, follow_symlinks=False)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid():
            return
    with os.fdopen(open_plain(MARKER, folder), "rb") as marker:
        if marker.read(len(MARK) + 1) != MARK:
            return
    # The marker last: if this process is killed now, the next one goes on.
    for entry in sorted(inside, key=lambda entry: entry == MARKER):
        os.unlink(entry, dir_fd=folder)
    os.rmdir(name, dir_fd=above)


@atexit.register
def _remove_kept() -> None:
    for path in _kept:
        shutil.rmtree(path, ignore_errors=True)


def _cure(error: OSError) -> str:
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "Close files that are open, or allow this process more of them (ulimit -n), and call again."
    return "Make room there, or set TMPDIR to a folder that can be written to, and start again."


def load_runner(file: Path, data: bytes, device: torch.device) -> tuple[Any, bool]:
    """Load a graph; tell whether it may call Python."""
    with _sound(file, data) as archive, scratch_folder(file) as folder:
        changed, python = operators(archive, device)
        own = getattr(torch._C._aoti, "AOTIModelContainerRunnerCpu", None) if device.type == "cpu" else None
        if own is None:
            # A GPU's kernels are read from the folder later on; torch's loader keeps one of its own for them.
            content = repacked(archive, changed) if changed else data
            package = folder.write(file.name, content, file)
            index = -1 if device.index is None or device.type == "cpu" else device.index
            with _refusals(file, folder):
                return torch._C._aoti.AOTIModelPackageLoader(str(package), "model", False, 1, index), python
        library = _unpack(archive, data, folder, file, changed)
        with _refusals(file, folder):
            return own(str(library), 1), python


def load_library(file: Path, data: bytes) -> Library:
    """Load the library of a graph for a CPU, to be called by its C interface."""
    with _sound(file, data) as archive:
        reason = _obstacle(archive)
        if reason:
            raise Unavailable(reason)
        with scratch_folder(file) as folder:
            return Library(_unpack(archive, data, folder, file, {}), file)


def obstacle(file: Path, data: bytes) -> str:
    """Why a graph for a CPU cannot be called by its C interface, as far as its package tells; nothing of it is run."""
    with _sound(file, data) as archive:
        return _obstacle(archive)


def _obstacle(archive: ZipFile) -> str:
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
    except RuntimeError as error:
        text = first_line(error)
        if "failed to map" in text or "Operation not permitted" in text:
            raise AOTIError(
                f"{file}: {folder.temporary} does not let programs run ({text}). Set TMPDIR to a folder of a file "
                "system that is not mounted noexec, and start again."
            ) from error
        raise ArtifactError(
            f"{file}: torch {torch.__version__} cannot load this package ({text}). Install the torch that the model "
            "was compiled with, or a later one, or compile the model again with neml2-compile."
        ) from error
