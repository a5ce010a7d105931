"""Graphs call torch's own power in place of neml2's, with the same bits, and only where the two are the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import references
from attacks.archives import edited
from attacks.artifacts import signature_of
from attacks.children import run
from neml2_aoti_plugin._artifact.package import open_archive, operators_in
from neml2_aoti_plugin._graphs.operators import operators, repacked
from neml2_aoti_plugin._graphs.unpack import load_runner

CPU = torch.device("cpu")


def packages() -> list[Path]:
    return sorted(references.case("calibration").artifact.rglob("*.pt2"))


def arguments(file: Path) -> list[Tensor]:
    signature = signature_of(file)
    assert signature is not None
    generator = torch.Generator().manual_seed(0)
    return [
        torch.rand([5 if n is None else n for n in a.extents], dtype=a.dtype, generator=generator) + 0.1
        for a in signature.arguments
    ]


def torchs_own(file: Path) -> list[Tensor]:
    """What the package gives as it is, by torch's package loader."""
    found: list[Tensor] = torch._C._aoti.AOTIModelPackageLoader(str(file), "model", False, 1, -1).run(arguments(file))
    return found


def test_the_same_bits_without_python(tmp_path: Path) -> None:
    with_power = 0
    for file in packages():
        data = file.read_bytes()
        with open_archive(file, data) as archive:
            changed, python = operators(archive, CPU)
            names = operators_in(archive)
            with_power += "neml2::opaque_pow" in names
            assert bool(changed) == bool({"neml2::opaque_pow", "aten::_linalg_check_errors"} & set(names))
            new = repacked(archive, changed)
        assert not python
        right = torchs_own(file)
        runner, python = load_runner(file, data, CPU)
        assert not python
        again = tmp_path / file.name
        again.write_bytes(new)
        with open_archive(again, again.read_bytes()) as archive:
            assert all(name.startswith("aten::") for name in operators_in(archive))
        for found in (runner.run(arguments(file)), torchs_own(again)):
            assert len(found) == len(right)
            assert all(a.dtype == b.dtype and a.stride() == b.stride() for a, b in zip(found, right, strict=True))
            assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))
    assert with_power >= 3


@pytest.mark.parametrize("name", ["viscoplasticity", "cross_group"])
def test_a_singular_row_fails_alone_and_without_a_word(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    for file in sorted(references.case(name).artifact.rglob("*_solve*.pt2")):
        given = arguments(file)
        # Arguments whose last two axes are equal are the diagonal blocks of the matrix.
        for x in given:
            if x.ndim > 2 and x.shape[-1] == x.shape[-2]:
                x += 3.0 * torch.eye(x.shape[-1], dtype=x.dtype)
        sound = torch.arange(5) != 2
        runner, _ = load_runner(file, file.read_bytes(), CPU)
        right = runner.run(given)
        given[0][2] = 0.0
        for found, whole in zip(runner.run(given), right, strict=True):
            assert torch.equal(found[sound], whole[sound])
            assert not bool(found[2].isfinite().all())
    told = capfd.readouterr()
    assert told.out == told.err == ""


@pytest.mark.parametrize(
    "change",
    [
        lambda node: node["inputs"][0].update(name="self"),
        lambda node: node["inputs"].reverse(),
        lambda node: node.update(target="neml2::opaque_pow.out"),
        lambda node: node.update(target="torch::pow"),
        lambda node: node.update(inputs=None),
        lambda node: node.update(inputs=[1, 2]),
    ],
)
def test_what_is_of_another_form_stays(change: Callable[[Any], object], tmp_path: Path) -> None:
    listed: list[Any] = []

    def rewritten(data: bytes) -> bytes:
        listed.append(json.loads(data))
        change(listed[0]["nodes"][0]["node"])
        return json.dumps(listed[0]).encode()

    file = next(file for file in packages() if file.stem.endswith("_residual"))
    data = edited("wrapper.json", rewritten)(file.read_bytes())
    with open_archive(file, data) as archive:
        changed, python = operators(archive, CPU)
    assert python
    assert all(json.loads(data) == listed[0] for data in changed.values())


@pytest.mark.parametrize("within", ["torch.device('meta')", "torch.inference_mode()", "Watch()", "Trace()"])
def test_the_caller_s_modes_do_not_matter(within: str) -> None:
    run(
        f"""
import sys
import neml2, torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from neml2_aoti_plugin import Model
from neml2_aoti_plugin._graphs import operators as native

class Watch(TorchFunctionMode):
    def __torch_function__(self, f, types, args=(), kwargs=None):
        return torch.zeros(()) if f is torch.pow else f(*args, **(kwargs or {{}}))

class Trace(TorchDispatchMode):
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        return f(*args, **(kwargs or {{}}))

with {within}:
    assert native.same_as_torch(torch.device("cpu"))
model = Model(sys.argv[1])
given = {{n: torch.zeros(v.base_shape, dtype=torch.float64) for n, v in model.inputs.items()}}
model.forward(given | {{"strain": torch.full((3, 6), 2e-3, dtype=torch.float64), "t": given["t"] + 1.0}})
""",
        references.case("calibration").artifact,
    )
