"""Solver settings, read and set one by one; how `iterations` and `miters` count; what `help` shows."""

from __future__ import annotations

import inspect
import pickle
import pydoc
import sys
from abc import ABC, abstractmethod
from dataclasses import replace

import neml2
import pytest
import torch
from torch import nn

import references
from neml2_aoti_plugin import AOTIModel, ConvergenceError, InputError, Model, UnknownNameError
from neml2_aoti_plugin.model import _module as shown
from neml2_aoti_plugin.settings import NewtonSettings
from references import Tensors


@pytest.fixture
def model() -> Model:
    return references.case("viscoplasticity").load(tight=False)


@pytest.fixture
def inputs(model: Model) -> Tensors:
    """From nothing far beyond the yield point in one step, at two points."""
    found = {n: torch.zeros(2, *v.natural_shape, dtype=torch.float64) for n, v in model.inputs.items()}
    found["strain"][:, 0], found["strain"][1, 5] = 0.01, 0.02
    found["t"] += 1.0
    return found


# As stubs/viscoplasticity.i has them.
OF_FILE = NewtonSettings(atol=1e-8, rtol=1e-10, miters=50, ls_max_iters=8)


def test_settings_are_those_of_the_input_file(model: Model) -> None:
    assert model.solver == OF_FILE
    assert Model(model.artifact, solver={"atol": 1e-3}).solver == replace(OF_FILE, atol=1e-3)
    assert references.case("elasticity").model.solver is None


def test_one_setting_leaves_the_others(model: Model) -> None:
    model.set_solver(miters=7)
    model.set_solver(atol=1e-5, rtol=0.0)
    after = replace(OF_FILE, miters=7, atol=1e-5, rtol=0.0)
    assert model.solver == after
    # They travel, and the seven arguments of neml2's C++ runtime replace all.
    assert pickle.loads(pickle.dumps(model)).solver == after
    model.set_solver_config(1e-9, 1e-9, 30, "STRONG_WOLFE", 4, 3.0, 1e-4)
    assert model.solver == NewtonSettings(1e-9, 1e-9, 30, "STRONG_WOLFE", 4, 3.0, 1e-4, 1e-6)
    # That runtime has no chord steps, and so does not change whether there are.
    model.set_solver(chord_steps=False)
    model.set_solver_config(1e-8, 1e-9, 30, "STRONG_WOLFE", 4, 3.0, 1e-4)
    assert model.solver is not None and not model.solver.chord_steps and model.solver.atol == 1e-8


def test_settings_take_effect(model: Model, inputs: Tensors) -> None:
    many = int(model.solve(inputs).iterations.max())
    model.set_solver(atol=1e3)
    assert int(model.solve(inputs).iterations.max()) < many
    typed = neml2.load_model(references.case("viscoplasticity").file, "viscoplasticity")
    typed.set_solver(miters=3)
    assert typed.solver.miters == 3


def test_wrong_settings_change_nothing(model: Model) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown 'tol'.* The settings are: atol, rtol, miters"):
        model.set_solver(tol=1.0)
    with pytest.raises(InputError, match="rtol is -1"):
        model.set_solver(atol=1.0, rtol=-1)
    assert model.solver == OF_FILE
    with pytest.raises(InputError, match="has no implicit segment"):
        references.case("elasticity").load().set_solver(atol=1.0)


INF, NAN = float("inf"), float("nan")
WRONG_SETTINGS: dict[str, list[object]] = {
    "atol": [-1.0, "tight", INF, "1e-8", True],
    "rtol": [-1.0, NAN],
    "miters": [-1, 2.5, INF, NAN, 2**31, True, "5"],
    "ls_type": ["WOLFE"],
    "ls_max_iters": [-2, INF],
    "ls_cutback": [1.0, INF],
    "ls_c": [-1e-3, 1j],
    "substep_del_tol": [-1.0],
}
# Those that would be long to write out.
HUGE = [(name, 2**20000) for name in ("atol", "miters", "ls_max_iters", "ls_cutback")]


@pytest.mark.parametrize(
    ("name", "value"),
    [*((n, value) for n, values in WRONG_SETTINGS.items() for value in values), *HUGE],
    ids=lambda x: "huge" if isinstance(x, int) and x > 2**40 else repr(x),
)
def test_values_out_of_range_are_refused_by_name(model: Model, name: str, value: object) -> None:
    told = "is an int of 20001 bits, expected" if (name, value) in HUGE else repr(value)
    with references.reported(InputError, name, told):
        model.set_solver_config(**{**references.case("viscoplasticity").newton, name: value})
    with pytest.raises(InputError, match=f"{name} is "):
        Model(model.artifact, solver={name: value})


@pytest.mark.parametrize("mode", ["rowwise", "lockstep"])
def test_whole_numbers_may_be_floats(mode: str) -> None:
    case = references.case("viscoplasticity")
    whole, floats = {"miters": 30, "ls_max_iters": 8}, {"miters": 30.0, "ls_max_iters": torch.tensor(8.0)}
    expected, *others = (case.load(mode=mode) for _ in range(2))
    expected.set_solver_config(**{**case.newton, **whole})
    others[0].set_solver_config(**{**case.newton, **floats})
    others.append(case.load(mode=mode, tight=False, solver={**case.newton, **floats, "ls_max_iters": 8.0}))
    right = expected.solve(case.rows())
    for found in (model.solve(case.rows()) for model in others):
        assert torch.equal(found.iterations, right.iterations)
        assert all(torch.equal(x, right.outputs[n]) for n, x in found.outputs.items())


def test_iterations_count_updates_and_miters_one_more(model: Model, inputs: Tensors) -> None:
    found = model.solve(inputs)
    most = int(found.iterations.max())
    assert bool(found.converged.all()) and most >= 2
    # The row that takes the most updates fails with one fewer allowed, and not with as many.
    model.set_solver(miters=most + 1)
    assert bool(model.solve(inputs).converged.all())
    model.set_solver(miters=most)
    fewer = model.solve(inputs)
    assert not bool(fewer.converged.all())
    # It is solved again without chord steps, as many updates long, before it counts as failed.
    assert int(fewer.iterations.max()) == 2 * (most - 1)
    with pytest.raises(ConvergenceError, match=f"miters={most}"):
        model.forward(inputs)


# -- help -------------------------------------------------------------------------------------------------------------


def test_help_fits() -> None:
    text = pydoc.plain(pydoc.render_doc(Model))
    # It has been 1,289 with all that a torch module has. Since 3.13 Python shows a long signature over several lines.
    assert len(text.splitlines()) <= (200 if sys.version_info < (3, 13) else 250)
    for name in ("inputs:", "outputs:", "mode:", "solver", "forward(", "set_solver(", "parameters"):
        assert name in text
    for name in ("inherited from torch", "register_forward_hook", "share_memory", "ipu(", "__getstate__"):
        assert name not in text
    for owner in (Model, AOTIModel):
        assert [name for name in dir(owner) if not inspect.getdoc(getattr(owner, name))] == []


def test_completion_shows_what_is_of_use(model: Model, inputs: Tensors) -> None:
    names = dir(model)
    assert set(names) >= shown.USEFUL
    assert {"forward", "solve", "solver", "inputs", "outputs", "mode", "named_parameters"} <= set(names)
    assert not {"register_backward_hook", "share_memory", "ipu", "xpu"} & set(names)
    # What is not shown works as ever.
    seen: list[int] = []
    handle = model.register_forward_hook(lambda *_: seen.append(1))
    model(inputs)
    handle.remove()
    assert seen == [1] and isinstance(model, nn.Module)


def test_a_model_mixes_with_abstract_classes() -> None:
    class Law(ABC):
        @abstractmethod
        def name(self) -> str: ...

    class Steel(Model, Law):
        def name(self) -> str:
            return "steel"

    assert Steel(references.case("elasticity").artifact).name() == "steel"
