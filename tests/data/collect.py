"""Copy metadata files of old artifacts from the cache of `legacy.build` to this folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from legacy import build  # noqa: E402

WANTED = [
    *((release, "multi") for release in ("3.0.0", "3.0.3", "3.0.6", "3.0.7", "3.1.0")),
    *((release, "promoted_provider") for release in ("3.0.0", "3.0.3")),
    ("3.0.3", "cross_group"),
    ("3.0.3", "cross_group_folded"),
]


def compact(release: str, scenario: str) -> str:
    """The metadata of one artifact, without white space that the file does not need."""
    return json.dumps(json.loads(build.metadata(release, scenario).read_text()), separators=(",", ":")) + "\n"


if __name__ == "__main__":
    for release, scenario in WANTED:
        (HERE / f"{release}-{scenario}.json").write_text(compact(release, scenario))
