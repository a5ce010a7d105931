"""Results of a driver's run: series over its steps, and their components by name."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeVar
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

from ..errors import UnknownNameError
from .target import lag

T = TypeVar("T")
Array = NDArray[np.float64]
# By name and step, `(*batch, *sub_batch, *base)`, each with its number of sub-batch axes.
Collected = dict[str, dict[int, tuple[Array, int]]]

# Names of ours, which no variable has; the last two are entries of a .npz file, as JSON.
TIME, STEP, POINT, TYPES, DIMS = "@time", "@step", "@point", "@types", "@dims"
BASE_SHAPES: dict[str, tuple[int, ...]] = {
    **{"Scalar": (), "SR2": (6,), "R2": (3, 3), "SSR4": (6, 6), "Quaternion": (4,)},
    **dict.fromkeys(("Vec", "WR2", "MRP", "MillerIndex"), (3,)),
}
_TENSOR, _SPACE = ("xx", "yy", "zz", "yz", "xz", "xy"), ("x", "y", "z")
# What the base axes are called, with the coordinates along them.
AXES: dict[tuple[int, ...], dict[str, tuple[str, ...]]] = {
    (): {},
    (6,): {"component": _TENSOR},
    (3,): {"axis": _SPACE},
    (3, 3): {"row": _SPACE, "column": _SPACE},
    (6, 6): {"component": _TENSOR, "by_component": _TENSOR},
    (4,): {"quaternion": tuple(map(str, range(4)))},
}
# Of a symmetric tensor.
INVARIANTS = ("vonmises", "equivalent", "norm", "trace", "mean")
# What the components of a symmetric tensor are multiplied by in neml2's notation.
MANDEL = np.array([1.0, 1.0, 1.0, *(math.sqrt(2.0),) * 3])
# A variable, one of its sites, and a part of it, such as `stress[2].xy`.
_COLUMN = re.compile(r"(?P<name>[^.\[\]]+)(?P<site>(?:\[\d+\])*)(?:\.(?P<part>\w+))?", re.ASCII)


@dataclass(frozen=True)
class Result:
    """The variables of a run by name, `(steps, points, *sub_batch, *base)`, and neml2's names of their types.

    Values are NaN where a step has none. What is the same for all points has one.
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
class RunResult:
    """What a run gave, as arrays with names of their dimensions; `xarray.Dataset(variables, coords)` takes both.

    Attributes:
        variables: The names of its dimensions and the values of each variable: `time`; `point`, but for what is the
            same at all points; `site`, or `site_0`, `site_1`, ... of a sub-batch of several axes; and of a symmetric
            tensor `component`, of a vector `axis`, of another tensor `row` and `column`. Where variables have different
            sites, the dimension begins with the variable's name; where a variable has the name of a dimension, the
            dimension begins with `@`. Components are those of the tensor, without the factors of Mandel's notation;
            tensors of fourth order (`component`, `by_component`) have them. What a step does not have is NaN.
        coords: Along these dimensions: the times, if they are the same at all points (the variable `@time` has them
            otherwise); the numbers of points and sites; the names of components.
        table: Columns of a table with a line for each step and point, those of a .csv file; `pandas.DataFrame(table)`
            takes them.
    """

    variables: dict[str, tuple[tuple[str, ...], Array]]
    coords: dict[str, NDArray[Any]]
    table: dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Column:
    """What the name of a column says, such as `branch_stress[2].xy`."""

    name: str
    site: tuple[int, ...] = ()  # one site of the sub-batch; empty for all, or where there is none
    part: str = ""  # a component or an invariant; empty for a scalar

    def __str__(self) -> str:
        # What would be read as the next part of the name is percent-encoded.
        name = re.sub(r"[.\[\]%]", lambda found: f"%{ord(found[0]):02X}", self.name)
        return name + "".join(f"[{index}]" for index in self.site) + (f".{self.part}" if self.part else "")


def column_of(text: str) -> Column:
    """Read the name of a column."""
    found = _COLUMN.fullmatch(text)
    if found is None:
        raise UnknownNameError(f"{text!r} is not the name of a variable, NAME, NAME.PART or NAME[SITE].PART.")
    site = tuple(int(index) for index in re.findall(r"\d+", found["site"]))
    return Column(unquote(found["name"]), site, found["part"] or "")


def base_shape(kind: str) -> tuple[int, ...]:
    """Base shape of a type; that of a scalar for one that is not known."""
    return BASE_SHAPES.get(kind, ())


def parts(kind: str) -> tuple[str, ...]:
    """What the components of a type are called; an empty name for a scalar."""
    return tuple(map("".join, product(*AXES[base_shape(kind)].values())))


def component(values: Array, kind: str, part: str) -> Array:
    """A component of a tensor `(..., *base)` without the factors of Mandel's notation."""
    base = base_shape(kind)
    index = parts(kind).index(part)
    found = values.reshape((*values.shape[: values.ndim - len(base)], math.prod(base)))[..., index]
    return found / MANDEL[index] if kind == "SR2" else found


def at_site(values: Array, site: tuple[int, ...]) -> Array:
    """Values `(steps, points, *sub_batch, ...)` at one site, as a view."""
    index: tuple[Any, ...] = (slice(None), slice(None), *site)
    found: Array = values[index]
    return found


def table_of(result: Result) -> dict[str, NDArray[Any]]:
    """A line for each step and point, a column for each component at each site, such as `stress[2].xy`."""
    shape = (result.steps, result.points)
    step, point = np.indices(shape)
    found: dict[str, NDArray[Any]] = {STEP: step.ravel(), POINT: point.ravel()}
    for name, values in result.series.items():
        for site in np.ndindex(result.sub_batch(name)):
            for part in parts(result.types[name]):
                column = at_site(component(values, result.types[name], part), site)
                found[str(Column(name, site, part))] = np.broadcast_to(column, shape).ravel()
    return found


def invariant(name: str, values: Array) -> Array:
    """An invariant of a symmetric tensor in Mandel notation, `(..., 6)`."""
    trace: Array = values[..., :3].sum(-1)
    if name in ("trace", "mean"):
        return trace / (3.0 if name == "mean" else 1.0)
    if name != "norm":
        values = values - trace[..., None] / 3.0 * np.array([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    # In Mandel notation a tensor's norm is that of its entries.
    norm: Array = np.linalg.norm(values, axis=-1)
    return norm * {"norm": 1.0, "vonmises": math.sqrt(1.5), "equivalent": math.sqrt(2.0 / 3.0)}[name]


def quantity(result: Result, wanted: str) -> Array:
    """A scalar, a component or an invariant, `(steps, points, *sub_batch)`, or at one site, `(steps, points)`.

    It is called `name`, `name.component` or `name.invariant`, with `[site]` behind the name; `@step` is the number of
    the step.
    """
    if wanted == STEP:
        return np.arange(result.steps, dtype=np.float64)[:, None]
    column = column_of(wanted)
    kind = result.types.get(column.name)
    known = () if kind is None else (*parts(kind), *(INVARIANTS if kind == "SR2" else ()))
    if kind is None or column.part not in known:
        raise UnknownNameError(f"{wanted!r} is not in this result: {_there(result)}.")
    values, sub_batch = result.series[column.name], result.sub_batch(column.name)
    if column.site and column.site not in np.ndindex(sub_batch):
        there = f"sites of shape {list(sub_batch)}" if sub_batch else "no sites"
        raise UnknownNameError(f"{wanted!r} is not in this result: {column.name!r} has {there}.")
    is_invariant = column.part in INVARIANTS
    found = invariant(column.part, values) if is_invariant else component(values, kind, column.part)
    return at_site(found, column.site)


def _there(result: Result) -> str:
    """What a result has, in words."""
    tensors = [str(Column(name)) for name, kind in result.types.items() if kind == "SR2"]
    others = [
        str(Column(name)) + (f".{'|'.join(of)}" if (of := parts(kind)) != ("",) else "")
        for name, kind in result.types.items()
        if kind != "SR2"
    ]
    words = [f"there are {', '.join((*others, STEP))}"]
    if tensors:
        words.append(f"and of {', '.join(tensors)} the parts .{'|'.join((*parts('SR2'), *INVARIANTS))}")
    return "; ".join(words)


def with_names(result: Result) -> RunResult:
    """The arrays of a result, in tensor components, with names and coordinates."""
    variables, coords = dimensions(result)
    for name in [name for name, kind in result.types.items() if kind == "SR2"]:
        dims, values = variables[name]
        variables[name] = (dims, values / MANDEL)
    for dim in [dim for dim in coords if f"@{dim}" in variables]:
        coords[dim] = variables.pop(f"@{dim}")[1]
    return RunResult(variables, coords, table_of(result))


def dimensions(result: Result) -> tuple[dict[str, tuple[tuple[str, ...], Array]], dict[str, NDArray[Any]]]:
    """Each variable with what its axes are called, and coordinates along them; those of the time are the variable.

    What is the same at all points has no axis for them.
    """
    coords: dict[str, NDArray[Any]] = {}

    def dimension(name: str, labels: NDArray[Any]) -> str:
        while name in result.series:
            name += "_"
        coords[name] = labels
        return name

    point, variables = dimension(POINT[1:], np.arange(result.points)), {}
    time = dimension(TIME[1:], np.arange(result.steps))
    for name, values in result.series.items():
        sites = result.sub_batch(name)
        same = values.shape[1] != result.points or (name == TIME and (values == values[:, :1]).all())
        dims = [time] if same else [time, point]
        for axis, size in enumerate(sites):
            dim = "site" if len(sites) == 1 else f"site_{axis}"
            dim = dim if len(coords.get(dim, range(size))) == size else f"{name}.{dim}"
            dims.append(dimension(dim, np.arange(size)))
        dims += [dimension(dim, np.array(of)) for dim, of in AXES[base_shape(result.types[name])].items()]
        variables[name] = (tuple(dims), values[:, 0] if same else values)
    if TIME not in variables or variables[TIME][0] != (time,):
        # Nothing is known of the steps, or it is another time at each point.
        del coords[time]
    return variables, coords


def to_array(value: Any) -> Array:
    """A tensor as an array of numbers in double precision."""
    return np.asarray(value.detach().cpu().numpy(), dtype=np.float64)


def from_driver(driver: Any) -> Result:
    """The result of a transient driver that has run."""
    sides = {"input": driver.result_in, "output": driver.result_out}
    steps = ((side, step, by) for side, of in sides.items() for step, by in enumerate(of))
    found, _, states = by_name((side, step, name, value) for side, step, by in steps for name, value in by.items())
    # A driver records the time only where the model takes it.
    values: Collected = {TIME: {step: (to_array(at), 0) for step, at in enumerate(driver.prescribed_time.data)}}
    types = {TIME: "Scalar"}
    for name, by_step in found.items():
        values[name] = {step: (to_array(value.data), value.sub_batch_ndim) for step, value in by_step.items()}
        types[name] = type(next(iter(by_step.values()))).__name__
    return collect(values, types, driver.nsteps, states)


def by_name(entries: Iterable[tuple[str, int, str, T]]) -> tuple[dict[str, dict[int, T]], set[str], set[str]]:
    """Sort what a driver records, `(side, step, name, value)`, by name and step; gives outputs and states as well.

    An output whose value one step before is an input is a state.
    """
    values: dict[str, dict[int, T]] = {}
    outputs, lagged = set(), set()
    for side, step, name, value in entries:
        base, steps = lag(name)
        if steps:
            lagged.add(base)
        else:
            values.setdefault(name, {})[step] = value
            if side == "output":
                outputs.add(name)
    return values, outputs, outputs & lagged


def collect(values: Collected, types: dict[str, str], steps: int, states: Collection[str]) -> Result:
    """Series of the values of steps, with batch axes folded onto one; of one point where the value is the same for all.

    A driver starts from zero states where no initial condition is given.
    """
    arrays: dict[str, dict[int, Array]] = {}
    leads, inner = {}, {}
    for name, by_step in values.items():
        base, sites = len(base_shape(types[name])), max(own for _, own in by_step.values())
        arrays[name] = {}
        for step, (array, own) in by_step.items():
            # As many sub-batch axes as the variable has at other steps.
            at = array.ndim - base - own
            arrays[name][step] = np.expand_dims(array, tuple(range(at, at + sites - own)))
        shapes = [array.shape for array in arrays[name].values()]
        leads[name] = np.broadcast_shapes(*(shape[: len(shape) - sites - base] for shape in shapes))
        inner[name] = np.broadcast_shapes(*(shape[len(shape) - sites - base :] for shape in shapes))
    batch = np.broadcast_shapes(*leads.values())
    series = {}
    for name, wide in arrays.items():
        lead = leads[name] if math.prod(leads[name]) == 1 else batch
        found = np.full((steps, *lead, *inner[name]), math.nan)
        found[0] = 0.0 if name in states else math.nan
        for step, array in wide.items():
            found[step] = array
        series[name] = found.reshape((steps, math.prod(lead), *inner[name]))
    return Result(series, {name: types[name] for name in series})
