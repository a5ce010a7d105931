"""Overrides of a compiled model's input file: taken as for the source input, or refused with what can be changed."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import neml2
import pytest
import torch
from neml2.cli.run import main as neml2_run

import references
from commands import answer, refused
from legacy import build
from neml2_aoti_plugin import InputError, Model
from references import write_stub

SOLVER = ["Models/viscoplasticity/solver:=newton", "Solvers/newton/type:=Newton", "Solvers/newton/max_its:=7"]


@functools.cache
def stress_of_the_source(name: str, override: str) -> tuple[int, torch.Tensor]:
    """The last step of the driver's run and the stress there, by neml2's eager model of the source input."""
    stub = references.case(name).stub
    with references.default_dtype(torch.float64):
        driver = neml2.load_input(stub.path, additional_args=[override]).get_driver(stub.driver)
        driver.run()
    last = driver.nsteps - 1
    return last, driver.result()[f"output.{last}.stress"].detach()


@pytest.mark.parametrize(
    ("name", "path", "source"),
    [
        ("calibration", "Models/hardening/hardening_modulus", "Models/hardening/hardening_modulus"),
        ("calibration", "Models/hardening/K", "Models/hardening/hardening_modulus"),
        ("calibration", "Models/viscoplasticity/residual.hardening.K", "Models/hardening/hardening_modulus"),
        ("promoted_implicit", "Models/creep/reference_stress", "Models/creep/reference_stress"),
    ],
)
def test_an_override_of_a_promoted_parameter_does_what_it_does_to_the_source(
    tmp_path: Path, name: str, path: str, source: str
) -> None:
    case, file = references.case(name), tmp_path / "result.pt"
    last, wanted = stress_of_the_source(name, f"{source}:=2500")
    answer("run", case.file, "driver", "--out", file)
    assert not torch.allclose(torch.load(file)[f"output.{last}.stress"], wanted, rtol=1e-3)
    answer("run", case.file, "driver", f"{path}:=2500", "--out", file)
    torch.testing.assert_close(torch.load(file)[f"output.{last}.stress"], wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "Models/flow_direction/yield_function:=f",
            "promoted parameters, by overrides of Models/viscoplasticity/residual.",
        ),
        ("Models/viscoplasticity/K:=3", "the options artifact_path, meta, solver"),
        ("Models/hardening/K:=soft", "expected 1 finite number(s)"),
        ("Models/hardening/K:=1e999", "expected 1 finite number(s)"),
        ("Models/hardening:=3", "Models/hardening is 3, which nobody reads"),
        ("Solvers/newton/max_its:=2", "'Models/viscoplasticity/solver:=newton' 'Solvers/newton/type:=Newton'"),
        ("EquationSystems/system/model:=other", "What the model 'viscoplasticity' was made of is compiled"),
        ("Drivers/other/save_as:=x.pt", "In [Drivers] there are: driver"),
        ("Tensors/times/exp:='1'", "[Tensors/times] of type Python has no such option"),
        ("Tensors/more/expr:='1'", "In [Tensors] there are: "),
        ("Settings/dynamic:=false", "which nobody reads"),
        ("Model/hardening/K:=3", "which nobody reads"),
    ],
)
def test_an_override_that_nobody_reads_is_refused_with_what_can_be_changed(override: str, said: str) -> None:
    stub = references.case("calibration").file
    message = refused("run", stub, "driver", override)
    assert said in message and override.partition(":=")[0] in message
    with pytest.raises(InputError, match=r"nobody reads|finite number"):
        neml2.load_input(stub, additional_args=[override]).get_model("viscoplasticity")


def test_an_override_that_is_refused_ends_neml2_run(capsys: pytest.CaptureFixture[str]) -> None:
    with references.default_dtype(torch.float64):
        status = neml2_run([str(references.case("calibration").file), "driver", "Solvers/newton/max_its:=2"])
    torch.set_default_device(None)
    assert status == 1 and "which nobody reads" in capsys.readouterr().err


@pytest.mark.legacy
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("override", ["Models/dashpot/viscosity:=300", "Solvers/newton/max_its:=2"])
def test_blocks_that_an_old_stub_still_has_are_not_read_either(override: str) -> None:
    """neml2 3.0.0 leaves the source in its stubs."""
    stub = build.stub("3.0.0", "multi")
    assert neml2.load_model(stub, "bar").input_spec
    with pytest.raises(InputError, match="nobody reads"):
        neml2.load_input(stub, additional_args=[override]).get_model("bar")
    solver = ["Models/bar/solver:=newton", "Solvers/newton/max_its:=2"]
    assert neml2.load_input(stub, additional_args=solver).get_model("bar").solver.miters == 2


def test_a_solver_that_is_added_and_named_is_read() -> None:
    file = neml2.load_input(references.case("calibration").file, additional_args=SOLVER)
    assert file.get_model("viscoplasticity").solver.miters == 7


def test_what_a_file_itself_holds_is_not_judged(tmp_path: Path) -> None:
    """Blocks that nothing builds, and sections of others, are in files that load today."""
    stub, case = tmp_path / "mine.i", references.case("promoted")
    text, where = case.file.read_text(), f"artifact_path = '{case.artifact}'"
    stub.write_text(text + "[Mine]\n a = 1\n[]\n[Solvers]\n [left]\n  max_its = 3\n []\n[]\n")
    overrides = [f"Models/promoted/artifact_path:='{case.artifact}'", "Mine/a:=2"]
    assert neml2.load_input(stub, pre=["nbatch = 2"], additional_args=overrides).get_model("promoted").input_spec
    assert neml2.load_string(text.replace("artifact_path = 'promoted'", where)).get_model("promoted").input_spec


def parameter(model: Any, name: str) -> float:
    return float(dict(model.named_parameters())[name])


def test_a_value_in_the_stub_itself_is_refused(tmp_path: Path) -> None:
    """By each that reads stubs, since none takes it."""
    artifact = references.case("promoted").artifact
    stub = write_stub(tmp_path / "mine.i", options="promoted.E = 5", m=artifact)
    with pytest.raises(InputError, match=r"promoted.E is 5, which nobody reads.*overrides of Models/m/promoted.E"):
        neml2.load_model(stub, "m")
    with pytest.raises(InputError, match=r"\[Models/m\] in .*promoted.E is 5, which nobody reads"):
        Model(stub)
    write_stub(stub, m=artifact)
    assert (
        parameter(neml2.load_input(stub, additional_args=["Models/m/promoted.E:=5"]).get_model("m"), "promoted.E") == 5
    )


def test_an_override_of_another_compiled_model_of_the_file(tmp_path: Path) -> None:
    one, two, three = (references.case(name).artifact for name in ("promoted", "viscoplasticity", "calibration"))
    stub = write_stub(tmp_path / "three.i", promoted=one, viscoplasticity=two, soft=three)
    file = neml2.load_input(stub, additional_args=["Models/hardening/K:=7", "Models/promoted/E:=5"])
    assert file.get_model("viscoplasticity").named_parameters() is not None
    assert parameter(file.get_model("soft"), "residual.hardening.K") == 7
    assert parameter(file.get_model("promoted"), "promoted.E") == 5
