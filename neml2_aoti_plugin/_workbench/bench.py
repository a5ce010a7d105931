"""How many rows a second a compiled model evaluates, by batch size and number of threads."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch

from ..errors import InputError
from ..model import Model
from .describe import name_of
from .evaluation import Where, choose_points, evaluate
from .figures import figure, literal
from .points import Points, Tensors
from .target import Target

CALLS = ("forward", "jacobian", "solve")
# Of each batch size, calls for so many seconds, and so many calls at least.
SECONDS, LEAST = 0.5, 3


@dataclass(frozen=True)
class Measurement:
    """One batch size with one number of threads.

    Args:
        threads: of torch.
        rows: in a call.
        seconds: of a call, the median.
        calls: that were timed.
        rows_per_second: rows over seconds.
    """

    threads: int
    rows: int
    seconds: float
    calls: int
    rows_per_second: float


@dataclass(frozen=True)
class BenchReport:
    """What `bench` measured.

    Args:
        artifact: its path.
        model: name of the model.
        leaf: as `device/dtype`.
        call: the method that was timed.
        points: where it was called, in words; they are repeated to fill a batch.
        measurements: one for each batch size and number of threads.
        picture: the file that was drawn; null if none was.
    """

    artifact: str
    model: str
    leaf: str
    call: str
    points: str
    measurements: tuple[Measurement, ...]
    picture: str | None = None


def bench(
    target: Target,
    sizes: Sequence[int],
    threads: Sequence[int],
    call: str = "forward",
    *,
    where: Where | None = None,
    seconds: float = SECONDS,
    device: str | None = None,
    dtype: str | None = None,
    on_measured: Callable[[int, int], None] | None = None,
) -> BenchReport:
    """Time calls of a model.

    Args:
        target: the model.
        sizes: numbers of rows.
        threads: numbers of threads.
        call: `forward`, `jacobian` or `solve`.
        where: which points.
        seconds: to spend on each measurement.
        device: of the leaf.
        dtype: of the leaf.
        on_measured: called behind each measurement with its number and how many there are.

    Raises:
        InputError: the model converges at none of the points.
        ArtifactError: the artifact cannot run here.
        DerivativeNotCompiledError: `jacobian` of a model without derivatives.
    """
    model = target.load(device, dtype)
    points = choose_points(target, model, where or Where(rows=64))
    found, _ = evaluate(model, points)
    before = torch.get_num_threads()
    measurements = []
    try:
        for count in threads:
            torch.set_num_threads(count)
            for rows in sizes:
                measurements.append(_measure(model, found.points, rows, count, call, seconds))
                if on_measured is not None:
                    on_measured(len(measurements), len(threads) * len(sizes))
    finally:
        torch.set_num_threads(before)
    place = target.place(device, dtype)
    leaf = f"{place.device.type}/{name_of(place)}"
    return BenchReport(str(target.artifact), target.model, leaf, call, points.source, tuple(measurements))


def draw(report: BenchReport, path: Path) -> BenchReport:
    """Draw rows per second over the batch size, a line for each number of threads.

    Args:
        report: what was measured.
        path: of the picture.

    Returns:
        The report, with the picture.
    """
    with figure(path) as axes:
        for threads in dict.fromkeys(found.threads for found in report.measurements):
            mine = [found for found in report.measurements if found.threads == threads]
            label = f"{threads} thread{'s' if threads > 1 else ''}"
            axes.plot([m.rows for m in mine], [m.rows_per_second for m in mine], "o-", label=label)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("rows in a call")
        axes.set_ylabel("rows per second")
        axes.set_title(literal(f"{report.model} ({report.leaf}), {report.call}"))
        axes.legend(frameon=False)
    return replace(report, picture=str(path))


def _measure(model: Model, points: Points, rows: int, threads: int, call: str, seconds: float) -> Measurement:
    inputs = _repeated(points, rows)
    if call not in CALLS:
        raise InputError(f"call is {call!r}, expected one of {', '.join(CALLS)}.")
    method: Callable[[Tensors], object] = getattr(model, call)
    method(inputs)
    times: list[float] = []
    while len(times) < LEAST or sum(times) < seconds:
        _wait(model)
        start = time.perf_counter()
        method(inputs)
        _wait(model)
        times.append(time.perf_counter() - start)
    took = median(times)
    return Measurement(threads, rows, took, len(times), rows / took)


def _repeated(points: Points, rows: int) -> Tensors:
    times = -(-rows // points.rows)
    return {n: x.repeat(times, *(1,) * (x.ndim - 1))[:rows].contiguous() for n, x in points.inputs.items()}


def _wait(model: Model) -> None:
    """Wait for a GPU, which is told what to do and not waited for by a call."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
