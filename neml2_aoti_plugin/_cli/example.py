"""`neml2-aoti example`: a source input that comes with the package, to begin with."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click

from ..errors import InputError
from .options import FILE, json_option
from .output import show

# A copy of the one in `stubs/`, which a wheel does not have.
SOURCE = Path(__file__).with_name("viscoplasticity.i")
DERIVATIVES = "stress:strain"

EPILOG = """\b
Examples:
  neml2-aoti example first
"""


@dataclass(frozen=True)
class ExampleReport:
    """A source input that was written."""

    written: str  # the file
    compile: str  # the command that compiles its model
    run: str  # the command that runs its driver then


@click.command(epilog=EPILOG)
@click.argument("folder", type=FILE, metavar="DIR")
@json_option
def command(folder: Path, as_json: bool) -> int:
    """Write a viscoplastic model with a driver to the folder DIR, and show the commands that compile and run it.

    The driver pulls three material points to 3 % strain. The folder is made if it is not there; a file that is there
    is not written over.
    """
    from .._files import draft

    target = folder / SOURCE.name
    if os.path.lexists(target):
        raise InputError(f"{target}: is there already. Give another folder, or move it away.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be made ({error.strerror}). Give a folder that can be written to."
        ) from None
    with draft(target) as scratch:
        scratch.write_bytes(SOURCE.read_bytes())
    source, aoti = shlex.quote(str(target)), shlex.quote(str(folder / "aoti"))
    stub, result = (shlex.quote(str(folder / name)) for name in ("aoti/viscoplasticity_aoti.i", "result.npz"))
    report = ExampleReport(
        str(target),
        f"neml2-compile {source} --driver driver -d {DERIVATIVES} --output-dir {aoti}",
        f"neml2-aoti run {stub} driver --out {result}",
    )
    return show("example", report, as_json, render)


def render(report: ExampleReport) -> Iterator[str]:
    """What was written, and what to do with it."""
    yield f"written: {report.written}"
    yield "Compile its model, which takes a minute or two, and run its driver:"
    yield f"  {report.compile}"
    yield f"  {report.run}"
