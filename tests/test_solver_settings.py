"""Solver settings, read and set one by one; how `iterations` and `miters` count; what `help` shows."""

from __future__ import annotations

import inspect
import pickle
import pydoc
import sys
from abc import ABC, abstractmethod

import neml2
import pytest
import torch
from torch import nn

import references
from neml2_aoti_plugin import AOTIModel, ConvergenceError, InputError, Model, UnknownNameError
from neml2_aoti_plugin.model import _module as shown
from neml2_aoti_plugin.settings import NewtonSettings
from stubs.build import compiled


def viscoplasticity() -> Model:
    return references.case("viscoplasticity").load(tight=False)


def states() -> dict[str, torch.Tensor]:
    """From nothing far beyond the yield point in one step, at two points."""
    inputs = {n: torch.zeros(2, *v.natural_shape, dtype=torch.float64) for n, v in viscoplasticity().inputs.items()}
    inputs["strain"][:, 0], inputs["strain"][1, 5] = 0.01, 0.02
    inputs["t"] += 1.0
    return inputs


# -- settings ------------------------------------------------------------------------------------------------------


def test_settings_are_those_of_the_input_file() -> None:
    # As stubs/viscoplasticity.i has them.
    told = NewtonSettings(atol=1e-8, rtol=1e-10, miters=50, ls_max_iters=8)
    assert viscoplasticity().solver == told
    assert Model(compiled("viscoplasticity") / "viscoplasticity", solver={"atol": 1e-3}).solver == NewtonSettings(
        **{**vars(told), "atol": 1e-3}
    )
    assert Model(compiled("elasticity") / "elasticity").solver is None


def test_one_setting_leaves_the_others() -> None:
    model = viscoplasticity()
    before = model.solver
    assert before is not None
    model.set_solver(miters=7)
    model.set_solver(atol=1e-5, rtol=0.0)
    after = NewtonSettings(**{**vars(before), "miters": 7, "atol": 1e-5, "rtol": 0.0})
    assert model.solver == after
    # They travel, and the seven arguments of neml2's C++ runtime replace all.
    assert pickle.loads(pickle.dumps(model)).solver == after
    model.set_solver_config(1e-9, 1e-9, 30, "STRONG_WOLFE", 4, 3.0, 1e-4)
    assert model.solver == NewtonSettings(1e-9, 1e-9, 30, "STRONG_WOLFE", 4, 3.0, 1e-4, 1e-6)
    # That runtime has no chord steps, and so does not change whether there are.
    model.set_solver(chord_steps=False)
    model.set_solver_config(1e-8, 1e-9, 30, "STRONG_WOLFE", 4, 3.0, 1e-4)
    assert model.solver is not None and not model.solver.chord_steps and model.solver.atol == 1e-8


def test_settings_take_effect() -> None:
    model, inputs = viscoplasticity(), states()
    many = int(model.solve(inputs).iterations.max())
    model.set_solver(atol=1e3)
    assert int(model.solve(inputs).iterations.max()) < many
    typed = neml2.load_model(references.case("viscoplasticity").file, "viscoplasticity")
    typed.set_solver(miters=3)
    assert typed.solver.miters == 3 and typed.solver.miters == 3


def test_wrong_settings_change_nothing() -> None:
    model = viscoplasticity()
    before = model.solver
    with pytest.raises(UnknownNameError, match=r"unknown 'tol'.* The settings are: atol, rtol, miters"):
        model.set_solver(tol=1.0)
    with pytest.raises(InputError, match="rtol is -1"):
        model.set_solver(atol=1.0, rtol=-1)
    assert model.solver == before
    with pytest.raises(InputError, match="has no implicit segment"):
        Model(compiled("elasticity") / "elasticity").set_solver(atol=1.0)


def test_iterations_count_updates_and_miters_one_more() -> None:
    model, inputs = viscoplasticity(), states()
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


# -- help ----------------------------------------------------------------------------------------------------------


# It has been 1,289 with all that a torch module has.
# Since 3.13 Python shows a long signature over several lines.
LINES = 200 if sys.version_info < (3, 13) else 250


def shown_by_help(thing: type) -> list[str]:
    return pydoc.plain(pydoc.render_doc(thing)).splitlines()


def test_help_fits() -> None:
    lines = shown_by_help(Model)
    assert len(lines) <= LINES
    text = "\n".join(lines)
    assert "inherited from torch" not in text
    for name in ("inputs:", "outputs:", "mode:", "solver", "forward(", "set_solver(", "parameters"):
        assert name in text
    for name in ("register_forward_hook", "share_memory", "ipu(", "__getstate__"):
        assert name not in text


def test_completion_shows_what_is_of_use() -> None:
    model = viscoplasticity()
    names = dir(model)
    assert set(names) >= shown.USEFUL
    assert {"forward", "solve", "solver", "inputs", "outputs", "mode", "named_parameters"} <= set(names)
    assert not {"register_backward_hook", "share_memory", "ipu", "xpu"} & set(names)
    assert model.input_names == list(model.inputs)
    # What is not shown works as ever.
    seen: list[int] = []
    handle = model.register_forward_hook(lambda *_: seen.append(1))
    model(states())
    handle.remove()
    assert seen == [1] and isinstance(model, nn.Module)


def test_a_model_mixes_with_abstract_classes() -> None:
    class Law(ABC):
        @abstractmethod
        def name(self) -> str: ...

    class Steel(Model, Law):
        def name(self) -> str:
            return "steel"

    assert Steel(compiled("elasticity") / "elasticity").name() == "steel"


def test_public_members_are_documented() -> None:
    for owner in (Model, AOTIModel):
        for name in dir(owner):
            assert inspect.getdoc(getattr(owner, name)), f"{owner.__name__}.{name}"
