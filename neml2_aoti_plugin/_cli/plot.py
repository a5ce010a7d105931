"""`neml2-aoti plot`: draw results of runs, a component or an invariant against another, or against time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import InputError, UnknownNameError
from .options import FILE, json_option
from .output import figure, literal, show

if TYPE_CHECKING:
    from .results import Array, Result

EPILOG = """\b
Examples:
  neml2-aoti plot result.npz --out curve.png
  neml2-aoti plot result.npz --x strain.xx --y stress.xx --row 0 --out uniaxial.svg
  neml2-aoti plot stiff.npz soft.npz --x @time --y stress.vonmises --out both.png
"""

STYLES = ("-", "--", "-.", ":")
# More lines than this get no legend.
LEGEND = 12
# Of a symmetric tensor.
INVARIANTS = ("vonmises", "equivalent", "norm", "trace", "mean")


@dataclass(frozen=True)
class LineReport:
    """A line of a picture."""

    result: str  # the file that it is from
    x: str  # what is drawn along the horizontal axis
    y: str  # what is drawn along the vertical axis
    row: int  # the point
    site: tuple[int, ...]  # of the sub-batch; empty where there is none
    steps: int  # number of its points in time
    y_first: float  # first value of `y` that is there
    y_last: float  # last value of `y`


@dataclass(frozen=True)
class PlotReport:
    """A picture that was drawn."""

    written: str  # the file
    lines: tuple[LineReport, ...]  # in it


@click.command(epilog=EPILOG)
@click.argument("results", type=FILE, metavar="RESULT...", nargs=-1, required=True)
@click.option("--out", type=FILE, required=True, help="The picture: .png, .svg or .pdf.")
@click.option("--x", metavar="NAME", help="Horizontal axis.")
@click.option("--y", "ys", multiple=True, metavar="NAME", help="Vertical axis; may be given several times.")
@click.option("--row", "rows", type=int, multiple=True, help="A point to draw; may be given several times. [all]")
@json_option
def command(
    results: tuple[Path, ...], out: Path, x: str | None, ys: tuple[str, ...], rows: tuple[int, ...], as_json: bool
) -> int:
    """Draw results that `neml2-aoti run --out` or neml2-run have written, several into one picture.

    NAME is a scalar such as temperature, a component such as stress.xy, or an invariant of a symmetric tensor:
    .vonmises, .equivalent (of a strain, the square root of 2/3 of its deviator's product with itself), .norm, .trace,
    .mean. @time and @step are there in any case. Each site of a sub-batch is a line; stress[2].xy is one of them.
    """
    found = [(path, _read(path, [*([x] if x else []), *ys])) for path in results]
    wanted_x = x or default_x(found[0][1])
    wanted_ys = list(ys) or [default_y(found[0][1], wanted_x)]
    drawn: list[tuple[str, Array, Array, LineReport]] = []
    for path, result in found:
        for y in wanted_ys:
            drawn += _lines(path, result, wanted_x, y, rows, several=len(found) > 1, quantities=len(wanted_ys) > 1)
    with figure(out) as axes:
        per_file = len(drawn) // len(found)
        for number, (label, along, up, _) in enumerate(drawn):
            # The same line of each file has the same colour.
            style = STYLES[number // per_file % len(STYLES)]
            axes.plot(along, up, style, color=f"C{number % per_file % 10}", linewidth=1.4, label=literal(label))
        axes.set_xlabel(literal(wanted_x))
        axes.set_ylabel(literal(wanted_ys[0]) if len(wanted_ys) == 1 else "")
        if 1 < len(drawn) <= LEGEND:
            axes.legend(frameon=False)
    report = PlotReport(str(out), tuple(line for *_, line in drawn))
    return show("plot", report, as_json, render)


def render(report: PlotReport) -> Iterator[str]:
    """The lines that were drawn."""
    for line in report.lines:
        where = f"{_place(line.row, line.site)} of {line.result}"
        yield f"  {line.y} over {line.x}, {where}: {line.steps} steps, to {line.y_last:.6g}"
    yield f"written: {report.written}"


def _read(path: Path, wanted: Sequence[str]) -> Result:
    """Read a result; of several readings the one that has what is wanted."""
    from .result_files import read_result

    readings = read_result(path)
    if len(readings) == 1:
        return readings[0]
    if not wanted:
        unsure = [name for name in readings[0].series if len({read.series[name].shape for read in readings}) > 1]
        may_be = (", ".join(_in_words(read, name) for name in unsure) for read in readings)
        raise InputError(
            f"{path}: a .pt file records no types, and this one may hold {', or '.join(may_be)}. Name what to draw "
            "(--y NAME of a scalar, --y NAME.PART of a tensor), or draw a .npz or .csv file."
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
    """The first symmetric tensor among the inputs, as `equivalent`, else the time or the step."""
    import numpy as np

    from .results import STEP, TIME, Column

    tensors = [name for name in _tensors(result) if not np.isnan(result.series[name][0]).any()]
    names = [name for name in tensors if "strain" in name] or tensors
    if names:
        return str(Column(names[0], part="equivalent"))
    return next((name for name in (TIME, "t") if result.types.get(name) == "Scalar"), STEP)


def default_y(result: Result, x: str) -> str:
    """The first symmetric tensor that is another one, as `vonmises`, else the first other variable."""
    from .results import TIME, Column, column_of, parts

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


def invariant(name: str, values: Array) -> Array:
    """An invariant of a symmetric tensor in Mandel notation, `(..., 6)`."""
    import numpy as np

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
    import numpy as np

    from .results import STEP, at_site, column_of, component, parts

    if wanted == STEP:
        return np.arange(result.steps, dtype=np.float64)[:, None]
    column = column_of(wanted)
    kind = result.types.get(column.name)
    known = () if kind is None else (*parts(kind), *(INVARIANTS if kind == "SR2" else ()))
    if kind is None or column.part not in known:
        raise UnknownNameError(f"{wanted!r} is not in this result: {_there(result)}.")
    values, sub_batch = result.series[column.name], result.sub_batch(column.name)
    is_invariant = column.part in INVARIANTS
    found = invariant(column.part, values) if is_invariant else component(values, kind, column.part)
    if not column.site:
        return found
    fits = len(column.site) == len(sub_batch) and all(i < size for i, size in zip(column.site, sub_batch, strict=True))
    if not fits:
        there = f"sites of shape {list(sub_batch)}" if sub_batch else "no sites"
        raise UnknownNameError(f"{wanted!r} is not in this result: {column.name!r} has {there}.")
    return at_site(found, column.site)


def _there(result: Result) -> str:
    """What a result has, in words."""
    from .results import STEP, Column, parts

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


def _lines(
    path: Path, result: Result, x: str, y: str, rows: Sequence[int], *, several: bool, quantities: bool
) -> list[tuple[str, Array, Array, LineReport]]:
    """A line for each point and site, with its label."""
    import numpy as np

    from .results import at_site

    try:
        along, up = quantity(result, x), quantity(result, y)
    except UnknownNameError as error:
        raise UnknownNameError(f"{path}: {error}") from None
    sites = max(along.shape[2:], up.shape[2:], key=len)
    try:
        # What has no sites is the same at all of them.
        wide = [values.reshape((*values.shape, *(1,) * (2 + len(sites) - values.ndim))) for values in (along, up)]
        along, up = np.broadcast_arrays(*(np.broadcast_to(values, (*values.shape[:2], *sites)) for values in wide))
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
    found = []
    for row in rows or range(total):
        for site in np.ndindex(sites):
            over, above = at_site(along, site)[:, row], at_site(up, site)[:, row]
            words = [path.stem] if several else []
            words += [y] if quantities else []
            words += [f"point {row}"] if total > 1 else []
            words += [f"site {', '.join(map(str, site))}"] if site else []
            finite = above[~np.isnan(above)]
            if not len(finite):
                raise InputError(f"{path}: {y!r} has no values at {_place(row, site)}.")
            report = LineReport(str(path), x, y, row, site, len(up), float(finite[0]), float(finite[-1]))
            found.append((", ".join(words), over, above, report))
    return found


def _place(row: int, site: tuple[int, ...]) -> str:
    """A point, and a site there, in words."""
    return f"point {row}" + (f", site {', '.join(map(str, site))}" if site else "")
