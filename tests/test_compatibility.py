"""The compatibility check: hostile, damaged and foreign packages are refused before native code runs, in a report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import references
from attacks.archives import ATTACKS, edited, recorded, swapped
from attacks.artifacts import package, refusal, signature_of
from attacks.children import run, run_fresh
from neml2_aoti_plugin import ArtifactNotFoundError, Model
from neml2_aoti_plugin._artifact import compatibility
from neml2_aoti_plugin._artifact.wiring import Wire, wire_fault


class TestArchives:
    @pytest.mark.parametrize("name", ATTACKS)
    def test_attack_is_refused_when_loaded(self, artifact: Path, name: str) -> None:
        file = package(artifact)
        file.write_bytes(ATTACKS[name].make(file.read_bytes()))
        before = sorted(artifact.parent.parent.rglob("*"))
        text = refusal(artifact)
        assert all(word in text for word in (str(file), *ATTACKS[name].words)), text
        assert sorted(artifact.parent.parent.rglob("*")) == before

    def test_the_real_package_passes(self, artifact: Path) -> None:
        file = package(artifact)
        # What the attacks start from, taken apart and put together again.
        file.write_bytes(recorded()(file.read_bytes()))
        strain = {"strain": torch.ones(6, dtype=torch.float64)}
        expected = references.case("elasticity").model.forward(strain)["stress"]
        assert torch.equal(Model(artifact).forward(strain)["stress"], expected)

    def test_package_of_another_graph(self, artifact: Path) -> None:
        package(artifact).write_bytes(package(artifact, "elasticity_jvp").read_bytes())
        assert "elasticity_jvp, expected elasticity" in refusal(artifact)

    def test_package_that_takes_other_tensors(self, artifact: Path) -> None:
        other = references.case("promoted").artifact / "cpu/float64/promoted.pt2"
        package(artifact).write_bytes(swapped(other, "elasticity"))
        assert "takes 3 tensors, where the metadata gives it 1 as the value" in refusal(artifact)

    def test_package_that_takes_other_shapes(self) -> None:
        signature = signature_of(package(references.case("elasticity").artifact))
        assert wire_fault(Wire("x", "value", ((6,),)), signature) == ""
        text = wire_fault(Wire("x", "value", ((7,),)), signature)
        assert "(*, 6) as tensor 0" in text and "(*batch, 7) as the value" in text

    def test_a_package_for_two_things(self, artifact: Path) -> None:
        file = artifact / "metadata.json"
        document = json.loads(file.read_text())
        document["segments"][0]["jvp_package"] = document["segments"][0]["package"]
        file.write_text(json.dumps(document))
        assert "named by the metadata as value and as jacobian" in refusal(artifact)


class TestReport:
    def test_all_findings_at_once_with_a_cure_each(self, artifact: Path) -> None:
        file = package(artifact)
        make = recorded(AOTI_PLATFORM="win32", AOTI_MACHINE="riscv64", AOTI_DEVICE_KEY="cuda")
        file.write_bytes(make(file.read_bytes()))
        package(artifact, "elasticity_jvp").unlink()
        head, *lines = refusal(artifact, ArtifactNotFoundError).splitlines()
        assert str(artifact) in head and "for 4 reasons" in head
        assert len(lines) == 4
        for line in lines:
            assert "neml2-compile" in line or "Copy the whole" in line or "Load it with" in line, line

    def test_the_same_finding_of_several_packages_once(self, artifact: Path) -> None:
        for name in ("elasticity", "elasticity_jvp"):
            file = package(artifact, name)
            file.write_bytes(recorded(AOTI_PLATFORM="win32")(file.read_bytes()))
        text = refusal(artifact)
        assert len(text.splitlines()) == 1
        assert "{elasticity.pt2, elasticity_jvp.pt2}" in text


HAVE = frozenset(["fma", "f16c", "avx2", "avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512_vnni"])


@pytest.mark.parametrize(
    ("needed", "have", "lacking"),
    [
        ("AVX512 AVX512_VNNI", HAVE, []),
        ("AVX2", HAVE | {"amx_tile"}, []),
        ("AVX512 AVX512_VNNI", HAVE - {"avx512_vnni"}, ["avx512_vnni"]),
        ("AVX512", frozenset({"avx2", "fma"}), ["avx512f", "avx512dq", "avx512bw", "avx512vl"]),
        ("AVX512 AVX512_VNNI AMX_TILE", HAVE, ["amx_tile", "amx_bf16", "amx_int8"]),
        # Where the system lists no flags, torch knows.
        ("AVX512", frozenset(), [] if "avx512f" in compatibility.cpu_flags() else ["AVX512"]),
    ],
)
def test_what_a_processor_lacks(needed: str, have: frozenset[str], lacking: list[str]) -> None:
    assert compatibility.lacking(needed, have) == lacking


def test_this_machine_can_run_what_it_compiled() -> None:
    assert compatibility.cpu_flags()
    assert compatibility.lacking("AVX512 AVX512_VNNI" if "avx512f" in compatibility.cpu_flags() else "AVX2") == []


@pytest.mark.parametrize(
    ("built_for", "have", "portable", "refused"),
    [
        ("90", (9, 0), False, False),
        ("80", (8, 6), False, False),
        ("86", (8, 0), False, True),
        ("80", (9, 0), False, True),
        ("80", (9, 0), True, False),
        ("100", (9, 0), True, True),
        ("90", (10, 0), True, False),
        ("gfx90a", (9, 0), False, False),
        ("", (9, 0), False, False),
    ],
)
def test_gpu_generations(built_for: str, have: tuple[int, int], portable: bool, refused: bool) -> None:
    text = compatibility.gpu_fault(built_for, have, portable)
    assert bool(text) == refused
    assert not refused or "--device cuda" in text


@pytest.mark.parametrize(
    ("release", "refused"),
    [("2.9.1", True), ("1.13", True), ("2.10.0", False), ("2.13.0+cpu", False), ("3.0", False), ("nightly", False)],
)
def test_torch_that_is_too_old(release: str, refused: bool) -> None:
    assert bool(compatibility.torch_fault(release)) == refused


@pytest.mark.processes
def test_operators_are_registered_where_neml2_was_not_imported() -> None:
    out = run_fresh(
        """
        import sys, torch
        from neml2_aoti_plugin import Model
        model = Model(sys.argv[1])
        inputs = {n: torch.zeros(v.base_shape, dtype=torch.float64) for n, v in model.inputs.items()}
        print(model.forward({**inputs, "t": torch.ones((), dtype=torch.float64)})["stress"].abs().max().item())
        """,
        references.case("calibration").artifact,
    )
    assert float(out) == 0.0


@pytest.mark.processes
def test_a_library_that_needs_what_torch_lacks_is_refused_and_ends_no_process(artifact: Path) -> None:
    file = package(artifact)
    make = edited(".so", lambda d: d.replace(b"aoti_torch_empty_strided\0", b"aoti_torch_empty_stridex\0"))
    file.write_bytes(make(file.read_bytes()))
    out = run(
        """
        import sys, torch
        from neml2_aoti_plugin import ArtifactError, Model
        try:
            Model(sys.argv[1]).forward({"strain": torch.zeros(6, dtype=torch.float64)})
        except ArtifactError as error:
            print(error)
        """,
        artifact,
    )
    for word in (str(file), "undefined symbol", "aoti_torch_empty_stridex", "Install the torch", "neml2-compile"):
        assert word in out, out
