"""Values of promoted parameters that travel in a file, and the command that reads and writes them."""

from __future__ import annotations

import copy
import json
import pickle
import stat
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import references
from attacks.archives import recorded
from attacks.artifacts import damage
from commands import answer, printed, refused
from neml2_aoti_plugin import InputError, Model, UnknownNameError
from references import change_json


@pytest.fixture
def promoted() -> Model:
    return Model(references.case("promoted").artifact)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "a.safetensors"


def values(model: Model) -> dict[str, Any]:
    return {name: value.tolist() for name, value in model.named_parameters().items()}


def test_a_calibrated_set_travels(promoted: Model, tmp_path: Path, file: Path) -> None:
    promoted.set_parameter("promoted.E", 12345.678901234567)
    # One value for each of two points.
    promoted.set_parameter("promoted.nu", torch.tensor([0.25, 0.3], dtype=torch.float64))
    promoted.save_parameters(file)
    # Elsewhere, where the same artifact is.
    again = Model(references.copied("promoted", tmp_path / "other"), parameters=file)
    assert values(again) == values(promoted)
    strain = {"strain": 1e-3 * torch.ones(2, 6, dtype=torch.float64)}
    assert torch.equal(again.forward(strain)["stress"], promoted.forward(strain)["stress"])
    assert not any(value.requires_grad for value in again.parameters())
    # A copy has the values, and needs no file.
    file.unlink()
    assert values(pickle.loads(pickle.dumps(again))) == values(copy.deepcopy(again)) == values(promoted)


def test_the_file_says_what_it_is_for(promoted: Model, file: Path) -> None:
    promoted.save_parameters(str(file))
    with safe_open(file, framework="pt") as opened:
        notes = opened.metadata()
        assert sorted(opened.keys()) == ["promoted.E", "promoted.nu"]
    assert notes.keys() == {"neml2-aoti", "model", "metadata_sha256"}
    assert (notes["neml2-aoti"], notes["model"], len(notes["metadata_sha256"])) == ("parameters 1", "promoted", 64)
    assert stat.S_IMODE(file.stat().st_mode) == 0o644


def test_another_artifact_refuses_it(promoted: Model, tmp_path: Path, file: Path) -> None:
    promoted.set_parameter("promoted.E", 5.0)
    promoted.save_parameters(file)
    other, new = references.copied("promoted", tmp_path / "other"), tmp_path / "b.safetensors"
    # Other graphs of the same model, as another compile makes them: here a byte that nothing reads differs.
    for graph in ("promoted", "promoted_pjac"):
        damage(other, recorded(more="x"), graph)
    assert values(Model(other, parameters=file)) == values(promoted)
    change_json(other / "metadata.json", lambda document: document["parameters"][0].update(values=[1.0]))
    with pytest.raises(InputError, match=f"neml2-aoti params {other} --from {file} --out NEW.safetensors"):
        Model(other, parameters=file)
    # The command that the error names takes the values over, by hand.
    printed("params", other, "--from", file, "--out", new)
    assert values(Model(other, parameters=new))["promoted.E"] == 5.0


def test_wrong_files(promoted: Model, tmp_path: Path, file: Path) -> None:
    before, one = values(promoted), torch.ones((), dtype=torch.float64)
    promoted.save_parameters(file)
    with safe_open(file, framework="pt") as opened:
        notes = opened.metadata()
    for number, header in enumerate(
        (
            {"a": {"dtype": "F64", "shape": [2], "data_offsets": [0, 99]}},
            {"a": {"dtype": "F64", "shape": [10**30, 10**30], "data_offsets": [0, 16]}},
            {"__metadata__": 5},
            None,
        )
    ):
        text = json.dumps(header).encode()
        (tmp_path / f"damaged {number}").write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    file.write_bytes(b"text, and more of it than the length of a head")
    (tmp_path / "empty").touch()
    save_file({"promoted.E": one}, tmp_path / "no notes")
    save_file({"promoted.E": one.expand(2, 2).clone()}, tmp_path / "one", notes)
    for name, wrong in (
        ("whole", torch.ones(2, dtype=torch.int64)),
        ("nan", torch.tensor([1.0, torch.nan])),
        ("none", torch.ones(0)),
    ):
        save_file({"promoted.E": 7 * one, "promoted.nu": wrong}, tmp_path / name, notes)
    for name, error, said in (
        *((f"damaged {number}", InputError, "is not a file of parameters") for number in range(4)),
        (file.name, InputError, "is not a file of parameters"),
        ("empty", InputError, "is not a file of parameters"),
        ("gone", InputError, "cannot be read"),
        ("no notes", InputError, "there is no such note"),
        ("one", UnknownNameError, r"missing 'promoted.nu'.* promoted.E, promoted.nu"),
        ("whole", InputError, "'promoted.nu' has dtype I64, expected float64 or float32"),
        ("nan", InputError, "'promoted.nu' holds NaN or infinite"),
        ("none", InputError, r"'promoted.nu' has shape \(0,\), expected \(\*batch\), and no empty batch"),
    ):
        with pytest.raises(error, match=said):
            Model(promoted.artifact, parameters=tmp_path / name)
        with pytest.raises(error, match=said):
            promoted.load_parameters(tmp_path / name)
        # Not the one that is right either.
        assert values(promoted) == before
    save_file({"promoted.E": torch.ones(()), "promoted.nu": torch.ones(2)}, file, notes)
    promoted.load_parameters(file)
    assert values(promoted) == {"promoted.E": 1.0, "promoted.nu": [1.0, 1.0]} != before


def test_what_cannot_be_written(promoted: Model, tmp_path: Path, file: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        promoted.save_parameters(tmp_path / "none" / "a.safetensors")
    with pytest.raises(InputError, match="is a folder"):
        promoted.save_parameters(tmp_path)
    with pytest.raises(InputError, match=r"no promoted parameters to write.*-p PARAMETER"):
        Model(references.case("elasticity").artifact).save_parameters(file)
    promoted.set_parameter("promoted.E", torch.tensor([1.0, torch.inf], dtype=torch.float64))
    with pytest.raises(InputError, match=r"is not written, since promoted.E would hold NaN or infinite"):
        promoted.save_parameters(file)
    assert not list(tmp_path.iterdir())


def test_the_command(tmp_path: Path, file: Path) -> None:
    path = references.case("promoted").artifact
    for arguments, said in (
        (["--set", "promoted.E=1"], "--set changes nothing by itself"),
        (["--set", "E=1", "--out", file], "parameters are: promoted.E, promoted.nu"),
        (["--set", "promoted.E", "--out", file], "is not NAME=VALUE"),
        (["--from", tmp_path / "gone"], "cannot be read"),
        (["--set", "promoted.E=1", "--out", tmp_path / "none" / "a"], "cannot be written"),
    ):
        assert said in refused("params", path, *arguments)
    assert not list(tmp_path.iterdir())
    told = answer("params", path)
    assert [(p["name"], p["shape"]) for p in told["parameters"]] == [("promoted.E", []), ("promoted.nu", [])]
    assert told["changed"] == [] and told["written"] is None
    told = answer("params", path, "--set", "promoted.E=1e5", "--out", file)
    assert (told["changed"], told["parameters"][0]["values"]) == (["promoted.E"], [1e5])
    shown, _ = printed("params", path, "--from", file)
    assert "100000" in shown and "changed" in shown
    none, _ = printed("params", references.case("elasticity").artifact)
    assert "has no promoted parameters. Promote some: neml2-compile" in none
