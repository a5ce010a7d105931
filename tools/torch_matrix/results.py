"""What was found under each torch, and the files in the work folder that keep it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

TORCHES = ("2.10.0", "2.11.0", "2.12.1", "2.13.0", "2.14.1", "2.15.0")
TOLERANCE = 1e-12
# The torch that other Pythons are tested with.
PYTHON_TORCH = "2.13.0"


@dataclass
class Measured:
    """What was found under one torch, filled in step by step.

    Args:
        torch: Its release, as asked for.
        day: On which this was.
        stamp: When the compiled stubs were evaluated.
        commit: Of the sources.
        versions: Of Python and of some distributions in the environment.
        size: Of the environment, in GiB.
        compiled: Stubs that were compiled.
        cached: Stubs that an earlier run had compiled under this torch; under another Python, those it was given.
        left_out: Stubs that cannot be compiled with a torch as old as this, with the reason.
        uncompiled: Stubs that failed to compile, with the last line of what was said.
        compile_seconds: For those that were compiled.
        evaluated: Compiled stubs that were loaded and evaluated.
        not_evaluated: The others, with what went wrong.
        passed: Number of tests.
        failed: Names of tests, with the first line of what went wrong.
        skipped: Number of tests.
        test_seconds: Of the whole test run.
        trouble: The step that stopped all further ones under this torch.
    """

    torch: str
    day: str = ""
    stamp: str = ""
    commit: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    size: float = 0.0
    compiled: int = 0
    cached: int = 0
    left_out: dict[str, str] = field(default_factory=dict)
    uncompiled: dict[str, str] = field(default_factory=dict)
    compile_seconds: float = 0.0
    evaluated: int = 0
    not_evaluated: dict[str, str] = field(default_factory=dict)
    passed: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    skipped: int = 0
    test_seconds: float = 0.0
    trouble: str = ""

    @property
    def good(self) -> bool:
        """Whether nothing failed."""
        return not (self.trouble or self.uncompiled or self.not_evaluated or self.failed)


@dataclass(frozen=True)
class Crossing:
    """What one torch made of the stubs that another, or itself, had compiled.

    Args:
        stamp: Of the numbers that were compared with.
        commit: Of the sources with which they were loaded.
        wanted: Number of compiled stubs.
        values: Largest relative difference of an output, by stub.
        derivatives: Largest relative difference of a derivative, by stub that has any.
        refused: What kept a stub from being loaded or evaluated.
        trouble: What kept all of them.
    """

    stamp: str
    commit: str = ""
    wanted: int = 0
    values: dict[str, float] = field(default_factory=dict)
    derivatives: dict[str, float] = field(default_factory=dict)
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


def folder_of(work: Path, torch: str) -> Path:
    """Give the folder of what was found under one torch."""
    return work / f"torch-{torch}"


def name_of(python: str) -> str:
    """Name what is found under a Python, by its major and minor number, as a torch is named elsewhere."""
    return f"{PYTHON_TORCH}-python{python}"


def release_of(name: str) -> str:
    """Give the release of torch in what `name_of` gave, or a release as it is."""
    return name.partition("-")[0]


def numbers_of(work: Path, torch: str) -> Path:
    """Say where the numbers are that a torch gave for what it has compiled."""
    return folder_of(work, torch) / "numbers.pt"


def read_results(work: Path) -> dict[str, Measured]:
    """Read what was found so far, by torch."""
    told = {torch: read_json(_result(work, torch)) for torch in TORCHES}
    return {torch: Measured(**one) for torch, one in told.items() if one}


def read_pythons(work: Path) -> list[Measured]:
    """Read what was found so far under other Pythons, oldest first."""
    files = work.glob(f"torch-{name_of('*')}/result.json")
    found = [Measured(**read_json(file)) for file in files]
    return sorted(found, key=lambda one: [int(n) for n in one.torch.partition("-python")[2].split(".")])


def write_result(work: Path, found: Measured) -> None:
    """Keep what was found under one torch."""
    write_json(_result(work, found.torch), asdict(found))


def read_loaded(work: Path, here: str) -> dict[str, Crossing]:
    """Read all that was ever loaded under one torch, by the torch that compiled."""
    return {there: Crossing(**one) for there, one in read_json(_crossings(work, here)).items()}


def write_loaded(work: Path, here: str, found: dict[str, Crossing]) -> None:
    """Keep what was loaded under one torch."""
    write_json(_crossings(work, here), {there: asdict(one) for there, one in found.items()})


def read_crossings(work: Path, results: dict[str, Measured]) -> Crossings:
    """Read what was loaded so far of what the results speak of."""
    loaded = {here: read_loaded(work, here) for here in TORCHES if _crossings(work, here).exists()}
    return {
        here: {there: one for there, one in row.items() if there in results and one.stamp == results[there].stamp}
        for here, row in loaded.items()
    }


def read_json(file: Path) -> dict[str, Any]:
    """Read a file; give nothing if it is not there."""
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return found


def write_json(file: Path, value: dict[str, Any]) -> None:
    """Write a file whole or not at all."""
    scratch = file.with_suffix(".new")
    scratch.write_text(json.dumps(value, indent=1), encoding="utf-8")
    scratch.replace(file)


def _result(work: Path, torch: str) -> Path:
    return folder_of(work, torch) / "result.json"


def _crossings(work: Path, here: str) -> Path:
    return folder_of(work, here) / "crossings.json"
