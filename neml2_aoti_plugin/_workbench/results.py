"""Results of a driver's run: series over its steps, and their components by name."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import numpy as np

from ..errors import InputError, UnknownNameError
from .names import lag
from .shapes import BASES, Layout, layouts

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]
    # By name and step, each with its number of sub-batch axes.
    Values = dict[str, dict[int, tuple[Array, int]]]

# Names of ours, which no variable has; the types are the entry of a .npz file that tells them, as JSON.
TIME, STEP, POINT, TYPES = "@time", "@step", "@point", "@types"
BASE_SHAPES: dict[str, tuple[int, ...]] = {
    **{"Scalar": (), "SR2": (6,), "R2": (3, 3), "SSR4": (6, 6), "Quaternion": (4,)},
    **dict.fromkeys(("Vec", "WR2", "MRP", "MillerIndex"), (3,)),
}
COMPONENTS: dict[tuple[int, ...], tuple[str, ...]] = {
    (): ("",),
    (6,): ("xx", "yy", "zz", "yz", "xz", "xy"),
    (3,): ("x", "y", "z"),
    (3, 3): ("xx", "xy", "xz", "yx", "yy", "yz", "zx", "zy", "zz"),
    (6, 6): tuple(map(str, range(36))),
    (4,): tuple(map(str, range(4))),
}
MANDEL = np.array([1.0, 1.0, 1.0, *(math.sqrt(2.0),) * 3])
# The names of tensors in what a driver saves.
KEY = re.compile(r"(input|output)\.(\d+)\.(.+)", re.ASCII | re.DOTALL)
# A variable, one of its sites, and a part of it, such as `stress[2].xy`.
_COLUMN = re.compile(r"(?P<name>[^.\[\]]+)(?P<site>(?:\[\d+\])*)(?:\.(?P<part>\w+))?", re.ASCII)


@dataclass(frozen=True)
class Result:
    """The variables of a run.

    Args:
        series: by name, `(steps, points, *sub_batch, *base)`; NaN where a step has no value. What is the same for all
            points has one.
        types: neml2's names of the types, by name of variable.
    """

    series: dict[str, Array]
    types: dict[str, str]

    @property
    def steps(self) -> int:
        """Number of steps, the first one included."""
        return next((len(values) for values in self.series.values()), 0)

    @property
    def points(self) -> int:
        """Number of points."""
        # What is the same for all points has one, also where there are none.
        return max((values.shape[1] for values in self.series.values() if values.shape[1] != 1), default=1)

    def sub_batch(self, name: str) -> tuple[int, ...]:
        """The sub-batch shape of a variable."""
        shape = self.series[name].shape
        return shape[2 : len(shape) - len(base_shape(self.types[name]))]


@dataclass(frozen=True)
class Column:
    """What the name of a column says, such as `branch_stress[2].xy`.

    Args:
        name: of the variable.
        site: one site of its sub-batch; empty for all, or where it has none.
        part: a component or an invariant; empty for a scalar.
    """

    name: str
    site: tuple[int, ...] = ()
    part: str = ""

    def __str__(self) -> str:
        # What would be read as the next part of the name is percent-encoded.
        name = re.sub(r"[.\[\]%]", lambda found: f"%{ord(found[0]):02X}", self.name)
        return name + "".join(f"[{index}]" for index in self.site) + (f".{self.part}" if self.part else "")


def column_of(text: str) -> Column:
    """Read the name of a column.

    Raises:
        UnknownNameError: it is none.
    """
    found = _COLUMN.fullmatch(text)
    if found is None:
        raise UnknownNameError(f"{text!r} is not the name of a variable, NAME, NAME.PART or NAME[SITE].PART.")
    site = tuple(int(index) for index in re.findall(r"\d+", found["site"]))
    return Column(unquote(found["name"]), site, found["part"] or "")


def from_driver(driver: Any) -> Result:
    """The result of a transient driver that has run."""
    values: Values = {}
    types: dict[str, str] = {}
    states = set()
    for side in (driver.result_in, driver.result_out):
        for step, found in enumerate(side):
            for name, value in found.items():
                if lag(name)[1]:
                    states.add(lag(name)[0])
                    continue
                types[name] = type(value).__name__
                values.setdefault(name, {})[step] = (to_array(value.data), value.sub_batch_ndim)
    outputs = {name for found in driver.result_out for name in found}
    # A driver records the time only where the model takes it.
    values = {TIME: {step: (to_array(at), 0) for step, at in enumerate(driver.prescribed_time.data)}, **values}
    return _result(values, {TIME: "Scalar", **types}, driver.nsteps, states & outputs)


def from_tensors(flat: Mapping[str, Any]) -> list[Result]:
    """The result that a driver has saved, which tells no types: as its shapes can be read, see `layouts`.

    Args:
        flat: tensors by `input.<step>.<name>` and `output.<step>.<name>`.

    Raises:
        InputError: the keys are others.
    """
    arrays: dict[str, dict[int, Array]] = {}
    steps, states, outputs = 0, set(), set()
    for key, value in flat.items():
        entry = KEY.fullmatch(key)
        if entry is None:
            raise InputError(f"has an entry {key!r}, expected input.<step>.<name> and output.<step>.<name>.")
        side, number, name = entry.groups()
        steps = max(steps, int(number) + 1)
        if lag(name)[1]:
            states.add(lag(name)[0])
            continue
        if side == "output":
            outputs.add(name)
        arrays.setdefault(name, {})[int(number)] = to_array(value)
    if not arrays:
        raise InputError("holds no variables.")
    if steps > len(flat):
        raise InputError(f"has {steps} steps and {len(flat)} entries, expected some for each step.")
    shapes = {name: max((array.shape for array in by_step.values()), key=len) for name, by_step in arrays.items()}
    return [
        _result(
            {n: {k: (a, _sites_in(a.shape, shapes[n], read[n])) for k, a in v.items()} for n, v in arrays.items()},
            {name: layout.type for name, layout in read.items()},
            steps,
            states & outputs,
        )
        for read in layouts(shapes, outputs)
    ]


def base_shape(kind: str) -> tuple[int, ...]:
    """Base shape of a type; that of a scalar for one that is not known."""
    return BASE_SHAPES.get(kind, ())


def parts(kind: str) -> tuple[str, ...]:
    """What the components of a type are called; an empty name for a scalar."""
    return COMPONENTS[base_shape(kind)]


def component(values: Array, kind: str, part: str) -> Array:
    """A component of a tensor without the factors of Mandel's notation.

    Args:
        values: `(..., *base)`.
        kind: its type.
        part: one of `parts`.
    """
    base = base_shape(kind)
    index = parts(kind).index(part)
    found = values.reshape((*values.shape[: values.ndim - len(base)], math.prod(base)))[..., index]
    return found / MANDEL[index] if kind == "SR2" else found


def at_site(values: Array, site: tuple[int, ...]) -> Array:
    """Values `(steps, points, *sub_batch, ...)` at one site, as a view."""
    index: tuple[Any, ...] = (slice(None), slice(None), *site)
    found: Array = values[index]
    return found


def columns(result: Result) -> dict[str, Array]:
    """The components of all variables at all sites by name, such as `stress[2].xy`, each `(steps, points)`."""
    return {
        str(Column(name, site, part)): at_site(component(values, result.types[name], part), site)
        for name, values in result.series.items()
        for site in np.ndindex(result.sub_batch(name))
        for part in parts(result.types[name])
    }


def to_array(value: Any) -> Array:
    """A tensor as an array of numbers in double precision."""
    return np.asarray(value.detach().cpu().numpy(), dtype=np.float64)


def _sites_in(shape: tuple[int, ...], widest: tuple[int, ...], layout: Layout) -> int:
    """The sub-batch axes of a value at one step: all of the variable, or none where it stands for all sites."""
    base, sites = len(BASES[layout.type]), layout.sites
    own = shape[len(shape) - base - sites : len(shape) - base]
    wanted = widest[len(widest) - base - sites : len(widest) - base]
    return sites if len(own) == sites and all(a in (1, b) for a, b in zip(own, wanted, strict=True)) else 0


def _result(values: Values, types: dict[str, str], steps: int, states: Collection[str]) -> Result:
    """Series of values `(*batch, *sub_batch, *base)`."""
    inner: dict[str, int] = {}
    wide: dict[str, dict[int, Array]] = {}
    for name, by_step in values.items():
        base = len(base_shape(types[name]))
        sites = max(own for _, own in by_step.values())
        inner[name] = sites + base
        wide[name] = {step: _with_sites(array, own, sites, base) for step, (array, own) in by_step.items()}
    batch = np.broadcast_shapes(*(a.shape[: a.ndim - inner[name]] for name, v in wide.items() for a in v.values()))
    # A driver starts from zero state where no initial condition is given.
    series = {
        name: _series(by_step, steps, batch, inner[name], 0.0 if name in states else math.nan)
        for name, by_step in wide.items()
    }
    return Result(series, {name: types[name] for name in series})


def _with_sites(array: Array, own: int, sites: int, base: int) -> Array:
    """A value with as many sub-batch axes as the variable has at other steps."""
    at = array.ndim - base - own
    return array.reshape((*array.shape[:at], *(1,) * (sites - own), *array.shape[at:]))


def _series(values: Mapping[int, Array], steps: int, batch: tuple[int, ...], inner: int, start: float) -> Array:
    """One array over all steps, its batch axes folded onto one; of one point if the value is the same for all."""
    lead = np.broadcast_shapes(*(array.shape[: array.ndim - inner] for array in values.values()))
    lead = lead if math.prod(lead) == 1 else batch
    shape = np.broadcast_shapes(*(array.shape[array.ndim - inner :] for array in values.values()))
    found = np.full((steps, *lead, *shape), math.nan)
    for step, array in values.items():
        found[step] = array
    if 0 not in values:
        found[0] = start
    return found.reshape((steps, math.prod(lead), *shape))
