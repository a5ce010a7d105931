"""The compatibility check: hostile, damaged and foreign packages are refused before native code runs, in a report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import references
from attacks.archives import ATTACKS, edited, recorded, swapped
from attacks.children import run, run_fresh
from neml2_aoti_plugin import ArtifactError, ArtifactNotFoundError, Model
from neml2_aoti_plugin._artifact import compatibility
from neml2_aoti_plugin._artifact.files import folder_at
from neml2_aoti_plugin._artifact.package import read_signature
from neml2_aoti_plugin._artifact.wiring import Wire, wire_fault


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """A copy of the elasticity artifact that a test may damage."""
    return Path(shutil.copytree(references.case("elasticity").artifact, tmp_path / "folder" / "elasticity"))


def package(artifact: Path, name: str = "elasticity") -> Path:
    return artifact / f"cpu/float64/{name}.pt2"


def refusal(artifact: Path, kind: type[Exception] = ArtifactError) -> str:
    with pytest.raises(kind) as raised:
        Model(artifact)
    return str(raised.value)


class TestArchives:
    @pytest.mark.parametrize("name", ATTACKS)
    def test_attack_is_refused_when_loaded(self, artifact: Path, name: str) -> None:
        file = package(artifact)
        file.write_bytes(ATTACKS[name].make(file.read_bytes()))
        before = sorted(artifact.parent.parent.rglob("*"))
        text = refusal(artifact)
        assert str(file) in text
        for word in ATTACKS[name].words:
            assert word in text, f"{word!r} is not in: {text}"
        assert sorted(artifact.parent.parent.rglob("*")) == before

    def test_the_real_package_passes(self, artifact: Path) -> None:
        file = package(artifact)
        # What the attacks start from, taken apart and put together again.
        file.write_bytes(recorded()(file.read_bytes()))
        strain = torch.ones(6, dtype=torch.float64)
        stress = Model(artifact).forward({"strain": strain})["stress"]
        assert torch.equal(stress, references.case("elasticity").model.forward({"strain": strain})["stress"])

    def test_package_of_another_graph(self, artifact: Path) -> None:
        file = package(artifact)
        file.write_bytes(package(artifact, "elasticity_jvp").read_bytes())
        assert "elasticity_jvp, expected elasticity" in refusal(artifact)

    def test_package_that_takes_other_tensors(self, artifact: Path) -> None:
        other = references.case("promoted").artifact / "cpu/float64/promoted.pt2"
        package(artifact).write_bytes(swapped(other, "elasticity"))
        assert "takes 3 tensors, where the metadata gives it 1 as the value" in refusal(artifact)

    def test_package_that_takes_other_shapes(self) -> None:
        file = package(references.case("elasticity").artifact)
        signature = read_signature(file, folder_at(file.parent))
        assert wire_fault(Wire("x", "value", ((6,),)), signature) == ""
        text = wire_fault(Wire("x", "value", ((7,),)), signature)
        assert "(*, 6) as tensor 0" in text and "(*batch, 7) as the value" in text

    def test_a_package_for_two_things(self, artifact: Path) -> None:
        file = artifact / "metadata.json"
        document = json.loads(file.read_text())
        document["segments"][0]["jvp_package"] = document["segments"][0]["package"]
        file.write_text(json.dumps(document))
        assert "named by the metadata as value and as jacobian" in refusal(artifact)

    def test_a_folder_and_a_pipe_for_a_package(self, artifact: Path) -> None:
        import os

        file = package(artifact)
        file.unlink()
        file.mkdir()
        assert "not a file" in refusal(artifact)
        file.rmdir()
        os.mkfifo(file)
        assert "not a file" in refusal(artifact)


class TestReport:
    def test_all_findings_at_once_with_a_cure_each(self, artifact: Path) -> None:
        file, other = package(artifact), package(artifact, "elasticity_jvp")
        make = recorded(AOTI_PLATFORM="win32", AOTI_MACHINE="riscv64", AOTI_DEVICE_KEY="cuda")
        file.write_bytes(make(file.read_bytes()))
        other.unlink()
        text = refusal(artifact, ArtifactNotFoundError)
        head, *lines = text.splitlines()
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


class TestProcessor:
    HAVE = frozenset(["fma", "f16c", "avx2", "avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512_vnni"])

    def test_a_superset_is_fine(self) -> None:
        assert compatibility.lacking("AVX512 AVX512_VNNI", self.HAVE) == []
        assert compatibility.lacking("AVX2", self.HAVE | {"amx_tile"}) == []

    def test_a_subset_is_refused(self) -> None:
        assert compatibility.lacking("AVX512 AVX512_VNNI", self.HAVE - {"avx512_vnni"}) == ["avx512_vnni"]
        assert compatibility.lacking("AVX512", frozenset({"avx2", "fma"})) == [
            "avx512f",
            "avx512dq",
            "avx512bw",
            "avx512vl",
        ]
        assert compatibility.lacking("AVX512 AVX512_VNNI AMX_TILE", self.HAVE) == ["amx_tile", "amx_bf16", "amx_int8"]

    def test_this_machine_can_run_what_it_compiled(self) -> None:
        assert compatibility.cpu_flags()
        assert compatibility.lacking("AVX512 AVX512_VNNI" if "avx512f" in compatibility.cpu_flags() else "AVX2") == []

    def test_where_the_system_tells_no_flags_torch_asks_the_processor(self) -> None:
        has = torch.cpu._is_avx512_supported()
        assert compatibility.lacking("AVX512", frozenset()) == ([] if has else ["AVX512"])

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
    def test_gpu_generations(self, built_for: str, have: tuple[int, int], portable: bool, refused: bool) -> None:
        text = compatibility.gpu_fault(built_for, have, portable)
        assert bool(text) == refused
        assert not refused or "--device cuda" in text


class TestTorch:
    @pytest.mark.parametrize(
        ("version", "refused"),
        [("2.9.1", True), ("1.13", True), ("2.10.0", False), ("2.13.0+cpu", False), ("3.0", False), ("nightly", False)],
    )
    def test_torch_that_is_too_old(self, version: str, refused: bool) -> None:
        assert bool(compatibility.torch_fault(version)) == refused


def test_operators_are_registered_where_neml2_was_not_imported() -> None:
    out = run_fresh(
        """
        import sys, torch
        from neml2_aoti_plugin import Model
        model = Model(sys.argv[1])
        zero = torch.zeros((), dtype=torch.float64)
        inputs = {n: torch.zeros(v.base_shape, dtype=torch.float64) for n, v in model.inputs.items()}
        inputs["t"] = zero + 1.0
        print(model.forward(inputs)["stress"].abs().max().item())
        """,
        references.case("calibration").artifact,
    )
    assert float(out) == 0.0


def test_a_library_that_needs_what_torch_lacks_is_refused_and_ends_no_process(artifact: Path) -> None:
    file = package(artifact)
    make = edited(".so", lambda d: d.replace(b"aoti_torch_empty_strided\0", b"aoti_torch_empty_stridex\0"))
    file.write_bytes(make(file.read_bytes()))
    out = run(
        """
        import sys, torch
        from neml2_aoti_plugin import ArtifactError, Model
        inputs = {"strain": torch.zeros(6, dtype=torch.float64)}
        try:
            Model(sys.argv[1]).forward(inputs)
        except ArtifactError as error:
            print(error)
        """,
        artifact,
    )
    for word in (str(file), "undefined symbol", "aoti_torch_empty_stridex", "Install the torch", "neml2-compile"):
        assert word in out, out


def test_a_changed_package_is_not_run_later(artifact: Path) -> None:
    file = package(artifact, "elasticity_jvp")
    # Bytes that nothing else in this process has: what is loaded already is not read again.
    file.write_bytes(recorded(more=str(artifact))(file.read_bytes()))
    model = Model(artifact)
    inputs = {"strain": torch.zeros(6, dtype=torch.float64)}
    model.forward(inputs)
    file.write_bytes(recorded(AOTI_PLATFORM="linux", more="x")(file.read_bytes()))
    with pytest.raises(ArtifactError, match="has changed since the model was loaded"):
        model.jacobian(inputs)
    assert model.forward(inputs)["stress"].shape == (6,)
    assert Model(artifact).jacobian(inputs)[1]["stress"]["strain"].shape == (6, 6)
