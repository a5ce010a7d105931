"""Values of promoted parameters that travel in a file, and the command that reads and writes them."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from attacks.archives import recorded
from neml2_aoti_plugin import InputError, Model, UnknownNameError
from neml2_aoti_plugin import _cli as cli
from stubs.build import compiled


def artifact(folder: Path, name: str = "promoted") -> Path:
    shutil.copytree(compiled(name) / name, folder / name)
    return folder / name


@pytest.fixture
def promoted() -> Model:
    return Model(compiled("promoted") / "promoted")


def values(model: Model) -> dict[str, Any]:
    return {name: value.tolist() for name, value in model.named_parameters().items()}


def test_a_calibrated_set_travels(promoted: Model, tmp_path: Path) -> None:
    promoted.set_parameter("promoted.E", 12345.678901234567)
    # One value for each of two points.
    promoted.set_parameter("promoted.nu", torch.tensor([0.25, 0.3], dtype=torch.float64))
    file = tmp_path / "calibrated.safetensors"
    promoted.save_parameters(file)
    # Elsewhere, where the same artifact is.
    again = Model(artifact(tmp_path), parameters=file)
    assert values(again) == values(promoted)
    strain = {"strain": 1e-3 * torch.ones(2, 6, dtype=torch.float64)}
    assert torch.equal(again.forward(strain)["stress"], promoted.forward(strain)["stress"])
    assert not any(value.requires_grad for value in again.parameters())
    # A copy has the values, and needs no file.
    file.unlink()
    assert values(pickle.loads(pickle.dumps(again))) == values(copy.deepcopy(again)) == values(promoted)


def test_the_file_says_what_it_is_for(promoted: Model, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    promoted.save_parameters(str(file))
    with safe_open(file, framework="pt") as opened:
        notes = opened.metadata()
        assert sorted(opened.keys()) == ["promoted.E", "promoted.nu"]
    assert notes.keys() == {"neml2-aoti", "model", "metadata_sha256"}
    assert (notes["neml2-aoti"], notes["model"], len(notes["metadata_sha256"])) == ("parameters 1", "promoted", 64)
    assert stat.S_IMODE(file.stat().st_mode) == 0o644


def test_another_artifact_refuses_it(promoted: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, new = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    promoted.set_parameter("promoted.E", 5.0)
    promoted.save_parameters(file)
    other = artifact(tmp_path)
    document = json.loads((other / "metadata.json").read_text())
    document["parameters"][0]["values"] = [1.0]
    (other / "metadata.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match=f"neml2-aoti params {other} --from {file} --out NEW.safetensors"):
        Model(other, parameters=file)
    # The command that the error names takes the values over, by hand.
    assert cli.main(["params", str(other), "--from", str(file), "--out", str(new)]) == 0
    assert values(Model(other, parameters=new))["promoted.E"] == 5.0
    capsys.readouterr()


@pytest.mark.parametrize("graph", ["promoted.pt2", "promoted_pjac.pt2"])
def test_other_graphs_of_the_same_model_take_it(graph: str, promoted: Model, tmp_path: Path) -> None:
    """As a compile on another machine makes them; here a byte that nothing reads differs."""
    file = tmp_path / "a.safetensors"
    promoted.save_parameters(file)
    other = artifact(tmp_path)
    package = other / "cpu/float64" / graph
    before = package.read_bytes()
    package.write_bytes(recorded(more="x")(before))
    assert package.read_bytes() != before
    assert values(Model(other, parameters=file)) == values(promoted)


def test_wrong_files(promoted: Model, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    file = tmp_path / "a.safetensors"
    for content in (b"", b"text, and more of it than the length of a head"):
        file.write_bytes(content)
        with pytest.raises(InputError, match="is not a file of parameters"):
            Model(promoted.artifact, parameters=file)
    save_file({"promoted.E": torch.ones(())}, file)
    with pytest.raises(InputError, match="there is no such note"):
        Model(promoted.artifact, parameters=file)
    with pytest.raises(InputError, match="cannot be read"):
        Model(promoted.artifact, parameters=tmp_path / "gone")
    promoted.save_parameters(file)
    with safe_open(file, framework="pt") as opened:
        notes = opened.metadata()
    save_file({"promoted.E": torch.ones(2, 2, dtype=torch.float64)}, file, notes)
    with pytest.raises(UnknownNameError, match=r"missing 'promoted.nu'.* promoted.E, promoted.nu"):
        Model(promoted.artifact, parameters=file)
    before = values(promoted)
    for wrong, said in (
        (torch.ones(2, dtype=torch.int64), "'promoted.nu' has dtype I64, expected float64 or float32"),
        (torch.tensor([1.0, torch.nan]), "'promoted.nu' holds NaN or infinite"),
        (torch.ones(0), r"'promoted.nu' has shape \(0,\), expected \(\*batch\), and no empty batch"),
    ):
        save_file({"promoted.E": torch.full((), 7.0), "promoted.nu": wrong}, file, notes)
        with pytest.raises(InputError, match=said):
            promoted.load_parameters(file)
        # Not the one that is right either.
        assert values(promoted) == before
    save_file({"promoted.E": torch.ones(()), "promoted.nu": torch.ones(2)}, file, notes)
    promoted.load_parameters(file)
    assert values(promoted) == {"promoted.E": 1.0, "promoted.nu": [1.0, 1.0]} != before


def test_what_cannot_be_written(promoted: Model, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        promoted.save_parameters(tmp_path / "none" / "a.safetensors")
    with pytest.raises(InputError, match="is a folder"):
        promoted.save_parameters(tmp_path)
    with pytest.raises(InputError, match=r"no promoted parameters to write.*-p PARAMETER"):
        Model(compiled("elasticity") / "elasticity").save_parameters(tmp_path / "a.safetensors")
    promoted.set_parameter("promoted.E", torch.tensor([1.0, torch.inf], dtype=torch.float64))
    with pytest.raises(InputError, match=r"is not written, since promoted.E would hold NaN or infinite"):
        promoted.save_parameters(tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, file = str(compiled("promoted") / "promoted"), tmp_path / "a.safetensors"
    assert cli.main(["params", path, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["result"]
    assert [(p["name"], p["shape"]) for p in told["parameters"]] == [("promoted.E", []), ("promoted.nu", [])]
    assert told["changed"] == [] and told["written"] is None
    assert cli.main(["params", path, "--set", "promoted.E=1e5", "--out", str(file), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["result"]
    assert (told["changed"], told["parameters"][0]["values"]) == (["promoted.E"], [1e5])
    assert cli.main(["params", path, "--from", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "100000" in shown and "changed" in shown
    assert cli.main(["params", str(compiled("elasticity") / "elasticity")]) == 0
    assert "has no promoted parameters. Promote some: neml2-compile" in capsys.readouterr().out


def test_wrong_use_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = str(compiled("promoted") / "promoted"), str(tmp_path / "a.safetensors")
    for arguments, said in (
        (["--set", "promoted.E=1"], "--set changes nothing by itself"),
        (["--set", "E=1", "--out", out], "parameters are: promoted.E, promoted.nu"),
        (["--set", "promoted.E", "--out", out], "is not NAME=VALUE"),
        (["--from", str(tmp_path / "gone")], "cannot be read"),
        (["--set", "promoted.E=1", "--out", str(tmp_path / "none" / "a")], "cannot be written"),
    ):
        assert cli.main(["params", path, *arguments]) == 2
        told = capsys.readouterr().err
        assert said in told and "Traceback" not in told
    assert not list(tmp_path.iterdir())
