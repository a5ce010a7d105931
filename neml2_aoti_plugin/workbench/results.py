"""Results of a driver's run: series over its steps, written to and read from .pt, .npz and .csv files.

Symmetric tensors are in Mandel notation, `xx yy zz yz xz xy` with the last three times the square root of 2, in .pt and
.npz files as in neml2; a .csv file has tensor components.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError
from ..files import draft
from .names import lag

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

FORMATS = (".pt", ".npz", ".csv")
# The entry of a .npz file that tells the types, as JSON.
TYPES = "__types__"
BASE_SHAPES: dict[str, tuple[int, ...]] = {"SR2": (6,), "R2": (3, 3), "Vec": (3,), "SSR4": (6, 6), "Scalar": ()}
SAME_SHAPE = {"WR2": "Vec", "MRP": "Vec", "MillerIndex": "Vec"}
COMPONENTS = {
    "SR2": ("xx", "yy", "zz", "yz", "xz", "xy"),
    "Vec": ("x", "y", "z"),
    "R2": ("xx", "xy", "xz", "yx", "yy", "yz", "zx", "zy", "zz"),
}
MANDEL = np.array([1.0, 1.0, 1.0, *(math.sqrt(2.0),) * 3])
WHAT = "a result (neml2-aoti run --out, neml2-run with save_as)"


@dataclass(frozen=True)
class Result:
    """The variables of a run.

    Args:
        series: by name, `(steps, rows, *base)`; NaN where a step has no value.
        types: neml2's names of the types, by name of variable.
    """

    series: dict[str, Array]
    types: dict[str, str]

    @property
    def steps(self) -> int:
        """Number of steps, the first one included."""
        return next((len(values) for values in self.series.values()), 0)

    @property
    def rows(self) -> int:
        """Number of points; sub-batch axes count as points."""
        return max((values.shape[1] for values in self.series.values()), default=0)


def from_steps(flat: Mapping[str, Any], types: Mapping[str, str]) -> Result:
    """Series from what a driver returns.

    Args:
        flat: tensors by `input.<step>.<name>` and `output.<step>.<name>`.
        types: names of types, as far as they are known; the others are told by their shapes.

    Raises:
        InputError: the keys are others.
    """
    by_name: dict[str, dict[int, Array]] = {}
    steps = 0
    outputs, lagged = set(), set()
    for key, value in flat.items():
        side, _, rest = key.partition(".")
        number, _, name = rest.partition(".")
        if side not in ("input", "output") or not number.isdigit() or not name:
            raise InputError(f"has an entry {key!r}, expected input.<step>.<name> and output.<step>.<name>.")
        steps = max(steps, int(number) + 1)
        if lag(name)[1]:
            lagged.add(lag(name)[0])
            continue
        if side == "output":
            outputs.add(name)
        by_name.setdefault(name, {})[int(number)] = np.asarray(value.detach().cpu().numpy(), dtype=np.float64)
    told = guessed_types({name: list(values.values()) for name, values in by_name.items()}) | dict(types)
    series = {}
    for name, values in by_name.items():
        # A driver starts from zero state where no initial condition is given.
        start = 0.0 if name in outputs and name in lagged else math.nan
        series[name] = _series(values, steps, base_shape(told[name]), start)
    return Result(series, {name: told[name] for name in series})


def guessed_types(found: Mapping[str, Iterable[Array]]) -> dict[str, str]:
    """Types from shapes `(*batch, *base)`, where nothing tells them.

    A last axis of 6 is a symmetric tensor, of 3 a vector; but if other variables show that there is a batch, an array
    of that many axes is a batch of scalars.
    """
    ranks = {name: max(array.ndim for array in arrays) for name, arrays in found.items()}
    shapes = {name: max((array.shape for array in arrays), key=len) for name, arrays in found.items()}
    batch = max((ranks[n] - 1 for n, shape in shapes.items() if len(shape) > 1 and shape[-1] == 6), default=0)
    told = {}
    for name, shape in shapes.items():
        if len(shape) <= batch or not shape:
            told[name] = "Scalar"
        elif shape[-2:] == (3, 3):
            told[name] = "R2"
        else:
            told[name] = {6: "SR2", 3: "Vec"}.get(shape[-1], "Scalar")
    return told


def base_shape(kind: str) -> tuple[int, ...]:
    """Base shape of a type; that of a scalar for one that is not known."""
    return BASE_SHAPES.get(SAME_SHAPE.get(kind, kind), ())


def require_format(path: Path) -> None:
    """Refuse a file name whose ending names no format.

    Raises:
        InputError: so it is.
    """
    if path.suffix not in FORMATS:
        raise InputError(f"{path}: ends with {path.suffix!r}, expected one of {', '.join(FORMATS)}.")


def write_result(path: Path, result: Result, flat: Mapping[str, Any]) -> None:
    """Write a result; into a path that the caller has made with `draft`.

    Args:
        path: of the file; its ending says which format.
        result: the series.
        flat: what the driver returned; a .pt file holds that, as neml2's own does.
    """
    if path.suffix == ".pt":
        import torch

        torch.save({key: value.detach().clone() for key, value in flat.items()}, path)
    elif path.suffix == ".npz":
        arrays: dict[str, Any] = {**result.series, TYPES: np.array(json.dumps(result.types))}
        with path.open("wb") as file:
            np.savez_compressed(file, **arrays)
    else:
        _write_csv(path, result)


def save_result(path: Path, result: Result, flat: Mapping[str, Any]) -> None:
    """Write a result whole or not at all; see `write_result`."""
    require_format(path)
    with draft(path) as scratch:
        write_result(scratch, result, flat)


def read_result(path: Path) -> Result:
    """Read a result.

    Raises:
        InputError: there is no such file, or it is something else.
    """
    require_format(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file. Give {WHAT}.")
    try:
        return {".pt": _read_pt, ".npz": _read_npz, ".csv": _read_csv}[path.suffix](path)
    except InputError as error:
        raise InputError(f"{path}: is not {WHAT}: {error}") from None
    except Exception as error:
        # What torch, numpy and zipfile raise for files of another kind is of many types; torch says how to run them.
        raise InputError(f"{path}: is not {WHAT} ({type(error).__name__} as it was read).") from None


def _series(values: Mapping[int, Array], steps: int, base: tuple[int, ...], start: float) -> Array:
    """One array over all steps, its batch axes folded onto one."""
    batch = np.broadcast_shapes(*(array.shape[: array.ndim - len(base)] for array in values.values()))
    found = np.full((steps, *batch, *base), math.nan)
    for step, array in values.items():
        found[step] = array
    if 0 not in values:
        found[0] = start
    return found.reshape(steps, -1, *base)


def _read_pt(path: Path) -> Result:
    import torch

    flat = torch.load(path, weights_only=True, map_location="cpu")
    if not isinstance(flat, dict) or not flat:
        raise InputError("it holds no dict of tensors.")
    return from_steps(flat, {})


def _read_npz(path: Path) -> Result:
    with np.load(path, allow_pickle=False) as file:
        if TYPES not in file.files:
            raise InputError(f"it has no entry {TYPES!r}.")
        types = {str(name): str(kind) for name, kind in json.loads(str(file[TYPES])).items()}
        return Result({name: np.asarray(file[name], dtype=np.float64) for name in types}, types)


def columns(result: Result) -> dict[str, Array]:
    """Tensor components of all variables by name, such as `stress.xy`, each `(steps, rows)`."""
    found: dict[str, Array] = {}
    for name, values in result.series.items():
        kind = result.types[name]
        if not base_shape(kind):
            found[name] = values.reshape(*values.shape[:2], -1)[:, :, 0]
            continue
        flat = values.reshape(*values.shape[:2], -1)
        if kind == "SR2":
            flat = flat / MANDEL
        labels = COMPONENTS.get(SAME_SHAPE.get(kind, kind)) or tuple(map(str, range(flat.shape[-1])))
        found |= {f"{name}.{label}": flat[:, :, i] for i, label in enumerate(labels)}
    return found


def _write_csv(path: Path, result: Result) -> None:
    wide = {name: np.broadcast_to(v, (result.steps, result.rows)) for name, v in columns(result).items()}
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "row", *wide])
        for step in range(result.steps):
            for row in range(result.rows):
                writer.writerow([step, row, *(repr(float(values[step, row])) for values in wide.values())])


def _read_csv(path: Path) -> Result:
    with path.open(newline="", encoding="utf-8") as file:
        head, *lines = list(csv.reader(file))
    if head[:2] != ["step", "row"] or not lines:
        raise InputError("its first columns are not step and row.")
    table = np.array(lines, dtype=np.float64)
    steps, rows = int(table[:, 0].max()) + 1, int(table[:, 1].max()) + 1
    wide = {name: table[:, i].reshape(steps, rows) for i, name in enumerate(head) if i > 1}
    series, types = {}, {}
    for name in dict.fromkeys(name.partition(".")[0] if _component(name, wide) else name for name in wide):
        kind = next((k for k in ("SR2", "R2", "Vec") if all(f"{name}.{c}" in wide for c in COMPONENTS[k])), "Scalar")
        if kind == "Scalar":
            series[name] = wide[name]
        else:
            stacked = np.stack([wide[f"{name}.{label}"] for label in COMPONENTS[kind]], -1)
            series[name] = stacked * MANDEL if kind == "SR2" else stacked.reshape(steps, rows, *BASE_SHAPES[kind])
        types[name] = kind
    return Result(series, types)


def _component(name: str, wide: Mapping[str, Array]) -> bool:
    """Whether a column is a component of a tensor, and not a scalar with a dot in its name."""
    stem, _, label = name.rpartition(".")
    return any(label in labels and all(f"{stem}.{c}" in wide for c in labels) for labels in COMPONENTS.values())
