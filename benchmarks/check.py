"""Compare the ratios to the C++ runtime with those stored in the repository: has anything become slower?

A ratio moves less from machine to machine than a time, and less from day to day; what is left is told by its quartiles
and by a second measurement.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .cases import NATIVE, PLUGIN, QUICK_ROWS, SUBJECTS
from .results import Ratios, Store
from .run import all_cases

FILE = Path(__file__).resolve().parent / "reference.json"
# Smaller changes, relative to the reference, are not told: two runs of the same sources differ as much.
LEAST = 0.05
# Where the quartile distances together are more than this part of the reference, hardly any change can be seen.
BLIND = 0.3
# What is kept of a run's header.
KEPT = (
    "commit",
    "changed",
    "sources",
    "machine",
    "versions",
    "threads",
    "optimised",
    "stubs",
    "begun",
    "command",
    "load",
)


@dataclass(frozen=True)
class Reference:
    """Ratios of the plugin's time to the C++ runtime's, by case, that later ones are compared with."""

    header: dict[str, Any]
    ratios: dict[str, Ratios]


@dataclass(frozen=True)
class Worse:
    """A case that has become slower."""

    key: str
    before: Ratios
    now: Ratios

    def __str__(self) -> str:
        before, now = (f"{r.median:.3f} (quartiles {r.low:.3f} to {r.high:.3f})" for r in (self.before, self.now))
        grown = 100.0 * (self.now.median / self.before.median - 1.0)
        return f"{self.key}: {now} of the C++ runtime's time, {grown:.0f} % more than {before}"


def worse(before: Mapping[str, Ratios], now: Mapping[str, Ratios]) -> list[Worse]:
    """The cases in both whose median has grown by more than both quartile distances together, and by `LEAST`."""
    found = [Worse(key, before[key], now[key]) for key in before if key in now]
    return [
        one
        for one in found
        if one.now.median - one.before.median > max(one.before.spread + one.now.spread, LEAST * one.before.median)
    ]


def blind(before: Mapping[str, Ratios], now: Mapping[str, Ratios]) -> list[str]:
    """The cases that are too noisy to tell whether they have become slower; arguments as for `worse`."""
    both = [key for key in before if key in now]
    return [key for key in both if before[key].spread + now[key].spread > BLIND * before[key].median]


def ratios_in(store: Store) -> dict[str, Ratios]:
    """The ratios to the C++ runtime of the cases of a quick run, as far as they were measured."""
    found = {}
    for case in all_cases(SUBJECTS, QUICK_ROWS, memory=False):
        measured = store.get(case)
        ratios = measured.ratios(PLUGIN, NATIVE) if measured else None
        if ratios is not None:
            found[case.key] = ratios
    return found


def write(store: Store, file: Path = FILE) -> int:
    """Store the ratios of a run; gives the number of cases."""
    reference = Reference({name: store.header.get(name) for name in KEPT}, ratios_in(store))
    rounded = {key: {name: round(x, 4) for name, x in asdict(r).items()} for key, r in reference.ratios.items()}
    file.write_text(json.dumps({"header": reference.header, "ratios": rounded}, indent=1) + "\n", encoding="utf-8")
    return len(rounded)


def read(file: Path = FILE) -> Reference:
    """The stored ratios.

    Raises:
        FileNotFoundError: none were stored.
    """
    content = json.loads(file.read_text(encoding="utf-8"))
    return Reference(content["header"], {key: Ratios(**found) for key, found in content["ratios"].items()})


def unlike(reference: Reference, header: Mapping[str, Any]) -> list[str]:
    """How the conditions differ from those of the reference: each may move the ratios."""
    before = reference.header
    names = ("machine", "versions", "threads", "optimised")
    found = [
        f"{name} {header[name]}, of the reference {before[name]}" for name in names if header[name] != before[name]
    ]
    others = [model for model, stub in header["stubs"].items() if stub != before["stubs"].get(model, stub)]
    return [*found, *([f"other stubs of {', '.join(others)}"] if others else [])]
