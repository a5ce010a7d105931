"""`neml2-aoti example`, `seal` and `warm`: what is done once, before a model is compiled, or loaded elsewhere."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .._files import draft
from .._solve import machine_code
from ..errors import InputError
from .output import Report, written

# A copy of the one in `stubs/`, which a wheel does not have.
SOURCE = Path(__file__).with_name("viscoplasticity.i")
DERIVATIVES = "stress:strain"


@dataclass(frozen=True)
class ExampleReport(Report):
    """A source input that was written."""

    written: str  # the file
    compile: str  # the command that compiles its model
    run: str  # the command that runs its driver then

    def render(self) -> Iterator[str]:
        yield from written(self.written)
        yield "Compile its model, which takes a minute or two, and run its driver:"
        yield f"  {self.compile}"
        yield f"  {self.run}"


def example(folder: Path) -> ExampleReport:
    """Write the source input of a viscoplastic model, and give the commands that compile and run it."""
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
    return ExampleReport(
        str(target),
        f"neml2-compile {source} --driver driver -d {DERIVATIVES} --output-dir {aoti}",
        f"neml2-aoti run {stub} driver --out {result}",
    )


@dataclass(frozen=True)
class SealReport(Report):
    """What was sealed."""

    seals: tuple[str, ...]  # the files that were written, one for each artifact

    def render(self) -> tuple[str, ...]:
        return self.seals


def seal(paths: tuple[str, ...]) -> SealReport:
    """Seal artifacts."""
    # These import torch, for which the other commands here do not wait.
    from .._artifact import locate
    from .target import find_target

    # All are looked for before one is sealed.
    targets = [find_target(path) for path in paths]
    return SealReport(tuple(str(locate.seal(found.artifact)) for found in targets))


@dataclass(frozen=True)
class WarmReport(Report):
    """The machine code of solves."""

    implementation: str  # what solves are done by, `native` or `torch`
    reason: str  # why
    file: str  # where the machine code is kept; empty where it is not

    @property
    def fine(self) -> bool:
        return self.implementation == "torch" or bool(self.file)

    def render(self) -> Iterator[str]:
        if self.implementation == "torch":
            yield f"nothing to make: solves are done by torch's operations ({self.reason})"
        elif self.file:
            yield f"machine code is kept in {self.file}"
        else:
            yield "the machine code cannot be kept. Name a folder that only you can write to: " + (
                "NEML2_AOTI_PLUGIN_CACHE=FOLDER"
            )


def warm() -> WarmReport:
    """Make machine code, or read what is kept."""
    code, reason = machine_code.machine_code()
    if code is None:
        return WarmReport(machine_code.TORCH, reason, "")
    return WarmReport(machine_code.NATIVE, reason, str(code.kept or ""))
