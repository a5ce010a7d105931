"""Where the rows of a long run come from: files, Zarr, arrays, or an iterable of blocks of rows."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .._checks import require_names
from .._files import file_name
from ..errors import AOTIError, InputError, InputTypeError
from ..model import Model

Rows = dict[str, np.ndarray]
# A `.npy` file, the folder of a Zarr array, or an array in memory.
Storage = Path | np.ndarray


@dataclass(frozen=True)
class SourceArrays:
    """Where the arrays of a source are, by input."""

    places: Mapping[str, Storage]
    # Names of those that have no row axis, and are the same for all rows.
    common: frozenset[str]

    def read(self, start: int, stop: int) -> Rows:
        """Rows by name of the input."""
        found = {}
        for name, place in self.places.items():
            with _as_input_errors(place):
                found[name] = np.array(opened(place)[... if name in self.common else slice(start, stop)])
        return found


@dataclass(frozen=True)
class Chunk:
    """Some rows: the first one, one behind the last, and the rows, or where any process reads them."""

    start: int
    stop: int
    rows: SourceArrays | Rows

    def read(self) -> Rows:
        """The rows by name of the input."""
        if not isinstance(self.rows, SourceArrays):
            return self.rows
        try:
            return self.rows.read(self.start, self.stop)
        except InputError as error:
            raise InputError(
                f"rows {self.start} to {self.stop - 1} cannot be read: {error} The source must stay as it is, and lie "
                "on a file system that all workers share, under the same path."
            ) from error


@dataclass(frozen=True)
class Source:
    """Rows to evaluate: arrays, or blocks of rows that come one after the other."""

    # How many; None where that is not known.
    rows: int | None
    # The first row, to try the model on.
    first: Rows
    arrays: SourceArrays | None = None
    blocks: Iterable[Rows] = ()

    def chunks(self, size: int) -> Iterator[Chunk]:
        """Chunks of `size` rows where the source is arrays; else its blocks."""
        stop = 0
        if self.arrays is not None and self.rows is not None:
            stored = all(isinstance(place, Path) for place in self.arrays.places.values())
            for start in range(0, self.rows, size):
                stop = min(start + size, self.rows)
                yield Chunk(start, stop, self.arrays if stored else self.arrays.read(start, stop))
            return
        for block in self.blocks:
            start, stop = stop, stop + len(next(iter(block.values())))
            if self.rows is not None and self.rows < stop:
                raise InputError(f"source gives more than {self.rows} rows (rows=).")
            yield Chunk(start, stop, block)
        if self.rows is not None and self.rows != stop:
            raise InputError(f"source gave {stop} rows, expected {self.rows} (rows=).")

    def files(self) -> Iterator[Path]:
        """The files and folders that are read, also those that arrays in memory are views of."""
        for place in self.arrays.places.values() if self.arrays is not None else ():
            if isinstance(place, Path):
                yield place
                continue
            array: Any = place
            while array is not None:
                if isinstance(array, np.memmap) and array.filename is not None:
                    yield Path(str(array.filename))
                array = getattr(array, "base", None)


def open_source(given: object, model: Model, rows: int | None) -> Source:
    """Find out what was given as a source, and check names, dtypes and shapes; `rows` is that of `map_rows`."""
    where, path = "source", path_of(given)
    if path is not None:
        if not path.is_dir():
            raise InputError(f"source {path}: there is no such folder. Give a folder of .npy files, or a Zarr group.")
        zarr = path.suffix == ".zarr" or (path / "zarr.json").is_file() or (path / ".zgroup").is_file()
        names = (*model.inputs, *model.initial_guesses)
        files = {name: path / f"{file_name(name)}{'' if zarr else '.npy'}" for name in names}
        where, given = str(path), {name: file for name, file in files.items() if file.exists()}
    if isinstance(given, Mapping):
        places = {name: _place_of(value, name) for name, value in given.items()}
        count, common = checked({name: opened(place) for name, place in places.items()}, model, where)
        arrays = SourceArrays(places, common)
        return Source(count, arrays.read(0, 1), arrays)
    if not isinstance(given, Iterable):
        raise InputTypeError(
            f"source is a {type(given).__name__}, expected a folder of .npy files, a Zarr group, a dict from the name "
            "of an input to an array or a .npy file, or an iterable of dicts of arrays."
        )
    blocks = (_block(block, model, number) for number, block in enumerate(given))
    first = next(blocks, None)
    if first is None:
        raise InputError("source gives no block of rows.")
    return Source(rows, {name: array[:1] for name, array in first.items()}, blocks=itertools.chain([first], blocks))


def path_of(given: Any) -> Path | None:
    """The folder that a path or a Zarr group leads to; None for what is neither."""
    if isinstance(given, (str, os.PathLike)):
        return Path(given)
    if not (hasattr(given, "arrays") and hasattr(given, "store")):
        return None
    root = getattr(given.store, "root", None) or getattr(given.store, "path", None)
    if root is None:
        raise InputTypeError("the Zarr group is not in a folder of this machine. Give one that is, by its path.")
    return Path(root) / str(given.path)


def opened(place: Storage) -> Any:
    """An array of which nothing is read yet."""
    if not isinstance(place, Path):
        return place
    with _as_input_errors(place):
        if place.is_dir():
            return import_zarr().open_array(str(place), mode="r")
        if not place.is_file():
            raise ValueError("there is no such file, or it is no plain file")
        return np.lib.format.open_memmap(place, mode="r")


@contextmanager
def _as_input_errors(place: Storage) -> Iterator[None]:
    """Raise an `InputError` for a file that cannot be read: damaged headers and chunks raise errors of many kinds."""
    try:
        yield
    except (AOTIError, MemoryError):
        raise
    except Exception as error:
        if not isinstance(place, Path):
            raise
        kind, cure = ("Zarr array", "zarr") if place.is_dir() else (".npy file", "numpy.save")
        raise InputError(
            f"source {place}: cannot be read as a {kind} ({error or type(error).__name__}). Write it with {cure}."
        ) from error


def _place_of(value: object, name: str) -> Storage:
    """The file that a value of a source is, or is the whole memory map of; else the array."""
    if isinstance(value, (str, os.PathLike)):
        return Path(value).absolute()
    if isinstance(value, np.memmap) and not isinstance(value.base, np.ndarray) and value.filename is not None:
        file = Path(str(value.filename)).absolute()
        if file.suffix == ".npy" and value.mode in ("r", "r+") and value.flags.c_contiguous:
            return file
    return _as_array(value, name)


def _as_array(value: Any, name: str) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return value
    if hasattr(value, "detach"):
        found: np.ndarray = value.detach().cpu().numpy()
        return found
    raise InputTypeError(
        f"source {name!r} is a {type(value).__name__}, expected an array of NumPy, a tensor, or a path of a .npy file."
    )


def _block(block: object, model: Model, number: int) -> Rows:
    """A block of an iterable, all of whose arrays are given the row axis."""
    where = f"block {number} of the source"
    if not isinstance(block, Mapping):
        raise InputTypeError(f"{where} is a {type(block).__name__}, expected a dict from name of the input to array.")
    arrays = {name: _as_array(value, name) for name, value in block.items()}
    rows, common = checked(arrays, model, where)
    return {n: np.broadcast_to(a, (rows, *a.shape)) if n in common else a for n, a in arrays.items()}


def checked(arrays: Mapping[str, Any], model: Model, where: str) -> tuple[int, frozenset[str]]:
    """The number of rows, and the names of arrays without a row axis; arrays need no more than a dtype and a shape."""
    variables = {**model.inputs, **model.initial_guesses}
    require_names(arrays, variables, where, "inputs", needed=model.inputs)
    dtype = str(model.dtype).removeprefix("torch.")
    rows: dict[str, int] = {}
    for name, array in arrays.items():
        natural, shape = variables[name].natural_shape, tuple(array.shape)
        if np.dtype(array.dtype) != np.dtype(dtype):
            raise InputTypeError(f"{where}: {name!r} has dtype {array.dtype}, expected {dtype}, as the model has.")
        if shape[1:] == natural and shape != natural:
            rows[name] = shape[0]
        elif shape != natural:
            shown = ", ".join(("rows", *map(str, natural)))
            raise InputError(f"{where}: {name!r} has shape {shape}, expected ({shown}), or {natural} for all rows.")
    if len(set(rows.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in rows.items())
        raise InputError(f"{where}: the arrays differ in their number of rows: {listed}.")
    count = next(iter(rows.values()), 0)
    if not count:
        raise InputError(f"{where}: there are no rows. Give at least one input with the shape (rows, *base).")
    return count, frozenset(arrays) - frozenset(rows)


def import_zarr() -> Any:
    """The package zarr, which is in no extra that is always there."""
    try:
        import zarr
    except ImportError:
        raise AOTIError("Zarr groups need zarr, which is not installed: pip install zarr.") from None
    return zarr
