"""Where the rows of a long run come from: files, Zarr, arrays, or an iterable of blocks of rows."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..errors import AOTIError, InputError, InputTypeError
from ..files import file_name
from ..model import Model

Rows = dict[str, np.ndarray]
# The mask of rows that failed, among results by the names of variables; no variable's name begins so.
FAILED = "@failed"


class Readable(Protocol):
    """What another process can read rows from."""

    def read(self, start: int, stop: int) -> Rows:
        """The rows by name of the input; one that has no row axis is the same for all.

        Raises:
            InputError: they cannot be read.
        """


@dataclass(frozen=True)
class NpyFiles:
    """Arrays in `.npy` files.

    Args:
        files: path by name of the input.
        common: names of those that have no row axis.
    """

    files: tuple[tuple[str, str], ...]
    common: frozenset[str]

    def read(self, start: int, stop: int) -> Rows:
        """See `Readable.read`."""
        found = {}
        for name, file in self.files:
            array = open_npy(Path(file))
            found[name] = np.array(array if name in self.common else array[start:stop])
        return found


@dataclass(frozen=True)
class ZarrArrays:
    """Arrays in a Zarr group on disk.

    Args:
        group: its path.
        names: of the inputs.
        common: names of those that have no row axis.
    """

    group: str
    names: tuple[str, ...]
    common: frozenset[str]

    def read(self, start: int, stop: int) -> Rows:
        """See `Readable.read`."""
        with zarr_errors(f"source {self.group}"):
            group = import_zarr().open_group(self.group, mode="r")
            arrays = {name: group[file_name(name)] for name in self.names}
            return {n: np.asarray(a[...] if n in self.common else a[start:stop]) for n, a in arrays.items()}


@dataclass(frozen=True)
class Source:
    """Rows to evaluate.

    Args:
        rows: how many.
        first: the first of them, to try the model on.
        identity: what it consists of, for the journal, which has the digests of its rows beside it.
        files: the files and folders that it is read from.
        readable: where processes read from; None where they are sent the rows.
        arrays: in memory, where they are.
        blocks: of rows, where they come one after the other.
        common: names of inputs that have no row axis.
    """

    rows: int
    first: Rows
    identity: dict[str, Any]
    files: tuple[Path, ...] = ()
    readable: Readable | None = None
    arrays: Mapping[str, np.ndarray] | None = None
    blocks: Iterator[Rows] | None = None
    common: frozenset[str] = frozenset()

    def part(self, start: int, stop: int) -> Rows | None:
        """Rows that are sent to a process; None where it reads them itself."""
        if self.arrays is None:
            return None
        return {n: np.asarray(a if n in self.common else a[start:stop]) for n, a in self.arrays.items()}


def open_source(given: object, model: Model, rows: int | None) -> Source:
    """Find out what was given as a source, and check it.

    Args:
        given: as for `map_rows`.
        model: that the rows are for.
        rows: as for `map_rows`.

    Raises:
        InputTypeError: it is nothing that rows could come from, or has another dtype than the model.
        InputError: names, shapes or numbers of rows do not fit.
    """
    if isinstance(given, (str, os.PathLike)):
        return _from_path(Path(given), model)
    if isinstance(given, Mapping):
        return _from_mapping(given, model)
    if hasattr(given, "arrays") and hasattr(given, "store"):
        return _from_zarr(_path_of_group(given), model)
    if isinstance(given, Iterable):
        return _from_blocks(given, model, rows)
    raise InputTypeError(
        f"source is a {type(given).__name__}, expected a folder of .npy files, a Zarr group, a dict from the name of "
        "an input to an array or a .npy file, or an iterable of dicts of arrays."
    )


def _from_path(path: Path, model: Model) -> Source:
    if not path.is_dir():
        raise InputError(f"source {path}: there is no such folder. Give a folder of .npy files, or a Zarr group.")
    if path.suffix == ".zarr" or (path / "zarr.json").is_file() or (path / ".zgroup").is_file():
        return _from_zarr(path, model)
    files = {name: path / f"{file_name(name)}.npy" for name in (*model.inputs, *model.first_iterates)}
    return _from_mapping({name: file for name, file in files.items() if file.exists()}, model, str(path))


def _from_mapping(given: Mapping[Any, Any], model: Model, where: str = "source") -> Source:
    files: dict[str, Path] = {}
    arrays: dict[str, np.ndarray] = {}
    for name, value in given.items():
        file = _file_of(value)
        if file is None:
            arrays[name] = _as_array(value, name)
            continue
        arrays[name] = open_npy(file)
        files[name] = file.absolute()
    rows, common = _checked(arrays, model, where)
    first = {n: np.array(a if n in common else a[:1]) for n, a in arrays.items()}
    behind = (*files.values(), *(file for array in arrays.values() for file in _files_behind(array)))
    if len(files) < len(arrays):
        return Source(rows, first, _identity(arrays), behind, arrays=arrays, common=common)
    readable = NpyFiles(tuple((n, str(f)) for n, f in files.items()), common)
    return Source(rows, first, _identity(arrays), behind, readable)


def _identity(arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {"arrays": {name: [list(array.shape), str(array.dtype)] for name, array in sorted(arrays.items())}}


def open_npy(file: Path) -> np.memmap[Any, Any]:
    """The array of a `.npy` file as a memory map.

    Raises:
        InputError: it cannot be read.
    """
    try:
        if not file.is_file():
            raise ValueError("there is no such file, or it is no plain file")
        return np.lib.format.open_memmap(file, mode="r")
    # NumPy parses the header as Python; a damaged one raises errors of many kinds.
    except Exception as error:
        raise InputError(f"source {file}: cannot be read as a .npy file ({error}). Write it with numpy.save.") from None


def _files_behind(array: object) -> Iterator[Path]:
    """The files that an array is a view of."""
    while array is not None:
        if isinstance(array, np.memmap) and array.filename is not None:
            yield Path(str(array.filename))
        array = getattr(array, "base", None)


def _file_of(value: object) -> Path | None:
    """The file that a value is, or that it is the whole memory map of."""
    if isinstance(value, (str, os.PathLike)):
        return Path(value)
    if isinstance(value, np.memmap) and not isinstance(value.base, np.ndarray) and value.filename is not None:
        file = Path(str(value.filename))
        if file.suffix == ".npy" and value.mode in ("r", "r+") and value.flags.c_contiguous:
            return file
    return None


def _as_array(value: object, name: str) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return value
    if hasattr(value, "detach"):
        found: np.ndarray = value.detach().cpu().numpy()
        return found
    raise InputTypeError(
        f"source {name!r} is a {type(value).__name__}, expected an array of NumPy, a tensor, or a path of a .npy file."
    )


def _from_zarr(path: Path, model: Model) -> Source:
    with zarr_errors(f"source {path}"):
        group = import_zarr().open_group(str(path), mode="r")
        names = [name for name in (*model.inputs, *model.first_iterates) if file_name(name) in group]
        arrays = {name: group[file_name(name)] for name in names}
    rows, common = _checked(arrays, model, str(path))
    readable = ZarrArrays(str(path.absolute()), tuple(names), common)
    folders = tuple(path.absolute() / file_name(name) for name in names)
    return Source(rows, readable.read(0, 1), _identity(arrays), folders, readable)


def _path_of_group(group: Any) -> Path:
    root = getattr(group.store, "root", None) or getattr(group.store, "path", None)
    if root is None:
        raise InputTypeError("the Zarr group is not in a folder of this machine. Give one that is, by its path.")
    return Path(root) / str(group.path)


def _from_blocks(given: Iterable[Any], model: Model, rows: int | None) -> Source:
    blocks = iter(given)
    first = next(blocks, None)
    if first is None:
        raise InputError("source gives no block of rows.")
    return Source(
        -1 if rows is None else rows,
        {n: a[:1] for n, a in checked_block(first, model, 0).items()},
        {"blocks": True},
        blocks=(checked_block(b, model, i) for i, b in enumerate(itertools.chain([first], blocks))),
    )


def checked_block(block: object, model: Model, number: int) -> Rows:
    """Check a block of an iterable; all its arrays have the row axis afterwards.

    Raises:
        InputTypeError: it is no dict of arrays.
        InputError: names, shapes or numbers of rows do not fit.
    """
    where = f"block {number} of the source"
    if not isinstance(block, Mapping):
        raise InputTypeError(f"{where} is a {type(block).__name__}, expected a dict from name of the input to array.")
    arrays = {name: _as_array(value, name) for name, value in block.items()}
    rows, common = _checked(arrays, model, where)
    return {n: np.broadcast_to(a, (rows, *a.shape)) if n in common else a for n, a in arrays.items()}


def _checked(arrays: Mapping[str, Any], model: Model, where: str) -> tuple[int, frozenset[str]]:
    """The number of rows, and the names of arrays without a row axis."""
    variables = {**model.first_iterates, **model.inputs}
    absent = [name for name in model.inputs if name not in arrays]
    unknown = [str(name) for name in arrays if name not in variables]
    if absent or unknown:
        parts = [f"missing {', '.join(absent)}"] * bool(absent) + [f"unknown {', '.join(unknown)}"] * bool(unknown)
        raise InputError(f"{where}: {'; '.join(parts)}. The model's inputs are: {', '.join(model.inputs)}.")
    dtype = str(model.dtype).removeprefix("torch.")
    rows: dict[str, int] = {}
    for name, array in arrays.items():
        natural = variables[name].natural_shape
        if np.dtype(array.dtype) != np.dtype(dtype):
            raise InputTypeError(f"{where}: {name!r} has dtype {array.dtype}, expected {dtype}, as the model has.")
        shape = tuple(array.shape)
        if shape == natural:
            continue
        if shape[1:] != natural:
            shown = ", ".join(("rows", *map(str, natural)))
            raise InputError(f"{where}: {name!r} has shape {shape}, expected ({shown}), or {natural} for all rows.")
        rows[name] = shape[0]
    if len(set(rows.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in rows.items())
        raise InputError(f"{where}: the arrays differ in their number of rows: {listed}.")
    if not rows or not next(iter(rows.values())):
        raise InputError(f"{where}: there are no rows. Give at least one input with the shape (rows, *base).")
    return next(iter(rows.values())), frozenset(arrays) - frozenset(rows)


@contextmanager
def zarr_errors(where: str) -> Iterator[None]:
    """Tell of a group that cannot be read as what it is: damaged metadata and chunks raise errors of many kinds."""
    try:
        yield
    except (AOTIError, MemoryError):
        raise
    except Exception as error:
        raise InputError(f"{where}: cannot be read as a Zarr group ({type(error).__name__}: {error}).") from error


def import_zarr() -> Any:
    """The package zarr, which is in no extra that is always there."""
    try:
        import zarr
    except ImportError:
        raise AOTIError("Zarr groups need zarr, which is not installed: pip install zarr.") from None
    return zarr
