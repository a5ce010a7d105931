"""`inspect` against the model itself; `doctor` in environments that are broken on purpose."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

import references
from commands import answer, copy_of, printed, refused, require_form, stub_of
from neml2_aoti_plugin import seal


def findings(diagnosis: Any, subject: str) -> list[Any]:
    return [finding for finding in diagnosis["findings"] if finding["subject"] == subject]


# -- inspect -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["elasticity", "promoted", "viscoplasticity", "calibration", "cross_group"])
def test_a_description_is_that_of_the_model(name: str) -> None:
    case = references.case(name)
    report, model = answer("inspect", case.file), case.load(tight=False)
    found = tuple(report[key] for key in ("model", "schema", "release", "leaf"))
    assert found == (case.stub.model, 14, "3.1.0", "cpu/float64")
    for side, variables in (("inputs", model.inputs), ("outputs", model.outputs)):
        shapes = [(v["name"], tuple(v["base_shape"]), tuple(v["sub_batch_shape"])) for v in report[side]]
        assert shapes == [(name, v.base_shape, v.sub_batch_shape) for name, v in variables.items()]
    assert [*map(tuple, report["derivatives"])] == model.derivative_pairs
    assert [*map(tuple, report["parameter_derivatives"])] == model.parameter_derivative_pairs
    values = {n: v.item() for n, v in model.named_parameters().items()}
    assert {p["name"]: p["values"][0] for p in report["parameters"]} == values
    settings = [s["newton"] for s in report["segments"] if s["kind"] == "implicit"]
    assert settings == ([asdict(model.solver)] if model.solver else [])
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


def test_a_damaged_artifact_is_described_and_diagnosed_all_the_same(tmp_path: Path) -> None:
    """Of its graphs one is gone, and another is none."""
    stub, leaf = copy_of("elasticity", tmp_path), tmp_path / "elasticity/cpu/float64"
    (leaf / "elasticity.pt2").unlink()
    (leaf / "elasticity_jvp.pt2").write_bytes(b"no package")
    report, diagnosis = answer("inspect", stub), answer("doctor", stub, status=1)
    files = {f["name"]: f["bytes"] for f in report["segments"][0]["files"]}
    assert files == {"elasticity.pt2": None, "elasticity_jvp.pt2": 10}
    # What the doctor says of it, the tree says too.
    assert not diagnosis["artifact"]["runs"]
    first, second = wrong = [found["says"] for found in findings(diagnosis, "artifact")]
    assert "no such file" in first and "elasticity_jvp.pt2" in second
    assert all("compile the model again" in says or "Copy" in says for says in wrong)
    assert report["leaves"][0]["faults"] == wrong
    tree = printed("inspect", stub)[0]
    assert all(text in tree for text in (*wrong, "elasticity.pt2  missing"))
    assert printed("doctor", stub, status=1)[0].splitlines()[-1].startswith("2 problem(s), see above")
    (tmp_path / "elasticity/metadata.json").write_text("{")
    assert "metadata.json" in refused("inspect", stub, status=1)
    assert answer("doctor", stub, status=1)["artifact"] is None


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


# Of each subject that is spoilt: the variables that do it, the level, what is said, and the cure.
KERNELS, LLVMLITE = "NEML2_AOTI_PLUGIN_KERNELS", {"PYTHONPATH": "with an llvmlite that fails"}
BROKEN: list[dict[str, tuple[dict[str, str], str, str, str]]] = [
    {
        "plugin": ({"NEML2_AOTI_PLUGIN": "0"}, "problem", "switched off", "unset NEML2_AOTI_PLUGIN"),
        "solves": ({KERNELS: "fast"}, "problem", "'fast'", f"unset {KERNELS}"),
        "compiler": ({"CXX": "no-such-compiler"}, "advice", "not on the PATH", "CXX"),
    },
    {
        "neml2": ({"NEML2_LOGS": "bogus=info"}, "problem", "cannot be imported", "NEML2_LOGS"),
        "solves": ({KERNELS: "", **LLVMLITE}, "advice", "Error: broken on purpose", "pip install -U llvmlite"),
        "torch": ({"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}, "advice", "loads no entry p", "import neml2_aoti_plugin"),
    },
]


@pytest.mark.processes
@pytest.mark.parametrize("spoilt", BROKEN)
def test_broken_environments(spoilt: dict[str, tuple[dict[str, str], str, str, str]], tmp_path: Path) -> None:
    variables = {name: value for given, *_ in spoilt.values() for name, value in given.items()}
    known = {name: value for name, value in variables.items() if name not in ("CXX", "PYTHONPATH")}
    if "PYTHONPATH" in variables:
        (tmp_path / "llvmlite").mkdir()
        (tmp_path / "llvmlite/__init__.py").write_text("raise ImportError('broken on purpose')")
        variables["PYTHONPATH"] = str(tmp_path)
    command = [sys.executable, "-m", "neml2_aoti_plugin", "doctor", "--json"]
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, check=False)
    document = json.loads(done.stdout)
    require_form(document["result"], "doctor")
    assert done.returncode == document["status"] == 1, done.stderr
    for subject, (_, level, says, cure) in spoilt.items():
        (found,) = findings(document["result"], subject)
        assert found["level"] == level and says in found["says"] and cure in found["cure"], found
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


@pytest.mark.processes
def test_the_binding_is_tried() -> None:
    """On whatever torch this is: what is tried must be what was measured."""
    diagnosis = answer("doctor", stub_of("viscoplasticity"), "--try-binding")
    begins = {"works": "works: called, its outputs are within", "imports, then reads wrong": "fails at the call"}
    begins["does not import"] = "fails at the import"
    measured = [tried for said, tried in begins.items() if diagnosis["plugin"]["native_binding"].startswith(said)]
    assert all(diagnosis["binding"].startswith(tried) for tried in measured)
