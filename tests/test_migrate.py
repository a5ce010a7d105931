"""Old artifacts rewritten for neml2's own runtime: against what neml2 3.1.0 writes itself, and in that runtime."""

from __future__ import annotations

import json
import os
import subprocess
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import answer, refused, stub_of
from legacy import build
from neml2_aoti_plugin import Model
from neml2_aoti_plugin._artifact.rewrite import rewrite
from tools.compare_native import NATIVE_VENV

DATA = Path(__file__).resolve().parent / "data"
# An environment with torch 2.12.1, where neml2's binding works; `make compare-native` makes it.
NATIVE = Path(os.environ.get("NEML2_AOTI_PLUGIN_NATIVE_PYTHON", NATIVE_VENV / "bin" / "python"))


def document_of(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DATA / f"{name}.json").read_text())
    return found


def last_segment(release: str) -> dict[str, Any]:
    """The scenario `multi` cut down to its last segment: a stress from two strains, all symmetric tensors."""
    whole = document_of(f"{release}-multi")
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
    before = deepcopy(old)
    found = rewrite(old, "meta.json")
    assert (found.reasons, found.dropped, old) == ((), (), before)
    for segment in new["segments"] if release == "3.0.3" else ():
        for pair in segment["jacobian_pairs"]:
            # Schema 3 does not record which blocks are constant.
            pair["batch_independent"] = False
    assert found.document == new


def test_the_newest_stays_what_it_is() -> None:
    document = last_segment("3.1.0")
    assert rewrite(document, "meta.json").document is document


def test_one_matrix_of_derivatives_is_a_block_only_between_two_vectors() -> None:
    two = last_segment("3.0.0")
    refused = rewrite(two, "meta.json")
    assert not refused.document and "--drop-derivatives" in refused.reasons[0]
    without = rewrite(two, "meta.json", drop_derivatives=True)
    assert without.dropped == ("stress:net_strain", "stress:creep_strain")
    assert without.document["derivatives"] == [] and "jvp_package" not in without.document["segments"][0]
    one = deepcopy(two)
    for inputs in (one["inputs"], one["segments"][0]["inputs"]):
        del inputs[1]
    found = rewrite(one, "meta.json")
    assert not found.reasons and not found.dropped
    (pair,) = found.document["segments"][0]["jacobian_pairs"]
    assert pair == {**pair, "out_var": "stress", "in_var": "net_strain", "out_base_shape": [6], "in_base_shape": [6]}
    assert pair.keys() == last_segment("3.1.0")["segments"][0]["jacobian_pairs"][0].keys()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        *((f"{release}-multi", "Newton step is one graph") for release in ("3.0.0", "3.0.3", "3.0.6")),
        ("3.0.3-promoted_provider", "without a batch axis"),
    ],
)
def test_what_the_newest_runtime_cannot_take_is_refused(name: str, reason: str) -> None:
    assert any(reason in found for found in rewrite(document_of(name), "meta.json").reasons)


def test_incremental_variables_are_refused() -> None:
    document = document_of("3.0.7-multi")
    assert rewrite(document, "meta.json").document["schema_version"] == 14
    given = next(s for s in document["segments"] if s["kind"] == "implicit")["givens"][0]
    given["role"] = "incremental"
    (reason,) = rewrite(document, "meta.json").reasons
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


@pytest.fixture
def migrated(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    release, scenario = request.param
    return scenario, Path(answer("migrate", build.stub(release, scenario), "--out", tmp_path / "new")["written"])


@pytest.mark.legacy
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("migrated", OLD, ids="-".join, indirect=True)
def test_metadata_is_that_of_the_newest_release(migrated: tuple[str, Path], request: pytest.FixtureRequest) -> None:
    scenario, folder = migrated
    found = json.loads((folder / "metadata.json").read_text())
    wanted = json.loads(build.metadata("3.1.0", scenario).read_text())
    if "3.0.0" in request.node.name or "3.0.3" in request.node.name:
        # These do not record which blocks are constant.
        wanted["segments"][0]["jacobian_pairs"][0]["batch_independent"] = False
    if scenario == "implicit":
        # What 3.0.7 does not write has a default.
        assert wanted["solver_config"].pop("substep_del_tol") == 1e-6
    assert found == wanted


@pytest.mark.legacy
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("release", ["3.0.0", "3.0.6"])
def test_an_old_implicit_artifact_is_refused(release: str, tmp_path: Path) -> None:
    said = refused("migrate", build.stub(release, "implicit"), "--out", tmp_path / "new", status=1)
    assert "cannot be rewritten: its Newton step" in said and "neml2-compile INPUT.i --model creep" in said
    assert not (tmp_path / "new").exists()


RUN_NATIVE = """
import json, sys, torch
from neml2.aoti._aoti import Model
assert Model.__module__ == "neml2.aoti._aoti"
model = Model(sys.argv[1])
inputs = {n: torch.tensor(v, dtype=torch.float64) for n, v in json.loads(sys.argv[2]).items()}
outputs, blocks = model.jacobian(inputs)
shown = {n: v.tolist() for n, v in outputs.items()}
print("\\n" + json.dumps([shown, {f"{o}:{i}": b.tolist() for o, row in blocks.items() for i, b in row.items()}]))
"""


@pytest.mark.legacy
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not NATIVE.exists(), reason=f"needs {NATIVE}, which `make compare-native` makes")
@pytest.mark.parametrize("migrated", OLD, ids="-".join, indirect=True)
def test_the_runtime_of_neml2_itself_runs_it(migrated: tuple[str, Path]) -> None:
    _, folder = migrated
    ours = Model(folder, mode="lockstep")
    generator = torch.Generator().manual_seed(1)
    inputs = {
        name: 0.2 * torch.randn((3, *v.natural_shape), generator=generator, dtype=torch.float64)
        for name, v in ours.inputs.items()
    }
    if "t" in inputs:
        inputs["t"] = inputs["t~1"] + 0.5
    given = json.dumps({name: value.tolist() for name, value in inputs.items()})
    environment = {**os.environ, "NEML2_AOTI_PLUGIN": "0"}
    done = subprocess.run(
        [str(NATIVE), "-c", RUN_NATIVE, str(folder), given],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    outputs, blocks = json.loads(done.stdout.splitlines()[-1])
    mine, own_blocks = ours.jacobian(inputs)
    for name, value in outputs.items():
        torch.testing.assert_close(mine[name], torch.tensor(value, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    for pair, block in blocks.items():
        out, by = pair.split(":")
        entries = ours.outputs[out].size * ours.inputs[by].size
        # A block that does not depend on the row comes once.
        mine_flat = own_blocks[out][by].reshape(-1, entries).expand(3, entries)
        native_flat = torch.tensor(block, dtype=torch.float64).reshape(-1, entries).expand(3, entries)
        torch.testing.assert_close(mine_flat, native_flat, rtol=1e-12, atol=1e-12)
