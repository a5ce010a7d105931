"""The catalogue of stubs: which model of which input is compiled, with which flags, and what for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Stub:
    """One entry of the catalogue.

    Args:
        name: Name of the entry, the argument of `stubs.build.compiled`.
        file: Input file, relative to this folder.
        model: Name of the `[Models]` block that is compiled.
        purpose: What the entry is for, in one sentence.
        flags: Further arguments of neml2-compile.
        driver: Name of the `[Drivers]` block that the compiled stub carries.
        appendix: File with a `[Drivers]` block to append to the compiled stub; for an entry with renames, which
            neml2-compile compiles only without a driver.
    """

    name: str
    file: str
    model: str
    purpose: str
    flags: tuple[str, ...] = ()
    driver: str = "driver"
    appendix: str | None = None

    @property
    def path(self) -> Path:
        """Path of the input file."""
        return FOLDER / self.file

    @property
    def appendix_path(self) -> Path | None:
        """Path of the appendix, if there is one."""
        return FOLDER / self.appendix if self.appendix else None


ALL_PAIRS = ("-d", ":")

ELASTICITY = Stub(
    name="elasticity",
    file="elasticity.i",
    model="elasticity",
    flags=ALL_PAIRS,
    purpose="The smallest artifact: one forward segment with one constant derivative block.",
)

_ENTRIES = (
    ELASTICITY,
    Stub(
        name="viscoplasticity",
        file="viscoplasticity.i",
        model="viscoplasticity",
        flags=("-d", "stress:strain"),
        purpose="One implicit segment: 7 unknowns, constant predictor, line search and the tangent stress:strain.",
    ),
    Stub(
        name="composed",
        file="composed.i",
        model="composed",
        flags=ALL_PAIRS,
        purpose="Three segments, explicit, implicit, explicit, so that derivatives must be chained across them.",
    ),
    Stub(
        name="crystal",
        file="crystal.i",
        model="crystal",
        flags=("-d", "elastic_strain:stretching"),
        purpose="A single crystal whose unknowns include an orientation; its 12 slip systems are a sub-batch inside.",
    ),
    Stub(
        name="promoted",
        file="promoted.i",
        model="promoted",
        flags=(
            *("-p", "promoted.E", "-p", "promoted.nu"),
            *ALL_PAIRS,
            *("-d", "stress:promoted.E", "-d", "stress:promoted.nu"),
        ),
        purpose="One forward segment with two promoted parameters, their Jacobian and their adjoint.",
    ),
)

CATALOGUE: dict[str, Stub] = {entry.name: entry for entry in _ENTRIES}
