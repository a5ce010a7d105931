"""`inspect` against the model itself; `doctor` in environments that are broken on purpose."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import references
from json_check import mismatches
from legacy import build
from legacy.catalogue import INPUTS, SCENARIOS
from neml2_aoti_plugin import _cli as cli
from neml2_aoti_plugin import seal
from neml2_aoti_plugin._workbench.contents import ArtifactReport
from neml2_aoti_plugin._workbench.describe import describe
from neml2_aoti_plugin._workbench.diagnose import Diagnosis, diagnose
from neml2_aoti_plugin._workbench.environment import Finding
from neml2_aoti_plugin._workbench.target import find_target
from stubs.build import compiled


def copy(name: str, folder: Path) -> Path:
    shutil.copytree(compiled(name) / name, folder / name)
    return folder / name


# -- inspect -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["elasticity", "promoted", "viscoplasticity", "calibration", "cross_group"])
def test_a_description_is_that_of_the_model(name: str) -> None:
    case = references.case(name)
    report, model = describe(find_target(case.file)), case.load(tight=False)
    assert (report.model, report.schema, report.release, report.leaf) == (
        case.stub.model,
        14,
        "3.1.0",
        "cpu/float64",
    )
    assert [v.name for v in report.inputs] == model.input_names
    assert [list(v.base_shape) for v in report.inputs] == model.input_base_shapes
    assert [v.sub_batch_shape for v in report.inputs] == [v.sub_batch_shape for v in model.inputs.values()]
    assert [v.name for v in report.outputs] == model.output_names
    assert list(report.derivatives) == model.derivative_pairs
    assert list(report.parameter_derivatives) == model.parameter_derivative_pairs
    assert {p.name: p.values[0] for p in report.parameters} == {
        n: v.item() for n, v in model.named_parameters().items()
    }
    settings = [s.newton for s in report.segments if s.kind == "implicit"]
    assert settings == ([model.solver] if model.solver else [])
    leaf = case.artifact / "cpu/float64"
    files = {f.name: f.bytes for s in report.segments for f in s.files}
    assert files == {p.name: p.stat().st_size for p in leaf.glob("*.pt2")}
    assert report.leaves[0].bytes == sum(p.stat().st_size for p in leaf.glob("*.pt2"))


def test_what_is_state_of_what() -> None:
    report = describe(find_target(references.case("viscoplasticity").file))
    assert {v.name: (v.kind, v.of, v.steps_back) for v in report.inputs} == {
        "strain": ("force", None, 0),
        "strain~1": ("old force", "strain", 1),
        "t": ("force", None, 0),
        "t~1": ("old force", "t", 1),
        "equivalent_plastic_strain~1": ("old state", "equivalent_plastic_strain", 1),
        "stress~1": ("old state", "stress", 1),
    }
    assert [v.kind for v in report.outputs] == ["state", "state"]
    (segment,) = report.segments
    assert (segment.unknowns, segment.groups, segment.linear_solver) == (7, ("dense",), "direct")


@pytest.mark.wide
def test_an_iterative_linear_solver() -> None:
    segment = describe(find_target(references.case("krylov_precond").file)).segments[0]
    assert (segment.linear_solver, segment.preconditioned) == ("gmres", True)


def test_a_damaged_artifact_is_described_all_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = copy("elasticity", tmp_path)
    (artifact / "cpu/float64/elasticity.pt2").unlink()
    (artifact / "cpu/float64/elasticity_jvp.pt2").write_bytes(b"no package")
    report = describe(find_target(artifact))
    assert [(f.name, f.bytes) for f in report.segments[0].files] == [
        ("elasticity.pt2", None),
        ("elasticity_jvp.pt2", 10),
    ]
    assert cli.main(["inspect", str(artifact)]) == 0
    assert "elasticity.pt2  missing" in capsys.readouterr().out
    (artifact / "metadata.json").write_text("{")
    assert cli.main(["inspect", str(artifact)]) == 1
    assert "metadata.json" in capsys.readouterr().err


def test_a_seal_is_told_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = copy("elasticity", tmp_path)
    assert not describe(find_target(artifact)).sealed
    seal(artifact)
    assert describe(find_target(artifact)).sealed
    (artifact / "cpu/float64/more").write_text("added")
    assert cli.main(["inspect", str(artifact)]) == 1
    assert "was added" in capsys.readouterr().err


OLD = [("3.0.0", "forward", 2), ("3.0.0", "implicit", 2), ("3.0.6", "forward", 7), ("3.0.6", "implicit", 7)]


@pytest.mark.legacy
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("release", "scenario", "schema"), [*OLD, ("3.1.0", "implicit", 14)])
def test_old_artifacts(release: str, scenario: str, schema: int, capsys: pytest.CaptureFixture[str]) -> None:
    stub = build.stub(release, scenario)
    reports = []
    for path in (stub, build.metadata(release, scenario), build.metadata(release, scenario).parent):
        assert cli.main(["inspect", str(path), "--json"]) == 0
        document: dict[str, Any] = json.loads(capsys.readouterr().out)
        assert not mismatches(document["result"], ArtifactReport)
        reports.append(document["result"])
        assert document["result"]["schema"] == schema
        assert cli.main(["doctor", str(path), "--json"]) in (0, 1)
        document = json.loads(capsys.readouterr().out)
        assert not mismatches(document["result"], Diagnosis)
        assert document["result"]["artifact"]["runs"] is True
    assert reports[1]["inputs"] == reports[2]["inputs"] == reports[0]["inputs"]
    if schema == 7 and scenario == "implicit":
        # Only the stub has the settings of that release.
        assert reports[0]["segments"][0]["newton"]["miters"] == 40 != reports[1]["segments"][0]["newton"]["miters"]
    source = INPUTS / SCENARIOS[scenario].input
    assert cli.main(["verify", str(stub), "--against", str(source)]) == 0
    assert "FAILED" not in capsys.readouterr().out


# -- doctor --------------------------------------------------------------------------------------------------------


def found(diagnosis: Diagnosis, subject: str) -> list[Finding]:
    return [finding for finding in diagnosis.findings if finding.subject == subject]


def test_a_healthy_environment() -> None:
    diagnosis = diagnose(find_target(references.case("viscoplasticity").file))
    assert diagnosis.healthy and diagnosis.plugin.active
    assert diagnosis.artifact is not None and diagnosis.artifact.runs and not diagnosis.artifact.sealed
    assert diagnosis.versions.keys() >= {"neml2", "torch", "llvmlite", "neml2-aoti-plugin", "Python"}
    assert all(finding.cure for finding in diagnosis.findings if finding.level != "fine")


# What is set, and of each subject that it spoils: level, what is said, and the cure.
BROKEN: list[tuple[dict[str, str], dict[str, tuple[str, str, str]]]] = [
    (
        {"NEML2_AOTI_PLUGIN": "0", "NEML2_AOTI_PLUGIN_KERNELS": "fast", "CXX": "no-such-compiler"},
        {
            "plugin": ("problem", "switched off", "unset NEML2_AOTI_PLUGIN"),
            "Newton loop": ("problem", "'fast'", "unset NEML2_AOTI_PLUGIN_KERNELS"),
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
            "Newton loop": ("advice", "ImportError: broken on purpose", "pip install -U llvmlite"),
            "torch": ("advice", "loads no entry points", "import neml2_aoti_plugin"),
        },
    ),
]


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
    assert not mismatches(document["result"], Diagnosis)
    assert done.returncode == document["status"] == 1, done.stderr
    by_subject = {finding["subject"]: finding for finding in document["result"]["findings"]}
    for subject, (level, says, cure) in spoilt.items():
        told = by_subject[subject]
        assert told["level"] == level and says in told["says"] and cure in told["cure"], told
    known = {name: value for name, value in variables.items() if name not in ("CXX", "PYTHONPATH")}
    assert document["result"]["variables"].items() >= known.items()


def test_a_loop_on_torch_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEML2_AOTI_PLUGIN_KERNELS", "torch")
    (finding,) = found(diagnose(), "Newton loop")
    assert (finding.level, finding.cure) == ("advice", "unset NEML2_AOTI_PLUGIN_KERNELS")


def test_a_word_that_chooses_nothing_is_told_beside_the_artifact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEML2_AOTI_PLUGIN_KERNELS", "fast")
    diagnosis = diagnose(find_target(references.case("viscoplasticity").file))
    assert diagnosis.artifact is not None and diagnosis.artifact.runs
    assert [x.subject for x in diagnosis.findings if x.level == "problem"] == ["Newton loop"]


def test_threads_that_wait_for_each_other() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(64)
        (finding,) = found(diagnose(), "threads")
    finally:
        torch.set_num_threads(before)
    assert finding.level == "problem" and finding.says.startswith("torch uses 64 of the")
    assert finding.cure == f"export OMP_NUM_THREADS={len(os.sched_getaffinity(0))}"


def test_an_artifact_that_cannot_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = copy("elasticity", tmp_path)
    (artifact / "cpu/float64/elasticity.pt2").unlink()
    (artifact / "cpu/float64/elasticity_jvp.pt2").write_bytes(b"no package")
    diagnosis = diagnose(find_target(artifact))
    assert not diagnosis.healthy and diagnosis.artifact is not None and not diagnosis.artifact.runs
    told = [finding.says for finding in found(diagnosis, "artifact")]
    assert len(told) == 2 and "no such file" in told[0] and "elasticity_jvp.pt2" in told[1]
    assert all("compile the model again" in f.cure or "Copy" in f.cure for f in found(diagnosis, "artifact"))
    assert cli.main(["doctor", str(artifact)]) == 1
    capsys.readouterr()
    (artifact / "metadata.json").write_text("{")
    diagnosis = diagnose(find_target(artifact))
    assert diagnosis.artifact is None and not diagnosis.healthy


def test_a_seal_that_is_broken(tmp_path: Path) -> None:
    artifact = copy("elasticity", tmp_path)
    seal(artifact)
    (artifact / "cpu/float64/more").write_text("added")
    (finding,) = found(diagnose(find_target(artifact)), "artifact")
    assert finding.level == "problem" and "more: was added" in finding.says
    assert finding.cure.startswith("Copy the artifact again")


def test_the_binding_is_tried() -> None:
    """On whatever torch this is: what is tried must be what was measured."""
    diagnosis = diagnose(find_target(references.case("viscoplasticity").file), try_binding=True)
    measured = diagnosis.plugin.native_binding
    if measured == "works":
        assert diagnosis.binding.startswith("works: called, its outputs are within")
    elif measured.startswith("imports, then reads wrong"):
        assert diagnosis.binding.startswith("fails at the call")
    elif measured.startswith("does not import"):
        assert diagnosis.binding.startswith("fails at the import")
