"""The seal of an artifact, and where artifacts may be loaded from."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from pathlib import Path

import neml2
import pytest

from attacks.archives import recorded
from attacks.artifacts import INPUTS, damage, old_metadata, package, refusal, runs
from commands import printed, refused
from neml2_aoti_plugin import ArtifactError, ArtifactNotFoundError, Model, seal
from neml2_aoti_plugin._artifact.files import ROOTS
from neml2_aoti_plugin._artifact.trust import REQUIRE_SEAL

OUTSIDE = "outside of the folders"


def flip(file: Path, at: int) -> None:
    """Change a bit; the times stay."""
    times = file.stat()
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def files(artifact: Path) -> list[Path]:
    return sorted(p for p in artifact.rglob("*") if p.is_file())


def test_it_stands_beside_the_artifact_and_sha256sum_checks_it(artifact: Path) -> None:
    file = artifact.with_name("elasticity.sha256")
    assert printed("seal", artifact)[0].strip() == str(file)
    assert len(file.read_text().splitlines()) == len(files(artifact)) == 3
    command = ["sha256sum", "--check", "--strict", file.name]
    done = subprocess.run(command, cwd=file.parent, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.count(": OK")) == (0, 3), done.stderr


@pytest.mark.parametrize("inside", ["metadata.json", "cpu", "cpu/float64", "."])
def test_any_path_that_loads_is_sealed(artifact: Path, inside: str) -> None:
    assert seal(artifact / inside) == artifact.with_name("elasticity.sha256")
    assert runs(artifact)


def test_a_changed_byte_anywhere_is_refused_by_file_name(artifact: Path) -> None:
    seal(artifact)
    random_ = random.Random(0)
    for file in files(artifact):
        size = file.stat().st_size
        for at in (0, size - 1, *(random_.randrange(size) for _ in range(3))):
            flip(file, at)
            text = refusal(artifact)
            assert "is not as it was sealed" in text and f"{file.relative_to(artifact.parent)}: was changed" in text
            flip(file, at)
    assert runs(artifact)


def test_files_that_came_and_went(artifact: Path) -> None:
    seal(artifact)
    package(artifact, "elasticity_jvp").rename(artifact / "cpu/new.pt2")
    text = refusal(artifact)
    assert "elasticity/cpu/float64/elasticity_jvp.pt2: is gone" in text
    assert "elasticity/cpu/new.pt2: was added" in text
    # A new compile is the commonest reason, and tampering the worst.
    cure = text.splitlines()[-1]
    assert cure.startswith("Copy the artifact again from where it came")
    assert cure.endswith(f"if you have compiled the model again since, seal it again: neml2-aoti seal {artifact}")
    # The cure that it names; then nothing is read before the seal is checked.
    seal(artifact)
    assert "elasticity_jvp.pt2: no such" in refusal(artifact, ArtifactNotFoundError)
    (artifact / "metadata.json").write_text("{")
    assert "metadata.json: was changed" in refusal(artifact)


def test_a_package_changed_after_the_load_is_not_run(artifact: Path) -> None:
    # Bytes that nothing else in this process has: what is loaded already is not read again.
    file = damage(artifact, recorded(more=str(artifact)))
    seal(artifact)
    model = Model(artifact)
    flip(file, 70_000)
    with pytest.raises(ArtifactError, match=r"elasticity\.pt2: was changed after the sealed artifact was verified"):
        model.forward(INPUTS)
    flip(file, 70_000)
    assert model.forward(INPUTS)["stress"].shape == (6,)


def test_it_is_checked_through_the_stub_and_a_link(artifact: Path) -> None:
    stub, link = artifact.with_name("elasticity_aoti.i"), artifact.with_name("link")
    link.symlink_to(artifact)
    seal(artifact)
    assert neml2.load_model(stub, "elasticity") is not None
    flip(package(artifact), 1000)
    with pytest.raises(ArtifactError, match=r"elasticity\.pt2: was changed"):
        neml2.load_model(stub, "elasticity")
    assert "elasticity.pt2: was changed" in refusal(link)


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
def test_a_damaged_seal(artifact: Path, text: str, words: list[str]) -> None:
    artifact.with_name("elasticity.sha256").write_text(text.format("0" * 64))
    found = refusal(artifact)
    assert all(word in found for word in ("elasticity.sha256", "neml2-aoti seal", *words)), found


def test_with_the_line_ends_of_windows(artifact: Path) -> None:
    file = seal(artifact)
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    assert runs(artifact)
    flip(artifact / "metadata.json", 3)
    assert "metadata.json: was changed" in refusal(artifact)


def test_a_link_to_a_seal_that_is_not_there_is_no_missing_seal(artifact: Path) -> None:
    artifact.with_name("elasticity.sha256").symlink_to("nothing")
    assert "a link to a seal that is not there" in refusal(artifact)


def test_what_cannot_be_sealed(artifact: Path) -> None:
    with pytest.raises(ArtifactNotFoundError):
        seal(artifact / "nothing")
    assert "nothing" in refused("seal", artifact / "nothing")
    (artifact / "link").symlink_to(artifact / "cpu")
    with pytest.raises(ArtifactError, match="a link to a folder"):
        seal(artifact)


@pytest.mark.parametrize("value", ["1", "0", "false", "off", "no", ""])
def test_a_seal_may_be_required(artifact: Path, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REQUIRE_SEAL, value)
    if value == "1":
        text = refusal(artifact)
        assert f"{REQUIRE_SEAL} asks for one" in text and f"neml2-aoti seal {artifact}" in text
        seal(artifact)
    assert runs(artifact)


def test_roots(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "fold"
    other.mkdir()
    for allowed in (os.pathsep.join([str(other), str(artifact.parent)]), str(artifact)):
        monkeypatch.setenv(ROOTS, allowed)
        assert runs(artifact)
    monkeypatch.setenv(ROOTS, str(other))
    assert f"{OUTSIDE} that {ROOTS} allows: {other}" in refusal(artifact)
    # Neither by the parent in the path, nor by links.
    assert OUTSIDE in refusal(other / ".." / "folder" / "elasticity")
    (other / "link").symlink_to(artifact)
    assert OUTSIDE in refusal(other / "link")


@pytest.mark.parametrize("inside", [".", "cpu", "cpu/old_meta.json"])
def test_the_old_layout(artifact: Path, inside: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A metadata file per device, as neml2 wrote it before 3.0.7."""
    old = artifact.with_name("old")
    shutil.copytree(artifact / "cpu/float64", old / "cpu")
    (old / "cpu/old_meta.json").write_text(old_metadata(artifact))
    assert seal(old / inside) == old.with_name("old.sha256")
    assert runs(old / inside)
    flip(old / "cpu/old_meta.json", 3)
    assert "old/cpu/old_meta.json: was changed" in refusal(old / inside)
    monkeypatch.setenv(ROOTS, str(artifact))
    assert OUTSIDE in refusal(old / inside)
