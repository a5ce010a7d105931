"""Metadata files of old artifacts: what is in this folder, and how it comes here from the cache of `legacy.build`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from legacy import build  # noqa: E402

WANTED = [
    *((release, "multi") for release in ("3.0.0", "3.0.3", "3.0.6", "3.0.7", "3.1.0")),
    *((release, "promoted_provider") for release in ("3.0.0", "3.0.3")),
    ("3.0.3", "cross_group"),
    ("3.0.3", "cross_group_folded"),
]


def document(release: str, scenario: str = "multi") -> dict[str, Any]:
    """The metadata that a release wrote for a scenario."""
    found: dict[str, Any] = json.loads((HERE / f"{release}-{scenario}.json").read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    for release, scenario in WANTED:
        # Without white space that the file does not need.
        text = json.dumps(json.loads(build.metadata(release, scenario).read_text()), separators=(",", ":"))
        (HERE / f"{release}-{scenario}.json").write_text(f"{text}\n")
