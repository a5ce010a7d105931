"""What can be measured, what was found, and the files in the work folder that keep it."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

TORCHES = ("2.10.0", "2.11.0", "2.12.1", "2.13.0", "2.14.1", "2.15.0")
TOLERANCE = 1e-12
# The torch that all is tested with that is no torch itself.
COMMON_TORCH = "2.13.0"


@dataclass(frozen=True)
class Variant:
    """Another way to install or to run than the wheel in its usual way."""

    told: str
    sdist: bool = False
    variables: dict[str, str] = field(default_factory=dict)
    # In place of what constraints.txt has.
    pinned: tuple[str, ...] = ()
    # Modules of tests; all if empty.
    tests: tuple[str, ...] = ()


# What the machine code of solves is tested by.
OF_MACHINE_CODE = ("test_machine_code", "test_newton", "test_block", "test_graph_calls", "test_independent_rows")
VARIANTS = {
    "sdist": Variant("installed from the sdist", sdist=True),
    "tensors": Variant("`NEML2_AOTI_PLUGIN_KERNELS=torch`", variables={"NEML2_AOTI_PLUGIN_KERNELS": "torch"}),
    "llvmlite": Variant(
        "the lowest llvmlite, with the tests of machine code", pinned=("llvmlite==0.46.0",), tests=OF_MACHINE_CODE
    ),
}


@dataclass
class Measured:
    """What was found in one environment, filled in step by step; failures by what failed, with a line of why."""

    # A release of torch, `pythonX.Y`, or a key of `VARIANTS`.
    name: str
    day: str = ""
    commit: str = ""
    # Of Python and of some distributions.
    versions: dict[str, str] = field(default_factory=dict)
    # Of the environment, in GiB.
    size: float = 0.0
    # The number of stubs that the tests had, and the torch that compiled them if it was that of another environment.
    compiled: int = 0
    compiled_under: str = ""
    # Stubs that cannot be compiled with a torch as old as this.
    left_out: dict[str, str] = field(default_factory=dict)
    uncompiled: dict[str, str] = field(default_factory=dict)
    # When the compiled stubs were evaluated, and how many of them.
    stamp: str = ""
    evaluated: int = 0
    not_evaluated: dict[str, str] = field(default_factory=dict)
    # Modules of tests that were run; all if empty.
    tests: list[str] = field(default_factory=list)
    passed: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    skipped: int = 0
    # Of the whole step.
    test_seconds: float = 0.0
    # The step that stopped all further ones.
    trouble: str = ""

    @property
    def torch(self) -> str:
        """The release of torch to install."""
        return self.name if self.name in TORCHES else COMMON_TORCH

    @property
    def variant(self) -> Variant:
        """How it is installed and run."""
        return VARIANTS.get(self.name, Variant(""))

    @property
    def good(self) -> bool:
        """Whether nothing failed."""
        return not (self.trouble or self.uncompiled or self.not_evaluated or self.failed)


@dataclass(frozen=True)
class Crossing:
    """What one torch made of the stubs that another, or itself, had compiled."""

    # Of the numbers that were compared with.
    stamp: str
    # Of the sources with which they were loaded.
    commit: str = ""
    # The number of compiled stubs.
    wanted: int = 0
    # Largest relative difference of an output, or of a derivative, by stub.
    values: dict[str, float] = field(default_factory=dict)
    derivatives: dict[str, float] = field(default_factory=dict)
    # What kept a stub from being evaluated, or all.
    refused: dict[str, str] = field(default_factory=dict)
    trouble: str = ""

    @property
    def worst(self) -> float:
        """Largest relative difference of all."""
        return max((*self.values.values(), *self.derivatives.values()), default=0.0)

    @property
    def good(self) -> bool:
        """Whether all stubs gave the same numbers."""
        return not (self.trouble or self.refused) and self.worst <= TOLERANCE

    @property
    def summary(self) -> str:
        """Number of stubs and largest difference, in a few characters."""
        if self.trouble:
            return "failed"
        number = len(self.values)
        of = str(number) if number == self.wanted else f"{number} of {self.wanted}"
        return f"{of}: {self.worst:.0e}" if self.worst else f"{of}: 0"


# What each torch made of what the others compiled: by the torch that loaded, then by the torch that compiled.
Crossings = dict[str, dict[str, Crossing]]


def read_all(work: Path) -> list[Measured]:
    """What was found so far: torches, Pythons and variants, each in their order."""
    found = [Measured(**read_json(file)) for file in work.glob("results/*/result.json")]
    order = [*TORCHES, *VARIANTS]
    return sorted(
        found,
        key=lambda one: (
            order.index(one.name) if one.name in order else len(TORCHES) - 0.5,
            [int(number) for number in re.findall(r"\d+", one.name)],
        ),
    )


def read_crossings(work: Path, results: list[Measured]) -> Crossings:
    """What was loaded so far of what the results speak of, and has not been compiled again since."""
    stamps = {one.name: one.stamp for one in results}
    found = {one.name: read_json(work / "results" / one.name / "crossings.json") for one in results}
    return {
        here: {t: Crossing(**one) for t, one in row.items() if one["stamp"] == stamps.get(t)}
        for here, row in found.items()
        if row
    }


def write_crossings(folder: Path, found: dict[str, Crossing]) -> None:
    """Keep what was loaded under one torch."""
    write_json(folder / "crossings.json", {there: asdict(one) for there, one in found.items()})


def read_json(file: Path) -> dict[str, Any]:
    """Read a file; give nothing if it is not there."""
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return found


def write_json(file: Path, value: dict[str, Any]) -> None:
    """Write a file whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(".new")
    scratch.write_text(json.dumps(value, indent=1), encoding="utf-8")
    scratch.replace(file)
