"""`inspect` against the model itself; `doctor` in environments that are broken on purpose."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

import references
from commands import answer, copy_of, printed, refused, require_form, stub_of
from neml2_aoti_plugin import seal


def damaged_copy(folder: Path) -> Path:
    """The stub of an artifact with a graph that is gone, and another that is none."""
    stub = copy_of("elasticity", folder)
    (folder / "elasticity/cpu/float64/elasticity.pt2").unlink()
    (folder / "elasticity/cpu/float64/elasticity_jvp.pt2").write_bytes(b"no package")
    return stub


# -- inspect -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["elasticity", "promoted", "viscoplasticity", "calibration", "cross_group"])
def test_a_description_is_that_of_the_model(name: str) -> None:
    case = references.case(name)
    report, model = answer("inspect", case.file), case.load(tight=False)
    assert [report[key] for key in ("model", "schema", "release", "leaf")] == [
        *(case.stub.model, 14, "3.1.0", "cpu/float64")
    ]
    assert [v["name"] for v in report["inputs"]] == model.input_names
    assert [v["base_shape"] for v in report["inputs"]] == model.input_base_shapes
    assert [tuple(v["sub_batch_shape"]) for v in report["inputs"]] == [v.sub_batch_shape for v in model.inputs.values()]
    assert [v["name"] for v in report["outputs"]] == model.output_names
    assert [*map(tuple, report["derivatives"])] == model.derivative_pairs
    assert [*map(tuple, report["parameter_derivatives"])] == model.parameter_derivative_pairs
    values = {n: v.item() for n, v in model.named_parameters().items()}
    assert {p["name"]: p["values"][0] for p in report["parameters"]} == values
    settings = [s["newton"] for s in report["segments"] if s["kind"] == "implicit"]
    assert settings == ([vars(model.solver)] if model.solver else [])
    sizes = {p.name: p.stat().st_size for p in (case.artifact / "cpu/float64").glob("*.pt2")}
    assert {f["name"]: f["bytes"] for s in report["segments"] for f in s["files"]} == sizes
    assert report["leaves"][0]["bytes"] == sum(sizes.values())
    tree = printed("inspect", case.file)[0]
    names = [*model.input_names, *model.output_names, *values, *(s["kind"] for s in report["segments"])]
    assert all(name in tree for name in names)


def test_what_is_state_of_what() -> None:
    report = answer("inspect", stub_of("viscoplasticity"))
    assert {v["name"]: (v["kind"], v["of"], v["steps_back"]) for v in report["inputs"]} == {
        "strain": ("force", None, 0),
        "strain~1": ("old force", "strain", 1),
        "t": ("force", None, 0),
        "t~1": ("old force", "t", 1),
        "equivalent_plastic_strain~1": ("old state", "equivalent_plastic_strain", 1),
        "stress~1": ("old state", "stress", 1),
    }
    assert [v["kind"] for v in report["outputs"]] == ["state", "state"]
    (segment,) = report["segments"]
    assert (segment["unknowns"], segment["groups"], segment["linear_solver"]) == (7, ["dense"], "direct")


@pytest.mark.wide
def test_an_iterative_linear_solver() -> None:
    segment = answer("inspect", stub_of("krylov_precond"))["segments"][0]
    assert (segment["linear_solver"], segment["preconditioned"]) == ("gmres", True)


def test_a_damaged_artifact_is_described_all_the_same(tmp_path: Path) -> None:
    stub = damaged_copy(tmp_path)
    files = {f["name"]: f["bytes"] for f in answer("inspect", stub)["segments"][0]["files"]}
    assert files == {"elasticity.pt2": None, "elasticity_jvp.pt2": 10}
    tree = printed("inspect", stub)[0]
    assert "elasticity.pt2  missing" in tree
    # What the doctor says of it, the tree says too.
    wrong = [found["says"] for found in findings(answer("doctor", stub, status=1), "artifact")]
    assert answer("inspect", stub)["leaves"][0]["faults"] == wrong
    assert len(wrong) == 2 and all(text in tree for text in wrong)
    (tmp_path / "elasticity/metadata.json").write_text("{")
    assert "metadata.json" in refused("inspect", stub, status=1)


def test_a_seal_is_reported_and_kept(tmp_path: Path) -> None:
    stub, artifact = copy_of("elasticity", tmp_path), tmp_path / "elasticity"
    assert not answer("inspect", stub)["sealed"]
    seal(artifact)
    assert answer("inspect", stub)["sealed"]
    (artifact / "cpu/float64/more").write_text("added")
    assert "was added" in refused("inspect", stub, status=1)
    (finding,) = findings(answer("doctor", stub, status=1), "artifact")
    assert finding["level"] == "problem" and "more: was added" in finding["says"]
    assert "Copy the artifact again" in finding["says"]


# -- doctor --------------------------------------------------------------------------------------------------------


def findings(diagnosis: Any, subject: str) -> list[Any]:
    return [finding for finding in diagnosis["findings"] if finding["subject"] == subject]


def test_a_healthy_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    stub = stub_of("viscoplasticity")
    diagnosis = answer("doctor", stub)
    assert diagnosis["plugin"]["active"]
    assert diagnosis["artifact"]["runs"] and not diagnosis["artifact"]["sealed"]
    assert diagnosis["versions"].keys() >= {"torch", "llvmlite", "neml2-aoti-plugin", "Python"}
    assert diagnosis["versions"]["neml2"] == version("neml2")
    assert all(finding["cure"] for finding in diagnosis["findings"] if finding["level"] != "fine")
    assert printed("doctor", stub)[0].splitlines()[-1].startswith("Compiled models run here")
    # It fits a terminal of the usual width.
    monkeypatch.setattr("neml2_aoti_plugin._cli.output.PIPED_WIDTH", 80)
    assert max(map(len, printed("doctor", stub)[0].splitlines())) <= 80


# What is set, and of each subject that it spoils: level, what is said, and the cure.
BROKEN: list[tuple[dict[str, str], dict[str, tuple[str, str, str]]]] = [
    (
        {"NEML2_AOTI_PLUGIN": "0", "NEML2_AOTI_PLUGIN_KERNELS": "fast", "CXX": "no-such-compiler"},
        {
            "plugin": ("problem", "switched off", "unset NEML2_AOTI_PLUGIN"),
            "solves": ("problem", "'fast'", "unset NEML2_AOTI_PLUGIN_KERNELS"),
            "compiler": ("advice", "not on the PATH", "CXX"),
        },
    ),
    (
        {
            "NEML2_LOGS": "bogus=info",
            "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
            "PYTHONPATH": "with an llvmlite that fails",
            "NEML2_AOTI_PLUGIN_KERNELS": "",
        },
        {
            "neml2": ("problem", "cannot be imported", "NEML2_LOGS"),
            "solves": ("advice", "ImportError: broken on purpose", "pip install -U llvmlite"),
            "torch": ("advice", "loads no entry points", "import neml2_aoti_plugin"),
        },
    ),
]


@pytest.mark.processes
@pytest.mark.parametrize(("variables", "spoilt"), BROKEN)
def test_broken_environments(
    variables: dict[str, str], spoilt: dict[str, tuple[str, str, str]], tmp_path: Path
) -> None:
    if "PYTHONPATH" in variables:
        (tmp_path / "llvmlite").mkdir()
        (tmp_path / "llvmlite/__init__.py").write_text("raise ImportError('broken on purpose')")
        variables = {**variables, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "neml2_aoti_plugin", "doctor", "--json"]
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, check=False)
    document = json.loads(done.stdout)
    require_form(document["result"], "doctor")
    assert done.returncode == document["status"] == 1, done.stderr
    by_subject = {finding["subject"]: finding for finding in document["result"]["findings"]}
    for subject, (level, says, cure) in spoilt.items():
        found = by_subject[subject]
        assert found["level"] == level and says in found["says"] and cure in found["cure"], found
    known = {name: value for name, value in variables.items() if name not in ("CXX", "PYTHONPATH")}
    assert document["result"]["variables"].items() >= known.items()


@pytest.mark.parametrize(("word", "level"), [("torch", "advice"), ("fast", "problem")])
def test_a_newton_loop_that_was_asked_for(word: str, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A word that chooses nothing does not keep the artifact from being looked over."""
    monkeypatch.setenv("NEML2_AOTI_PLUGIN_KERNELS", word)
    diagnosis = answer("doctor", stub_of("viscoplasticity"), status=1 if level == "problem" else 0)
    (finding,) = findings(diagnosis, "solves")
    assert (finding["level"], finding["cure"]) == (level, "unset NEML2_AOTI_PLUGIN_KERNELS")
    assert diagnosis["artifact"]["runs"]
    assert {x["subject"] for x in diagnosis["findings"] if x["level"] == "problem"} <= {"solves"}


def test_threads_that_wait_for_each_other() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(64)
        (finding,) = findings(answer("doctor", status=1), "threads")
    finally:
        torch.set_num_threads(before)
    assert finding["level"] == "problem" and finding["says"].startswith("torch uses 64 on the")
    assert finding["cure"] == f"export OMP_NUM_THREADS={len(os.sched_getaffinity(0))}"


def test_an_artifact_that_cannot_run(tmp_path: Path) -> None:
    stub = damaged_copy(tmp_path)
    diagnosis = answer("doctor", stub, status=1)
    assert not diagnosis["artifact"]["runs"]
    first, second = findings(diagnosis, "artifact")
    assert "no such file" in first["says"] and "elasticity_jvp.pt2" in second["says"]
    assert all("compile the model again" in f["says"] or "Copy" in f["says"] for f in (first, second))
    assert printed("doctor", stub, status=1)[0].splitlines()[-1].startswith("2 problem(s), see above")
    (tmp_path / "elasticity/metadata.json").write_text("{")
    assert answer("doctor", stub, status=1)["artifact"] is None


@pytest.mark.processes
def test_the_binding_is_tried() -> None:
    """On whatever torch this is: what is tried must be what was measured."""
    diagnosis = answer("doctor", stub_of("viscoplasticity"), "--try-binding")
    begins = {
        "works": "works: called, its outputs are within",
        "imports, then reads wrong": "fails at the call",
        "does not import": "fails at the import",
    }
    measured = [tried for said, tried in begins.items() if diagnosis["plugin"]["native_binding"].startswith(said)]
    assert all(diagnosis["binding"].startswith(tried) for tried in measured)
