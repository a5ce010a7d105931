"""Where the results of a long run go: `.npy` files in a folder, a Zarr group, or a function."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .._files import draft, file_name, require_outside_artifacts, require_writable
from ..errors import InputError, InputTypeError
from ._sources import Rows, import_zarr, opened, path_of

# The mask of rows that failed among the results, and their numbers beside it; no variable's name begins so.
FAILED, FAILED_ROWS = "@failed", "@failed_rows"
# What single files are called; a sink is a folder.
ENDINGS = frozenset({".csv", ".h5", ".hdf5", ".json", ".nc", ".npy", ".npz", ".parquet", ".pt", ".safetensors", ".txt"})

# What each row of a result is: dtype and shape.
Fields = dict[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class _Files:
    """A folder of results, where the journal lies, and how the file or folder of a result ends."""

    path: Path
    journal: Path
    ending: str = ""

    def place(self, name: str) -> Path:
        """The file or folder of a result."""
        return self.path / f"{file_name(name)}{self.ending}"


class FolderSink(_Files):
    """A folder of `.npy` files, to which any process can write rows of its own."""

    def prepare(self, fields: Fields, rows: int, chunk: int) -> None:
        """Make the files, with room for all rows; nothing is left of them where that cannot be done."""
        require_writable(self.place(FAILED_ROWS))
        with ExitStack() as stack:
            drafts = {name: stack.enter_context(draft(self.place(name))) for name in fields}
            # What was there would be replaced; the room that it takes may be needed.
            for name in (*fields, FAILED_ROWS):
                self.place(name).unlink(missing_ok=True)
            for name, (dtype, tail) in fields.items():
                with _written(self.place(name)):
                    array: Any = np.lib.format.open_memmap(drafts[name], "w+", np.dtype(dtype), (rows, *tail))
                    if hasattr(os, "posix_fallocate"):
                        # Room on the disk, so that no process finds it full later on.
                        with drafts[name].open("r+b") as out:
                            os.posix_fallocate(out.fileno(), 0, array.offset + array.nbytes)

    def write(self, start: int, rows: Rows) -> None:
        """Write rows from a row on to the files that are there."""
        for name, array in rows.items():
            rest = np.ascontiguousarray(array).data.cast("B")
            with _written(self.place(name)), open(self.place(name), "r+b", buffering=0, opener=_open_no_link) as out:
                np.lib.format.read_magic(out)
                np.lib.format.read_array_header_1_0(out)
                out.seek(start * (rest.nbytes // len(array)), os.SEEK_CUR)
                while rest:
                    rest = rest[out.write(rest) :]

    def sync(self, fields: Fields) -> None:
        """Have on disk what was written."""
        for name in fields:
            with self.place(name).open("r+b") as file:
                os.fsync(file.fileno())

    def finish(self) -> np.ndarray:
        """Write the numbers of the rows that failed, and give them."""
        numbers = np.flatnonzero(opened(self.place(FAILED)))
        with draft(self.place(FAILED_ROWS)) as scratch, scratch.open("wb") as out:
            np.save(out, numbers)
        return numbers


class ZarrSink(_Files):
    """A Zarr group on disk; only one process at a time may write to a chunk of an array."""

    def prepare(self, fields: Fields, rows: int, chunk: int) -> None:
        """Make the arrays; a chunk of the run is a chunk of each array."""
        with _written(self.path):
            group = self._group("a")
            for name, (dtype, tail) in fields.items():
                key = file_name(name)
                if key not in group and os.path.lexists(self.place(name)):
                    raise InputError(f"sink {self.place(name)}: is no Zarr array to replace. Give another sink.")
                group.create_array(
                    key, shape=(rows, *tail), chunks=(min(chunk, rows), *tail), dtype=dtype, overwrite=True
                )

    def write(self, start: int, rows: Rows) -> None:
        """Write rows from a row on to the arrays that are there."""
        group = self._group("r+")
        for name, array in rows.items():
            with _written(self.place(name)):
                group[file_name(name)][start : start + len(array)] = array

    def sync(self, fields: Fields) -> None:
        """Nothing: Zarr's chunks are files of their own."""

    def finish(self) -> np.ndarray:
        """Write the numbers of the rows that failed, and give them."""
        group = self._group("r+")
        numbers = np.flatnonzero(group[FAILED][...])
        group.create_array(FAILED_ROWS, data=numbers, overwrite=True)
        return numbers

    def _group(self, mode: str) -> Any:
        return import_zarr().open_group(str(self.path), mode=mode)


class FunctionSink:
    """A function that takes the results chunk by chunk, in the order of the rows."""

    def __init__(self, function: Callable[[Rows], object]) -> None:
        self._function = function
        self._waiting: dict[int, Rows] = {}
        self._next = 0
        self._failed = [np.empty(0, np.int64)]

    def write(self, start: int, rows: Rows) -> None:
        """Take the results of a chunk; they are handed on when all earlier ones have been."""
        self._waiting[start] = rows
        while self._next in self._waiting:
            found = self._waiting.pop(self._next)
            self._failed.append(self._next + np.flatnonzero(found[FAILED]))
            self._next += len(found[FAILED])
            self._function(found)

    def finish(self) -> np.ndarray:
        """The numbers of the rows that failed."""
        return np.concatenate(self._failed)


FileSink = FolderSink | ZarrSink
Sink = FileSink | FunctionSink


def open_sink(given: object) -> Sink:
    """Find out what was given as a sink, and make the folder that it lies in."""
    if callable(given):
        return FunctionSink(given)
    path = path_of(given)
    if path is None:
        raise InputTypeError(
            f"sink is a {type(given).__name__}, expected a folder for .npy files, the path of a Zarr group (*.zarr), "
            "or a function that takes a dict of arrays."
        )
    path = path.absolute()
    is_path = isinstance(given, (str, os.PathLike))
    if is_path and path.suffix.lower() in ENDINGS and not path.is_dir():
        raise InputError(
            f"sink {path}: is named like a file, and results are a folder of .npy files or a Zarr group (*.zarr). Give "
            f"a name such as {path.stem}."
        )
    sink: FileSink
    if is_path and path.suffix != ".zarr":
        sink = FolderSink(path, path / "journal.jsonl", ".npy")
    else:
        sink = ZarrSink(path, path.with_name(f"{path.name}.journal.jsonl"))
    require_outside_artifacts(sink.journal)
    with _written(sink.journal.parent):
        sink.journal.parent.mkdir(parents=True, exist_ok=True)
    return sink


def require_free(sink: FileSink, files: Iterable[Path], fields: Fields, *, resume: bool) -> None:
    """Refuse a sink where results would replace a file of the source, or results that no journal is about."""
    # A file of the source may be a result by whatever path, and may lie in one.
    real = {file: Path(os.path.realpath(file)) for file in files}
    read = {_inode(place): file for file, path in real.items() for place in (path, *path.parents) if place.exists()}
    places = [sink.place(name) for name in (*fields, FAILED_ROWS)]
    for place in places:
        if place.exists() and (file := read.get(_inode(place))) is not None:
            raise InputError(f"sink {place}: the source {file} is the same file. Give another sink.")
    if resume and any(map(os.path.lexists, places)) and not os.path.lexists(sink.journal):
        raise InputError(
            f"sink {sink.path}: there are results, but no journal of a run. Give another sink, or resume=False to "
            "replace them."
        )


def require_prepared(sink: FileSink, fields: Fields, rows: int) -> None:
    """Refuse to go on where the results are not there as an earlier run has made them."""
    for name, (dtype, tail) in fields.items():
        with suppress(InputError):
            array = opened(sink.place(name))
            if str(array.dtype) == dtype and array.shape == (rows, *tail):
                continue
        raise InputError(
            f"sink {sink.place(name)}: is not there as the journal of the run says, so the run cannot go on. Give "
            "resume=False to start anew, or another sink."
        )


def _inode(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_dev, found.st_ino


def _open_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0))


@contextmanager
def _written(place: Path) -> Iterator[None]:
    """Raise an `InputError` where a part of the sink cannot be written."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
        cure = "Make room, and call again" if full else "Give a sink that can be written to"
        raise InputError(f"sink {place}: cannot be written ({error.strerror or error}). {cure}.") from error
