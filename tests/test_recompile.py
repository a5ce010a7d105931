"""The command that an error names for a missing derivative: it is whole, and it works."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import references
from legacy import build
from neml2_aoti_plugin import DerivativeNotCompiledError, Model
from references import Tensors, altered
from stubs.build import QUICK
from stubs.catalogue import CATALOGUE


def command_in(call: Callable[[], object]) -> list[str]:
    """The words of the command that the error of a call names."""
    with pytest.raises(DerivativeNotCompiledError) as raised:
        call()
    return shlex.split(str(raised.value)[str(raised.value).index("neml2-compile ") :])


def for_jacobian(model: Model) -> list[str]:
    return command_in(lambda: model.jacobian(zeros(model)))


def flags(words: list[str], option: str) -> list[str]:
    return [value for name, value in pairwise(words) if name == option]


def zeros(model: Model) -> Tensors:
    return {name: torch.zeros(1, *v.natural_shape, dtype=model.dtype) for name, v in model.inputs.items()}


def test_what_was_compiled_comes_again() -> None:
    case = references.case("viscoplasticity")
    inputs = {**zeros(case.model), "t": torch.ones(1, dtype=torch.float64)}
    words = command_in(lambda: case.model.jvp(inputs, {"t": inputs["t"]}))
    assert words[:4] == ["neml2-compile", "INPUT.i", "--driver", "driver"]
    assert flags(words, "-d") == ["stress:strain", "stress:t"]
    assert flags(words, "--output-dir") == [str(case.folder)]
    words = command_in(lambda: case.model.param_jacobian(inputs))
    assert flags(words, "-p") == ["PARAMETER"]
    assert flags(words, "-d") == ["stress:strain", "stress:PARAMETER", "equivalent_plastic_strain:PARAMETER"]


def test_none_at_all_and_one_parameter_of_two(tmp_path: Path) -> None:
    model = altered("promoted", tmp_path / "none", derivatives=[], parameter_derivatives=[])
    words = for_jacobian(model)
    assert (flags(words, "-p"), flags(words, "-d")) == (["promoted.E", "promoted.nu"], [":"])
    words = command_in(lambda: model.param_vjp(zeros(model), {}))
    assert flags(words, "-d") == ["stress:promoted.E", "stress:promoted.nu"]
    one = altered("promoted", tmp_path / "one", parameter_derivatives=[["stress", "promoted.nu"]])
    words = command_in(lambda: one.param_jacobian(zeros(one), params=["promoted.E"]))
    assert flags(words, "-d") == [":", "stress:promoted.E", "stress:promoted.nu"]


def test_renames_come_again(tmp_path: Path) -> None:
    """Flags name what is inside, as neml2-compile takes it; the error what is at the boundary."""
    aliases = {"inputs": {"strain": "eps"}, "outputs": {"stress": "sigma"}, "parameters": {"promoted.E": "youngs"}}
    model = altered("promoted", tmp_path, boundary_aliases=aliases, derivatives=[])
    inputs = {"eps": zeros(model)["eps"].requires_grad_()}
    with pytest.raises(DerivativeNotCompiledError, match=r"d\(sigma\)/d\(eps\) was not compiled"):
        model.forward(inputs)["sigma"].sum().backward()
    words = for_jacobian(model)
    assert flags(words, "-d") == [":", "stress:promoted.E", "stress:promoted.nu"]
    renames = {option: flags(words, f"--rename-{option}") for option in ("input", "output", "parameter")}
    assert renames == {"input": ["strain:eps"], "output": ["stress:sigma"], "parameter": ["promoted.E:youngs"]}


@pytest.mark.parametrize("aliases", [{}, {"inputs": {"strain": "eps"}}])
def test_the_driver_of_the_stub_is_kept(aliases: dict[str, dict[str, str]], tmp_path: Path) -> None:
    model = altered("promoted", tmp_path, derivatives=[], boundary_aliases=aliases)
    # Without a stub there is nothing to lose.
    assert for_jacobian(model)[2:4] == ["--model", "promoted"] and "--no-stub" not in for_jacobian(model)
    stub = Path(shutil.copy(references.case("promoted").file, tmp_path))
    words = for_jacobian(model)
    if aliases:
        # A driver that was added to the stub of a renamed model is left alone.
        assert words[2:4] == ["--model", "promoted"] and "--no-stub" in words
        return
    assert words[2:4] == ["--driver", "driver"] and "--model" not in words
    stub.write_text(stub.read_text().replace("model = 'promoted'", "model = 'another'"))
    assert for_jacobian(model)[2:4] == ["--model", "promoted"]


@pytest.mark.long
def test_the_command_works(tmp_path: Path) -> None:
    """Run as it stands, with the input file in place of INPUT.i, it mends what the error was about."""
    model = altered("promoted", tmp_path / "aoti", derivatives=[])
    stub = Path(shutil.copy(references.case("promoted").file, tmp_path / "aoti"))
    words = for_jacobian(model)
    assert flags(words, "--output-dir") == [str(tmp_path / "aoti")]
    words = [str(CATALOGUE["promoted"].path) if word == "INPUT.i" else word for word in words]
    words[0] = str(Path(sys.executable).with_name(words[0]))
    variables = {**os.environ, **QUICK, "NEML2_AOTI_PLUGIN": "0"}
    subprocess.run([*words, "-q"], check=True, cwd=tmp_path, env=variables)
    again = Model(tmp_path / "aoti/promoted")
    assert again.jacobian(zeros(again))[1]["stress"]["strain"].shape == (1, 6, 6)
    assert again.parameter_derivative_pairs == [("stress", "promoted.E"), ("stress", "promoted.nu")]
    assert "[Drivers]" in stub.read_text()


@pytest.mark.legacy
@pytest.mark.timeout(3600)
def test_old_names_become_new_ones() -> None:
    """Before 3.0.4 the parameters of a lone model had no block in their names."""
    model = Model(build.metadata("3.0.0", "promoted"))
    words = command_in(lambda: model.param_jacobian(zeros(model)))
    document = json.loads(build.metadata("3.1.0", "promoted").read_text())
    assert flags(words, "-p") == [parameter["name"] for parameter in document["parameters"]]
    assert not [word for word in words if re.search(r"\s", word)]
