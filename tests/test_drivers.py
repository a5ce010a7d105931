"""Trajectories: compiled stubs against eager neml2, a closed form, and an integration that knows nothing of neml2."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import TypeAlias

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
BIN = Path(sys.executable).parent


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


class TestElasticity:
    @pytest.mark.parametrize("name", [name for name in CATALOGUE if CATALOGUE[name].model == "elasticity"])
    def test_stress_is_hookes(self, name: str) -> None:
        case = references.case(name)
        strain = history(case.driver.result(), "input", "strain", 0)[1:].to(torch.float64)
        stress = history(case.driver.result(), "output", "stress")
        # One entry is compiled with twice the modulus.
        young, poisson = 410_000.0 if name == "elasticity_stiff" else 205_000.0, 0.29
        lame = young * poisson / ((1 + poisson) * (1 - 2 * poisson))
        identity = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
        trace = strain[..., :3].sum(-1, keepdim=True)
        hooke = young / (1 + poisson) * strain + lame * trace * identity
        assert difference(stress, hooke) < (1e-14 if case.dtype == torch.float64 else 1e-6)


Histories: TypeAlias = tuple[np.ndarray, np.ndarray]
Stepped: TypeAlias = dict[int, Histories]

END = 6.0
STEPS = (30, 60, 120)
STRAIN_RATES = 1e-3 * np.array([[1.0, -0.49, -0.49, 0.0, 0.0, 0.0], [0.6, -0.4, -0.15, 0.3, 0.0, 0.5]])


@pytest.fixture(scope="module")
def integrated() -> Histories:
    """Stress `(times, points, 6)` and equivalent plastic strain `(times, points)` at the coarsest steps' times."""
    times = np.linspace(0.0, END, STEPS[0] + 1)
    solved = np.stack([Viscoplasticity().integrate(times, rate) for rate in STRAIN_RATES], 1)
    return solved[..., :6], solved[..., 6]


@pytest.fixture(scope="module")
def stepped() -> Stepped:
    """The same from the compiled model, by the number of steps."""
    model = neml2.load_model(references.case("viscoplasticity").file, "viscoplasticity")
    found = {}
    for count in STEPS:
        times = torch.linspace(0.0, END, count + 1, dtype=torch.float64)
        strain = times.reshape(-1, 1, 1) * torch.from_numpy(STRAIN_RATES)
        driver = neml2.TransientDriver(model, Scalar(times), "t", {"strain": SR2(strain)}, {})
        driver.run()
        every = count // STEPS[0]
        stress, p = (history(driver.result(), "output", name)[every - 1 :: every].numpy() for name in model.output_spec)
        found[count] = stress, p
    return found


class TestViscoplasticity:
    """Backward Euler steps against a stiff integration, with tight tolerances, of equations written anew."""

    @pytest.mark.parametrize("which", [0, 1], ids=["stress", "equivalent plastic strain"])
    def test_error_falls_in_proportion_to_the_step(self, stepped: Stepped, integrated: Histories, which: int) -> None:
        expected = integrated[which][1:]
        errors = [np.abs(stepped[count][which] - expected).max() / np.abs(expected).max() for count in STEPS]
        assert errors[0] < 0.02
        assert 1.8 < errors[0] / errors[1] < 2.2
        assert 1.8 < errors[1] / errors[2] < 2.2

    def test_steady_flow_does_not_depend_on_the_step(self, stepped: Stepped, integrated: Histories) -> None:
        for count in STEPS:
            assert np.abs(stepped[count][0][-1] - integrated[0][-1]).max() < 1e-6 * np.abs(integrated[0]).max()


@pytest.mark.processes
class TestConsoleScripts:
    """neml2's own tools, as a user starts them, on compiled stubs."""

    def start(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(list(map(str, arguments)), capture_output=True, text=True, timeout=120, check=False)

    def test_neml2_run_writes_the_trajectory(self, tmp_path: Path) -> None:
        case = references.case("calibration")
        file = tmp_path / "result.pt"
        done = self.start(BIN / "neml2-run", case.file, "driver", f"Drivers/driver/save_as:={file}")
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        saved = torch.load(file, weights_only=True)
        here = case.driver.result()
        assert set(saved) == set(here)
        # The tolerances of the solves are the stub's own here.
        assert all(difference(saved[name], here[name]) < 1e-7 for name in here)

    def test_neml2_run_tells_what_is_wrong(self, tmp_path: Path) -> None:
        stub = tmp_path / "moved_aoti.i"
        stub.write_text(references.case("elasticity").file.read_text(encoding="utf-8"), encoding="utf-8")
        done = self.start(BIN / "neml2-run", stub, "driver")
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert str(tmp_path / "elasticity") in done.stderr and "neml2-compile" in done.stderr

    def test_neml2_inspect_lists_inputs_outputs_and_parameters(self) -> None:
        case = references.case("calibration")
        words = (BIN / "neml2-inspect", case.file, case.stub.model)
        told, as_json = self.start(*words), self.start(*words, "--json")
        assert (told.returncode, as_json.returncode) == (0, 0), told.stderr + as_json.stderr
        for word in ("strain", "stress", "residual.hardening.K", "residual.overstress.sy", "SR2", "float64", "cpu"):
            assert word in told.stdout, word
        found = json.loads(as_json.stdout)
        assert "strain" in json.dumps(found["inputs"]) and "stress" in json.dumps(found["outputs"])
        parameters = {entry["name"]: entry for entry in found["parameters"]}
        assert parameters.keys() == {"residual.hardening.K", "residual.overstress.sy"}
        modulus = parameters["residual.hardening.K"]
        assert "float64" in str(modulus["dtype"]) and "cpu" in str(modulus["device"]) and list(modulus["shape"]) == []
