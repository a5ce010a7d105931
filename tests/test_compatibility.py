"""The compatibility check: hostile, damaged and foreign packages are refused before native code runs, in a report."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import references
from attacks.archives import ATTACKS, edited, of_stem, recorded
from attacks.artifacts import damage, package, refusal, signature_of
from attacks.children import run_fresh
from neml2_aoti_plugin import ArtifactNotFoundError, Model
from neml2_aoti_plugin._artifact import compatibility
from neml2_aoti_plugin._artifact.wiring import Wire, wire_fault
from references import change_json


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_is_refused_when_loaded(artifact: Path, name: str) -> None:
    make, words = ATTACKS[name]
    file = damage(artifact, make)
    before = sorted(artifact.parent.parent.rglob("*"))
    text = refusal(artifact)
    assert all(word in text for word in (str(file), *words)), text
    assert sorted(artifact.parent.parent.rglob("*")) == before


def test_the_real_package_passes(artifact: Path) -> None:
    # What the attacks start from, taken apart and put together again.
    damage(artifact, recorded())
    strain = {"strain": torch.ones(6, dtype=torch.float64)}
    expected = references.case("elasticity").model.forward(strain)["stress"]
    assert torch.equal(Model(artifact).forward(strain)["stress"], expected)


def test_a_package_of_something_else(artifact: Path) -> None:
    own = damage(artifact, lambda _: package(artifact, "elasticity_jvp").read_bytes())
    assert "elasticity_jvp, expected elasticity" in refusal(artifact)
    other = package(references.case("promoted").artifact, "promoted")
    own.write_bytes(of_stem("elasticity")(other.read_bytes()))
    assert "takes 3 tensors, where the metadata gives it 1 as the value" in refusal(artifact)
    shutil.copy(package(references.case("elasticity").artifact), own)
    assert wire_fault(Wire("x", "value", ((6,),)), signature_of(own)) == ""
    text = wire_fault(Wire("x", "value", ((7,),)), signature_of(own))
    assert "(*, 6) as tensor 0" in text and "(*batch, 7) as the value" in text
    change_json(artifact / "metadata.json", lambda d: d["segments"][0].update(jvp_package="elasticity.pt2"))
    assert "named by the metadata as value and as jacobian" in refusal(artifact)


def test_all_findings_come_at_once_with_a_cure_each_and_the_same_of_several_packages_once(artifact: Path) -> None:
    for name in ("elasticity", "elasticity_jvp"):
        damage(artifact, recorded(AOTI_PLATFORM="win32"), name)
    assert len(refusal(artifact).splitlines()) == 1
    assert "{elasticity.pt2, elasticity_jvp.pt2}" in refusal(artifact)
    damage(artifact, recorded(AOTI_MACHINE="riscv64", AOTI_DEVICE_KEY="cuda"))
    package(artifact, "elasticity_jvp").unlink()
    head, *lines = refusal(artifact, ArtifactNotFoundError).splitlines()
    assert str(artifact) in head and "for 4 reasons" in head and len(lines) == 4
    for line in lines:
        assert "neml2-compile" in line or "Copy the whole" in line or "Load it with" in line, line


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
        import sys
        from attacks.scene import stress
        from neml2_aoti_plugin import Model
        print(stress(Model(sys.argv[1])).abs().max().item())
        """,
        references.case("calibration").artifact,
    )
    assert float(out) > 0.0


@pytest.mark.processes
def test_a_library_that_needs_what_torch_lacks_is_refused_and_ends_no_process(artifact: Path) -> None:
    make = edited(".so", lambda d: d.replace(b"aoti_torch_empty_strided\0", b"aoti_torch_empty_stridex\0"))
    file = damage(artifact, make)
    out = run_fresh("import sys; from attacks.artifacts import runs; runs(sys.argv[1])", artifact, status=1)
    assert "ArtifactError" in out
    for word in (str(file), "undefined symbol", "aoti_torch_empty_stridex", "Install the torch", "neml2-compile"):
        assert word in out, out
