"""The seal of an artifact, and where artifacts may be loaded from."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import neml2
import pytest
import torch

import references
from attacks.archives import recorded
from attacks.children import environment
from neml2_aoti_plugin import ArtifactError, ArtifactNotFoundError, Model, seal
from neml2_aoti_plugin import _cli as cli
from neml2_aoti_plugin._artifact.files import ROOTS
from neml2_aoti_plugin._artifact.trust import REQUIRE_SEAL

INPUTS = {"strain": torch.zeros(6, dtype=torch.float64)}


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """A copy of the elasticity artifact, not sealed."""
    return Path(shutil.copytree(references.case("elasticity").artifact, tmp_path / "folder" / "elasticity"))


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def files(artifact: Path) -> list[Path]:
    return sorted(p for p in artifact.rglob("*") if p.is_file())


class TestSeal:
    def test_stands_beside_the_artifact_and_sha256sum_checks_it(self, artifact: Path) -> None:
        file = seal(artifact)
        assert file == artifact.with_name("elasticity.sha256")
        assert len(file.read_text().splitlines()) == len(files(artifact)) == 3
        command = ["sha256sum", "--check", "--strict", file.name]
        done = subprocess.run(command, cwd=file.parent, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(": OK") == 3

    @pytest.mark.parametrize("inside", ["metadata.json", "cpu", "cpu/float64", "."])
    def test_takes_any_path_that_loads(self, artifact: Path, inside: str) -> None:
        assert seal(artifact / inside) == artifact.with_name("elasticity.sha256")

    def test_sealed_artifact_loads_and_runs(self, artifact: Path) -> None:
        seal(artifact)
        assert Model(artifact).forward(INPUTS)["stress"].shape == (6,)

    def test_a_changed_byte_anywhere_is_refused_by_file_name(self, artifact: Path) -> None:
        seal(artifact)
        random_ = random.Random(0)
        for file in files(artifact):
            size = file.stat().st_size
            for at in (0, size - 1, *(random_.randrange(size) for _ in range(3))):
                flip(file, at)
                with pytest.raises(ArtifactError, match="is not as it was sealed") as raised:
                    Model(artifact)
                assert f"{file.relative_to(artifact.parent)}: was changed" in str(raised.value)
                flip(file, at)
        assert Model(artifact).forward(INPUTS)["stress"].shape == (6,)

    def test_files_that_came_and_went(self, artifact: Path) -> None:
        seal(artifact)
        (artifact / "cpu/float64/elasticity_jvp.pt2").rename(artifact / "cpu/new.pt2")
        with pytest.raises(ArtifactError) as raised:
            Model(artifact)
        assert "elasticity/cpu/float64/elasticity_jvp.pt2: is gone" in str(raised.value)
        assert "elasticity/cpu/new.pt2: was added" in str(raised.value)
        # A new compile is the commonest reason, and tampering the worst.
        cure = str(raised.value).splitlines()[-1]
        assert cure.startswith("Copy the artifact again from where it came")
        assert cure.endswith(f"if you have compiled the model again since, seal it again: neml2-aoti seal {artifact}")

    def test_nothing_is_opened_before(self, artifact: Path) -> None:
        seal(artifact)
        (artifact / "metadata.json").write_text("{")
        with pytest.raises(ArtifactError, match=r"metadata\.json: was changed"):
            Model(artifact)

    def test_a_package_changed_after_the_load_is_not_run(self, artifact: Path) -> None:
        file = artifact / "cpu/float64/elasticity.pt2"
        # Bytes that nothing else in this process has: what is loaded already is not read again.
        file.write_bytes(recorded(more=str(artifact))(file.read_bytes()))
        seal(artifact)
        model = Model(artifact)
        times = file.stat()
        flip(file, 70_000)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        with pytest.raises(ArtifactError, match=r"elasticity\.pt2: was changed after the sealed artifact was verified"):
            model.forward(INPUTS)
        flip(file, 70_000)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert model.forward(INPUTS)["stress"].shape == (6,)

    def test_through_the_stub(self, artifact: Path) -> None:
        case = references.case("elasticity")
        shutil.copy(case.file, artifact.parent)
        seal(artifact)
        assert neml2.load_model(artifact.parent / case.file.name, "elasticity") is not None
        flip(artifact / "cpu/float64/elasticity.pt2", 1000)
        with pytest.raises(ArtifactError, match=r"elasticity\.pt2: was changed"):
            neml2.load_model(artifact.parent / case.file.name, "elasticity")

    def test_through_a_link(self, artifact: Path) -> None:
        seal(artifact)
        link = artifact.with_name("link")
        link.symlink_to(artifact)
        flip(artifact / "cpu/float64/elasticity.pt2", 1000)
        with pytest.raises(ArtifactError, match=r"elasticity\.pt2: was changed"):
            Model(link)

    def test_sealed_again_after_a_change(self, artifact: Path) -> None:
        seal(artifact)
        shutil.rmtree(artifact)
        shutil.copytree(references.case("promoted").artifact, artifact)
        with pytest.raises(ArtifactError):
            Model(artifact)
        seal(artifact)
        assert Model(artifact).input_names == ["strain"]

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("", ["line 1"]),
            ("0123  elasticity/metadata.json\n", ["line 1", "SHA-256"]),
            ("{0}  elasticity/../other/metadata.json\n", ["line 1", "../other"]),
            ("{0}  /etc/passwd\n", ["line 1", "/etc/passwd"]),
            ("{0}  other/metadata.json\n", ["line 1", "other/metadata.json"]),
            ("{0}  elasticity/a\n{0}  elasticity/a\n", ["line 2", "twice"]),
        ],
    )
    def test_damaged_seal(self, artifact: Path, text: str, words: list[str]) -> None:
        artifact.with_name("elasticity.sha256").write_text(text.format("0" * 64))
        with pytest.raises(ArtifactError) as raised:
            Model(artifact)
        for word in ("elasticity.sha256", "neml2-aoti seal", *words):
            assert word in str(raised.value), str(raised.value)

    def test_what_cannot_be_sealed(self, artifact: Path) -> None:
        with pytest.raises(ArtifactNotFoundError):
            seal(artifact / "nothing")
        (artifact / "link").symlink_to(artifact / "cpu")
        with pytest.raises(ArtifactError, match="a link to a folder"):
            seal(artifact)


class TestPolicy:
    def test_seal_required(self, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(REQUIRE_SEAL, "1")
        with pytest.raises(ArtifactError, match=f"{REQUIRE_SEAL} asks for one.*neml2-aoti seal {artifact}"):
            Model(artifact)
        seal(artifact)
        assert Model(artifact).input_names == ["strain"]

    @pytest.mark.parametrize("value", ["0", "false", "off", "no", ""])
    def test_seal_not_required(self, artifact: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
        monkeypatch.setenv(REQUIRE_SEAL, value)
        assert Model(artifact).input_names == ["strain"]

    def test_roots(self, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        other = tmp_path / "fold"
        other.mkdir()
        monkeypatch.setenv(ROOTS, str(other))
        with pytest.raises(ArtifactError, match=f"outside of the folders that {ROOTS} allows: {other}"):
            Model(artifact)
        monkeypatch.setenv(ROOTS, os.pathsep.join([str(other), str(artifact.parent)]))
        assert Model(artifact).input_names == ["strain"]
        monkeypatch.setenv(ROOTS, str(artifact))
        assert Model(artifact).input_names == ["strain"]

    def test_links_do_not_lead_out_of_the_roots(
        self, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        allowed = tmp_path / "allowed"
        allowed.mkdir()
        monkeypatch.setenv(ROOTS, str(allowed))
        (allowed / "elasticity").symlink_to(artifact)
        with pytest.raises(ArtifactError, match="outside of the folders"):
            Model(allowed / "elasticity")
        (allowed / "elasticity").unlink()
        shutil.copytree(artifact, allowed / "elasticity")
        file = allowed / "elasticity/cpu/float64/elasticity.pt2"
        file.unlink()
        file.symlink_to(artifact / "cpu/float64/elasticity.pt2")
        with pytest.raises(ArtifactError, match=r"elasticity\.pt2: lies in .* outside of the folders"):
            Model(allowed / "elasticity")

    def test_parent_in_the_path(self, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        allowed = tmp_path / "allowed"
        allowed.mkdir()
        monkeypatch.setenv(ROOTS, str(allowed))
        with pytest.raises(ArtifactError, match="outside of the folders"):
            Model(allowed / ".." / "folder" / "elasticity")


class TestOldLayout:
    """A metadata file per device, as neml2 wrote it before 3.0.7."""

    @pytest.fixture
    def old(self, artifact: Path) -> Path:
        document = json.loads((artifact / "metadata.json").read_text())
        folder = artifact.with_name("old") / "cpu"
        shutil.copytree(artifact / "cpu/float64", folder)
        document.update(device="cpu", dtype="float64")
        (folder / "old_meta.json").write_text(json.dumps(document))
        return folder.parent

    @pytest.mark.parametrize("inside", [".", "cpu", "cpu/old_meta.json"])
    def test_a_changed_byte_is_refused(self, old: Path, inside: str) -> None:
        assert seal(old / inside) == old.with_name("old.sha256")
        assert Model(old / inside).forward(INPUTS)["stress"].shape == (6,)
        flip(old / "cpu/old_meta.json", 3)
        with pytest.raises(ArtifactError, match=r"old/cpu/old_meta\.json: was changed"):
            Model(old / inside)

    def test_roots(self, old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(ROOTS, str(tmp_path / "other"))
        with pytest.raises(ArtifactError, match="outside of the folders"):
            Model(old / "cpu/old_meta.json")


class TestCommand:
    def test_is_in_the_wheel(self, wheel: Path) -> None:
        with zipfile.ZipFile(wheel) as archive:
            name = next(n for n in archive.namelist() if n.endswith("entry_points.txt"))
            assert "[console_scripts]\nneml2-aoti = neml2_aoti_plugin._cli:main" in archive.read(name).decode()

    def test_seals_and_tells_where(self, artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["seal", str(artifact)]) == 0
        assert capsys.readouterr().out.strip() == str(artifact.with_name("elasticity.sha256"))

    def test_tells_what_is_wrong(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["seal", str(tmp_path / "gone")]) == 2
        assert "neml2-aoti: " in capsys.readouterr().err

    def test_help_does_not_import_torch(self) -> None:
        program = (
            "import sys; from neml2_aoti_plugin import _cli as cli\n"
            "try: cli.main(['--help'])\n"
            "finally: assert not {'torch', 'neml2'} & set(sys.modules)"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0 and "seal" in done.stdout, done.stderr
