"""Graphs that cannot be called by their C interface: torch's runner runs them, with the same numbers, and says why."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import references
from attacks import children
from attacks.archives import edited
from neml2_aoti_plugin import Model, status
from neml2_aoti_plugin import _log as log
from neml2_aoti_plugin._cli.doctor import doctor
from neml2_aoti_plugin._cli.target import find_target
from neml2_aoti_plugin._solve.machine_code import CHOICE as VARIABLE
from neml2_aoti_plugin.model._plan import SHORT
from references import Tensors, difference, flat

RUNNER, LOOP = "run by torch's runner, since", "solved by torch's operations, since"


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The lines of the log on the channel `model`."""
    monkeypatch.setenv(VARIABLE, "native")
    lines: list[str] = []
    log.set_default_level("model", "info")
    monkeypatch.setattr(log, "_sink", lambda level, line: lines.append(line))
    yield lines
    log.reset_defaults()


def results(artifact: Path) -> Tensors:
    """Outputs and derivatives: of an explicit model for more rows than go the shortest way."""
    model, generator = Model(artifact), torch.Generator().manual_seed(0)
    given = {"strain": 1e-3 * torch.randn(SHORT + 1, 6, dtype=torch.float64, generator=generator)}
    found = flat(model.jacobian(references.case("viscoplasticity").rows() if model.solver else given))
    assert all(bool(x.isfinite().all()) for x in found.values())
    return found


def with_torchs_power(listed: bytes) -> bytes:
    """The power by torch's own name in a list of operators: another operator than is known, which does the same."""
    content = json.loads(listed)
    for entry in content["nodes"]:
        node: dict[str, Any] = entry["node"]
        assert node["target"] == "neml2::opaque_pow"
        node["target"], node["inputs"][0]["name"] = "aten::pow.Tensor_Tensor", "self"
    return json.dumps(content).encode()


def without(name: bytes) -> Callable[[bytes], bytes]:
    """Take a function out of a library, by another name for it; torch's runner does without some."""

    def change(library: bytes) -> bytes:
        assert name + b"\0" in library
        return library.replace(name + b"\0", name[:-1] + b"_\0")

    return change


# What is changed in packages, and the reason that is told.
CHANGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "another operator": (edited("wrapper.json", with_torchs_power), "it calls aten::pow"),
    "several threads": (edited(".so", lambda d: d + b"\0GOMP_parallel\0"), "it has kernels on several threads"),
    "threads of LLVM": (edited(".so", lambda d: d + b"\0__kmpc_fork_call\0"), "it has kernels on several threads"),
    "missing function": (
        edited(".so", without(b"AOTInductorModelContainerGetNumInputs")),
        "there is no function AOTInductorModelContainerGetNumInputs",
    ),
}
PINNED = "it has pinned batch axes"
# Graphs of which a solve is made, and others.
SOLVED = [("viscoplasticity", "residual"), ("viscoplasticity", "jacobian")]
OTHERS = [("viscoplasticity", "jacobian_given"), ("elasticity", "jvp")]
# Model, package and change; elasticity calls no operator.
PACKAGES = [(*at, kind) for at in (*SOLVED, *OTHERS) for kind in CHANGES]
PACKAGES.remove(("elasticity", "jvp", "another operator"))


def changed(name: str, stem: str, change: Callable[[bytes], bytes], folder: Path) -> tuple[Path, str]:
    """A copy of an artifact with one package changed, and the name of the package."""
    artifact = references.copied(name, folder)
    (package,) = artifact.rglob(f"{name}_{stem}.pt2")
    package.write_bytes(change(package.read_bytes()))
    return artifact, package.name


@pytest.mark.parametrize(("name", "stem", "kind"), [*PACKAGES, ("elasticity_static", "", PINNED)])
def test_a_package_that_is_other(
    name: str, stem: str, kind: str, tmp_path: Path, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == PINNED:
        artifact, packages, reason = references.case(name).artifact, ["elasticity.pt2", "elasticity_jvp.pt2"], PINNED
    else:
        change, reason = CHANGES[kind]
        artifact, package = changed(name, stem, change, tmp_path)
        packages = [package]
    found = results(artifact)
    for how, there in ((RUNNER, True), (LOOP, (name, stem) in SOLVED)):
        # Those of linear solves are always run so.
        lines = {line for line in told if how in line and "_solve" not in line}
        wanted = [f"{package}: {how} {reason}" for package in packages if there]
        assert len(lines) >= len(wanted) and all(any(line.endswith(end) for end in wanted) for line in lines)
        assert all(any(line.endswith(end) for line in lines) for end in wanted)
    (advice,) = (x for x in doctor(find_target(artifact)).findings if x.subject == "graphs")
    assert advice.level == "advice" and advice.says == f"{', '.join(packages)}: {RUNNER} {reason}" and advice.cure
    # The numbers are those of torch's operations and torch's runner.
    monkeypatch.setenv(VARIABLE, "torch")
    right = results(references.case(name.removesuffix("_static")).artifact)
    assert found.keys() == right.keys()
    # A block that is the same for all rows comes once, or not where a graph has pinned batch axes.
    assert all(difference(x, right[key].expand_as(x)) <= 1e-13 for key, x in found.items())


@pytest.mark.parametrize("name", ["viscoplasticity", "elasticity", "cross_group"])
def test_a_package_as_it_is_needs_no_runner(name: str, told: list[str]) -> None:
    artifact = references.case(name).artifact
    assert not [x for x in doctor(find_target(artifact)).findings if x.subject == "graphs"]
    if name != "cross_group":
        results(artifact)
    assert not [line for line in told if RUNNER in line or LOOP in line]
    assert status().graphs == f"by their C interface ({VARIABLE}=native)"


def test_a_graph_of_another_dtype(tmp_path: Path) -> None:
    """neml2-compile writes graphs for float64 alone; the source in a package tells its dtype."""
    to_float = edited("wrapper.cpp", lambda text: text.replace(b"(at::kDouble", b"(at::kFloat"))
    artifact, package = changed("elasticity", "jvp", to_float, tmp_path)
    says = [x.says for x in doctor(find_target(artifact)).findings if x.level != "fine"]
    assert any(package in text and "float32" in text for text in says), says


# A model of a power law as it runs, and by torch's operations; what the log says meanwhile comes between.
PROGRAM = """
    import os, sys, torch
    from dataclasses import replace
    from neml2_aoti_plugin import Model, _log as log, status
    from neml2_aoti_plugin._graphs import c_interface, operators
    from neml2_aoti_plugin._solve import code_file
    log.set_default_level("model", "info")
    {before}
    zero, six = torch.zeros((), dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    given = {{"strain": 2e-3 * torch.arange(1, 7, dtype=torch.float64).repeat(3, 1), "strain~1": six, "stress~1": six,
        "equivalent_plastic_strain~1": zero, "t": zero + 1.0, "t~1": zero}}

    def results():
        outputs, blocks = Model(sys.argv[1]).jacobian(given)
        return [*outputs.values(), blocks["stress"]["strain"]]

    found = results()
    print("graphs:", status().graphs)
    print("Newton loop:", status().kernels)
    if "doctor" in sys.argv:
        from neml2_aoti_plugin._cli.doctor import doctor
        print("doctor:", *(f"{{x.level}}: {{x.says}}" for x in doctor().findings if x.subject == "solves"))
    os.environ["NEML2_AOTI_PLUGIN_KERNELS"] = "torch"
    for x, y in zip(found, results(), strict=True):
        assert torch.isfinite(x).all() and (x - y).abs().max() <= 1e-13 * y.abs().max()
"""

# What is other in the whole process, and the reason that is told.
PROCESSES = {
    "torch lacks a function for tensors": (
        'c_interface.TENSOR_FUNCTIONS = (*c_interface.TENSOR_FUNCTIONS[:-1], "aoti_torch_gone")',
        "there is no function aoti_torch_gone",
    ),
    "torch lacks the call of an operator": (
        'operators._CALL = "aoti_torch_proxy_gone"',
        "there is no function aoti_torch_proxy_gone",
    ),
    "torch lacks the power": ('operators._POWER = "aoti_torch_cpu_gone"', "there is no function aoti_torch_cpu_gone"),
    # It is called, gives 0 as one that succeeds, and calls nothing.
    "torch calls no entry": (
        'operators._CALL = "aoti_torch_device_type_cpu"',
        "torch does not call a proxy executor as expected",
    ),
    "no llvmlite": ("sys.modules['llvmlite'] = None", "llvmlite is not installed"),
    "llvmlite is broken": (
        "sys.path.insert(0, sys.argv[2])",
        "llvmlite cannot be imported (ImportError: broken on purpose)",
    ),
    "no machine code": ("code_file.PATH = code_file.HERE / 'nowhere.bc'", "is not there"),
    "damaged machine code": ("code_file.PATH = code_file.HERE / 'outcome.py'", "is damaged"),
    "machine code of other sources": ("code_file.sources = lambda: {'tables.py': ''}", "is older than its sources"),
    "machine code of a later LLVM": (
        "code = replace(code_file.read(), llvm=(99, 0, 0)); code_file.read = lambda: code",
        "does not read the code of LLVM 99",
    ),
    "machine code that is none": (
        "code = replace(code_file.read(), bitcode=b'none', digest='none'); code_file.read = lambda: code",
        "LLVM makes no code for this processor",
    ),
}


@pytest.mark.processes
@pytest.mark.parametrize("kind", PROCESSES)
def test_a_process_that_is_other(kind: str, tmp_path: Path) -> None:
    before, reason = PROCESSES[kind]
    artifact = references.case("viscoplasticity").artifact
    (tmp_path / "llvmlite.py").write_text("raise ImportError('broken on purpose')")
    said = children.run(PROGRAM.format(before=before), artifact, tmp_path, "doctor", NEML2_AOTI_PLUGIN_KERNELS="")
    loaded, _, rest = said.partition("graphs: ")
    assert any(RUNNER in line and reason in line for line in loaded.splitlines()), said
    assert any("Newton loop of" in line and ": torch (" in line and reason in line for line in said.splitlines())
    told = dict(zip(("graphs", "loop", "doctor"), rest.splitlines(), strict=False))
    assert told["graphs"].startswith("by torch's runner (")
    assert told["loop"].startswith("Newton loop: torch (")
    assert told["doctor"].startswith("doctor: advice: done by torch's operations, and graphs by torch's runner (")
    assert all(reason in line for line in told.values())


def test_another_power_of_neml2() -> None:
    """A release whose power is not torch's; that of a graph is called."""
    before = """
    library = torch.library.Library("neml2", "IMPL")
    library.impl("opaque_pow", lambda x, n: torch.where(x == 0.3, 7.0, torch.pow(x, n)), "CPU")
    """
    artifact = references.case("viscoplasticity").artifact
    said = children.run(PROGRAM.format(before=before.strip()), artifact, NEML2_AOTI_PLUGIN_KERNELS="native")
    for text in (f"_jacobian_given.pt2: {RUNNER}", f"_residual.pt2: {RUNNER}", f"_residual.pt2: {LOOP}"):
        assert f"{text} neml2::opaque_pow is not torch's power" in said
    assert "graphs: by their C interface" in said
