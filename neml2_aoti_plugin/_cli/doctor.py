"""`neml2-aoti doctor`: does this environment run compiled models, and this artifact?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from . import FINE, SHORT
from .output import device_options, json_option, show

if TYPE_CHECKING:
    from rich.console import Console

    from .._workbench.diagnose import Diagnosis

EPILOG = """\b
Examples:
  neml2-aoti doctor
  neml2-aoti doctor aoti/elasticity
  neml2-aoti doctor aoti/elasticity_aoti.i --try-binding
"""

COLOURS = {"fine": "green", "advice": "yellow", "problem": "bold red"}


@click.command(epilog=EPILOG, short_help="What is installed, what is wrong, and what mends it.")
@click.argument("target", metavar="[ARTIFACT|STUB]", required=False)
@click.argument("model", required=False)
@click.option(
    "--try-binding",
    is_flag=True,
    help="Try neml2's own binding in a process of its own, with the artifact if one is given, instead of telling "
    "what we measured.",
)
@device_options
@json_option
def command(
    target: str | None, model: str | None, try_binding: bool, device: str | None, dtype: str | None, as_json: bool
) -> int:
    """Tell what is installed, what is active, what is wrong, and what mends it.

    Exit status 1 if something is wrong.
    """
    from .._workbench.diagnose import diagnose
    from .._workbench.target import find_target

    found = None if target is None else find_target(target, model)
    report = diagnose(found, device, dtype, try_binding=try_binding)
    return show("doctor", report, as_json, render, FINE if report.healthy else SHORT)


def render(report: Diagnosis, console: Console) -> None:
    """Print the facts, then the findings."""
    from rich.markup import escape
    from rich.table import Column, Table

    facts = Table.grid(Column(no_wrap=True), Column(overflow="fold"), padding=(0, 2))
    versions = ", ".join(f"{name} {version or '-'}" for name, version in report.versions.items())
    rows = {
        "versions": versions,
        "plugin": f"{'active' if report.plugin.active else 'not active'}, armed by {report.plugin.armed}, over "
        f"{report.plugin.owner or 'nothing'}",
        "neml2's binding": f"{'on disk' if report.plugin.native_on_disk else 'not on disk'}; {report.binding}",
        "Newton loop": f"{report.kernels.implementation or '-'} ({report.kernels.reason})",
        "compiled graphs": report.plugin.graphs,
        "machine code": f"{report.kernels.files} files in {report.kernels.folder or '-'}",
        "compiler": report.compiler.version or "-",
        "processor": f"{report.processor.machine}, {report.processor.cores} core(s), "
        f"{' '.join(report.processor.instruction_sets) or 'no instruction sets told'}",
        "threads": f"{report.threads.torch} (OMP_NUM_THREADS={report.threads.variable or ''})",
        "devices": ", ".join(f"{device.name} ({device.kind})" for device in report.devices),
        "variables": ", ".join(f"{name}={value}" for name, value in report.variables.items()) or "none set",
    }
    if report.artifact is not None:
        told = report.artifact
        rows["artifact"] = f"{told.model} ({told.leaf}), schema {told.schema}, neml2 {told.release}"
    for name, value in rows.items():
        facts.add_row(f"[bold]{name}[/]", escape(value))
    console.print(facts)
    console.print()
    findings = Table.grid(Column(no_wrap=True), Column(no_wrap=True), Column(overflow="fold"), padding=(0, 2))
    for finding in report.findings:
        colour = COLOURS[finding.level]
        cure = f"\n[bold]-> {escape(finding.cure)}[/]" if finding.cure else ""
        findings.add_row(f"[{colour}]{finding.level}[/]", finding.subject, escape(finding.says) + cure)
    console.print(findings)
