"""`neml2-aoti warm`: compile the kernels of the Newton loop ahead, as in the build of a container."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from . import FINE, SHORT
from .output import json_option, show

if TYPE_CHECKING:
    from rich.console import Console

EPILOG = """\b
Examples:
  neml2-aoti warm
  NUMBA_CACHE_DIR=/opt/kernels neml2-aoti warm
"""


@dataclass(frozen=True)
class WarmReport:
    """The machine code of the kernels.

    Args:
        implementation: what the Newton loop runs on, `numba` or `torch`.
        reason: why.
        files: number of files of machine code that there are.
        folders: where they are.
    """

    implementation: str
    reason: str
    files: int
    folders: tuple[str, ...]


@click.command(epilog=EPILOG, short_help="Compile the kernels of the Newton loop ahead.")
@json_option
def command(as_json: bool) -> int:
    """Compile the kernels of the Newton loop and keep their machine code, so that no first solve waits for it.

    The folder is numba's cache; NUMBA_CACHE_DIR names another one. Exit status 1 if no folder can be written to.
    """
    from ..solve import choice

    arrays, reason = choice.machine()
    if arrays is None:
        return show("warm", WarmReport(choice.TORCH, reason, 0, ()), as_json, render, FINE)
    from ..solve import warm

    warm.compile_all()
    found = warm.files()
    report = WarmReport(choice.NUMBA, reason, len(found), tuple(sorted({str(file.parent) for file in found})))
    return show("warm", report, as_json, render, FINE if found else SHORT)


def render(report: WarmReport, console: Console) -> None:
    """Print how many files there are, and where."""
    from rich.markup import escape

    if report.implementation != "numba":
        text = f"nothing to compile: the Newton loop runs on torch's operations ({report.reason})"
    elif report.files:
        text = f"{report.files} files of machine code in {' and '.join(report.folders)}"
    else:
        text = "the machine code cannot be kept: no folder can be written to. Name one in NUMBA_CACHE_DIR."
    console.print(escape(text), soft_wrap=True)
