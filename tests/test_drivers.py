"""Trajectories: compiled stubs against eager neml2, a closed form, and an integration that knows nothing of neml2."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import neml2
import numpy as np
import pytest
import torch
from neml2.types import SR2, Scalar

import references
from examples.reference import Viscoplasticity, deviator
from references import difference
from stubs.catalogue import CATALOGUE

# Relative to the largest value of a variable over the trajectory.
TRAJECTORY = 1e-8
SINGLE = 1e-6
# The absolute tolerance of BiCGStab, 1e-7 MPa, is one of the plastic strain, of 1e-2, as well.
LOOSER = {"bicgstab": 1e-6}
CUT = ["substepping"]


@functools.cache
def eager_result(file: Path, driver: str) -> dict[str, torch.Tensor]:
    """Trajectory of an input file's driver, with tightened tolerances; entries of the catalogue share input files."""
    with references.default_dtype(torch.float64):
        found = neml2.load_input(file).get_driver(driver)
        references.tighten(found.model)
        found.run()
    return {name: value.detach() for name, value in found.result().items()}


def history(result: dict[str, torch.Tensor], side: str, name: str, first: int = 1) -> torch.Tensor:
    """One variable over the steps, `(steps, *batch, ...)`."""
    count = sum(key.startswith(f"{side}.") and key.endswith(f".{name}") for key in result)
    steps = [result[f"{side}.{k}.{name}"] for k in range(first, first + count) if f"{side}.{k}.{name}" in result]
    return torch.stack([step.expand(torch.broadcast_shapes(*(s.shape for s in steps))) for step in steps])


@pytest.mark.parametrize("name", [name for name in CATALOGUE if name not in (*CUT, "elasticity_stiff")])
def test_trajectory_is_that_of_the_eager_model(name: str) -> None:
    case = references.case(name)
    # What the overrides choose is how the equations are solved; eager solves them directly.
    expected = eager_result(case.stub.path, case.stub.driver)
    found = case.driver.result()
    tolerance = LOOSER.get(name, TRAJECTORY if case.dtype == torch.float64 else SINGLE)
    for out in case.model.output_names:
        mine, theirs = history(found, "output", out), history(expected, "output", case.authored(out))
        assert len(mine) == case.driver.nsteps - 1
        assert difference(mine, theirs.expand(mine.shape)) < tolerance, out


class TestCutSteps:
    """Eager neml2 does not cut steps; what it can do is the same model in small steps, or where no cut is needed."""

    def test_rows_without_cuts_follow_the_eager_model(self) -> None:
        case = references.case("substepping")
        factory = neml2.load_input(case.stub.path)
        strains, times = factory.get_tensor("strains"), factory.get_tensor("times")
        gentle = SR2(strains.data[:, 2:3])
        eager = neml2.TransientDriver(factory.get_model("whole_step"), times, "t", {"strain": gentle}, {})
        references.tighten(eager.model)
        eager.run()
        for out in case.model.output_names:
            mine = history(case.driver.result(), "output", out)[:, 2:3]
            assert difference(mine, history(eager.result(), "output", out).expand(mine.shape)) < TRAJECTORY, out

    def test_rows_with_cuts_come_near_a_stiff_integration(self) -> None:
        law = Viscoplasticity(60_000.0, 0.35, 30.0, lambda p: 20.0 * (1.0 - np.exp(-150.0 * p)), 40.0, 8.0)
        case = references.case("substepping")
        result = case.driver.result()
        times = np.array([float(result[f"input.{k}.t"]) for k in range(case.driver.nsteps)])
        strain = history(result, "input", "strain", 0).numpy()
        for point in (0, 1):
            rate = (strain[-1, point] - strain[0, point]) / times[-1]
            solved = law.integrate(times, rate)
            p = solved[:, 6]
            found = history(result, "output", "equivalent_plastic_strain")[:, point].numpy()
            assert np.abs(found - p[1:]).max() < 0.01 * p.max()
            # The elastic strain is what the plastic one leaves.
            elastic = strain[1:, point] - history(result, "output", "plastic_strain")[:, point].numpy()
            stress = law.young / (1 + law.poisson) * np.apply_along_axis(deviator, 1, elastic)
            expected = np.apply_along_axis(deviator, 1, solved[1:, :6])
            assert np.abs(stress - expected).max() < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize("name", [name for name in CATALOGUE if CATALOGUE[name].model == "elasticity"])
def test_stress_of_elasticity_is_hookes(name: str) -> None:
    case = references.case(name)
    strain = history(case.driver.result(), "input", "strain", 0)[1:].to(torch.float64)
    # One entry is compiled with twice the modulus.
    young, poisson = 410_000.0 if name == "elasticity_stiff" else 205_000.0, 0.29
    lame = young * poisson / ((1 + poisson) * (1 - 2 * poisson))
    volumetric = strain[..., :3].sum(-1, keepdim=True) * torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0]).double()
    hooke = young / (1 + poisson) * strain + lame * volumetric
    stress = history(case.driver.result(), "output", "stress")
    assert difference(stress, hooke) < (1e-14 if case.dtype == torch.float64 else 1e-6)


END = 6.0
STEPS = (30, 60, 120)
STRAIN_RATES = 1e-3 * np.array([[1.0, -0.49, -0.49, 0.0, 0.0, 0.0], [0.6, -0.4, -0.15, 0.3, 0.0, 0.5]])


def stepped(count: int) -> list[np.ndarray]:
    """Stress `(times, points, 6)` and equivalent plastic strain `(times, points)` at the coarsest steps' times."""
    model = neml2.load_model(references.case("viscoplasticity").file, "viscoplasticity")
    times = torch.linspace(0.0, END, count + 1, dtype=torch.float64)
    strain = times.reshape(-1, 1, 1) * torch.from_numpy(STRAIN_RATES)
    driver = neml2.TransientDriver(model, Scalar(times), "t", {"strain": SR2(strain)}, {})
    driver.run()
    every = count // STEPS[0]
    return [history(driver.result(), "output", name)[every - 1 :: every].numpy() for name in model.output_spec]


def test_backward_euler_steps_come_near_a_stiff_integration() -> None:
    """With tight tolerances, of equations written anew. The error falls in proportion to the step."""
    times = np.linspace(0.0, END, STEPS[0] + 1)
    solved = np.stack([Viscoplasticity().integrate(times, rate) for rate in STRAIN_RATES], 1)[1:]
    found = [stepped(count) for count in STEPS]
    for which, wanted in enumerate((solved[..., :6], solved[..., 6])):
        errors = [np.abs(histories[which] - wanted).max() / np.abs(wanted).max() for histories in found]
        assert errors[0] < 0.02
        assert 1.8 < errors[0] / errors[1] < 2.2 and 1.8 < errors[1] / errors[2] < 2.2
    # Steady flow does not depend on the step.
    for stress, _ in found:
        assert np.abs(stress[-1] - solved[-1, :, :6]).max() < 1e-6 * np.abs(solved[..., :6]).max()


def start(tool: str, *arguments: str | Path, status: int = 0) -> tuple[str, str]:
    """One of neml2's own tools, as a user starts it; what it prints to stdout and stderr."""
    command = [str(Path(sys.executable).with_name(tool)), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == status, done.stderr
    return done.stdout, done.stderr


@pytest.mark.processes
def test_neml2_run_writes_the_trajectory_or_says_what_is_wrong(tmp_path: Path) -> None:
    case, file = references.case("calibration"), tmp_path / "result.pt"
    assert start("neml2-run", case.file, "driver", f"Drivers/driver/save_as:={file}")[1] == ""
    saved, here = torch.load(file, weights_only=True), case.driver.result()
    assert set(saved) == set(here)
    # The tolerances of the solves are the stub's own here.
    assert all(difference(saved[name], here[name]) < 1e-7 for name in here)
    moved = shutil.copy(case.file, tmp_path)
    _, said = start("neml2-run", moved, "driver", status=1)
    assert str(tmp_path / "viscoplasticity") in said and "neml2-compile" in said and "Traceback" not in said


@pytest.mark.processes
def test_neml2_inspect_lists_inputs_outputs_and_parameters() -> None:
    case = references.case("calibration")
    told, _ = start("neml2-inspect", case.file, case.stub.model)
    for word in ("strain", "stress", "residual.hardening.K", "residual.overstress.sy", "SR2", "float64", "cpu"):
        assert word in told, word
    found = json.loads(start("neml2-inspect", case.file, case.stub.model, "--json")[0])
    assert "strain" in json.dumps(found["inputs"]) and "stress" in json.dumps(found["outputs"])
    parameters = {entry["name"]: entry for entry in found["parameters"]}
    assert parameters.keys() == {"residual.hardening.K", "residual.overstress.sy"}
    modulus = parameters["residual.hardening.K"]
    assert "float64" in str(modulus["dtype"]) and "cpu" in str(modulus["device"]) and list(modulus["shape"]) == []
