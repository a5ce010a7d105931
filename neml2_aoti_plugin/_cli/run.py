"""`neml2-aoti run`: run a driver, with a progress bar, and keep its result."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .interrupt import heeded
from .options import assignments
from .output import json_option, progress, show

if TYPE_CHECKING:
    from rich.console import Console

    from .._workbench.drive import RunReport

EPILOG = """\b
Examples:
  neml2-aoti run aoti/viscoplasticity_aoti.i driver --out result.npz
  neml2-aoti run aoti/promoted_aoti.i driver --set promoted.E=80000 --out soft.csv
  neml2-aoti run aoti/promoted_aoti.i driver 'Drivers/driver/save_as:=soft.pt'
"""

FILE = click.Path(path_type=Path)


@click.command(epilog=EPILOG, short_help="Run a driver, with a progress bar.")
@click.argument("stub", type=FILE, metavar="STUB")
@click.argument("driver")
@click.argument("overrides", nargs=-1, metavar="[PATH:=VALUE]...")
@click.option("--set", "given", multiple=True, metavar="NAME=VALUE", help="Give a promoted parameter another value.")
@click.option("--parameters", type=FILE, help="Take the promoted parameters from this file (see params).")
@click.option("--out", type=FILE, help="Write the result to this file: .pt (neml2's form), .npz or .csv.")
@click.option("--device", metavar="DEVICE", help="Of tensors and of the leaf, such as cpu or cuda:1.")
@click.option(
    "--dtype",
    type=click.Choice(["float64", "float32"]),
    default="float64",
    show_default=True,
    help="Of tensors and of the leaf.",
)
@json_option
def command(
    stub: Path,
    driver: str,
    overrides: tuple[str, ...],
    given: tuple[str, ...],
    parameters: Path | None,
    out: Path | None,
    device: str | None,
    dtype: str,
    as_json: bool,
) -> int:
    """Run a driver of an input file.

    PATH:=VALUE overrides an option of the input file, as with neml2-run. Exit status 1 if a step does not converge;
    then no file is written.
    """
    from .._workbench.drive import run

    for text in overrides:
        if ":=" not in text:
            raise click.BadParameter(f"{text!r} is not PATH:=VALUE.", param_hint="PATH:=VALUE")
    values = assignments(given, "--set")
    with progress() as bar, heeded() as heed:
        task = bar.add_task(driver, total=None)

        def on_step(done: int, last: int) -> None:
            heed()
            bar.update(task, completed=done, total=last)

        report = run(
            stub,
            driver,
            values=values,
            parameters=parameters,
            overrides=overrides,
            out=out,
            device=device,
            dtype=dtype,
            on_step=on_step,
        )
    return show("run", report, as_json, render)


def render(report: RunReport, console: Console) -> None:
    """Print what was run, and what there is now."""
    from rich.markup import escape

    console.print(
        escape(f"{report.driver}: {report.steps - 1} steps of {report.rows} point(s) in {report.seconds:.2f} s"),
        soft_wrap=True,
    )
    for found in report.variables:
        console.print(escape(f"  {found.name}  {found.type} {list(found.shape)}"), soft_wrap=True)
    for file in (report.saved, report.written):
        if file is not None:
            console.print(escape(f"written: {file}"), soft_wrap=True)
