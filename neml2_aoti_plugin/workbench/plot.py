"""Draw results of runs: a component or an invariant against another, or against time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError, UnknownNameError
from .figures import figure
from .results import COMPONENTS, Result, columns, read_result

if TYPE_CHECKING:
    from .results import Array

TIME, STEP = "t", "step"
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
        steps: number of its points in time.
        y_first: first value of `y` that is there.
        y_last: last value of `y`.
    """

    result: str
    x: str
    y: str
    row: int
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
        x: for the horizontal axis, such as `t`, `strain.xx` or `strain.equivalent`; the first symmetric tensor among
            the inputs, as `equivalent`, if not given, else the time or the step.
        ys: for the vertical axis; the first symmetric tensor that is another one, as `vonmises`, if none is given.
        rows: the points to draw; all if none is given.

    Raises:
        InputError: a file is no result, or the picture cannot be written.
        UnknownNameError: a result has no such variable, component or point.
    """
    found = [(path, read_result(path)) for path in paths]
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
            axes.plot(along, up, style, color=f"C{number % per_file % 10}", linewidth=1.4, label=label)
        axes.set_xlabel(wanted_x)
        axes.set_ylabel(wanted_ys[0] if len(wanted_ys) == 1 else "")
        if 1 < len(lines) <= LEGEND:
            axes.legend(frameon=False)
    return PlotReport(str(out), tuple(report for *_, report in lines))


def default_x(result: Result) -> str:
    """What to draw along the horizontal axis if nothing is asked for."""
    tensors = [
        name for name, kind in result.types.items() if kind == "SR2" and not np.isnan(result.series[name][0]).any()
    ]
    names = [name for name in tensors if "strain" in name] or tensors
    if names:
        return f"{names[0]}.equivalent"
    return TIME if TIME in result.series else STEP


def default_y(result: Result, x: str) -> str:
    """What to draw along the vertical axis if nothing is asked for."""
    others = [name for name, kind in result.types.items() if kind == "SR2" and name != x.partition(".")[0]]
    names = [name for name in others if "stress" in name] or others
    if names:
        return f"{names[0]}.vonmises"
    scalars = [name for name, kind in result.types.items() if kind == "Scalar" and name not in (TIME, x)]
    return scalars[0] if scalars else next(iter(result.series))


def quantity(result: Result, wanted: str) -> Array:
    """A component or an invariant over steps and points, `(steps, rows)`.

    Args:
        result: of a run.
        wanted: a scalar's name, `name.component` or `name.invariant`; `step` is the number of the step.

    Raises:
        UnknownNameError: the result has no such thing.
    """
    there = {STEP: np.arange(result.steps, dtype=np.float64)[:, None], **columns(result)}
    if wanted in there:
        return there[wanted]
    name, _, what = wanted.rpartition(".")
    if result.types.get(name) == "SR2" and what in INVARIANTS:
        return INVARIANTS[what](result.series[name])
    known = [*(n for n in result.series if result.types[n] != "SR2"), STEP]
    tensors = [n for n in result.series if result.types[n] == "SR2"]
    parts = "|".join((*COMPONENTS["SR2"], *INVARIANTS))
    told = "; ".join(
        part
        for part in (
            f"there are {', '.join(known)}" if known else "",
            f"and of {', '.join(tensors)} the parts .{parts}" if tensors else "",
        )
        if part
    )
    raise UnknownNameError(f"{wanted!r} is not in this result: {told}.")


def _lines(
    path: Path, result: Result, x: str, y: str, rows: Sequence[int], *, several: bool, quantities: bool
) -> list[tuple[str, Array, Array, LineReport]]:
    try:
        along, up = np.broadcast_arrays(quantity(result, x), quantity(result, y))
    except UnknownNameError as error:
        raise UnknownNameError(f"{path}: {error}") from None
    total = up.shape[1]
    beyond = [row for row in rows if not 0 <= row < total]
    if beyond:
        raise UnknownNameError(f"{path}: there is no point {beyond[0]}; the points are 0 to {total - 1}.")
    lines = []
    for row in rows or range(total):
        words = [path.stem] if several else []
        words += [y] if quantities else []
        words += [f"point {row}"] if total > 1 else []
        finite = up[:, row][~np.isnan(up[:, row])]
        if not len(finite):
            raise InputError(f"{path}: {y!r} has no values at point {row}.")
        report = LineReport(str(path), x, y, row, len(up), float(finite[0]), float(finite[-1]))
        lines.append((", ".join(words), along[:, row], up[:, row], report))
    return lines
