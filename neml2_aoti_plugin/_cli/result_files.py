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
from dataclasses import dataclass
from io import StringIO
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .._files import read_plain, require_plain
from .._tensor_files import MOST_BYTES, Header, read_tensors
from ..errors import InputError
from .output import first_line, missing, require_ending
from .results import (
    BASE_SHAPES,
    DIMS,
    MANDEL,
    POINT,
    STEP,
    TYPES,
    Result,
    RunResult,
    at_site,
    base_shape,
    collect,
    column_of,
    dimensions,
    has_points,
    parts,
    table_of,
    to_array,
    with_names,
    without_points,
)
from .target import lag

if TYPE_CHECKING:
    from .results import Array

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
    return {".pt": _read_pt, ".npz": _read_npz, ".csv": _read_csv, ".nc": _read_nc}[path.suffix.lower()](path)


# -- .pt ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """What the axes of a variable are, `(*batch, *sub_batch, *base)`: its type and the number of sub-batch axes."""

    type: str
    sites: int = 0


def layouts(shapes: Mapping[str, Shape], outputs: Collection[str] = ()) -> list[dict[str, Layout]]:
    """How the variables of a run may be read, from their shapes alone; one reading if these leave no choice.

    For each batch that the tensors may have in common, each is taken as what fits it best. The best are those batches
    with the fewest sub-batch axes and the fewest tensors that have not the whole batch. Six numbers may then still be
    the components of one point, or a scalar at six; several batch axes are taken only where nothing else fits. Outputs
    have the whole batch also where they are single numbers.
    """
    leads = {lead for shape in shapes.values() for kind in BASES if (lead := _lead(shape, kind)) is not None}
    found = []
    for batch in sorted(leads, key=lambda lead: (len(lead), lead)):
        fits = {name: _fit(shape, batch, name in outputs) for name, shape in shapes.items()}
        found.append((sum(cost for cost, _ in fits.values()), batch, {name: fit for name, (_, fit) in fits.items()}))
    least = min((cost for cost, _, _ in found), default=0)
    best = [(batch, read) for cost, batch, read in found if cost == least]
    few = [read for batch, read in best if len(batch) <= max(1, len(best[0][0]))]
    return [read for number, read in enumerate(few) if read not in few[:number]]


def _lead(shape: Shape, kind: str) -> Shape | None:
    """The axes before the base axes of a type; None if the shape has no such base axes."""
    base = BASES[kind]
    lead = len(shape) - len(base)
    return shape[:lead] if lead >= 0 and shape[lead:] == base else None


def _fit(shape: Shape, batch: Shape, output: bool) -> tuple[int, Layout]:
    """What a tensor is beside a batch, and how badly it fits: its sub-batch axes, and one if it lacks the batch."""
    found = []
    for kind in BASES:
        lead = _lead(shape, kind)
        if lead is None:
            continue
        sites = 0 if _broadcasts(lead, batch) else len(lead) - (len(batch) if lead[: len(batch)] == batch else 0)
        # A single number is the same for all points, unless the model gave it.
        says = output or math.prod(shape) > 1
        lacks = says and lead[: len(lead) - sites] != batch
        found.append((sites + lacks, Layout(kind, sites)))
    return min(found, key=lambda fit: fit[0])


def _broadcasts(lead: Shape, batch: Shape) -> bool:
    return len(lead) <= len(batch) and all(a in (1, b) for a, b in zip(lead[::-1], batch[::-1], strict=False))


def _sites_in(shape: Shape, widest: Shape, layout: Layout) -> int:
    """The sub-batch axes of a value at one step: all of the variable, or none where it stands for all sites."""
    base, sites = len(BASES[layout.type]), layout.sites
    own = shape[len(shape) - base - sites : len(shape) - base]
    wanted = widest[len(widest) - base - sites : len(widest) - base]
    return sites if len(own) == sites and all(a in (1, b) for a, b in zip(own, wanted, strict=True)) else 0


def _read_pt(path: Path) -> list[Result]:
    arrays: dict[str, dict[int, Array]] = {}
    steps, states, outputs = 0, set(), set()
    flat = read_tensors(path, WHAT, lambda header: header.claims, finite=False).tensors
    for key, value in flat.items():
        entry = KEY.fullmatch(key)
        if entry is None:
            raise _no_result(path, f"has an entry {key!r}, expected input.<step>.<name> and output.<step>.<name>.")
        side, number, name = entry.groups()
        steps = max(steps, int(number) + 1)
        if lag(name)[1]:
            states.add(lag(name)[0])
            continue
        if side == "output":
            outputs.add(name)
        arrays.setdefault(name, {})[int(number)] = to_array(value)
    if not arrays:
        raise _no_result(path, "holds no variables.")
    if steps > len(flat):
        raise _no_result(path, f"has {steps} steps and {len(flat)} entries, expected some for each step.")
    shapes = {name: max((array.shape for array in by_step.values()), key=len) for name, by_step in arrays.items()}
    try:
        return [
            collect(
                {n: {k: (a, _sites_in(a.shape, shapes[n], read[n])) for k, a in v.items()} for n, v in arrays.items()},
                {name: layout.type for name, layout in read.items()},
                steps,
                states & outputs,
            )
            for read in layouts(shapes, outputs)
        ]
    except ValueError as error:
        raise _no_result(path, str(error)) from None


# -- .npz and netCDF ---------------------------------------------------------------------------------------------------


def _write_npz(path: Path, result: Result) -> None:
    dims, coords = dimensions(result)
    notes = {TYPES: np.array(json.dumps(result.types)), DIMS: np.array(json.dumps(dims))}
    # numpy.savez takes the names as keywords, of which it has some itself.
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        entries = {f"@{dim}": values for dim, values in coords.items()} | without_points(result, dims) | notes
        for name, values in entries.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, values, allow_pickle=False)


def _read_npz(path: Path) -> list[Result]:
    types: dict[str, str] = {}
    dims: dict[str, list[str]] = {}

    def check(header: Header) -> Iterable[str]:
        for name, found in ((TYPES, types), (DIMS, dims)):
            if name not in header.notes:
                raise _no_result(path, f"it has no entry {name!r}.")
            found.update(json.loads(header.notes[name]))
        return types

    found = read_tensors(path, WHAT, check, finite=False).tensors
    return [_with_points(path, {name: to_array(values) for name, values in found.items()}, dims, types)]


def _with_points(
    path: Path, found: Mapping[str, Array], dims: Mapping[str, Collection[str]], types: dict[str, str]
) -> Result:
    """The result of values by variable; see `without_points`."""
    for name, values in found.items():
        shape, base, axes = values.shape, base_shape(types[name]), tuple(dims.get(name, ()))
        if len(shape) != len(axes) or shape[len(shape) - len(base) :] != base or len(shape) <= len(base):
            raise _no_result(path, f"{name!r} has shape {shape}, expected {axes}, at the end {base} of {types[name]}.")
    series = {name: x if has_points(dims[name]) else x[:, None] for name, x in found.items()}
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


def _read_nc(path: Path) -> list[Result]:
    xarray = _xarray(path)
    require_plain(path, WHAT)
    try:
        dataset = xarray.load_dataset(path)
        found = {str(x.attrs["long_name"]): x for x in dataset.variables.values() if "type" in x.attrs}
        types = {name: str(x.attrs["type"]) for name, x in found.items()}
        series = {name: np.asarray(x.values, dtype=np.float64) for name, x in found.items()}
        series = {name: x * MANDEL if types[name] == "SR2" else x for name, x in series.items()}
    except Exception as error:
        # xarray, and what it reads by, raise errors of a dozen types.
        raise _no_result(path, first_line(error)) from None
    return [_with_points(path, series, {name: x.dims for name, x in found.items()}, types)]


# -- .csv --------------------------------------------------------------------------------------------------------------


def _write_csv(path: Path, result: Result) -> None:
    table = table_of(result)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(table)
        writer.writerows(zip(*(map(repr, values.tolist()) for values in table.values()), strict=True))


def _read_csv(path: Path) -> list[Result]:
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
    found: dict[str, dict[Shape, dict[str, Array]]] = {}
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
        raise _no_result(path, f"its table cannot be read ({error}).") from None


def _stacked(found: Mapping[str, Mapping[Shape, Mapping[str, Array]]], steps: int, points: int) -> Result:
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


def _no_result(path: Path, why: str) -> InputError:
    return InputError(f"{path}: is not {WHAT}: {why}")
