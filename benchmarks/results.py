"""What is found, case by case, and the file that it is kept in."""

from __future__ import annotations

import json
import os
import statistics
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .cases import Case

# What takes longer hangs, in seconds, and is ended. The largest case takes a quarter of an hour.
HANGS = 2400.0


@dataclass(frozen=True)
class Ratios:
    """The ratio of two times over the rounds: median, least, first and third quartile."""

    median: float
    least: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        """The distance of the quartiles."""
        return self.high - self.low


@dataclass
class Found:
    """What was found in one case.

    Args:
        key: of the case.
        seconds: of one call in each round, by peer.
        skipped: why a peer was left out, by peer.
        deviations: largest relative deviation of a row from the plugin's, by peer.
        judged: rows that the C++ runtime had left at its tolerance, and that it solved again with a tighter one.
        stable: whether two calls of the plugin gave the same bits; None if that was not asked.
        updates: number of rows with 0, 1, 2, ... Newton updates.
        growth: bytes by which the peak memory of a fresh process grew in one call, by peer.
        size: bytes of inputs and of outputs.
        trouble: why there is nothing.
    """

    key: str
    seconds: dict[str, list[float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    deviations: dict[str, float] = field(default_factory=dict)
    judged: int = 0
    stable: bool | None = None
    updates: list[int] = field(default_factory=list)
    growth: dict[str, int] = field(default_factory=dict)
    size: dict[str, int] = field(default_factory=dict)
    trouble: str = ""

    def ratios(self, peer: str, to: str) -> Ratios | None:
        """The time of one peer over that of another in the same round; None if one was not timed."""
        if peer not in self.seconds or to not in self.seconds:
            return None
        found = [a / b for a, b in zip(self.seconds[peer], self.seconds[to], strict=True)]
        low, middle, high = statistics.quantiles(found, n=4, method="inclusive")
        return Ratios(middle, min(found), low, high)

    def time(self, peer: str) -> float | None:
        """Median time of one call, in seconds."""
        return median(self.seconds[peer]) if peer in self.seconds else None


@dataclass(frozen=True)
class Orders:
    """What a worker is to do.

    Args:
        model: entry of the stub catalogue.
        batch: kind of batch.
        folder: the compiled stub.
        pool: file of the rows; made if it is not there.
        cases: the fields of each case.
        threads: of torch's pool for the work inside an operator.
        deadline: when all should be done, in seconds since the epoch.
        known: quantity, peer, rows and seconds of a call that was timed before.
        memory: bytes that a peer needs for each row, as far as that has been measured.
        only_essential: why eager neml2 and `neml2.compile` are left out, or nothing.
        only_plugin: leave the C++ runtime out as well.
    """

    model: str
    batch: str
    folder: str
    pool: str
    cases: list[list[Any]]
    threads: int
    deadline: float
    known: list[list[Any]] = field(default_factory=list)
    memory: dict[str, float] = field(default_factory=dict)
    only_essential: str = ""
    only_plugin: bool = False


class Store:
    """The results of a run, written to a file after each case."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.header: dict[str, Any] = {}
        self.cases: dict[str, Found] = {}
        if file.exists():
            content = json.loads(file.read_text(encoding="utf-8"))
            self.header = content["header"]
            # A file of an earlier version may tell more.
            names = {f.name for f in fields(Found)}
            for key, found in content["cases"].items():
                self.cases[key] = Found(**{name: value for name, value in found.items() if name in names})

    def begin(self, header: dict[str, Any]) -> None:
        """Start over, with what was found before put aside under another name."""
        if self.cases:
            day = str(self.header.get("begun", "before")).replace(":", "").replace(" ", "-")
            self.file.replace(self.file.with_name(f"results-{day}.json"))
        self.header, self.cases = header, {}
        self.write()

    def put(self, found: Found) -> None:
        """Keep what was found in a case."""
        self.cases[found.key] = found
        self.write()

    def write(self) -> None:
        """Write the file, all of it or nothing."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.file.with_name(f"{self.file.name}.{os.getpid()}")
        content = {"header": self.header, "cases": {key: asdict(found) for key, found in self.cases.items()}}
        scratch.write_text(json.dumps(content, indent=1), encoding="utf-8")
        scratch.replace(self.file)

    def get(self, case: Case) -> Found | None:
        """What was found in a case, if it was measured."""
        return self.cases.get(case.key)


def median(values: list[float]) -> float:
    """The median."""
    return statistics.median(values)
