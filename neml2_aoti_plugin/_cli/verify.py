"""`neml2-aoti verify`: does a compiled model do what its source does?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import FINE, SHORT
from .options import MOST_ROWS, SEED, Finite, assignments, refuse_together
from .output import device_options, json_option, show

if TYPE_CHECKING:
    from rich.console import Console

    from .._workbench.verify import Verification

EPILOG = """\b
Examples:
  neml2-aoti verify aoti/elasticity_aoti.i --against elasticity.i
  neml2-aoti verify aoti/elasticity --record aoti/elasticity.golden.safetensors
  neml2-aoti verify aoti/elasticity
"""

FILE = click.Path(path_type=Path)


@click.command(epilog=EPILOG, short_help="Compare a compiled model with its source.")
@click.argument("target", metavar="ARTIFACT|STUB")
@click.argument("model", required=False)
@click.option("--against", type=FILE, metavar="INPUT.i", help="The input file that was compiled.")
@click.option("--source-model", metavar="NAME", help="The model in INPUT.i, if it has another name there.")
@click.option("--golden", type=FILE, help="Compare with what --record has written.")
@click.option(
    "--record", type=FILE, help="Write points, values and derivatives to a golden file, if all comparisons pass."
)
@click.option("--points", type=FILE, help="Evaluate at these points: .npz, .pt or .safetensors, a tensor per input.")
@click.option("--driver", metavar="NAME", help="Evaluate where this driver of the stub calls the model.")
@click.option("--rows", type=click.IntRange(1, MOST_ROWS), default=16, show_default=True, help="Points of each kind.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the random points.")
@click.option("--scale", multiple=True, metavar="NAME=VALUE", help="Standard deviation of an input's random entries.")
@click.option(
    "--rtol", type=Finite(0.0), default=1e-6, show_default=True, help="Tolerance against source and golden file."
)
@click.option(
    "--difference-rtol", type=Finite(0.0), help="Tolerance against finite differences. [1e-5, of float32 1e-3]"
)
@click.option("--plot", "picture", type=FILE, help="Draw the worst errors to this file (.png or .svg).")
@device_options
@json_option
def command(
    target: str,
    model: str | None,
    against: Path | None,
    source_model: str | None,
    golden: Path | None,
    record: Path | None,
    points: Path | None,
    driver: str | None,
    rows: int,
    seed: int,
    scale: tuple[str, ...],
    rtol: float,
    difference_rtol: float | None,
    picture: Path | None,
    device: str | None,
    dtype: str | None,
    as_json: bool,
) -> int:
    """Compare a compiled model's values and derivatives with its source.

    The points are those at which the stub's driver calls the model and random ones around them, or random ones alone
    if there is no driver. Where there is no source, derivatives are compared with finite differences. A golden file
    ARTIFACT.golden.safetensors beside the artifact is used without being named.

    Errors are relative to the largest entry of each quantity. Exit status 1 if one is above the tolerance.
    """
    from .._workbench.evaluation import Where
    from .._workbench.figures import draw_errors, require_drawable
    from .._workbench.target import find_target
    from .._workbench.verify import Wanted, verify

    scales = assignments(scale, "--scale")
    if source_model is not None and against is None:
        raise click.UsageError("--source-model names a model in INPUT.i. Give that file as well: --against INPUT.i")
    refuse_together({"--golden": golden, "--points": points, "--driver or --scale": driver or scales})
    if picture is not None:
        require_drawable(picture)
    where = Where(points, driver, rows, seed, scales)
    wanted = Wanted(against, source_model, golden, where, rtol, difference_rtol)
    report = verify(find_target(target, model), wanted, device, dtype, record=record)
    if picture is not None:
        report = draw_errors(report, picture)
    return show("verify", report, as_json, render, FINE if report.passed else SHORT)


def render(report: Verification, console: Console) -> None:
    """Print the table of errors."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    apart = (
        f"; {report.not_converged} did not converge, or are not finite, and are left out"
        if report.not_converged
        else ""
    )
    console.print(escape(f"{report.model} ({report.leaf}) at {report.rows} points ({report.points}){apart}"))
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    # Only the names of quantities may be broken, in a narrow terminal.
    table.add_column("quantity", overflow="fold")
    table.add_column("reference", no_wrap=True)
    for title in ("points", "worst", "at", "limit", ""):
        table.add_column(title, justify="right", no_wrap=True)
    for found in report.comparisons:
        table.add_row(
            escape(found.quantity),
            found.reference,
            f"{found.rows} (-{found.left_out})" if found.left_out else str(found.rows),
            f"{found.worst:.1e}" if found.rows else "-",
            str(found.worst_row) if found.rows else "-",
            f"{found.tolerance:.0e}",
            "[green]passed[/]" if found.passed else "[bold red]FAILED[/]",
        )
    console.print(table)
    if any(found.left_out for found in report.comparisons):
        console.print("(-N): so many points were left out, because the two steps of the differences disagree there")
    for text in report.not_compared:
        console.print(f"[yellow]not compared[/] {escape(text)}")
    for file in (report.recorded, report.picture):
        if file is not None:
            console.print(escape(f"written: {file}"), soft_wrap=True)
