"""Folders that packages are unpacked to: nothing is left of them, and nothing else is ever removed."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import references
from attacks.children import run, run_fresh, start
from attacks.scene import everything
from neml2_aoti_plugin._graphs import unpack as unpacked

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there are no owners and no locks of this kind")

SETUP = """
import os, resource, signal, sys, tempfile, time, torch
from pathlib import Path
from attacks.scene import everything, stress
from neml2_aoti_plugin import AOTIError, Model
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


def artifact(name: str = "elasticity") -> Path:
    return references.case(name).artifact


def left_behind(parent: Path, name: str = NAME) -> Path:
    """A folder as a process that was killed leaves it."""
    folder = parent / name
    folder.mkdir(0o700)
    (folder / "graph.so").write_bytes(b"half a library")
    (folder / unpacked.MARKER).write_bytes(unpacked.MARK)
    return folder


def after_a_load(temporary: Path, of: Path | None = None) -> list[tuple[str, bytes]]:
    """What is there once a process with these temporary files has called a model, which is the same when it is gone."""
    program = SETUP + "assert stress(Model(sys.argv[1])).any()\nprint(everything(tempfile.gettempdir()))"
    seen = run(program, of or artifact(), TMPDIR=str(temporary)).strip()
    left = everything(temporary)
    assert seen == repr(left)
    return left


def test_somebody_tidies_up_while_folders_are_made(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    over = threading.Event()

    def tidy() -> None:
        while not over.is_set():
            with contextlib.suppress(OSError):
                (temporary / PARENT).rmdir()

    thread = threading.Thread(target=tidy)
    thread.start()
    try:
        for _ in range(150):
            with unpacked.scratch_folder(Path("x.pt2")) as folder:
                assert folder.write("half.so", b"half", Path("x.pt2")).read_bytes() == b"half"
    finally:
        over.set()
        thread.join()
    assert everything(temporary) in ([], [(PARENT, b"")])


class TestSweep:
    def test_what_a_process_uses_stays_and_what_a_killed_one_left_goes(self, temporary: Path) -> None:
        child = start(
            """
            import time
            from pathlib import Path
            from neml2_aoti_plugin._graphs.unpack import scratch_folder
            with scratch_folder(Path("x.pt2")) as folder:
                folder.write("half.so", b"half", Path("x.pt2"))
                print(folder.path, flush=True)
                time.sleep(60)
            """,
            TMPDIR=str(temporary),
        )
        folder = Path(child.line())
        assert folder.parent == temporary / PARENT
        assert [path.stat().st_mode & 0o777 for path in (folder.parent, folder)] == [0o700, 0o700]
        before = everything(temporary)
        assert len(before) == 3 and after_a_load(temporary) == before
        child.send(signal.SIGKILL)
        assert everything(temporary) == before and after_a_load(temporary) == []

    def test_what_looks_alike_stays(self, temporary: Path, parent: Path) -> None:
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
        # A clone of this project, and the artifact itself in it, were once removed while it was loaded.
        for name in ("neml2-aoti-plugin", "neml2-aoti-", "neml2-aoti-abc123", "neml2-aoti-plugin-54321", NAME):
            shutil.copytree(artifact(), left_behind(temporary, name) / "aoti" / "elasticity")
        # A link of our name and what it leads to, and a file.
        (temporary / "there").mkdir()
        (parent / NAME).symlink_to(left_behind(temporary / "there"))
        (parent / f"{NAME[:-2]}ff").write_bytes(unpacked.MARK)
        before = everything(temporary)
        assert len({Path(path).parent for path, _ in before} - {temporary, parent}) >= len(changes)
        assert after_a_load(temporary, temporary / "neml2-aoti-plugin" / "aoti" / "elasticity") == before

    @pytest.mark.parametrize(
        "change",
        [
            pytest.param(lambda parent: parent.chmod(0o755), id="open to others"),
            pytest.param(lambda parent: parent.chmod(0o1700), id="another mode"),
            pytest.param(lambda parent: given_away(parent), id="somebody else's"),
            pytest.param(lambda parent: linked(parent), id="a link"),
        ],
    )
    def test_in_a_parent_that_is_not_safe_nothing_goes(
        self, temporary: Path, parent: Path, change: Callable[[Path], object]
    ) -> None:
        left_behind(parent)
        change(parent)
        before = everything(temporary)
        assert after_a_load(temporary) == before

    def test_a_file_in_the_place_of_the_parent_stays(self, temporary: Path) -> None:
        (temporary / PARENT).write_bytes(b"mine")
        assert after_a_load(temporary) == []
        assert (temporary / PARENT).read_bytes() == b"mine"


def linked(path: Path) -> None:
    """Put a link to a file or folder in its place."""
    path.symlink_to(path.rename(path.with_name(f"{path.name}-moved")))


def given_away(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file to somebody else")
    os.chown(path, SOMEBODY_ELSE, -1)


# -- nothing is left ---------------------------------------------------------------------------------------------------


def test_after_sigterm(temporary: Path) -> None:
    program = SETUP + "model = Model(sys.argv[1]); stress(model); print('ready', flush=True); time.sleep(60)"
    child = start(program, artifact(), TMPDIR=str(temporary))
    assert child.line() == "ready"
    assert child.send(signal.SIGTERM) == -signal.SIGTERM
    assert everything(temporary) == []


@pytest.mark.long
@pytest.mark.timeout(900)
def test_after_processes_that_were_killed_at_any_moment(temporary: Path) -> None:
    program = SETUP + "print('ready', flush=True)\nwhile True: stress(Model(sys.argv[1]))"
    for number in range(25):
        child = start(program, artifact("calibration"), TMPDIR=str(temporary))
        assert child.line() == "ready"
        time.sleep(0.02 + 0.013 * number)
        child.send(signal.SIGKILL)
    assert after_a_load(temporary, artifact("calibration")) == []


def test_when_file_descriptors_run_out(temporary: Path) -> None:
    """At each number of descriptors at which the call fails, whichever step it is that fails."""
    out = run(
        SETUP
        + """
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
    print(free, end, everything(tempfile.gettempdir()), sep="|")
    if end == "runs":
        break
""",
        artifact(),
        TMPDIR=str(temporary),
    )
    lines = [line.split("|") for line in out.splitlines()]
    assert all(left == "[]" for _, _, left in lines), out
    ends = [end for _, end, _ in lines]
    assert ends[-1] == "runs" and "ulimit -n" in ends, out


# -- nowhere to unpack -------------------------------------------------------------------------------------------------

NOWHERE = (
    SETUP
    + """
model = Model(sys.argv[1])
def report():
    try:
        stress(model)
    except AOTIError as error:
        print(str(error).replace("\\n", " "))
"""
)


@pytest.mark.parametrize(
    ("spoil", "mend", "words"),
    [
        pytest.param(
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, resource.RLIM_INFINITY))",
            "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))",
            ["cannot unpack it to", "File too large", "TMPDIR"],
            id="no room",
        ),
        pytest.param(
            "tempfile.tempdir = '/proc'",
            "tempfile.tempdir = None",
            ["cannot make a folder to unpack it to", "TMPDIR"],
            id="no folder can be made",
        ),
    ],
)
def test_nowhere_to_unpack(spoil: str, mend: str, words: list[str]) -> None:
    out = run(f"{NOWHERE}\n{spoil}\nreport()\n{mend}\nassert stress(model).any()", artifact())
    assert all(word in out for word in words), out


MOUNTS = {
    "full": ("size=1m", ["cannot unpack it to", "No space left on device", "TMPDIR"]),
    "read-only": ("ro", ["cannot make a folder", "Read-only file system", "TMPDIR"]),
    "noexec": ("noexec,size=64m", ["does not let programs run", "TMPDIR", "noexec"]),
}


@pytest.mark.long
def test_file_systems_that_do_not_serve(temporary: Path) -> None:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("only root can mount a file system of its own")
    places = [temporary / kind for kind in MOUNTS]
    lines = [
        f"mkdir -p {place} && mount -t tmpfs -o {options} none {place}"
        for place, (options, _) in zip(places, MOUNTS.values(), strict=True)
    ]
    before = ("unshare", "-m", "sh", "-c", " && ".join([*lines, 'exec "$@"']), "sh")
    if subprocess.run([*before, "true"], capture_output=True).returncode != 0:
        pytest.skip("this system does not let a file system be mounted")
    tries = "for tempfile.tempdir in sys.argv[2:]:\n    report()\n"
    source = f"{NOWHERE}\n{tries}tempfile.tempdir = None\nassert stress(model).any()"
    out = run_fresh(source, artifact("calibration"), *places, before=before)
    for line, (_, words) in zip(out.splitlines(), MOUNTS.values(), strict=True):
        assert all(word in line for word in words), line
