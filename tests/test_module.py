"""Compiled models as torch modules: parameters, optimisers, state, moves, copies, pickles and other processes."""

from __future__ import annotations

import copy
import io
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import joblib
import matplotlib.image
import neml2
import pytest
import torch
import torch.multiprocessing
from neml2.types import SR2

import references
from neml2_aoti_plugin import ArtifactError, ArtifactNotFoundError, Model
from references import difference

E, NU = "promoted.E", "promoted.nu"


@pytest.fixture(params=["raw", "typed"])
def model(request: pytest.FixtureRequest) -> Any:
    """The promoted stub as `Model` and as `AOTIModel`."""
    case = references.case("promoted")
    return case.load() if request.param == "raw" else neml2.load_model(case.file, case.stub.model)


def stress(model: Any) -> torch.Tensor:
    rows = references.case("promoted").rows()
    if isinstance(model, Model):
        return model.forward(rows)["stress"]
    result: torch.Tensor = model(SR2(rows["strain"]))[0].data
    return result


# -- parameters -------------------------------------------------------------------------------------------------------


def test_parameters_are_real_ones_under_their_qualified_names(model: Any) -> None:
    for found in (model.named_parameters(), dict(model.named_parameters(recurse=True))):
        assert list(found) == [E, NU]
        assert all(isinstance(x, torch.nn.Parameter) for x in found.values())
    assert list(model.parameters()) == list(model.named_parameters().values())
    assert model.promoted.E is model.get_parameter(E) is model.named_parameters()[E]
    assert [name for name, _ in model.named_parameters(prefix="x")] == [f"x.{E}", f"x.{NU}"]
    assert not list(model.buffers())
    assert "promoted" in repr(model)
    assert model.train().eval() is model and model.apply(lambda m: None) is model
    assert isinstance(model, torch.nn.Module)


def test_set_parameter_keeps_the_parameter_where_the_shape_is_kept(model: Any) -> None:
    parameter, before = model.get_parameter(E), stress(model)
    model.requires_grad_()
    model.set_parameter(E, 142000.0)
    assert model.get_parameter(E) is parameter and parameter.requires_grad
    assert difference(stress(model), 2.0 * before) < 1e-14
    model.set_parameter(E, torch.linspace(71000.0, 142000.0, len(before), dtype=torch.float64))
    changed = model.get_parameter(E)
    assert isinstance(changed, torch.nn.Parameter) and changed.requires_grad and changed.shape == (len(before),)
    assert difference(stress(model)[-1], 2.0 * before[-1]) < 1e-14


@pytest.mark.parametrize("how", ["load", "set", "copy"])
def test_made_under_inference_mode_is_set_and_trained_outside(how: str) -> None:
    case = references.case("promoted")
    outside = case.load()
    with torch.inference_mode():
        model = case.load() if how == "load" else copy.deepcopy(outside) if how == "copy" else outside
        if how == "set":
            model.set_parameter(E, torch.full((6,), 71000.0, dtype=torch.float64))
        inside = stress(model).clone()
    assert torch.equal(stress(model), inside) and torch.equal(stress(model), stress(case.model))
    value = model.get_parameter(E)
    model.set_parameter(E, torch.full_like(value, 142000.0))
    assert model.get_parameter(E) is value and difference(stress(model), 2.0 * inside) < 1e-14
    model.requires_grad_()
    stress(model).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    assert bool((value != 142000.0).all())


def test_typed_value() -> None:
    case = references.case("promoted")
    loaded = neml2.load_model(case.file, case.stub.model)
    loaded.set_parameter(E, neml2.types.Scalar(torch.tensor(142000.0, dtype=torch.float64)))
    assert float(loaded.get_parameter(E)) == 142000.0


@pytest.mark.wide
def test_name_without_a_dot() -> None:
    loaded = neml2.load_model(references.case("renamed").file, "promoted")
    assert list(loaded.state_dict()) == ["youngs_modulus"]
    stiff, strain = {"youngs_modulus": torch.tensor(142000.0, dtype=torch.float64)}, SR2(torch.ones(6).double())
    other = torch.func.functional_call(loaded, stiff, (strain,))
    assert difference(other[0].data, 2.0 * loaded(strain)[0].data) < 1e-14


def test_state_dict(model: Any) -> None:
    before, state = stress(model), {**model.state_dict(), E: 2.0 * model.state_dict()[E]}
    assert list(state) == [E, NU]
    model.load_state_dict(state)
    assert difference(stress(model), 2.0 * before) < 1e-14
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*promoted\.G"):
        model.load_state_dict({**state, "promoted.G": state[E]})


def test_optimizer(model: Any) -> None:
    wanted = 1.25 * stress(model)
    model.requires_grad_()
    optimizer = torch.optim.Adam([model.get_parameter(E)], lr=500.0)
    for _ in range(120):
        optimizer.zero_grad()
        (stress(model) - wanted).square().mean().backward()
        optimizer.step()
    assert abs(model.get_parameter(E).item() / (1.25 * 71000.0) - 1.0) < 1e-2


# -- moves ------------------------------------------------------------------------------------------------------------


def test_move_to_where_it_is_already(model: Any) -> None:
    before = stress(model)
    for moved in (model.to("cpu"), model.to(torch.float64), model.double(), model.cpu()):
        assert moved is model
    assert torch.equal(stress(model), before)


@pytest.mark.parametrize(
    "move",
    [
        lambda m: m.float(),
        lambda m: m.to(torch.float32),
        lambda m: m.to("meta"),
        lambda m: torch.nn.ModuleList([m]).float(),
    ],
)
def test_move_to_what_was_not_compiled(model: Any, move: Callable[[Any], Any]) -> None:
    before = stress(model)
    with pytest.raises((ArtifactNotFoundError, ValueError), match=r"float32|meta"):
        move(model)
    assert torch.equal(stress(model), before) and model.get_parameter(E).dtype == torch.float64


def test_move_to_another_compiled_leaf(tmp_path: Path) -> None:
    """neml2-compile labels float64 graphs float32; beside the float64 leaf they make an artifact with both."""
    root, rows = references.copied("promoted", tmp_path), references.case("promoted").rows()
    shutil.copytree(root / "cpu" / "float64", root / "cpu" / "float32")
    model = Model(root)
    model.set_parameter(E, 142000.0)
    expected = model.forward(rows)["stress"]
    assert model.to(torch.float32) is model and model.dtype == model.get_parameter(E).dtype == torch.float32
    assert float(model.get_parameter(E)) == 142000.0
    found = model.forward({name: x.float() for name, x in rows.items()})["stress"]
    assert found.dtype == torch.float32
    assert difference(found, expected) < 1e-6
    assert difference(model.double().forward(rows)["stress"], expected) < 1e-6


# -- copies -----------------------------------------------------------------------------------------------------------


def through_a_file(dump: Callable[..., object], load: Callable[..., Any]) -> Callable[[Any], Any]:
    def copied(model: Any) -> Any:
        file = io.BytesIO()
        dump(model, file)
        file.seek(0)
        return load(file)

    return copied


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    # As ray, loky and Dask do it.
    "cloudpickle": lambda m: cloudpickle.loads(cloudpickle.dumps(m)),
    "joblib": through_a_file(joblib.dump, joblib.load),
    "torch": through_a_file(torch.save, lambda file: torch.load(file, weights_only=False)),
}
every_way_to_copy = pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)


@every_way_to_copy
def test_copies_are_equal_and_independent(model: Any, copied: Callable[[Any], Any]) -> None:
    model.set_parameter(E, 100000.0)
    model.requires_grad_()
    other = copied(model)
    assert type(other) is type(model)
    assert float(other.get_parameter(E)) == 100000.0 and other.get_parameter(E).requires_grad
    assert torch.equal(stress(other), stress(model))
    other.set_parameter(E, 71000.0)
    assert float(model.get_parameter(E)) == 100000.0


@every_way_to_copy
def test_copies_keep_options_and_settings(copied: Callable[[Any], Any]) -> None:
    case = references.case("viscoplasticity")
    model = Model(case.artifact, mode="lockstep")
    model.set_solver_config(1e-6, 1e-7, 9, "BACKTRACKING", 1, 2.0, 1e-3)
    other = copied(model)
    assert other.mode == "lockstep" and other.solver == model.solver
    found, expected = other.forward(case.rows()), model.forward(case.rows())
    assert all(torch.equal(found[name], x) for name, x in expected.items())


def test_copy_shares_parameters_with_what_is_copied_along(model: Any) -> None:
    both = copy.deepcopy([model.requires_grad_(), model.get_parameter(E)])
    assert both[0].get_parameter(E) is both[1]
    # A pickle is a recipe.
    assert len(pickle.dumps(model)) < 10_000


def test_artifact_that_is_another_one_is_refused(tmp_path: Path) -> None:
    artifact = references.copied("promoted", tmp_path)
    model = Model(artifact)
    data = pickle.dumps(model)
    assert isinstance(pickle.loads(data), Model)
    metadata = artifact / "metadata.json"
    metadata.write_text(metadata.read_text(encoding="utf-8").replace("71000.0", "72000.0"), encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"metadata\.json differ"):
        pickle.loads(data)
    with pytest.raises(ArtifactError, match="changed or removed"):
        pickle.dumps(model)
    shutil.rmtree(artifact)
    with pytest.raises(ArtifactNotFoundError, match="promoted"):
        pickle.loads(data)


# -- other processes --------------------------------------------------------------------------------------------------


def work(model: Any, queue: Any) -> None:
    """What a spawned process does."""
    queue.put(stress(model).detach().numpy())


@pytest.mark.processes
def test_model_in_other_processes(model: Any) -> None:
    model.set_parameter(E, 100000.0)
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=work, args=(model, queue))
    process.start()
    found = torch.from_numpy(queue.get(timeout=120))
    process.join(timeout=60)
    assert process.exitcode == 0
    for x in (found, *joblib.Parallel(n_jobs=2)(joblib.delayed(stress)(model) for _ in range(3))):
        assert torch.equal(x, stress(model))


@pytest.mark.wide
def test_calibration_example(tmp_path: Path) -> None:
    """Recovers two parameters through the TransientDriver and draws data, initial guess and fit."""
    references.case("calibration")  # the example needs it, and the torch of this run may be too old for it
    example = Path(__file__).resolve().parent.parent / "examples" / "calibrate.py"
    picture = tmp_path / "calibration.png"
    command = [sys.executable, str(example), "--output", str(picture)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {name: float(value) for name, value in re.findall(r"^(\S+)\s+([\d.]+) MPa, truth", done.stdout, re.M)}
    assert found == pytest.approx({"residual.overstress.sy": 240.0, "residual.hardening.K": 3100.0}, rel=1e-2)
    image = matplotlib.image.imread(picture)
    assert image.shape[0] > 300 and image.std() > 0.05
