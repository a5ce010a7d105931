"""`neml2-aoti warm`: make the machine code of solves ahead, as in the build of a container."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import click

from .options import json_option
from .output import show
from .process import FINE, SHORT

EPILOG = """\b
Examples:
  neml2-aoti warm
  NEML2_AOTI_PLUGIN_CACHE=/opt/cache neml2-aoti warm
"""


@dataclass(frozen=True)
class WarmReport:
    """The machine code of solves."""

    implementation: str  # what solves are done by, `native` or `torch`
    reason: str  # why
    file: str  # where the machine code is kept; empty where it is not


@click.command(epilog=EPILOG)
@json_option
def command(as_json: bool) -> int:
    """Make machine code for this processor and keep it, so that no first solve waits for it.

    NEML2_AOTI_PLUGIN_CACHE names another folder than the user's cache folder. Exit status 1 if it cannot be kept.
    """
    from .._solve import machine_code

    code, reason = machine_code.machine_code()
    if code is None:
        return show("warm", WarmReport(machine_code.TORCH, reason, ""), as_json, render, FINE)
    report = WarmReport(machine_code.NATIVE, reason, str(code.kept or ""))
    return show("warm", report, as_json, render, FINE if code.kept else SHORT)


def render(report: WarmReport) -> Iterator[str]:
    """Where the machine code is."""
    if report.implementation == "torch":
        text = f"nothing to make: solves are done by torch's operations ({report.reason})"
    elif report.file:
        text = f"machine code is kept in {report.file}"
    else:
        text = (
            "the machine code cannot be kept. Name a folder that only you can write to: NEML2_AOTI_PLUGIN_CACHE=FOLDER"
        )
    yield text
