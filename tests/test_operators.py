"""Graphs call torch's own power in place of neml2's, with the same bits, and only where the two are the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import references
from attacks.archives import archive_of, entries_of
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
def test_what_is_of_another_form_stays(change, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    file = next(file for file in packages() if file.stem.endswith("_residual"))
    entries = []
    for info, data in entries_of(file.read_bytes()):
        if info.filename.endswith("wrapper.json"):
            listed = json.loads(data)
            change(listed["nodes"][0]["node"])
            data = json.dumps(listed).encode()
        entries.append((info, data))
    copy = tmp_path / file.name
    copy.write_bytes(archive_of(entries))
    with open_archive(copy, copy.read_bytes()) as archive:
        changed, python = operators(archive, CPU)
        text = next(data for info, data in entries if info.filename.endswith("wrapper.json"))
        assert python
        assert all(json.loads(data) == json.loads(text) for data in changed.values())


LOADED = """
import sys
import neml2, torch
from neml2_aoti_plugin import Model

def call(prepare=None):
    model = Model(sys.argv[1])
    given = {n: torch.zeros(v.base_shape, dtype=torch.float64) for n, v in model.inputs.items()}
    given |= {"strain": torch.full((3, 6), 2e-3, dtype=torch.float64), "t": torch.ones((), dtype=torch.float64)}
    return model.forward(given)["stress"]
"""


def test_another_power_of_neml2_is_called() -> None:
    # A release that changed what its operator does would be followed.
    out = run(
        LOADED
        + """
calls = []
library = torch.library.Library("neml2", "IMPL")

def power(base, exponent):
    calls.append(1)
    return torch.where(base == 0.3, 7.0, torch.pow(base, exponent))

library.impl("opaque_pow", power, "CPU")
call()
print(len(calls))
""",
        references.case("calibration").artifact,
    )
    # One comparison ended at the first difference; the others are calls of the graphs.
    assert int(out) > 3


@pytest.mark.parametrize("within", ["torch.device('meta')", "torch.inference_mode()", "Watch()", "Trace()"])
def test_the_caller_s_modes_do_not_matter(within: str) -> None:
    run(
        LOADED
        + f"""
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from neml2_aoti_plugin._graphs import operators as native

class Watch(TorchFunctionMode):
    def __torch_function__(self, f, types, args=(), kwargs=None):
        return torch.zeros(()) if f is torch.pow else f(*args, **(kwargs or {{}}))

class Trace(TorchDispatchMode):
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        return f(*args, **(kwargs or {{}}))

with {within}:
    assert native.same_as_torch(torch.device("cpu"))
call()
""",
        references.case("calibration").artifact,
    )
