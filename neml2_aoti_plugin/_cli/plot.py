"""`neml2-aoti plot`: draw results of runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .output import json_option, show

if TYPE_CHECKING:
    from rich.console import Console

    from .._workbench.plot import PlotReport

EPILOG = """\b
Examples:
  neml2-aoti plot result.npz --out curve.png
  neml2-aoti plot result.npz --x strain.xx --y stress.xx --row 0 --out uniaxial.svg
  neml2-aoti plot stiff.npz soft.npz --x @time --y stress.vonmises --out both.png
"""

FILE = click.Path(path_type=Path)


@click.command(epilog=EPILOG, short_help="Draw results of runs.")
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
    from .._workbench.plot import plot

    return show("plot", plot(results, out, x, ys, rows), as_json, render)


def render(report: PlotReport, console: Console) -> None:
    """Print the lines that were drawn."""
    from rich.markup import escape

    for line in report.lines:
        site = f", site {', '.join(map(str, line.site))}" if line.site else ""
        where = f"point {line.row}{site} of {line.result}"
        text = f"  {line.y} over {line.x}, {where}: {line.steps} steps, to {line.y_last:.6g}"
        console.print(escape(text), soft_wrap=True)
    console.print(escape(f"written: {report.written}"), soft_wrap=True)
