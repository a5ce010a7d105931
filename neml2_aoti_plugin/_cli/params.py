"""`neml2-aoti params`: the promoted parameters, read, set and handed on in a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .options import assignments
from .output import device_options, json_option, show

if TYPE_CHECKING:
    from rich.console import Console

    from .._workbench.params import ParametersReport

EPILOG = """\b
Examples:
  neml2-aoti params aoti/promoted
  neml2-aoti params aoti/promoted --set promoted.E=80000 --out soft.safetensors
  neml2-aoti params aoti/promoted --from soft.safetensors
  python -c "from neml2.aoti import Model; Model('aoti/promoted', parameters='soft.safetensors')"
"""

FILE = click.Path(path_type=Path)


@click.command(epilog=EPILOG, short_help="Promoted parameters: show, set, write to a file.")
@click.argument("target", metavar="ARTIFACT|STUB")
@click.argument("model", required=False)
@click.option("--from", "file", type=FILE, help="Begin with the values in this file instead of the artifact's.")
@click.option("--set", "given", multiple=True, metavar="NAME=VALUE", help="Give a parameter another value.")
@click.option("--out", type=FILE, help="Write the values to this file (.safetensors).")
@click.option("--force", is_flag=True, help="Write over --out, whatever file it is.")
@device_options
@json_option
def command(
    target: str,
    model: str | None,
    file: Path | None,
    given: tuple[str, ...],
    out: Path | None,
    force: bool,
    device: str | None,
    dtype: str | None,
    as_json: bool,
) -> int:
    """Show the promoted parameters, and write values to a file that `Model(..., parameters=FILE)` takes.

    The artifact itself is never changed. A file is for one artifact, by the SHA-256 of its metadata: --from also takes
    that of another artifact with the same parameters, and --out writes it for this one. A file that is there is
    replaced if it holds parameters and is not that of --from; with --force in any case.
    """
    from .._workbench.params import parameters
    from .._workbench.target import find_target

    values = assignments(given, "--set")
    if given and out is None:
        raise click.UsageError("--set changes nothing by itself. Give a file to write as well: --out FILE.safetensors")
    report = parameters(find_target(target, model), values, file, out, device, dtype, force=force)
    return show("params", report, as_json, render)


def render(report: ParametersReport, console: Console) -> None:
    """Print the parameters."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    if not report.parameters:
        cure = "Promote some: neml2-compile ... -p NAME"
        console.print(escape(f"{report.model} has no promoted parameters. {cure}"))
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title in ("parameter", "shape", "value", ""):
        table.add_column(title)
    for found in report.parameters:
        shown = ", ".join(f"{value:.10g}" for value in found.values[:6]) + (", ..." if len(found.values) > 6 else "")
        mark = "changed" if found.name in report.changed else ""
        table.add_row(escape(found.name), escape(str(list(found.shape))), shown, f"[yellow]{mark}[/]")
    console.print(table)
    if report.written is not None:
        console.print(escape(f"written: {report.written}"))
