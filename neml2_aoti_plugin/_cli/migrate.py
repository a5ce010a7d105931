"""`neml2-aoti migrate`: rewrite an old artifact for neml2's own runtime."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .output import json_option, show

if TYPE_CHECKING:
    from rich.console import Console

    from .._workbench.migrate import MigrateReport

EPILOG = """\b
Examples:
  neml2-aoti migrate old/elasticity_aoti.i --out new
  neml2-aoti migrate old/elasticity --out new --drop-derivatives
"""


@click.command(epilog=EPILOG, short_help="Rewrite an old artifact for neml2's own runtime.")
@click.argument("target", metavar="ARTIFACT|STUB")
@click.argument("model", required=False)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the new artifact and its stub.")
@click.option("--drop-derivatives", is_flag=True, help="Leave derivatives out whose graphs do not fit.")
@json_option
def command(target: str, model: str | None, out: Path, drop_derivatives: bool, as_json: bool) -> int:
    """Rewrite an artifact of an older neml2 in the layout and schema of neml2 3.1.0.

    neml2's own C++ runtime loads only those; this plugin runs old ones as they are. The graphs are copied unchanged,
    so it works where they are what the newest schema expects: not for implicit models from before 3.0.7, whose Newton
    step is one graph, nor for promoted parameters from before 3.0.4. Exit status 1 if it cannot be done.
    """
    from .._workbench.migrate import migrate
    from .._workbench.target import find_target

    report = migrate(find_target(target, model), out, drop_derivatives=drop_derivatives)
    return show("migrate", report, as_json, render)


def render(report: MigrateReport, console: Console) -> None:
    """Print what was written."""
    from rich.markup import escape

    lines = [
        f"{report.model}: schema {report.schema} (neml2 {report.release}) -> schema {report.new_schema}, "
        f"{', '.join(report.leaves)}",
        f"written: {report.written}",
        f"written: {report.stub}",
    ]
    if report.dropped:
        lines.append(f"without the derivatives {', '.join(report.dropped)}")
    console.print(escape("\n".join(lines)), soft_wrap=True)
