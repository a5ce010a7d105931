"""`neml2-aoti bench`: rows per second by batch size and number of threads."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Column, Table
from torch.utils.benchmark import Timer, select_unit

from .options import refuse_together
from .output import Report, figure, literal, require_drawable, table, waits_for, written
from .points import choose_points, evaluate
from .process import heeded
from .target import Target, leaf_name


@dataclass(frozen=True)
class Measurement:
    """One batch size with one number of threads."""

    threads: int  # of torch
    rows: int  # in a call
    seconds: float  # of a call, the median
    calls: int  # that were timed
    rows_per_second: float  # rows over seconds


@dataclass(frozen=True)
class BenchReport(Report):
    """What `bench` measured."""

    artifact: str  # its path
    model: str  # name of the model
    leaf: str  # as `device/dtype`
    call: str  # the method that was timed
    points: str  # where it was called, in words; they are repeated to fill a batch
    measurements: tuple[Measurement, ...]  # one for each batch size and number of threads
    picture: str | None  # the file that was drawn; null if none was

    def render(self) -> Iterator[str | Table]:
        yield f"{self.model} ({self.leaf}), {self.call} at {self.points} points"
        titles = ("threads", "rows", "time of a call", "rows per second")
        times = table(*(Column(title, justify="right") for title in titles))
        for found in self.measurements:
            unit, scale = select_unit(found.seconds)
            took = f"{found.seconds / scale:.3g} {unit}"
            times.add_row(str(found.threads), str(found.rows), took, f"{found.rows_per_second:.3g}")
        yield times
        yield from written(self.picture)


def bench(
    target: Target,
    rows: Sequence[int],
    threads: Sequence[int] | None,
    call: str,
    seconds: float,
    points: Path | None,
    driver: str | None,
    picture: Path | None,
) -> BenchReport:
    """Time calls of so many rows on so many threads, each for some seconds."""
    refuse_together({"--points": points, "--driver": driver})
    require_drawable(picture)
    measurements: list[Measurement] = []
    with heeded() as heed:
        model = target.load()
        at = choose_points(target, model, points, driver, rows=64)
        # Where it does not converge, it takes another time.
        kept = evaluate(model, at).points
        cases = [(number, size) for number in threads or (torch.get_num_threads(),) for size in rows]
        for done, (number, size) in enumerate(cases, 1):
            times = -(-size // kept.rows)
            inputs = {n: x.repeat(times, *(1,) * (x.ndim - 1))[:size].contiguous() for n, x in kept.inputs.items()}
            names = {"method": getattr(model, call), "inputs": inputs}
            timer = Timer("method(inputs)", globals=names, num_threads=number)
            took = timer.blocked_autorange(min_run_time=seconds)
            calls = took.number_per_run * len(took.times)
            measurements.append(Measurement(number, size, took.median, calls, size / took.median))
            heed()
            waits_for(target.model, done, len(cases))
    report = BenchReport(
        artifact=str(target.artifact),
        model=target.model,
        leaf=leaf_name(target.place()),
        call=call,
        points=at.source,
        measurements=tuple(measurements),
        picture=None if picture is None else str(picture),
    )
    if picture is not None:
        _draw(report, picture)
    return report


def _draw(report: BenchReport, path: Path) -> None:
    """Draw rows per second over the batch size, a line for each number of threads."""
    with figure(path) as (axes,):
        for threads in dict.fromkeys(found.threads for found in report.measurements):
            mine = [found for found in report.measurements if found.threads == threads]
            label = f"{threads} thread{'s' if threads > 1 else ''}"
            axes.plot([m.rows for m in mine], [m.rows_per_second for m in mine], "o-", label=label)
        speeds = [found.rows_per_second for found in report.measurements]
        for axis, values in ((axes.xaxis, [found.rows for found in report.measurements]), (axes.yaxis, speeds)):
            axis.axes.set(**{f"{axis.axis_name}scale": "log"})
            # Whole powers of ten, so that two ticks at least have a number.
            least, most = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
            beyond = least == most
            axis.set_view_interval(10.0 ** (least - beyond) / 1.2, 10.0 ** (most + beyond) * 1.2, ignore=True)
            axis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1.0 else f"{value:g}")
            axis.set_minor_formatter(lambda *_: "")
        axes.grid(which="minor", alpha=0.1)
        axes.set_xlabel("rows in a call")
        axes.set_ylabel("rows per second")
        axes.set_title(literal(f"{report.model} ({report.leaf}), {report.call}"))
        axes.legend(frameon=False)
