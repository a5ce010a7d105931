"""`neml2-aoti bench`: rows per second by batch size and number of threads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .interrupt import heeded
from .options import MOST_ROWS, MOST_THREADS, Finite, counts, refuse_together
from .output import device_options, json_option, progress, show

if TYPE_CHECKING:
    from rich.console import Console

    from .._workbench.bench import BenchReport

EPILOG = """\b
Examples:
  neml2-aoti bench aoti/viscoplasticity_aoti.i
  neml2-aoti bench aoti/viscoplasticity_aoti.i --rows 1,100,10000 --threads 1,2 --plot speed.png
  neml2-aoti bench aoti/elasticity --call jacobian --json
"""

FILE = click.Path(path_type=Path)


@click.command(epilog=EPILOG, short_help="Rows per second by batch size and threads.")
@click.argument("target", metavar="ARTIFACT|STUB")
@click.argument("model", required=False)
@click.option("--rows", default="1,10,100,1000,10000", show_default=True, help="Batch sizes.")
@click.option("--threads", help="Numbers of threads. [as many as torch uses]")
@click.option(
    "--call",
    type=click.Choice(["forward", "jacobian", "solve"]),
    default="forward",
    show_default=True,
    help="Method of the model to time.",
)
@click.option("--seconds", type=Finite(0.0), default=0.5, show_default=True, help="For each measurement.")
@click.option("--points", type=FILE, help="Evaluate at these points; see verify.")
@click.option("--driver", metavar="NAME", help="Evaluate where this driver of the stub calls the model.")
@click.option("--plot", "picture", type=FILE, help="Draw rows per second over batch size to this file.")
@device_options
@json_option
def command(
    target: str,
    model: str | None,
    rows: str,
    threads: str | None,
    call: str,
    seconds: float,
    points: Path | None,
    driver: str | None,
    picture: Path | None,
    device: str | None,
    dtype: str | None,
    as_json: bool,
) -> int:
    """Time a compiled model.

    The points are those of verify, repeated to fill a batch. Other programs on the machine disturb the measurement.
    """
    refuse_together({"--points": points, "--driver": driver})
    sizes = counts(rows, "--rows", MOST_ROWS)
    numbers = counts(threads, "--threads", MOST_THREADS) if threads is not None else None

    import torch

    from .._workbench.bench import bench, draw
    from .._workbench.evaluation import Where
    from .._workbench.figures import require_drawable
    from .._workbench.target import find_target

    if picture is not None:
        require_drawable(picture)
    found = find_target(target, model)
    with progress() as bar, heeded() as heed:
        task = bar.add_task(found.model, total=None)

        def on_measured(done: int, total: int) -> None:
            heed()
            bar.update(task, completed=done, total=total)

        report = bench(
            found,
            sizes,
            numbers or (torch.get_num_threads(),),
            call,
            where=Where(points, driver, rows=64),
            seconds=seconds,
            device=device,
            dtype=dtype,
            on_measured=on_measured,
        )
    if picture is not None:
        report = draw(report, picture)
    return show("bench", report, as_json, render)


def render(report: BenchReport, console: Console) -> None:
    """Print the table."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    console.print(escape(f"{report.model} ({report.leaf}), {report.call} at {report.points} points"))
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title in ("threads", "rows", "time of a call", "rows per second"):
        table.add_column(title, justify="right")
    for found in report.measurements:
        table.add_row(str(found.threads), str(found.rows), duration(found.seconds), f"{found.rows_per_second:.3g}")
    console.print(table)
    if report.picture is not None:
        console.print(escape(f"written: {report.picture}"), soft_wrap=True)


def duration(seconds: float) -> str:
    """A time, for people."""
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if seconds * factor >= 1.0:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"
