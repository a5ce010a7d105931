"""Draw results of runs: a component or an invariant against another, or against time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError, UnknownNameError
from .figures import figure, literal
from .result_files import read_result
from .results import STEP, TIME, Column, Result, at_site, column_of, component, parts

if TYPE_CHECKING:
    from .results import Array

STYLES = ("-", "--", "-.", ":")
# More lines than this get no legend.
LEGEND = 12


def _deviator(values: Array) -> Array:
    mean = values[..., :3].mean(-1, keepdims=True)
    found: Array = values - mean * np.array([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    return found


def _norm(values: Array) -> Array:
    # In Mandel notation a tensor's norm is that of its entries.
    found: Array = np.sqrt((values**2).sum(-1))
    return found


# Of a symmetric tensor in Mandel notation, `(..., 6)`.
INVARIANTS: dict[str, Callable[[Array], Array]] = {
    "vonmises": lambda s: np.sqrt(1.5) * _norm(_deviator(s)),
    "equivalent": lambda e: np.sqrt(2.0 / 3.0) * _norm(_deviator(e)),
    "norm": _norm,
    "trace": lambda s: s[..., :3].sum(-1),
    "mean": lambda s: s[..., :3].mean(-1),
}


@dataclass(frozen=True)
class LineReport:
    """A line of a picture.

    Args:
        result: the file that it is from.
        x: what is drawn along the horizontal axis.
        y: what is drawn along the vertical axis.
        row: the point.
        site: of the sub-batch; empty where there is none.
        steps: number of its points in time.
        y_first: first value of `y` that is there.
        y_last: last value of `y`.
    """

    result: str
    x: str
    y: str
    row: int
    site: tuple[int, ...]
    steps: int
    y_first: float
    y_last: float


@dataclass(frozen=True)
class PlotReport:
    """A picture that was drawn.

    Args:
        written: the file.
        lines: in it.
    """

    written: str
    lines: tuple[LineReport, ...]


def plot(
    paths: Sequence[Path], out: Path, x: str | None = None, ys: Sequence[str] = (), rows: Sequence[int] = ()
) -> PlotReport:
    """Draw results into one picture.

    Args:
        paths: of the results.
        out: the picture (.png, .svg or .pdf).
        x: for the horizontal axis, such as `@time`, `strain.xx` or `strain.equivalent`; the first symmetric tensor
            among the inputs, as `equivalent`, if not given, else the time or the step.
        ys: for the vertical axis; the first symmetric tensor that is another one, as `vonmises`, if none is given.
        rows: the points to draw; all if none is given.

    Raises:
        InputError: a file is no result, or the picture cannot be written.
        UnknownNameError: a result has no such variable, component or point.
    """
    found = [(path, _read(path, [*([x] if x else []), *ys])) for path in paths]
    wanted_x = x or default_x(found[0][1])
    wanted_ys = list(ys) or [default_y(found[0][1], wanted_x)]
    lines: list[tuple[str, Array, Array, LineReport]] = []
    for path, result in found:
        for y in wanted_ys:
            lines += _lines(path, result, wanted_x, y, rows, several=len(found) > 1, quantities=len(wanted_ys) > 1)
    with figure(out) as axes:
        per_file = len(lines) // len(found)
        for number, (label, along, up, _) in enumerate(lines):
            # The same line of each file has the same colour.
            style = STYLES[number // per_file % len(STYLES)]
            axes.plot(along, up, style, color=f"C{number % per_file % 10}", linewidth=1.4, label=literal(label))
        axes.set_xlabel(literal(wanted_x))
        axes.set_ylabel(literal(wanted_ys[0]) if len(wanted_ys) == 1 else "")
        if 1 < len(lines) <= LEGEND:
            axes.legend(frameon=False)
    return PlotReport(str(out), tuple(report for *_, report in lines))


def _read(path: Path, wanted: Sequence[str]) -> Result:
    """Read a result; of several readings the one that has what is wanted."""
    readings = read_result(path)
    if len(readings) == 1:
        return readings[0]
    if not wanted:
        unsure = [name for name in readings[0].series if len({read.series[name].shape for read in readings}) > 1]
        told = (", ".join(_in_words(read, name) for name in unsure) for read in readings)
        raise InputError(
            f"{path}: a .pt file tells no types, and this one may hold {', or '.join(told)}. Name what to draw (--y "
            "NAME of a scalar, --y NAME.PART of a tensor), or draw a .npz or .csv file."
        )
    return next((found for found in readings if _has(found, wanted)), readings[0])


def _in_words(result: Result, name: str) -> str:
    sites = result.sub_batch(name)
    return f"{name} as {result.types[name]} at {result.series[name].shape[1]} point(s)" + (
        f" with sites {list(sites)}" if sites else ""
    )


def _has(result: Result, wanted: Sequence[str]) -> bool:
    try:
        for name in wanted:
            quantity(result, name)
    except UnknownNameError:
        return False
    return True


def default_x(result: Result) -> str:
    """What to draw along the horizontal axis if nothing is asked for."""
    tensors = [name for name in _tensors(result) if not np.isnan(result.series[name][0]).any()]
    names = [name for name in tensors if "strain" in name] or tensors
    if names:
        return str(Column(names[0], part="equivalent"))
    return next((name for name in (TIME, "t") if result.types.get(name) == "Scalar"), STEP)


def default_y(result: Result, x: str) -> str:
    """What to draw along the vertical axis if nothing is asked for."""
    others = [name for name in _tensors(result) if name != column_of(x).name]
    names = [name for name in others if "stress" in name] or others
    if names:
        return str(Column(names[0], part="vonmises"))
    left = [name for name in result.series if name not in (TIME, "t", column_of(x).name)] or [*result.series]
    return str(Column(left[0], part=parts(result.types[left[0]])[0]))


def _tensors(result: Result) -> list[str]:
    """The symmetric tensors, those without sites first."""
    found = [name for name, kind in result.types.items() if kind == "SR2"]
    return sorted(found, key=lambda name: len(result.sub_batch(name)))


def quantity(result: Result, wanted: str) -> Array:
    """A scalar, a component or an invariant over steps and points, `(steps, points, *sub_batch)`.

    Args:
        result: of a run.
        wanted: a scalar's name, `name.component` or `name.invariant`; with `[site]` behind the name the values at one
            site, `(steps, points)`. `@step` is the number of the step.

    Raises:
        UnknownNameError: the result has no such thing.
    """
    if wanted == STEP:
        return np.arange(result.steps, dtype=np.float64)[:, None]
    column = column_of(wanted)
    kind = result.types.get(column.name)
    known = () if kind is None else (*parts(kind), *(INVARIANTS if kind == "SR2" else ()))
    if kind is None or column.part not in known:
        raise UnknownNameError(f"{wanted!r} is not in this result: {_there(result)}.")
    values, sub_batch = result.series[column.name], result.sub_batch(column.name)
    found = INVARIANTS[column.part](values) if column.part in INVARIANTS else component(values, kind, column.part)
    if not column.site:
        return found
    fits = len(column.site) == len(sub_batch) and all(i < size for i, size in zip(column.site, sub_batch, strict=True))
    if not fits:
        there = f"sites of shape {list(sub_batch)}" if sub_batch else "no sites"
        raise UnknownNameError(f"{wanted!r} is not in this result: {column.name!r} has {there}.")
    return at_site(found, column.site)


def _there(result: Result) -> str:
    """What a result has, in words."""
    tensors = [str(Column(name)) for name, kind in result.types.items() if kind == "SR2"]
    others = [
        str(Column(name)) + (f".{'|'.join(of)}" if (of := parts(kind)) != ("",) else "")
        for name, kind in result.types.items()
        if kind != "SR2"
    ]
    told = [f"there are {', '.join((*others, STEP))}"]
    if tensors:
        told.append(f"and of {', '.join(tensors)} the parts .{'|'.join((*parts('SR2'), *INVARIANTS))}")
    return "; ".join(told)


def _lines(
    path: Path, result: Result, x: str, y: str, rows: Sequence[int], *, several: bool, quantities: bool
) -> list[tuple[str, Array, Array, LineReport]]:
    try:
        along, up = quantity(result, x), quantity(result, y)
    except UnknownNameError as error:
        raise UnknownNameError(f"{path}: {error}") from None
    sites = max(along.shape[2:], up.shape[2:], key=len)
    try:
        along, up = (_at(values, (*values.shape[:2], *sites)) for values in (along, up))
        along, up = np.broadcast_arrays(along, up)
    except ValueError:
        raise InputError(
            f"{path}: {x!r} and {y!r} have other sites, {list(along.shape[2:])} and {list(up.shape[2:])}. Draw one of "
            "them at one site, such as NAME[0] or NAME[0].PART."
        ) from None
    total = up.shape[1]
    if not total:
        raise InputError(f"{path}: has no points, so that there is nothing to draw.")
    beyond = [row for row in rows if not 0 <= row < total]
    if beyond:
        raise UnknownNameError(f"{path}: there is no point {beyond[0]}; the points are 0 to {total - 1}.")
    lines = []
    for row in rows or range(total):
        for site in np.ndindex(sites):
            over, above = at_site(along, site)[:, row], at_site(up, site)[:, row]
            words = [path.stem] if several else []
            words += [y] if quantities else []
            words += [f"point {row}"] if total > 1 else []
            words += [f"site {', '.join(map(str, site))}"] if site else []
            finite = above[~np.isnan(above)]
            if not len(finite):
                raise InputError(f"{path}: {y!r} has no values at {place(row, site)}.")
            report = LineReport(str(path), x, y, row, site, len(up), float(finite[0]), float(finite[-1]))
            lines.append((", ".join(words), over, above, report))
    return lines


def place(row: int, site: tuple[int, ...]) -> str:
    """A point, and a site there, in words."""
    return f"point {row}" + (f", site {', '.join(map(str, site))}" if site else "")


def _at(values: Array, shape: tuple[int, ...]) -> Array:
    """Values with axes for sites, where they have none."""
    found: Array = values.reshape((*values.shape, *(1,) * (len(shape) - values.ndim)))
    return np.broadcast_to(found, shape)
