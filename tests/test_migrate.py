"""Old artifacts rewritten for neml2's own runtime: against what neml2 3.1.0 writes itself, and in that runtime."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import answer, refused, stub_of
from data.collect import document
from legacy import build
from neml2_aoti_plugin import Model
from neml2_aoti_plugin._artifact.rewrite import rewrite
from tools.compare_native import NATIVE_VENV

# An environment with torch 2.12.1, where neml2's binding works; `make compare-native` makes it.
NATIVE = Path(os.environ.get("NEML2_AOTI_PLUGIN_NATIVE_PYTHON", NATIVE_VENV / "bin" / "python"))


def last_segment(release: str) -> dict[str, Any]:
    """The scenario `multi` cut down to its last segment: a stress from two strains, all symmetric tensors."""
    whole = document(release)
    segment = whole["segments"][-1]
    names = [variable["name"] for variable in segment["inputs"]]
    assert (segment["kind"], names) == ("forward", ["net_strain", "creep_strain"])
    (stress,) = [variable for variable in whole["outputs"] if variable["name"] == "stress"]
    found = {**whole, "inputs": [{**stress, "name": name} for name in names], "outputs": [stress]}
    found |= {"segments": [segment], "parameters": []}
    if "derivatives" in whole:
        found["derivatives"] = [["stress", name] for name in names]
    return {key: value for key, value in found.items() if key != "solver_config"}


# -- documents -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("release", ["3.0.3", "3.0.6", "3.0.7"])
def test_a_forward_document_becomes_what_the_newest_neml2_writes(release: str) -> None:
    old, new = last_segment(release), last_segment("3.1.0")
    found = rewrite(old, "meta.json")
    assert (found.reasons, found.dropped, old) == ((), (), last_segment(release))
    for segment in new["segments"] if release == "3.0.3" else ():
        for pair in segment["jacobian_pairs"]:
            # Schema 3 does not record which blocks are constant.
            pair["batch_independent"] = False
    assert found.document == new
    assert rewrite(new, "meta.json").document is new


def test_one_matrix_of_derivatives_is_a_block_only_between_two_vectors() -> None:
    two = last_segment("3.0.0")
    refused = rewrite(two, "meta.json")
    assert not refused.document and "--drop-derivatives" in refused.reasons[0]
    without = rewrite(two, "meta.json", drop_derivatives=True)
    assert without.dropped == ("stress:net_strain", "stress:creep_strain")
    assert without.document["derivatives"] == [] and "jvp_package" not in without.document["segments"][0]
    one = last_segment("3.0.0")
    for inputs in (one["inputs"], one["segments"][0]["inputs"]):
        del inputs[1]
    found = rewrite(one, "meta.json")
    assert not found.reasons and not found.dropped
    (pair,) = found.document["segments"][0]["jacobian_pairs"]
    assert pair == {**pair, "out_var": "stress", "in_var": "net_strain", "out_base_shape": [6], "in_base_shape": [6]}
    assert pair.keys() == last_segment("3.1.0")["segments"][0]["jacobian_pairs"][0].keys()


@pytest.mark.parametrize(
    ("release", "scenario", "reason"),
    [
        *((release, "multi", "Newton step is one graph") for release in ("3.0.0", "3.0.3", "3.0.6")),
        ("3.0.3", "promoted_provider", "without a batch axis"),
    ],
)
def test_what_the_newest_runtime_cannot_take_is_refused(release: str, scenario: str, reason: str) -> None:
    assert any(reason in found for found in rewrite(document(release, scenario), "meta.json").reasons)


def test_incremental_variables_are_refused() -> None:
    written = document("3.0.7")
    assert rewrite(written, "meta.json").document["schema_version"] == 14
    given = next(s for s in written["segments"] if s["kind"] == "implicit")["givens"][0]
    given["role"] = "incremental"
    (reason,) = rewrite(written, "meta.json").reasons
    assert given["name"] in reason


# -- artifacts -----------------------------------------------------------------------------------------------------


def test_a_new_artifact_is_written_whole(tmp_path: Path) -> None:
    new, old = tmp_path / "new", stub_of("elasticity")
    assert answer("migrate", old, "--out", new) == {
        "artifact": str((old.parent / "elasticity").resolve()),
        "model": "elasticity",
        "schema": 14,
        "release": "3.1.0",
        "new_schema": 14,
        "written": str(new / "elasticity"),
        "stub": str(new / "elasticity_aoti.i"),
        "leaves": ["cpu/float64"],
        "dropped": [],
    }
    assert sorted(p.name for p in new.iterdir()) == ["elasticity", "elasticity_aoti.i"]
    assert answer("inspect", new / "elasticity_aoti.i")["artifact"] == str(new / "elasticity")
    assert Model(new / "elasticity_aoti.i").derivative_pairs == [("stress", "strain")]


def test_what_is_there_already_stays(tmp_path: Path) -> None:
    artifact, mine = stub_of("elasticity").parent / "elasticity", tmp_path / "elasticity_aoti.i"
    mine.write_text("mine")
    assert "is there already" in refused("migrate", artifact, "--out", tmp_path)
    assert "cannot be written" in refused("migrate", artifact, "--out", mine / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["elasticity_aoti.i"] and mine.read_text() == "mine"


# -- real artifacts of old releases --------------------------------------------------------------------------------

OLD = [("3.0.0", "forward"), ("3.0.3", "forward"), ("3.0.6", "forward"), ("3.0.6", "promoted"), ("3.0.7", "implicit")]


def legacy(test: Any) -> Any:
    return pytest.mark.legacy(pytest.mark.timeout(3600)(test))


@pytest.fixture
def migrated(release: str, scenario: str, tmp_path: Path) -> Path:
    return Path(answer("migrate", build.stub(release, scenario), "--out", tmp_path / "new")["written"])


@legacy
@pytest.mark.parametrize(("release", "scenario"), OLD)
def test_metadata_is_that_of_the_newest_release(migrated: Path, release: str, scenario: str) -> None:
    found = json.loads((migrated / "metadata.json").read_text())
    wanted = json.loads(build.metadata("3.1.0", scenario).read_text())
    if release in ("3.0.0", "3.0.3"):
        # These do not record which blocks are constant.
        wanted["segments"][0]["jacobian_pairs"][0]["batch_independent"] = False
    if scenario == "implicit":
        # What 3.0.7 does not write has a default.
        assert wanted["solver_config"].pop("substep_del_tol") == 1e-6
    assert found == wanted


@legacy
@pytest.mark.parametrize("release", ["3.0.0", "3.0.6"])
def test_an_old_implicit_artifact_is_refused(release: str, tmp_path: Path) -> None:
    said = refused("migrate", build.stub(release, "implicit"), "--out", tmp_path / "new", status=1)
    assert "cannot be rewritten: its Newton step" in said and "neml2-compile INPUT.i --model creep" in said
    assert not (tmp_path / "new").exists()


RUN_NATIVE = """
import sys, torch
from neml2.aoti._aoti import Model
assert Model.__module__ == "neml2.aoti._aoti"
outputs, blocks = Model(sys.argv[1]).jacobian(torch.load(sys.argv[2]))
torch.save((dict(outputs), {name: dict(row) for name, row in blocks.items()}), sys.argv[3])
"""


@legacy
@pytest.mark.skipif(not NATIVE.exists(), reason=f"needs {NATIVE}, which `make compare-native` makes")
@pytest.mark.parametrize(("release", "scenario"), OLD)
def test_the_runtime_of_neml2_itself_runs_it(migrated: Path, tmp_path: Path) -> None:
    ours = Model(migrated, mode="lockstep")
    generator = torch.Generator().manual_seed(1)
    inputs = {
        name: 0.2 * torch.randn((3, *v.natural_shape), generator=generator, dtype=torch.float64)
        for name, v in ours.inputs.items()
    }
    if "t" in inputs:
        inputs["t"] = inputs["t~1"] + 0.5
    given, result = tmp_path / "given.pt", tmp_path / "result.pt"
    torch.save(inputs, given)
    command = [str(NATIVE), "-c", RUN_NATIVE, str(migrated), str(given), str(result)]
    done = subprocess.run(command, env={**os.environ, "NEML2_AOTI_PLUGIN": "0"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    outputs, blocks = torch.load(result)
    own, own_blocks = ours.jacobian(inputs)
    torch.testing.assert_close(own, outputs, rtol=1e-12, atol=1e-12)
    for out, row in own_blocks.items():
        for by, block in row.items():
            # A block that does not depend on the row comes once.
            torch.testing.assert_close(block, blocks[out][by].expand(block.shape), rtol=1e-12, atol=1e-12)
