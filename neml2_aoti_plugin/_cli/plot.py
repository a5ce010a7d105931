"""`neml2-aoti plot`: draw results of runs, a component or an invariant against another, or against time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import click
import numpy as np

from ..errors import InputError, UnknownNameError
from .output import Report, figure, literal, written
from .result_files import read_readings
from .results import POINT, STEP, TIME, Array, Column, Result, at_site, column_of, parts, quantity

STYLES = ("-", "--", "-.", ":")
# As many lines as there are colours have a legend. More have none, but a scale of colours where each is a point.
LEGEND = 10
# Longer labels, in characters, stand beside the lines, where they cover none.
INSIDE = 24
# How people call an invariant, before the name of the variable.
SPOKEN = {
    "vonmises": "von Mises ",
    "equivalent": "equivalent ",
    "norm": "norm of ",
    "trace": "trace of ",
    "mean": "mean ",
}


@dataclass(frozen=True)
class LineReport:
    """A line of a picture."""

    result: str  # the file that it is from
    x: str  # what is drawn along the horizontal axis
    y: str  # what is drawn along the vertical axis
    label: str  # what tells it from the others in the legend; empty if nothing does
    row: int  # the point
    site: tuple[int, ...]  # of the sub-batch; empty where there is none
    steps: int  # number of its points in time
    y_first: float  # first value of `y` that is there
    y_last: float  # last value of `y`


@dataclass(frozen=True)
class PlotReport(Report):
    """A picture that was drawn."""

    written: str  # the file
    lines: tuple[LineReport, ...]  # in it

    def render(self) -> Iterator[str]:
        for line in self.lines:
            where = f"{_place(line.row, line.site)} of {line.result}"
            yield f"  {line.y} over {line.x}, {where}: {line.steps} steps, to {line.y_last:.6g}"
        yield from written(self.written)


@dataclass(frozen=True)
class Labels:
    """What tells the points of a result apart: the value of a quantity at each, or the point's number."""

    title: str  # of a legend with nothing but `values`
    word: str  # what stands before a value otherwise
    values: Array  # of each point

    def number(self, row: int) -> str:
        """The value at a point."""
        return f"{self.values[row]:.4g}"


@dataclass(frozen=True)
class Line:
    """A line to draw: its points in time, and what the report says of it."""

    along: Array
    up: Array
    report: LineReport


def plot(
    results: Sequence[Path],
    out: Path,
    x: str | None,
    ys: Sequence[str],
    rows: Sequence[int],
    label: str | None,
    title: str | None,
    xlabel: str | None,
    ylabels: Sequence[str],
) -> PlotReport:
    """Draw quantities over another one into a picture: a line for each result, point and site."""
    if len(ylabels) > max(len(ys), 1):
        raise click.UsageError(f"--ylabel is given {len(ylabels)} times, for {max(len(ys), 1)} quantities.")
    wanted = [name for name in (x, *ys, label) if name and name != POINT]
    found = {path: _read(path, wanted) for path in results}
    first = found[results[0]]
    x = x or default_x(first)
    ys = list(dict.fromkeys(ys)) or [default_y(first, x)]
    names = {y: spoken(y) for y in ys} | dict(zip(ys, ylabels, strict=False))
    labels = {path: _labels(path, result, ys[0], label, rows) for path, result in found.items()}
    panels: dict[str, list[str]] = {}
    for y in ys:
        panels.setdefault(_kind(y), []).append(y)
    alike = len({path.stem for path in found}) < len(found)
    drawn: list[LineReport] = []
    with figure(out, height=1.6 + 3.0 * len(panels), panels=len(panels)) as figures:
        before: list[str] = []
        for axes, shown in zip(figures, panels.values(), strict=True):
            lines: list[Line] = []
            for path, result in found.items():
                for y in shown:
                    words = [str(path) if alike else path.stem] if len(found) > 1 else []
                    words += [names[y]] if len(shown) > 1 else []
                    lines += _lines(path, result, x, y, rows, labels[path], words)
            # Where nothing but the points differs, a legend has their values alone, below its title.
            points_alone = len(found) == len(shown) == 1 and not any(line.report.site for line in lines)
            told = [line.report.label for line in lines]
            _draw(axes, lines, len(found), labels[results[0]] if points_alone else None, told != before)
            called = [names[y] for y in shown]
            axes.set_ylabel(literal((", " if len(", ".join(called)) <= INSIDE else ",\n").join(called)))
            drawn, before = [*drawn, *(line.report for line in lines)], told
        figures[0].set_title(literal(title or ""))
        figures[-1].set_xlabel(literal(xlabel or spoken(x)))
    return PlotReport(str(out), tuple(drawn))


def _draw(axes: Any, lines: Sequence[Line], files: int, points: Labels | None, legend: bool) -> None:
    """Draw lines, with a legend or a scale of colours; `points` where nothing but the points differs."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable

    scale = None
    if points and len(lines) > LEGEND:
        scale = ScalarMappable(cmap=colormaps["viridis"])
        scale.set_array([points.values[line.report.row] for line in lines])
        scale.autoscale()
        axes.figure.colorbar(scale, ax=axes, label=literal(points.title))
    per_file = len(lines) // files
    for number, line in enumerate(lines):
        report = line.report
        # The same line of each file has the same colour.
        colour = scale.to_rgba(points.values[report.row]) if points and scale else f"C{number % per_file % 10}"
        style = STYLES[number // per_file % len(STYLES)]
        label = literal(points.number(report.row) if points else report.label)
        axes.plot(line.along, line.up, style, color=colour, linewidth=1.4, label=label)
    if legend and scale is None and 1 < len(lines) <= LEGEND:
        longest = max(len(line.report.label) for line in lines)
        if points or longest <= INSIDE:
            axes.legend(frameon=False, title=literal(points.title) if points else "", alignment="left")
        else:
            axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
            axes.figure.set_figwidth(max(axes.figure.get_figwidth(), 6.9 + 0.09 * longest))


def _read(path: Path, wanted: Sequence[str]) -> Result:
    """Read a result; of several readings the one that has what is wanted."""
    readings = read_readings(path)
    if len(readings) > 1 and not wanted:
        unsure = [name for name in readings[0].series if len({read.series[name].shape for read in readings}) > 1]

        def said(read: Result, name: str) -> str:
            sites = f" with sites {list(of)}" if (of := read.sub_batch(name)) else ""
            return f"{name} as {read.types[name]} at {read.series[name].shape[1]} point(s){sites}"

        may_be = (", ".join(said(read, name) for name in unsure) for read in readings)
        raise InputError(
            f"{path}: a .pt file records no types, and this one may hold {', or '.join(may_be)}. Name what to draw "
            "(--y NAME of a scalar, --y NAME.PART of a tensor), or draw a .npz or .csv file."
        )
    for read in readings:
        with suppress(UnknownNameError):
            for name in wanted:
                quantity(read, name)
            return read
    return readings[0]


def spoken(name: str) -> str:
    """A quantity as people call it: `branch_stress[2].vonmises` is the von Mises branch stress at site 2."""
    if name in (STEP, TIME):
        return name.removeprefix("@")
    column = column_of(name)
    called = SPOKEN.get(column.part, "") + column.name.replace("_", " ").strip()
    called += f" {column.part}" if column.part and column.part not in SPOKEN else ""
    return called + (f" at {_site(column.site)}" if column.site else "")


def _kind(name: str) -> str:
    """The last word of a variable's name, which says whether it is a stress, a strain, a rate."""
    return name if name.startswith("@") else re.split(r"[^a-z0-9]+", column_of(name).name.lower())[-1]


def _quantity(path: Path, result: Result, name: str) -> Array:
    try:
        return quantity(result, name)
    except UnknownNameError as error:
        raise UnknownNameError(f"{path}: {error}") from None


def _labels(path: Path, result: Result, y: str, wanted: str | None, rows: Sequence[int]) -> Labels:
    """What tells the points of a result apart: what is wanted, else an input, else their numbers.

    Inputs come first in a result. The first scalar or component that has another value at each point is taken, one
    that is constant in time before one that is not, but nothing behind the first variable that is drawn.
    """
    by_number = Labels(POINT.removeprefix("@"), POINT.removeprefix("@"), np.arange(float(result.points)))
    if wanted == POINT:
        return by_number
    names = [wanted] if wanted else []
    for name, values in result.series.items() if not wanted and not y.startswith("@") else ():
        if name not in (TIME, "t") and values.shape[1] > 1 and not result.sub_batch(name):
            names += [str(Column(name, part=part)) for part in parts(result.types[name])]
        if name == column_of(y).name:
            break
    chosen = [row for row in rows if 0 <= row < result.points] if len(set(rows)) > 1 else range(result.points)
    # Each with whether it is constant.
    telling: list[tuple[bool, Labels]] = []
    for name in names:
        values = _quantity(path, result, name)
        if values.ndim > 2:
            raise InputError(f"{path}: {name!r} has sites. Tell points apart by one of them, such as NAME[0].PART.")
        values = np.broadcast_to(values, (len(values), result.points))
        # Behind the first step all outputs are there.
        constant, called = bool((values[1:] == values[-1]).all()), spoken(name)
        ends = ("", "") if constant else (" at the end", " to")
        labels = Labels(called + ends[0], called + ends[1], values[-1])
        if wanted or len({labels.number(row) for row in chosen}) == len(chosen):
            telling.append((constant, labels))
    return max(telling, key=lambda found: found[0], default=(False, by_number))[1]


def default_x(result: Result) -> str:
    """The first symmetric tensor among the inputs, as `equivalent`, else the time or the step."""
    found = _tensor(result, "strain", [n for n, values in result.series.items() if not np.isnan(values[0]).any()])
    if found is not None:
        return str(Column(found, part="equivalent"))
    return next((name for name in (TIME, "t") if result.types.get(name) == "Scalar"), STEP)


def default_y(result: Result, x: str) -> str:
    """The first symmetric tensor that is another one, as `vonmises`, else the first other variable."""
    found = _tensor(result, "stress", [name for name in result.series if name != column_of(x).name])
    if found is not None:
        return str(Column(found, part="vonmises"))
    left = [name for name in result.series if name not in (TIME, "t", column_of(x).name)] or [*result.series]
    return str(Column(left[0], part=parts(result.types[left[0]])[0]))


def _tensor(result: Result, word: str, among: Sequence[str]) -> str | None:
    """The first symmetric tensor: those with a word in the name before others, those without sites before others."""
    tensors = [name for name in among if result.types[name] == "SR2"]
    return min(tensors, key=lambda name: (word not in name, len(result.sub_batch(name))), default=None)


def _lines(
    path: Path, result: Result, x: str, y: str, rows: Sequence[int], labels: Labels, before: Sequence[str]
) -> Iterator[Line]:
    """A line for each point and site, with its label."""
    along, up = _quantity(path, result, x), _quantity(path, result, y)
    axes = max(along.ndim, up.ndim)
    try:
        # What has no sites is the same at all of them.
        wide = (values.reshape(values.shape + (1,) * (axes - values.ndim)) for values in (along, up))
        over, above = np.broadcast_arrays(*wide)
    except ValueError:
        raise InputError(
            f"{path}: {x!r} and {y!r} have other sites, {list(along.shape[2:])} and {list(up.shape[2:])}. Draw one of "
            "them at one site, such as NAME[0] or NAME[0].PART."
        ) from None
    total, sites = above.shape[1], above.shape[2:]
    if not total:
        raise InputError(f"{path}: has no points, so that there is nothing to draw.")
    beyond = [row for row in rows if not 0 <= row < total]
    if beyond:
        raise UnknownNameError(f"{path}: there is no point {beyond[0]}; the points are 0 to {total - 1}.")
    for row, site in product(rows or range(total), np.ndindex(sites)):
        values = at_site(above, site)[:, row]
        finite = values[~np.isnan(values)]
        if not len(finite):
            raise InputError(f"{path}: {y!r} has no values at {_place(row, site)}.")
        words = [*before]
        words += [f"{labels.word} {labels.number(row)}"] if total > 1 else []
        words += [_site(site)] if site else []
        ends = (float(finite[0]), float(finite[-1]))
        report = LineReport(str(path), x, y, ", ".join(words), row, site, len(values), *ends)
        yield Line(at_site(over, site)[:, row], values, report)


def _place(row: int, site: tuple[int, ...]) -> str:
    """A point, and a site there, in words."""
    return f"point {row}" + (f", {_site(site)}" if site else "")


def _site(site: tuple[int, ...]) -> str:
    return f"site {', '.join(map(str, site))}"
