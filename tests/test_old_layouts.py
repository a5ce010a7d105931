"""Artifacts and stubs of old releases found from every entry; nothing is evaluated here.

The folders hold metadata that the real compilers wrote, and no graphs but empty files: finding a leaf takes no more.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import neml2
import pytest
import torch

from data.collect import HERE, document
from neml2_aoti_plugin import Model
from neml2_aoti_plugin._artifact.locate import locate
from neml2_aoti_plugin._artifact.stub import Stub, find, read_stub
from neml2_aoti_plugin.errors import ArtifactError, ArtifactNotFoundError, InputError
from references import change_json, reported


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """The folder that neml2 3.0.3 writes: metadata and graphs side by side."""
    folder = tmp_path / "flat" / "bar"
    folder.mkdir(parents=True)
    shutil.copy(HERE / "3.0.3-multi.json", folder / "bar_meta.json")
    return folder


@pytest.fixture
def per_device(tmp_path: Path) -> Path:
    """The folder that neml2 3.0.6 writes for cpu and cuda."""
    root = tmp_path / "aoti" / "bar"
    for device in ("cpu", "cuda"):
        (root / device).mkdir(parents=True)
        (root / device / "bar_meta.json").write_text(json.dumps({**document("3.0.6"), "device": device}))
    return root


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """The folder that neml2 3.0.7 writes."""
    root = tmp_path / "aoti" / "bar"
    for leaf in ("cpu/float64", "cpu/float32", "cuda/float64"):
        (root / leaf).mkdir(parents=True)
        (root / leaf / "bar.pt2").touch()
    shutil.copy(HERE / "3.0.7-multi.json", root / "metadata.json")
    return root


# -- entries -------------------------------------------------------------------------------------------------------


def test_a_folder_is_found_from_all_entries(flat: Path, per_device: Path) -> None:
    for leaf, entries in ((flat, [flat]), (per_device / "cpu", [per_device, per_device / "cpu"])):
        for entry in (*entries, leaf / "bar_meta.json"):
            place = locate(entry)
            assert (place.artifact.model, place.metadata, place.leaf) == ("bar", leaf / "bar_meta.json", leaf)
            assert (place.device, place.dtype) == (torch.device("cpu"), torch.float64)
    assert locate(per_device, "cuda:1").device == torch.device("cuda", 1)
    assert locate(per_device / "cuda", "cuda").leaf == per_device / "cuda"


def test_a_path_relative_to_the_working_folder(per_device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(per_device / "cpu")
    for entry in ("bar_meta.json", "."):
        assert locate(entry).metadata.resolve() == per_device / "cpu" / "bar_meta.json"
    monkeypatch.chdir(per_device.parents[1])
    assert locate("aoti/bar/cpu/bar_meta.json").metadata == Path("aoti/bar/cpu/bar_meta.json")


def test_the_device_is_the_current_default(per_device: Path, flat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # torch itself asks a CUDA device for its index, and there may be none here.
    monkeypatch.setattr(torch, "get_default_device", lambda: torch.device("cuda"))
    assert locate(per_device).leaf == per_device / "cuda"
    # A path that names its device, and a file that is the only one, leave no choice.
    assert locate(per_device / "cpu").device == torch.device("cpu")
    assert locate(flat).device == torch.device("cpu")


def test_the_path_of_old_leads_to_an_artifact_of_today_unless_the_old_one_is_there(shared: Path) -> None:
    old = shared / "cpu" / "bar_meta.json"
    assert (locate(old).metadata, locate(old).leaf) == (shared / "metadata.json", shared / "cpu" / "float64")
    assert locate(shared / "cuda" / "bar_meta.json").device == torch.device("cuda")
    with pytest.raises(ArtifactNotFoundError, match=r"foo_meta.json: no such metadata file"):
        locate(shared / "cpu" / "foo_meta.json")
    shutil.copy(HERE / "3.0.6-multi.json", old)
    assert (locate(shared).metadata, locate(old).metadata) == (shared / "metadata.json", old)


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["{", "[]", '{"schema_version": 4, "device": "tpu"}', '{"schema_version": 10}'])
def test_a_leaf_that_is_not_there_is_reported_whatever_the_metadata_is_worth(
    text: str, shared: Path, flat: Path
) -> None:
    old = flat / "cpu" / "bar_meta.json"
    old.parent.mkdir()
    (flat / "bar_meta.json").rename(old).write_text(text)
    for path in (flat, flat / "cpu", old):
        with reported(ArtifactNotFoundError, "no compiled artifact for device 'cuda'", f"({old})"):
            Model(path, device="cuda")
        with pytest.raises(ArtifactError):
            Model(path)
    (shared / "metadata.json").write_text(text)
    # What is left is float32, which is taken where no dtype is asked for.
    for leaf in ("cpu/float64", "cuda/float64", "cpu/float32"):
        (shared / leaf / "bar.pt2").unlink()
    with pytest.raises(ArtifactNotFoundError, match=r"no .* for device 'cpu'.*without a graph: cpu/float32"):
        Model(shared)


def test_another_device_is_refused_with_those_there_are(per_device: Path) -> None:
    with pytest.raises(ArtifactNotFoundError, match=r"device 'xpu'.*cpu/float64.*cuda/float64"):
        locate(per_device / "cpu" / "bar_meta.json", "xpu")
    shutil.rmtree(per_device / "cuda")
    for entry in (per_device, per_device / "cpu", per_device / "cpu" / "bar_meta.json"):
        with pytest.raises(ArtifactNotFoundError, match=r"device 'cuda'.*leaves: cpu/float64 \(.*bar_meta.json\)"):
            locate(entry, "cuda")


def test_another_dtype_than_the_recorded_one_is_refused(flat: Path) -> None:
    assert locate(flat, dtype="float64").dtype == locate(flat, dtype=torch.float64).dtype == torch.float64
    with pytest.raises(ArtifactNotFoundError, match=r"device 'cpu' and dtype 'float32'.*leaves: cpu/float64"):
        locate(flat, dtype="float32")
    change_json(flat / "bar_meta.json", lambda written: written.update(dtype="float32"))
    assert locate(flat).dtype == torch.float32


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [("device", "tpu", "device is a str"), ("dtype", "float16", "dtype is a str"), ("dtype", 3, "dtype is 3")],
)
def test_a_recorded_leaf_that_is_none_is_refused(flat: Path, key: str, value: object, words: str) -> None:
    change_json(flat / "bar_meta.json", lambda written: written.update({key: value}))
    with pytest.raises(ArtifactError, match=f"bar_meta.json: {words}, expected"):
        locate(flat)


def test_two_models_in_a_folder_must_be_told_apart(flat: Path, per_device: Path) -> None:
    shutil.copy(flat / "bar_meta.json", flat / "rod_meta.json")
    with pytest.raises(ArtifactError, match=r"holds several artifacts:.*bar_meta.json.*rod_meta.json"):
        locate(flat)
    assert locate(flat / "rod_meta.json").artifact.model == "rod"
    with pytest.raises(ArtifactNotFoundError, match="but artifacts below it: bar"):
        locate(per_device.parent)


@pytest.mark.parametrize("entry", ["none", "none_meta.json", "metadata.json", "none/cpu/none_meta.json"])
def test_nothing_there(tmp_path: Path, entry: str) -> None:
    with pytest.raises(ArtifactNotFoundError, match=f"{entry}|no metadata.json"):
        locate(tmp_path / entry)


# -- stubs ---------------------------------------------------------------------------------------------------------


def stub(folder: Path, options: str, rest: str = "") -> Path:
    file = folder / "bar_aoti.i"
    file.write_text(f"[Models]\n  [bar]\n    type = AOTIModel\n    {options}\n  []\n[]\n{rest}")
    return file


def asked(file: Path) -> Stub:
    factory = neml2.load_input(file)
    block = factory._find_in_section("Models", "bar")
    return read_stub(block, file.parent, lambda name: factory._find_in_section("Solvers", name))


@pytest.mark.parametrize(
    ("option", "path"),
    [("meta", "./bar_meta.json"), ("meta", "../bar/bar_meta.json"), ("artifact_path", "bar")],
)
def test_a_relative_path_starts_at_the_stub(tmp_path: Path, option: str, path: str) -> None:
    assert asked(stub(tmp_path, f"{option} = {path}")) == Stub(tmp_path / path)


def test_an_absolute_path_is_taken_while_it_is_there(tmp_path: Path, flat: Path) -> None:
    assert asked(stub(tmp_path, f"meta = {flat}/bar_meta.json")).artifact == flat / "bar_meta.json"
    assert asked(stub(tmp_path, f"artifact_path = {flat}")).artifact == flat


def test_an_artifact_that_moved_with_its_stub_is_found(per_device: Path, tmp_path: Path) -> None:
    here = per_device.parent
    assert asked(stub(here, "artifact_path = /gone/far/aoti/bar")).artifact == per_device
    # The stub one folder higher: two names of the path are the same.
    assert asked(stub(here.parent, "artifact_path = /gone/far/aoti/bar")).artifact == per_device
    assert find("/gone/bar/cpu/bar_meta.json", here) == per_device / "cpu" / "bar_meta.json"
    # One that is in neither place is refused with both.
    with reported(ArtifactNotFoundError, "/gone/aoti/rod", str(tmp_path / "rod")):
        asked(stub(tmp_path, "artifact_path = /gone/aoti/rod"))


SOLVED = "artifact_path = 'bar'\n    solver = newton"
NEWTON = "[Solvers]\n  [newton]\n    type = {}\n    {}\n  []\n[]\n"


@pytest.mark.parametrize(
    ("kind", "options", "settings"),
    [
        ("Newton", "", {"ls_max_iters": 1}),
        ("NewtonWithLineSearch", "", {"ls_max_iters": 10}),
        (
            "Newton",
            "abs_tol = 1e-12\n rel_tol = 1e-9\n max_its = 40\n verbose = true\n linear_solver = 'lu'",
            {"atol": 1e-12, "rtol": 1e-9, "miters": 40, "ls_max_iters": 1},
        ),
        (
            "NewtonWithLineSearch",
            "linesearch_type = STRONG_WOLFE\n max_linesearch_iterations = 6\n linesearch_cutback = 3.0\n"
            "linesearch_stopping_criteria = 1e-4\n check_negative_criterion = true",
            {"ls_type": "STRONG_WOLFE", "ls_max_iters": 6, "ls_cutback": 3.0, "ls_c": 1e-4},
        ),
    ],
)
def test_settings_come_from_the_solvers_block(
    tmp_path: Path, kind: str, options: str, settings: dict[str, object]
) -> None:
    assert asked(stub(tmp_path, SOLVED, NEWTON.format(kind, options))) == Stub(tmp_path / "bar", settings)


@pytest.mark.parametrize(
    ("options", "rest", "words"),
    [
        (SOLVED, "", r"no block \[Solvers/newton\]"),
        (SOLVED, NEWTON.format("DenseLU", ""), "type is 'DenseLU', expected Newton or"),
        (SOLVED, NEWTON.format("Newton", "atol = 1"), "no option 'atol'.*abs_tol"),
        (SOLVED, NEWTON.format("Newton", "linesearch_c = 1"), "no option 'linesearch_c'"),
        (SOLVED, NEWTON.format("Newton", "max_its = x"), "max_its is 'x'"),
        ("artifact_path = 'bar'\n meta = ./bar_meta.json", "", "artifact_path and meta given, expected one of"),
        ("", "", "no artifact given, expected one of artifact_path .* and meta"),
    ],
)
def test_options_that_do_not_go_together_are_refused(tmp_path: Path, options: str, rest: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        neml2.load_model(stub(tmp_path, options, rest), "bar")


@pytest.mark.parametrize("option", ["artefact_path = 'bar'", "meta_path = ./bar_meta.json", "solvers = newton"])
def test_a_misspelt_option_is_refused(tmp_path: Path, option: str) -> None:
    with pytest.raises(ValueError, match=r"unknown option.*Accepted: artifact_path, meta, solver"):
        neml2.load_model(stub(tmp_path, f"artifact_path = 'bar'\n    {option}"), "bar")
