"""docs/artifact-format.md: its tables of keys are what real metadata files hold, release by release."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from legacy import build
from legacy.catalogue import pairs
from stubs.build import compiled
from stubs.catalogue import CATALOGUE

PAGE = Path(__file__).resolve().parent.parent / "docs" / "artifact-format.md"

Object = dict[str, Any]
# Schemas that have the key, and whether each object has it.
Keys = dict[str, tuple[set[int], bool]]

# What no scenario of legacy/ has: rare, or only in models of the newest release, which has stubs of its own.
NOT_ASKED_FOR = {
    ("Boundary variables", "sparsity"),
    ("Implicit segments", "predictor_feedback"),
    ("Promoted parameters", "dtype"),
}


def tables() -> dict[str, Keys]:
    """The tables of keys by the heading they stand under."""
    found: dict[str, Keys] = {}
    heading = ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("### "):
            heading = line[4:]
        row = re.match(r"\| `(\w+)` \| ([\d ]+) \| (yes)? ?\|", line)
        if row:
            found.setdefault(heading, {})[row[1]] = ({int(n) for n in row[2].split()}, row[3] is not None)
    return found


def objects(metadata: Object) -> Iterator[tuple[str, Object]]:
    """Each object of a metadata file, with the heading of its table."""
    yield "Top level", metadata
    for name in ("inputs", "outputs"):
        yield from (("Boundary variables", variable) for variable in metadata[name])
    yield from (("Promoted parameters", parameter) for parameter in metadata["parameters"])
    if "solver_config" in metadata:
        yield "Newton settings", metadata["solver_config"]
    for segment in metadata["segments"]:
        yield "Explicit segments" if segment["kind"] == "forward" else "Implicit segments", segment
        for name in ("jacobian_pairs", "param_jacobian_pairs"):
            yield from (("Pairs", pair) for pair in segment.get(name) or [])
        if segment["kind"] == "implicit":
            for name in ("unknowns", "givens", "residuals"):
                yield from (("Segment variables", variable) for variable in segment.get(name) or [])
            for name in ("unknown_group_infos", "given_group_infos", "residual_group_infos"):
                for group in segment.get(name) or []:
                    yield "Groups", group
                    yield from (("Segment variables", variable) for variable in group["per_var_info"])


def wrong(metadata: Object) -> list[str]:
    """What a metadata file has otherwise than the page says."""
    schema, found = metadata["schema_version"], []
    page = tables()
    for heading, thing in objects(metadata):
        there = {key for key, (schemas, _) in page[heading].items() if schema in schemas}
        must = {key for key, (schemas, each) in page[heading].items() if schema in schemas and each}
        found += [f"{heading}: {key!r} is not on the page" for key in thing.keys() - there]
        found += [f"{heading}: {key!r} is not there" for key in must - thing.keys()]
    return sorted(set(found))


@pytest.mark.parametrize("file", sorted((Path(__file__).parent / "data").glob("*.json")), ids=lambda file: file.stem)
def test_keys_of_stored_metadata(file: Path) -> None:
    assert not wrong(json.loads(file.read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", CATALOGUE)
def test_keys_of_the_newest_schema(name: str) -> None:
    (file,) = compiled(name).glob("*/metadata.json")
    assert not wrong(json.loads(file.read_text(encoding="utf-8")))


@pytest.mark.legacy
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("release", "scenario"), pairs())
def test_keys_of_every_schema(release: str, scenario: str) -> None:
    assert not wrong(json.loads(build.metadata(release, scenario).read_text(encoding="utf-8")))


@pytest.mark.legacy
@pytest.mark.timeout(3600)
def test_each_key_is_in_some_artifact() -> None:
    """No key on the page that no artifact has, but for those that no scenario of `legacy/` asks for."""
    seen: set[tuple[str, str, int]] = set()
    for release, scenario in pairs():
        metadata = json.loads(build.metadata(release, scenario).read_text(encoding="utf-8"))
        schema = metadata["schema_version"]
        seen |= {(heading, key, schema) for heading, thing in objects(metadata) for key in thing}
    page = {(h, key, n) for h, keys in tables().items() for key, (schemas, _) in keys.items() for n in schemas}
    assert {(h, key) for h, key, n in page - seen} <= NOT_ASKED_FOR


def test_the_example_is_a_real_one() -> None:
    (block,) = re.findall(r"```json\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    file = compiled("elasticity") / "elasticity" / "metadata.json"
    assert json.loads(block) == json.loads(file.read_text(encoding="utf-8"))


def test_an_unknown_key_and_a_missing_one_are_told() -> None:
    metadata = json.loads((compiled("elasticity") / "elasticity/metadata.json").read_text(encoding="utf-8"))
    metadata["colour"] = "red"
    del metadata["segments"][0]["package"]
    assert wrong(metadata) == ["Explicit segments: 'package' is not there", "Top level: 'colour' is not on the page"]
