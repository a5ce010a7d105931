"""docs/artifact-format.md: its tables of keys are what real metadata files hold, release by release."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import references
from data import collect
from legacy import build
from legacy.catalogue import pairs
from stubs.catalogue import CATALOGUE

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "artifact-format.md").read_text(encoding="utf-8")

Object = dict[str, Any]

# What no scenario of legacy/ has: rare, or only in models of the newest release, which has stubs of its own.
NOT_ASKED_FOR = {
    ("Boundary variables", "sparsity"),
    ("Implicit segments", "predictor_feedback"),
    ("Promoted parameters", "dtype"),
}


def tables() -> dict[str, dict[str, tuple[set[int], bool]]]:
    """By heading and key, the schemas that have the key, and whether each object has it."""
    found: dict[str, dict[str, tuple[set[int], bool]]] = {}
    heading = ""
    for line in PAGE.splitlines():
        if line.startswith("### "):
            heading = line[4:]
        row = re.match(r"\| `(\w+)` \| ([\d ]+) \| (yes)? ?\|", line)
        if row:
            found.setdefault(heading, {})[row[1]] = ({int(n) for n in row[2].split()}, row[3] is not None)
    return found


# The heading of the objects in each list, wherever the list stands.
LISTS = {
    **dict.fromkeys(("inputs", "outputs"), "Boundary variables"),
    "parameters": "Promoted parameters",
    **dict.fromkeys(("jacobian_pairs", "param_jacobian_pairs"), "Pairs"),
    **dict.fromkeys(("unknowns", "givens", "residuals", "per_var_info"), "Segment variables"),
    **dict.fromkeys(("unknown_group_infos", "given_group_infos", "residual_group_infos"), "Groups"),
}


def objects(thing: Object, heading: str = "Top level") -> Iterator[tuple[str, Object]]:
    """Each object of a metadata file, with the heading of its table."""
    yield heading, thing
    if "solver_config" in thing:
        yield "Newton settings", thing["solver_config"]
    for segment in thing.get("segments", ()):
        yield from objects(segment, "Explicit segments" if segment["kind"] == "forward" else "Implicit segments")
    for name in LISTS.keys() & thing.keys():
        for entry in thing[name] or ():
            # The variables of explicit segments, and parameters, are names alone.
            if isinstance(entry, dict) and not (name in ("inputs", "outputs") and heading != "Top level"):
                yield from objects(entry, LISTS[name])


def wrong(metadata: Object) -> list[str]:
    """What a metadata file has otherwise than the page says."""
    schema, page, found = metadata["schema_version"], tables(), []
    for heading, thing in objects(metadata):
        there = {key for key, (schemas, _) in page[heading].items() if schema in schemas}
        must = {key for key, (schemas, each) in page[heading].items() if schema in schemas and each}
        found += [f"{heading}: {key!r} is not on the page" for key in thing.keys() - there]
        found += [f"{heading}: {key!r} is not there" for key in must - thing.keys()]
    return sorted(set(found))


@pytest.mark.parametrize(("release", "scenario"), collect.WANTED)
def test_keys_of_stored_metadata(release: str, scenario: str) -> None:
    assert not wrong(collect.document(release, scenario))


@pytest.mark.parametrize("name", CATALOGUE)
def test_keys_of_the_newest_schema(name: str) -> None:
    assert not wrong(json.loads((references.case(name).artifact / "metadata.json").read_text(encoding="utf-8")))


@pytest.mark.legacy
@pytest.mark.timeout(3600)
def test_keys_of_every_schema() -> None:
    """And no key on the page that no artifact has, but for those that no scenario of `legacy/` asks for."""
    seen: set[tuple[str, str, int]] = set()
    for release, scenario in pairs():
        metadata = json.loads(build.metadata(release, scenario).read_text(encoding="utf-8"))
        assert not wrong(metadata), (release, scenario)
        seen |= {(heading, key, metadata["schema_version"]) for heading, thing in objects(metadata) for key in thing}
    page = {(h, key, n) for h, keys in tables().items() for key, (schemas, _) in keys.items() for n in schemas}
    assert {(h, key) for h, key, n in page - seen} <= NOT_ASKED_FOR


def test_the_example_is_a_real_one_and_what_it_has_otherwise_would_be_reported() -> None:
    (block,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    metadata = json.loads((references.case("elasticity").artifact / "metadata.json").read_text(encoding="utf-8"))
    assert json.loads(block) == metadata
    metadata["colour"] = "red"
    del metadata["segments"][0]["package"]
    assert wrong(metadata) == ["Explicit segments: 'package' is not there", "Top level: 'colour' is not on the page"]
