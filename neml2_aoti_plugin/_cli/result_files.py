"""Results of runs in files: .pt as neml2 writes it, .npz, .csv and netCDF.

Symmetric tensors are in Mandel notation, `xx yy zz yz xz xy` with the last three times the square root of 2, in .pt and
.npz files as in neml2; others have tensor components. A .pt file records no types: its shapes are read.
"""

from __future__ import annotations

import csv
import json
import math
import re
import zipfile
from collections.abc import Collection, Iterable, Mapping
from io import StringIO
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .._files import read_plain, require_plain
from .._tensor_files import MOST_BYTES, Header, read_tensors
from ..errors import InputError
from .output import in_one_line, missing, require_ending
from .results import (
    BASE_SHAPES,
    DIMS,
    MANDEL,
    POINT,
    STEP,
    TYPES,
    Array,
    Result,
    RunResult,
    base_shape,
    by_name,
    collect,
    column_of,
    dimensions,
    parts,
    table_of,
    to_array,
    with_names,
)

Shape = tuple[int, ...]

FORMATS = (".pt", ".npz", ".csv", ".nc")
WHAT = "a result (neml2-aoti run --out, neml2-run with save_as)"
# The names of tensors in what a driver saves.
KEY = re.compile(r"(input|output)\.(\d+)\.(.+)", re.ASCII | re.DOTALL)
# The types that shapes distinguish; a last axis of any other size is no base axis.
BASES: dict[str, Shape] = {kind: BASE_SHAPES[kind] for kind in ("Scalar", "SR2", "Vec", "R2")}


def require_format(path: Path) -> None:
    """Refuse a file name whose ending names no format, or one that takes a package that is not installed."""
    require_ending(path, FORMATS)
    if path.suffix.lower() == ".nc":
        _xarray(path)


def write_result(path: Path, driver: Any, result: Result) -> None:
    """Write what a transient driver gave, in the format of the path's ending; see `_files.draft`."""
    if path.suffix.lower() == ".pt":
        import torch

        torch.save({key: value.detach().clone() for key, value in driver.result().items()}, path)
    else:
        {".npz": _write_npz, ".csv": _write_csv, ".nc": _write_nc}[path.suffix.lower()](path, result)


def read_result(path: str | PathLike[str]) -> RunResult:
    """Read what `neml2-aoti run --out` has written.

    Args:
        path: A `.npz`, `.csv` or `.nc` file (netCDF, which takes xarray and SciPy: `pip install
            'neml2-aoti-plugin[netcdf]'`); a `.pt` file, which records no types, where its shapes leave no choice.

    Returns:
        The variables, their coordinates, and a table of them.

    Raises:
        InputError: If the file cannot be read, is no result, or may be read in several ways.
    """
    readings = read_readings(Path(path))
    if len(readings) > 1:
        raise InputError(
            f"{path}: records no types, and its shapes may be read in several ways. Read a .npz, .csv or .nc file."
        )
    return with_names(readings[0])


def read_readings(path: Path) -> list[Result]:
    """Read a result; gives several readings of a .pt file, where its shapes allow them."""
    require_format(path)
    if path.suffix.lower() == ".pt":
        return _read_pt(path)
    return [{".npz": _read_npz, ".csv": _read_csv, ".nc": _read_nc}[path.suffix.lower()](path)]


def _no_result(path: Path, why: str) -> InputError:
    return InputError(f"{path}: is not {WHAT}: {why}")


# -- .pt ---------------------------------------------------------------------------------------------------------------


class FileLayout(NamedTuple):
    """What the axes of a variable are, `(*batch, *sub_batch, *base)`: its type and the number of sub-batch axes."""

    type: str
    sites: int


def layouts(shapes: Mapping[str, Shape], outputs: Collection[str] = ()) -> list[dict[str, FileLayout]]:
    """How the variables of a run may be read, from their shapes alone; one reading if these leave no choice.

    For each batch that the tensors may have in common, each is taken as what fits it best. The best are those batches
    with the fewest sub-batch axes and the fewest tensors that have not the whole batch. Six numbers may then still be
    the components of one point, or a scalar at six; several batch axes are taken only where nothing else fits. Outputs
    have the whole batch also where they are single numbers.
    """
    leads = {lead for shape in shapes.values() for lead in _leads(shape).values()}
    found = []
    for batch in sorted(leads, key=lambda lead: (len(lead), lead)):
        fits = {name: _fit(shape, batch, name in outputs) for name, shape in shapes.items()}
        found.append((sum(cost for cost, _ in fits.values()), batch, {name: fit for name, (_, fit) in fits.items()}))
    least = min((cost for cost, _, _ in found), default=0)
    best = [(batch, read) for cost, batch, read in found if cost == least]
    few = [read for batch, read in best if len(batch) <= max(1, len(best[0][0]))]
    return [read for number, read in enumerate(few) if read not in few[:number]]


def _leads(shape: Shape) -> dict[str, Shape]:
    """The axes before the base axes, by each type that the shape may be of."""
    ends = {kind: len(shape) - len(base) for kind, base in BASES.items()}
    return {kind: shape[:end] for kind, end in ends.items() if end >= 0 and shape[end:] == BASES[kind]}


def _fit(shape: Shape, batch: Shape, output: bool) -> tuple[int, FileLayout]:
    """How badly a tensor fits a batch, and what it is then: its sub-batch axes, and one if it lacks the batch."""
    found = []
    for kind, lead in _leads(shape).items():
        sites = 0 if _broadcasts(lead, batch) else len(lead) - (len(batch) if lead[: len(batch)] == batch else 0)
        # A single number is the same for all points, unless the model gave it.
        says = output or math.prod(shape) > 1
        lacks = says and lead[: len(lead) - sites] != batch
        found.append((sites + lacks, FileLayout(kind, sites)))
    return min(found, key=lambda fit: fit[0])


def _broadcasts(lead: Shape, batch: Shape) -> bool:
    return len(lead) <= len(batch) and all(a in (1, b) for a, b in zip(lead[::-1], batch[::-1], strict=False))


def _read_pt(path: Path) -> list[Result]:
    entries = []
    for key, value in read_tensors(path, WHAT, lambda header: header.claims, finite=False).items():
        found = KEY.fullmatch(key)
        if found is None:
            raise _no_result(path, f"has an entry {key!r}, expected input.<step>.<name> and output.<step>.<name>.")
        entries.append((found[1], int(found[2]), found[3], to_array(value)))
    arrays, outputs, states = by_name(entries)
    if not arrays:
        raise _no_result(path, "holds no variables.")
    steps = max(step for _, step, _, _ in entries) + 1
    if steps > len(entries):
        raise _no_result(path, f"has {steps} steps and {len(entries)} entries, expected some for each step.")
    widest = {name: max((array.shape for array in by_step.values()), key=len) for name, by_step in arrays.items()}

    def sites(array: Array, name: str, layout: FileLayout) -> int:
        """The sub-batch axes of a value at one step: all of the variable, or none where it stands for all sites."""
        base = len(BASES[layout.type])
        own, wanted = (s[len(s) - base - layout.sites : len(s) - base] for s in (array.shape, widest[name]))
        return layout.sites if len(own) == layout.sites and _broadcasts(own, wanted) else 0

    results = []
    for read in layouts(widest, outputs):
        values = {n: {k: (a, sites(a, n, read[n])) for k, a in by_step.items()} for n, by_step in arrays.items()}
        try:
            results.append(collect(values, {n: layout.type for n, layout in read.items()}, steps, states))
        except ValueError as error:
            raise _no_result(path, str(error)) from None
    return results


# -- .npz and netCDF ---------------------------------------------------------------------------------------------------


def _write_npz(path: Path, result: Result) -> None:
    variables, coords = dimensions(result)
    notes = {TYPES: result.types, DIMS: {name: dims for name, (dims, _) in variables.items()}}
    entries = {f"@{dim}": labels for dim, labels in coords.items()}
    entries |= {name: values for name, (_, values) in variables.items()}
    entries |= {name: np.array(json.dumps(note)) for name, note in notes.items()}
    # numpy.savez takes the names as keywords, of which it has some itself.
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, values in entries.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, values, allow_pickle=False)


def _read_npz(path: Path) -> Result:
    types: dict[str, str] = {}
    dims: dict[str, list[str]] = {}

    def check(header: Header) -> Iterable[str]:
        for name, found in ((TYPES, types), (DIMS, dims)):
            if name not in header.notes:
                raise _no_result(path, f"it has no entry {name!r}.")
            found.update(json.loads(header.notes[name]))
        return types

    found = read_tensors(path, WHAT, check, finite=False)
    return _with_points(path, {name: (dims.get(name, ()), to_array(x)) for name, x in found.items()}, types)


def _with_points(path: Path, found: Mapping[str, tuple[Iterable[Any], Array]], types: dict[str, str]) -> Result:
    """The result of variables with what their axes are called; see `dimensions`."""
    series = {}
    for name, (given, values) in found.items():
        shape, base, dims = values.shape, base_shape(types[name]), tuple(given)
        if len(shape) != len(dims) or shape[len(shape) - len(base) :] != base or len(shape) <= len(base):
            raise _no_result(path, f"{name!r} has shape {shape}, expected {dims}, at the end {base} of {types[name]}.")
        series[name] = values if any(dim.rstrip("_") == POINT[1:] for dim in dims) else values[:, None]
    if len({len(values) for values in series.values()}) != 1:
        raise _no_result(path, "its variables have different numbers of steps, or there are none.")
    return Result(series, types)


def _xarray(path: Path) -> Any:
    """xarray, with SciPy, by which it reads and writes netCDF."""
    try:
        import scipy.io  # noqa: F401
        import xarray
    except ModuleNotFoundError as error:
        raise InputError(f"{path}: {missing(error.name) or error}") from None
    return xarray


def _write_nc(path: Path, result: Result) -> None:
    if not result.points:
        raise InputError("the run has no points, and netCDF has no empty dimensions. Write a .npz file.")
    named = with_names(result)
    attributes = {name: {"long_name": name, "type": kind} for name, kind in result.types.items()}
    arrays = {name: (*variable, attributes[name]) for name, variable in named.variables.items()}
    coords = {dim: ((dim,), values, attributes.get(f"@{dim}", {})) for dim, values in named.coords.items()}
    dataset = _xarray(path).Dataset(arrays, coords)
    plain: dict[str, str] = {}
    for name in (*arrays, *coords):
        # What netCDF takes as a name; the variable's own is its `long_name`.
        taken = re.sub(r"^(?=\W)|[^\w.~+-]", "_", name, flags=re.ASCII)
        while taken in plain.values():
            taken += "_"
        plain[name] = taken
    dataset.rename(plain).to_netcdf(path, engine="scipy")


def _read_nc(path: Path) -> Result:
    xarray = _xarray(path)
    require_plain(path, WHAT)
    found, types = {}, {}
    try:
        for variable in xarray.load_dataset(path).variables.values():
            if "type" in variable.attrs:
                name, kind = (str(variable.attrs[key]) for key in ("long_name", "type"))
                values = np.asarray(variable.values, dtype=np.float64)
                found[name], types[name] = (variable.dims, values * MANDEL if kind == "SR2" else values), kind
    except Exception as error:
        # xarray, and what it reads by, raise errors of a dozen types.
        raise _no_result(path, in_one_line(error)) from None
    return _with_points(path, found, types)


# -- .csv --------------------------------------------------------------------------------------------------------------


def _write_csv(path: Path, result: Result) -> None:
    table = table_of(result)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(table)
        writer.writerows(zip(*(map(repr, values.tolist()) for values in table.values()), strict=True))


def _read_csv(path: Path) -> Result:
    try:
        text = read_plain(path, WHAT, MOST_BYTES).decode()
        head, *lines = csv.reader(StringIO(text, newline=""))
    except InputError:
        raise
    except (csv.Error, ValueError) as error:
        raise _no_result(path, f"{error} ({type(error).__name__}).") from None
    if head[:2] != [STEP, POINT]:
        raise _no_result(path, f"its first columns are not {STEP} and {POINT}.")
    if not lines:
        raise InputError(f"{path}: has no points, so that there is nothing to draw.")
    try:
        return _of_table(head, np.array(lines, dtype=np.float64))
    except (ValueError, LookupError, ArithmeticError) as error:
        raise _no_result(path, f"its table cannot be read ({error}).") from None


def _of_table(head: list[str], table: Array) -> Result:
    """The result of a table with a line for each step and point."""
    steps, points = int(table[-1, 0]) + 1, int(table[-1, 1]) + 1
    if len(table) != steps * points or not np.array_equal(table[:, :2], list(np.ndindex(steps, points))):
        raise ValueError("steps and points are not all there, in order")
    # Where in a line is which part of which site, by variable.
    places: dict[str, dict[tuple[Shape, str], int]] = {}
    for place, text in enumerate(head[2:], 2):
        column = column_of(text)
        places.setdefault(column.name, {})[column.site, column.part] = place
    kinds = {parts(kind): kind for kind in reversed(BASE_SHAPES)}
    series, types = {}, {}
    for name, at in places.items():
        kind = types[name] = kinds[tuple(dict.fromkeys(part for _, part in at))]
        sites = tuple(max(axis) + 1 for axis in zip(*(site for site, _ in at), strict=True))
        order = [at[site, part] for site in np.ndindex(sites) for part in parts(kind)]
        values = table[:, order].reshape((steps, points, *sites, *base_shape(kind)))
        series[name] = values * MANDEL if kind == "SR2" else values
    return Result(series, types)
