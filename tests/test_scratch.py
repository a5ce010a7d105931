"""Folders that packages are unpacked to: nothing is left of them, and nothing else is ever removed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import references
from attacks.children import run
from neml2_aoti_plugin._graphs import unpack as unpacked

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there are no owners and no locks of this kind")

FORWARD = """
import sys, torch
from neml2_aoti_plugin import Model
print(Model(sys.argv[1]).forward({"strain": torch.ones(6, dtype=torch.float64)})["stress"].shape)
"""
PARENT = f"neml2-aoti-plugin-{os.getuid() if hasattr(os, 'getuid') else 0}"
NAME = "unpacked-4000000-" + "0123456789abcdef" * 2
# For tests that must be root to give a file away.
SOMEBODY_ELSE = 54321


@pytest.fixture
def temporary(tmp_path: Path) -> Path:
    """A folder for temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    return folder


@pytest.fixture
def parent(temporary: Path) -> Path:
    """Our folder in it, as a process that was killed leaves it."""
    folder = temporary / PARENT
    folder.mkdir(0o700)
    return folder


def left_behind(parent: Path, name: str = NAME) -> Path:
    """A folder as a process that was killed leaves it."""
    folder = parent / name
    folder.mkdir(0o700)
    (folder / "graph.so").write_bytes(b"half a library")
    (folder / unpacked.MARKER).write_bytes(unpacked.MARK)
    return folder


def forward(temporary: Path, artifact: Path | None = None) -> None:
    """Load and call a model in a process of its own that has these temporary files."""
    artifact = artifact or references.case("elasticity").artifact
    assert run(FORWARD, artifact, TMPDIR=str(temporary)).strip() == "torch.Size([6])"


def everything(folder: Path) -> list[tuple[str, bytes | None]]:
    """All that is in a folder, with the bytes of plain files."""
    return sorted(
        (str(path), path.read_bytes() if path.is_file() else None) for path in folder.rglob("*") if path.name != PARENT
    )


class TestSweep:
    def test_what_a_killed_process_left_goes(self, temporary: Path, parent: Path) -> None:
        left_behind(parent)
        forward(temporary)
        assert everything(temporary) == []

    def test_folders_of_like_names_beside_ours_stay(self, temporary: Path) -> None:
        """A clone of this project, and the artifact itself in it, were once removed while it was loaded."""
        alike = ["neml2-aoti-plugin", "neml2-aoti-", "neml2-aoti-abc123", "neml2-aoti-plugin-abcdefgh"]
        for name in (*alike, "neml2-aoti-plugin-54321", NAME):
            folder = temporary / name
            shutil.copytree(references.case("elasticity").artifact, folder / "aoti" / "elasticity")
            folder.chmod(0o700)
            (folder / unpacked.MARKER).write_bytes(unpacked.MARK)
        before = everything(temporary)
        forward(temporary, temporary / "neml2-aoti-plugin" / "aoti" / "elasticity")
        assert everything(temporary) == before

    def test_folders_that_look_alike_in_every_other_way_stay(self, temporary: Path, parent: Path) -> None:
        changes: list[Callable[[Path], object]] = [
            lambda folder: (folder / unpacked.MARKER).unlink(),
            lambda folder: (folder / unpacked.MARKER).write_bytes(b"mine"),
            lambda folder: (folder / unpacked.MARKER).write_bytes(unpacked.MARK + b"?"),
            lambda folder: linked(folder / unpacked.MARKER),
            lambda folder: folder.chmod(0o755),
            lambda folder: folder.chmod(0o500),
            lambda folder: (folder / "below").mkdir(),
            lambda folder: (folder / "link").symlink_to("/"),
            lambda folder: os.mkfifo(folder / "pipe"),
            lambda folder: folder.rename(folder.with_name("unpacked-1-0123")),
            lambda folder: folder.rename(folder.with_name(NAME + "0")),
            lambda folder: folder.rename(folder.with_name(NAME.upper())),
            lambda folder: folder.rename(folder.with_name("project")),
        ]
        if os.geteuid() == 0:
            changes += [given_away, lambda folder: given_away(folder / "graph.so")]
        for number, change in enumerate(changes):
            change(left_behind(parent, f"{NAME[:-2]}{number:02}"))
        before = everything(temporary)
        assert len({Path(path).parent for path, _ in before} - {temporary, parent}) >= len(changes)
        forward(temporary)
        assert everything(temporary) == before

    def test_a_link_of_our_name_stays_and_so_does_what_it_leads_to(self, temporary: Path, parent: Path) -> None:
        there = temporary / "there"
        there.mkdir()
        (parent / NAME).symlink_to(left_behind(there))
        before = everything(temporary)
        forward(temporary)
        assert everything(temporary) == before

    def test_a_file_of_our_name_stays(self, temporary: Path, parent: Path) -> None:
        (parent / NAME).write_bytes(unpacked.MARK)
        before = everything(temporary)
        forward(temporary)
        assert everything(temporary) == before

    def test_what_a_living_process_uses_stays(self, temporary: Path, parent: Path) -> None:
        folder = left_behind(parent)
        before = everything(temporary)
        with subprocess.Popen(["flock", str(folder), "sh", "-c", "echo; read x"], stdin=-1, stdout=-1) as holder:
            assert holder.stdout is not None and holder.stdin is not None
            holder.stdout.readline()
            forward(temporary)
            assert everything(temporary) == before
            holder.stdin.close()
        forward(temporary)
        assert everything(temporary) == []


class TestParentThatIsNotSafe:
    """Packages are unpacked elsewhere, and nothing is swept."""

    @pytest.mark.parametrize(
        "change",
        [
            pytest.param(lambda parent: parent.chmod(0o755), id="open to others"),
            pytest.param(lambda parent: parent.chmod(0o1700), id="another mode"),
            pytest.param(lambda parent: given_away(parent), id="somebody else's"),
            pytest.param(lambda parent: linked(parent), id="a link"),
        ],
    )
    def test_folder(self, temporary: Path, parent: Path, change: Callable[[Path], object]) -> None:
        left_behind(parent)
        change(parent)
        before = everything(temporary)
        forward(temporary)
        assert everything(temporary) == before

    def test_file(self, temporary: Path) -> None:
        (temporary / PARENT).write_bytes(b"mine")
        forward(temporary)
        assert (temporary / PARENT).read_bytes() == b"mine" and len(list(temporary.iterdir())) == 1


def linked(path: Path) -> None:
    """Put a link to a file or folder in its place."""
    path.symlink_to(path.rename(path.with_name(f"{path.name}-moved")))


def given_away(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file to somebody else")
    os.chown(path, SOMEBODY_ELSE, -1)


def test_nothing_is_left_when_file_descriptors_run_out(temporary: Path) -> None:
    """At each number of descriptors at which the call fails, whichever step it is that fails."""
    out = run(
        """
        import os, resource, sys, tempfile, torch
        from pathlib import Path
        from neml2_aoti_plugin import AOTIError
        from neml2_aoti_plugin._graphs.unpack import load_runner
        file = Path(sys.argv[1]) / "cpu/float64/elasticity.pt2"
        data = file.read_bytes()
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        fillers = []
        for free in range(12):
            while True:
                try:
                    fillers.append(os.open("/dev/null", os.O_RDONLY))
                except OSError:
                    break
                if len(fillers) == 1:
                    resource.setrlimit(resource.RLIMIT_NOFILE, (fillers[0] + 20, hard))
            for handle in [fillers.pop() for _ in range(free)]:
                os.close(handle)
            try:
                load_runner(file, data, torch.device("cpu"))
                end = "runs"
            except AOTIError as error:
                end = "ulimit -n" if "ulimit -n" in str(error) else str(error)
            for handle in fillers:
                os.close(handle)
            fillers = []
            found = [name for _, folders, files in os.walk(tempfile.gettempdir()) for name in folders + files]
            print(free, end, [name for name in found if name != f"neml2-aoti-plugin-{os.getuid()}"], sep="|")
            if end == "runs":
                break
        """,
        references.case("elasticity").artifact,
        TMPDIR=str(temporary),
    )
    lines = [line.split("|") for line in out.splitlines()]
    assert all(left == "[]" for _, _, left in lines), out
    ends = [end for _, end, _ in lines]
    assert ends[-1] == "runs" and "ulimit -n" in ends, out
