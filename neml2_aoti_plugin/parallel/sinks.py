"""Where the results of a long run go: `.npy` files in a folder, a Zarr group, or a function."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from ..errors import AOTIError, InputError, InputTypeError
from ..files import draft, file_name, require_outside_artifacts, require_writable
from . import exchange
from .sources import FAILED, Rows, import_zarr, open_npy

# What each row of a result is: dtype and shape.
Fields = dict[str, tuple[str, tuple[int, ...]]]

JOURNAL = "journal.jsonl"
# The numbers of the rows that failed, beside the mask.
FAILED_ROWS = "@failed_rows"


class Writable(Protocol):
    """Where another process can write rows to."""

    def write(self, start: int, rows: Rows) -> None:
        """Write rows from a row on."""

    def require_visible(self) -> None:
        """Refuse a process that does not see the same place."""


@dataclass(frozen=True)
class NpyResults:
    """Files that are there already, each with room for all rows.

    Args:
        folder: of the files.
        offsets: of the first row in each, by name, in bytes.
        journal: the file that tells that the folder is the same one, and how it begins.
    """

    folder: str
    offsets: tuple[tuple[str, int], ...]
    journal: tuple[str, bytes]

    def write(self, start: int, rows: Rows) -> None:
        """See `Writable.write`."""
        offsets = dict(self.offsets)
        for name, array in rows.items():
            array = np.ascontiguousarray(array)
            file = _npy(self.folder, name)
            try:
                with open(file, "r+b", buffering=0, opener=_open_no_link) as out:
                    exchange.write_at(out.fileno(), array, offsets[name] + start * (array.nbytes // len(array)))
            except OSError as error:
                raise _unwritable(str(file), error) from error

    def require_visible(self) -> None:
        """See `Writable.require_visible`."""
        require_same_journal(*self.journal)


@dataclass(frozen=True)
class ZarrResults:
    """Arrays of a Zarr group that are there already; chunks of rows are theirs.

    Args:
        group: its path.
        journal: as for `NpyResults`.
    """

    group: str
    journal: tuple[str, bytes]

    def write(self, start: int, rows: Rows) -> None:
        """See `Writable.write`."""
        group = import_zarr().open_group(self.group, mode="r+")
        for name, array in rows.items():
            try:
                group[file_name(name)][start : start + len(array)] = array
            except OSError as error:
                raise _unwritable(f"{self.group}/{file_name(name)}", error) from error

    def require_visible(self) -> None:
        """See `Writable.require_visible`."""
        require_same_journal(*self.journal)


class FolderSink:
    """A folder of `.npy` files.

    Args:
        folder: made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.journal = self.folder / JOURNAL

    def place(self, name: str) -> Path:
        """The file of a result."""
        return _npy(self.folder, name)

    def prepare(self, fields: Fields, rows: int, chunk: int, *, anew: bool) -> None:
        """Have the files there, with room for all rows.

        Args:
            fields: of the results.
            rows: how many.
            chunk: not needed here.
            anew: whether to make them; else they must be there.

        Raises:
            InputError: they cannot be made, or are there and others; nothing is left that was made.
        """
        shapes = {name: (np.dtype(dtype), (rows, *tail)) for name, (dtype, tail) in fields.items()}
        if not anew:
            self._offsets = {name: _check_npy(self.place(name), *shape) for name, shape in shapes.items()}
            return
        self._offsets = {}
        require_writable(self.place(FAILED_ROWS))
        with ExitStack() as stack:
            drafts = {name: stack.enter_context(draft(self.place(name))) for name in shapes}
            # What was there would be replaced; the room that it takes may be needed.
            for name in (*shapes, FAILED_ROWS):
                self.place(name).unlink(missing_ok=True)
            for name, scratch in drafts.items():
                try:
                    with scratch.open("r+b") as out:
                        self._offsets[name] = _make_npy(out, *shapes[name])
                except OSError as error:
                    raise _unwritable(str(self.place(name)), error) from error

    def results(self, header: bytes) -> NpyResults:
        """What processes write to."""
        return NpyResults(str(self.folder), tuple(self._offsets.items()), (str(self.journal), header))

    def sync(self) -> None:
        """Have on disk what was written."""
        for name in self._offsets:
            with self.place(name).open("r+b") as file:
                os.fsync(file.fileno())

    def failed(self) -> np.ndarray:
        """The mask of rows that failed."""
        return open_npy(self.place(FAILED))

    def finish(self, numbers: np.ndarray) -> None:
        """Write the numbers of the rows that failed."""
        with draft(self.place(FAILED_ROWS)) as scratch, scratch.open("wb") as out:
            np.save(out, numbers)


class ZarrSink:
    """A Zarr group on disk.

    Args:
        path: of the group; made if it is not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.folder = self.path.parent
        self.journal = self.path.with_name(f"{self.path.name}.{JOURNAL}")

    def place(self, name: str) -> Path:
        """The folder of a result."""
        return self.path / file_name(name)

    def prepare(self, fields: Fields, rows: int, chunk: int, *, anew: bool) -> None:
        """See `FolderSink.prepare`; a chunk of rows is a chunk of each array, so that processes write apart."""
        zarr = import_zarr()
        try:
            group = zarr.open_group(str(self.path), mode="a")
            for name, (dtype, tail) in fields.items():
                key, shape = file_name(name), (rows, *tail)
                if anew and key not in group and os.path.lexists(self.place(name)):
                    raise InputError(f"sink {self.place(name)}: is no Zarr array to replace. Give another sink.")
                if anew:
                    group.create_array(key, shape=shape, chunks=(min(chunk, rows), *tail), dtype=dtype, overwrite=True)
                elif key not in group or group[key].shape != shape or str(group[key].dtype) != dtype:
                    raise InputError(f"sink {self.path}: has no array {key!r} as its journal tells. Use another sink.")
        except OSError as error:
            raise _unwritable(str(self.path), error) from error

    def results(self, header: bytes) -> ZarrResults:
        """What processes write to."""
        return ZarrResults(str(self.path), (str(self.journal), header))

    def sync(self) -> None:
        """Nothing: Zarr's chunks are files of their own."""

    def failed(self) -> np.ndarray:
        """The mask of rows that failed."""
        return np.asarray(import_zarr().open_group(str(self.path), mode="r")[FAILED][...])

    def finish(self, numbers: np.ndarray) -> None:
        """Write the numbers of the rows that failed."""
        group = import_zarr().open_group(str(self.path), mode="r+")
        group.create_array(FAILED_ROWS, data=numbers, overwrite=True)


class FunctionSink:
    """A function that takes the results block by block, in the order of the rows.

    Args:
        function: takes a dict from name to array, with the rows of a chunk.
    """

    def __init__(self, function: Callable[[Rows], object]) -> None:
        self._function = function
        self._waiting: dict[int, Rows] = {}
        self._next = 0
        self.numbers: list[np.ndarray] = []

    def take(self, start: int, rows: Rows) -> None:
        """Take the results of a chunk; they are handed on when all earlier ones have been."""
        self._waiting[start] = rows
        while self._next in self._waiting:
            found = self._waiting.pop(self._next)
            self.numbers.append(self._next + np.flatnonzero(found[FAILED]))
            self._next += len(found[FAILED])
            self._function(found)


FileSink = FolderSink | ZarrSink


def open_sink(given: object) -> FileSink | FunctionSink:
    """Find out what was given as a sink, and make its folder.

    Raises:
        InputTypeError: it is nothing that results could go to.
        InputError: its folder cannot be made or written to.
    """
    if callable(given):
        return FunctionSink(given)
    sink: FileSink
    if isinstance(given, (str, os.PathLike)):
        path = Path(given)
        sink = ZarrSink(path) if path.suffix == ".zarr" else FolderSink(path)
    elif hasattr(given, "arrays") and hasattr(given, "store"):
        from .sources import _path_of_group

        sink = ZarrSink(_path_of_group(given))
    else:
        raise InputTypeError(
            f"sink is a {type(given).__name__}, expected a folder for .npy files, the path of a Zarr group (*.zarr), "
            "or a function that takes a dict of arrays."
        )
    require_outside_artifacts(sink.journal)
    try:
        sink.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(str(sink.folder), error) from error
    return sink


def require_apart(sink: FileSink, files: Iterable[Path], fields: Fields) -> None:
    """Refuse a sink whose results would take the place of what the source is read from.

    Args:
        sink: that nothing was written to yet.
        files: the files and folders of the source.
        fields: of the results.

    Raises:
        InputError: one of them is a result of the sink, or lies in one; by whatever path.
    """
    real = {file: Path(os.path.realpath(file)) for file in files}
    read = {_inode(place): file for file, path in real.items() for place in (path, *path.parents)}
    for name in (*fields, FAILED_ROWS):
        place = sink.place(name)
        if place.exists() and (file := read.get(_inode(place))) is not None:
            raise InputError(f"sink {place}: the source {file} is the same file. Give another sink.")


def _inode(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_dev, found.st_ino


def is_used(sink: FileSink, fields: Fields) -> bool:
    """Whether something is in the places of the results already."""
    return any(os.path.lexists(sink.place(name)) for name in (*fields, FAILED_ROWS))


def require_same_journal(journal: str, header: bytes) -> None:
    """Refuse a process that does not see the sink of this run.

    Raises:
        AOTIError: the journal is not there, or another one.
    """
    try:
        with open(journal, "rb") as file:
            same = file.readline(len(header)) == header
    except OSError:
        same = False
    if not same:
        raise AOTIError(
            f"a worker does not see the sink of this run: {journal} is not there, or another one. The sink must lie on "
            "a file system that all workers share, under the same path."
        )


def _make_npy(out: BinaryIO, dtype: np.dtype, shape: tuple[int, ...]) -> int:
    """Make an open file a `.npy` file with room for an array; give the place of its first row."""
    form: Mapping[str, Any] = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": False,
        "shape": shape,
    }
    np.lib.format.write_array_header_1_0(out, dict(form))
    out.flush()
    offset = out.tell()
    size = offset + dtype.itemsize * int(np.prod(shape, dtype=np.int64))
    if hasattr(os, "posix_fallocate"):
        # Room on the disk, so that no process finds it full later on.
        os.posix_fallocate(out.fileno(), 0, size)
    else:
        out.truncate(size)
    return offset


def _check_npy(file: Path, dtype: np.dtype, shape: tuple[int, ...]) -> int:
    """The place of the first row in a `.npy` file that must be one of such an array."""
    try:
        array = open_npy(file)
    except InputError:
        array = None
    if array is None or array.dtype != dtype or array.shape != shape:
        raise InputError(
            f"sink {file}: is not there as the journal beside it tells, so the run cannot go on. Give resume=False to "
            "start anew, or another sink."
        )
    return int(array.offset)


def _npy(folder: str | Path, name: str) -> Path:
    return Path(folder) / f"{file_name(name)}.npy"


def _open_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0))


def _unwritable(file: str, error: OSError) -> InputError:
    full = error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
    cure = "Make room, and call again" if full else "Give a sink that can be written to"
    found = InputError(f"sink {file}: cannot be written ({error.strerror or error}). {cure}.")
    with suppress(AttributeError):
        found.errno = error.errno  # type: ignore[attr-defined]
    return found
