"""Results of runs in files: .pt as neml2 writes it, .npz and .csv.

Symmetric tensors are in Mandel notation, `xx yy zz yz xz xy` with the last three times the square root of 2, in .pt and
.npz files as in neml2; a .csv file has tensor components.
"""

from __future__ import annotations

import csv
import json
import math
import zipfile
from collections.abc import Iterable, Mapping
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .._files import read_plain
from .._tensor_files import MOST_BYTES, Header, read_tensors
from ..errors import InputError
from .results import (
    BASE_SHAPES,
    MANDEL,
    POINT,
    STEP,
    TYPES,
    Result,
    at_site,
    base_shape,
    column_of,
    columns,
    from_driver,
    from_tensors,
    parts,
    to_array,
)

if TYPE_CHECKING:
    from .results import Array

FORMATS = (".pt", ".npz", ".csv")
WHAT = "a result (neml2-aoti run --out, neml2-run with save_as)"


def require_format(path: Path) -> None:
    """Refuse a file name whose ending names no format.

    Raises:
        InputError: so it is.
    """
    if path.suffix not in FORMATS:
        raise InputError(f"{path}: ends with {path.suffix!r}, expected one of {', '.join(FORMATS)}.")


def write_result(path: Path, driver: Any) -> None:
    """Write the result of a transient driver that has run; into a path that the caller has made with `draft`.

    Args:
        path: of the file; its ending says which format. A .pt file is as neml2 writes it.
        driver: that has run.
    """
    if path.suffix == ".npz":
        _write_npz(path, from_driver(driver))
    elif path.suffix == ".csv":
        _write_csv(path, from_driver(driver))
    else:
        import torch

        torch.save({key: value.detach().clone() for key, value in driver.result().items()}, path)


def read_result(path: Path) -> list[Result]:
    """Read a result.

    Returns:
        What the file holds; several readings of a .pt file, which tells no types, where its shapes allow them.

    Raises:
        InputError: there is no such file, or it is something else.
    """
    require_format(path)
    return {".pt": _read_pt, ".npz": _read_npz, ".csv": _read_csv}[path.suffix](path)


def _read_pt(path: Path) -> list[Result]:
    flat = read_tensors(path, WHAT, lambda header: header.claims, finite=False).tensors
    try:
        return from_tensors(flat)
    except ValueError as error:
        raise InputError(f"{path}: is not {WHAT}: {error}") from None


def _write_npz(path: Path, result: Result) -> None:
    # numpy.savez takes the names as keywords, of which it has some itself.
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, values in {**result.series, TYPES: np.array(json.dumps(result.types))}.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, values, allow_pickle=False)


def _read_npz(path: Path) -> list[Result]:
    types: dict[str, str] = {}

    def check(header: Header) -> Iterable[str]:
        if TYPES not in header.notes:
            raise InputError(f"{path}: is not {WHAT}: it has no entry {TYPES!r}.")
        types.update({str(name): str(kind) for name, kind in json.loads(header.notes[TYPES]).items()})
        for name, kind in types.items():
            shape, base = header.claims[name].shape, base_shape(kind)
            if len(shape) < 2 + len(base) or shape[len(shape) - len(base) :] != base:
                raise InputError(
                    f"{path}: {name!r} has shape {shape}, expected (steps, points, *sub_batch, *base) with the base "
                    f"shape {base} of {kind}."
                )
        return types

    found = read_tensors(path, WHAT, check, finite=False).tensors
    if len({len(values) for values in found.values()}) != 1:
        raise InputError(f"{path}: is not {WHAT}: its variables have different numbers of steps, or there are none.")
    return [Result({name: to_array(values) for name, values in found.items()}, types)]


def _write_csv(path: Path, result: Result) -> None:
    wide = {name: np.broadcast_to(v, (result.steps, result.points)) for name, v in columns(result).items()}
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([STEP, POINT, *wide])
        for step in range(result.steps):
            for point in range(result.points):
                writer.writerow([step, point, *(repr(float(values[step, point])) for values in wide.values())])


def _read_csv(path: Path) -> list[Result]:
    text = _text(path)
    try:
        head, *lines = csv.reader(StringIO(text, newline=""))
    except (csv.Error, ValueError) as error:
        raise InputError(f"{path}: is not {WHAT}: {error} ({type(error).__name__}).") from None
    if head[:2] != [STEP, POINT]:
        raise InputError(f"{path}: is not {WHAT}: its first columns are not {STEP} and {POINT}.")
    if not lines:
        raise InputError(f"{path}: has no points, so that there is nothing to draw.")
    found: dict[str, dict[tuple[int, ...], dict[str, Array]]] = {}
    try:
        table = np.array(lines, dtype=np.float64)
        steps, points = int(table[-1, 0]) + 1, int(table[-1, 1]) + 1
        if not np.array_equal(table[:, :2], list(np.ndindex(steps, points))):
            raise ValueError("steps and points are not all there, in order")
        for index, name in enumerate(head[2:], 2):
            column = column_of(name)
            values = table[:, index].reshape(steps, points)
            found.setdefault(column.name, {}).setdefault(column.site, {})[column.part] = values
        return [_stacked(found, steps, points)]
    except (ValueError, LookupError, ArithmeticError) as error:
        raise InputError(f"{path}: is not {WHAT}: its table cannot be read ({error}).") from None


def _stacked(found: Mapping[str, Mapping[tuple[int, ...], Mapping[str, Array]]], steps: int, points: int) -> Result:
    """Columns by variable, site and part, each `(steps, points)`, as a result."""
    kinds = {parts(kind): kind for kind in reversed(BASE_SHAPES)}
    series, types = {}, {}
    for name, sites in found.items():
        labels = tuple(next(iter(sites.values())))
        types[name] = kinds[labels]
        shape = tuple(max(axis) + 1 for axis in zip(*sites, strict=True))
        if math.prod(shape) != len(sites):
            raise ValueError(f"{name!r} has not all of its sites")
        values = np.full((steps, points, *shape, len(labels)), math.nan)
        for site, of_site in sites.items():
            at_site(values, site)[...] = np.stack([of_site[label] for label in labels], -1)
        values = values * MANDEL if types[name] == "SR2" else values
        series[name] = values.reshape((steps, points, *shape, *base_shape(types[name])))
    return Result(series, types)


def _text(path: Path) -> str:
    try:
        return read_plain(path, WHAT, MOST_BYTES).decode()
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not {WHAT}: it is no text in UTF-8.") from None
