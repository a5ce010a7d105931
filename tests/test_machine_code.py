"""Machine code of kernels on disk: folders that cannot be written, full disks, many processes, damage, forks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from filelock import FileLock

import references
from attacks import children
from attacks.children import REPOSITORY

# These tests are of kernels, also where NEML2_AOTI_PLUGIN_KERNELS=torch is set for the others.
environment = partial(children.environment, NEML2_AOTI_PLUGIN_KERNELS="")
run = partial(children.run, NEML2_AOTI_PLUGIN_KERNELS="")

# Kernels that compile in a second or two, with numbers that are easy to tell; then which were found and which compiled.
SMALL = """
import numpy as np
from neml2_aoti_plugin.solve import elimination, kernels, machine_code

def system():
    return np.array([[[0.0, 2.0], [3.0, 4.0]]]), np.array([[2.0, 10.0]])

def space():
    return elimination.room_for(1, 2)

def columns():
    (a, b), found = system(), np.empty((1, 1, 2))
    elimination.columns(a, -b[:, :, None], np.zeros(1, np.int64), *space(), found)
    return found[0, 0].tolist()

def arrays():
    numbers, norms, record = np.ones((1, 4)), np.ones((1, 2)), np.zeros((1, 2), np.int64)
    vectors, givens, indices = np.zeros((5, 1, 2)), np.zeros((2, 1, 1)), np.zeros((1, 4), np.int64)
    return vectors, givens, numbers, indices, *space(), norms, record, np.zeros((1, 2)), np.zeros(10)

def begin():
    both = arrays()
    return kernels.begin(np.array([[3.0, 4.0]]), *both), both[2][0, kernels.NORM]

def settle():
    both = arrays()
    return kernels.settle(np.zeros((1, 2)), 0, 1, 1, *both), both[2][0, kernels.NORM]

def right():
    assert (columns(), begin(), settle()) == ([2.0, 1.0], (1, 5.0), (1, 1.0))

def counts():
    both = {**vars(elimination), **vars(kernels)}.values()
    found = [k.stats for k in both if isinstance(getattr(k, "_cache", None), machine_code._Files)]
    return [sum(len(counter) for counter in counters) for counters in (
        [s.cache_hits for s in found], [s.cache_misses for s in found])]
"""
LISTEN = "from neml2_aoti_plugin import log\nlog.apply_env()\n"
SHOW = SMALL + "right()\nprint(*counts(), len(machine_code.not_kept))\n"

# The whole: a call of a model, its Jacobian, and which kernels were found, compiled and not kept.
MODEL = (
    SMALL
    + """
import os, sys, torch
from neml2_aoti_plugin import Model

def call(model):
    double = torch.float64
    zero, six = torch.zeros((), dtype=double), torch.zeros(6, dtype=double)
    inputs = {"strain": 2e-3 * torch.arange(1, 7, dtype=double).repeat(3, 1), "strain~1": six, "stress~1": six,
        "equivalent_plastic_strain~1": zero, "t": zero + 1.0, "t~1": zero}
    blocks = model.jacobian(inputs)[1]
    found = [model.forward(inputs)["stress"], blocks["stress"]["strain"]]
    return [x.sum().item() for x in found] + [x.abs().max().item() for x in found]
"""
)
CALL = MODEL + "print(*call(Model(sys.argv[1])), *counts(), len(machine_code.not_kept))\n"


@pytest.fixture(scope="session")
def artifact() -> str:
    return str(references.case("viscoplasticity").artifact)


@pytest.fixture(scope="session")
def right(artifact: str) -> list[float]:
    """The numbers of the call without kernels."""
    source = MODEL.replace("def right", "import torch\ndef right") + "print(*call(Model(sys.argv[1])))"
    return [float(x) for x in run(source, artifact, NEML2_AOTI_PLUGIN_KERNELS="torch").split()]


@pytest.fixture(scope="session")
def filled(shared_folder: Path) -> Path:
    """A folder with the machine code of all kernels, as the command fills it; to be copied, not to be written to."""
    folder = shared_folder / "machine_code"
    with FileLock(shared_folder / "machine_code.lock"):
        if not folder.exists():
            # It has no forked form: what it prints is looked at, too.
            command = [sys.executable, "-m", "neml2_aoti_plugin.solve.warm"]
            variables = environment(NUMBA_CACHE_DIR=str(folder))
            done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=250, check=False)
            assert done.returncode == 0, done.stderr
            assert "files of machine code in " + str(folder) in done.stdout
    return folder


@pytest.fixture
def warm(filled: Path, tmp_path: Path) -> Path:
    """A copy of such a folder."""
    return Path(shutil.copytree(filled, tmp_path / "warm"))


def small(folder: Path | str, **variables: str) -> list[int]:
    """Kernels found, compiled and not kept, in a process with this cache folder."""
    out = run(SHOW, NUMBA_CACHE_DIR=str(folder), limit=200, **variables)
    return [int(x) for x in out.split()]


def called(artifact: str, right: list[float], folder: Path | str, limit: float = 200) -> list[int]:
    """The same for a call of the model, whose numbers must be right."""
    out = run(CALL, artifact, NUMBA_CACHE_DIR=str(folder), limit=limit).split()
    assert [float(x) for x in out[: len(right)]] == pytest.approx(right, rel=1e-12)
    return [int(x) for x in out[len(right) :]]


def mounted(mount: str, after: str = "true") -> list[str]:
    """A command that goes before another, which then sees a file system of its own."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("only root can mount a file system of its own")
    before = ["unshare", "-m", "sh", "-c", f'{mount} && "$@" && {after}', "sh"]
    if subprocess.run([*before, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("this system does not let a file system be mounted")
    return before


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def of(folder: Path, kernel: str) -> Path:
    (file,) = folder.rglob(f"{kernel}.*.nbc")
    return file


class TestCommand:
    def test_it_compiles_all_that_a_model_calls(self, artifact: str, right: list[float], warm: Path) -> None:
        before = {file: file.read_bytes() for file in files_in(warm)}
        found, compiled, not_kept = called(artifact, right, warm)
        assert found >= 5 and compiled == not_kept == 0
        assert {file: file.read_bytes() for file in files_in(warm)} == before

    def test_it_compiles_every_kernel(self, filled: Path) -> None:
        from neml2_aoti_plugin.solve import elimination, kernels, machine_code

        both = {**vars(elimination), **vars(kernels)}
        kernels_of = [k for k in both.values() if isinstance(getattr(k, "_cache", None), machine_code._Files)]
        names = {k.py_func.__name__ for k in kernels_of}
        assert {file.name.partition(".")[0] for file in files_in(filled)} == names

    def test_where_nothing_can_be_kept_it_fails(self, warm: Path, tmp_path: Path) -> None:
        blocked = tmp_path / "file"
        blocked.write_text("")
        command = [
            sys.executable,
            "-c",
            "import runpy, neml2_aoti_plugin.solve.warm as w\nw.compile_all = lambda: None\n",
        ]
        command = [sys.executable, "-m", "neml2_aoti_plugin.solve.warm"]
        variables = environment(NUMBA_CACHE_DIR=str(blocked), NUMBA_DISABLE_JIT="1")
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode == 1
        assert "cannot be kept in any of: " + str(blocked) in done.stderr


class TestFolders:
    """Root may write anywhere; so these folders cannot be made, or are on a file system that is mounted read-only."""

    @pytest.mark.wide
    def test_where_none_can_be_made(self, tmp_path: Path) -> None:
        blocked = tmp_path / "file"
        blocked.write_text("")
        for folder in (blocked, blocked / "below", "/proc/nothing", "/dev/null"):
            assert small(folder) == [0, 3, 3]
        assert blocked.read_text() == ""

    def test_the_log_tells_of_it(self) -> None:
        out = run(LISTEN + SHOW, NUMBA_CACHE_DIR="/dev/null", NEML2_LOGS="model=info", limit=200)
        assert "machine code of begin cannot be kept" in out

    def test_a_filled_folder_serves_also_where_it_cannot_be_written(
        self, artifact: str, right: list[float], warm: Path
    ) -> None:
        before = mounted(f"mount --bind {warm} {warm} && mount -o remount,ro,bind {warm}")
        of(warm, "begin").unlink()
        command = [*before, sys.executable, "-c", CALL + f"open({str(warm / 'x')!r}, 'w')", artifact]
        variables = environment(NUMBA_CACHE_DIR=str(warm))
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=200, check=False)
        assert "Read-only file system" in done.stderr
        out = done.stdout.split()
        assert [float(x) for x in out[: len(right)]] == pytest.approx(right, rel=1e-12)
        assert out[len(right) + 1 :] == ["1", "1"]

    @pytest.mark.long
    def test_the_package_itself_then_the_home_then_nothing(self, tmp_path: Path) -> None:
        package, home = tmp_path / "site" / "neml2_aoti_plugin", tmp_path / "home"
        shutil.copytree(REPOSITORY / "neml2_aoti_plugin", package, ignore=shutil.ignore_patterns("__pycache__"))
        inside, source = package / "solve" / "__pycache__", SHOW

        def found(home: Path | str) -> str:
            variables = environment(PYTHONPATH=str(package.parent), HOME=str(home), PYTHONDONTWRITEBYTECODE="1")
            for name in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME"):
                variables.pop(name, None)
            done = subprocess.run(
                [sys.executable, "-c", source],
                env=variables,
                cwd=tmp_path,
                capture_output=True,
                text=True,
                timeout=200,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            return done.stdout.strip()

        assert found(home) == "0 3 0"
        assert len(list(inside.glob("*.nbc"))) == 3 and not home.exists()
        assert found(home) == "3 0 0"
        # A file in its place binds root as well.
        shutil.rmtree(inside)
        inside.write_text("")
        assert found(home) == "0 3 0"
        assert len(list((home / ".cache" / "numba").rglob("*.nbc"))) == 3
        assert found(home) == "3 0 0"
        assert found("/dev/null") == "0 3 3"
        # numba would make a folder `~` in the current one.
        assert found("~") == "0 3 3"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "site"]

    def test_a_full_disk(self, warm: Path) -> None:
        for kernel in ("begin", "columns"):
            of(warm, kernel).unlink()
        names = [file.name for file in files_in(warm)]
        limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        assert run(limit + SHOW, NUMBA_CACHE_DIR=str(warm), limit=200).split() == ["1", "2", "2"]
        assert [file.name for file in files_in(warm)] == names

    @pytest.mark.wide
    def test_a_full_file_system(self, tmp_path: Path) -> None:
        before = mounted(f"mount -t tmpfs -o size=16k none {tmp_path}", f"find {tmp_path} -type f")
        variables = environment(NUMBA_CACHE_DIR=str(tmp_path))
        command = [*before, sys.executable, "-c", SHOW]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stderr
        counts, *left = done.stdout.splitlines()
        found, compiled, not_kept = map(int, counts.split())
        assert (found, compiled) == (0, 3) and not_kept > 0
        assert all(name.endswith(".nbc") for name in left) and len(left) == 3 - not_kept


class TestAtOnce:
    @pytest.mark.wide
    def test_eight_processes_on_an_empty_folder(self, tmp_path: Path) -> None:
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda _: small(tmp_path), range(8)))
        assert all(hits + misses == 3 and not_kept == 0 for hits, misses, not_kept in found)
        names = [file.name.partition(".")[0] for file in files_in(tmp_path)]
        assert names == ["begin", "columns", "settle"] and not list(tmp_path.rglob(".*"))
        assert small(tmp_path) == [3, 0, 0]

    @pytest.mark.long
    @pytest.mark.timeout(1500)
    def test_eight_processes_with_a_model(self, artifact: str, right: list[float], tmp_path: Path) -> None:
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda _: called(artifact, right, tmp_path, 1200), range(8)))
        assert all(not_kept == 0 for *_, not_kept in found)
        assert not list(tmp_path.rglob(".*"))
        assert called(artifact, right, tmp_path)[1:] == [0, 0]

    @pytest.mark.long
    def test_a_model_without_any_folder(self, artifact: str, right: list[float]) -> None:
        hits, misses, not_kept = called(artifact, right, "/dev/null")
        assert hits == 0 and misses == not_kept >= 4

    def test_threads(self, artifact: str, right: list[float], warm: Path) -> None:
        for kernel in ("begin", "columns"):
            of(warm, kernel).unlink()
        source = (
            MODEL
            + """
import threading
from concurrent.futures import ThreadPoolExecutor
barrier = threading.Barrier(4)

def work(_):
    barrier.wait()
    return call(Model(sys.argv[1]))

with ThreadPoolExecutor(4) as pool:
    found = list(pool.map(work, range(4)))
assert found == [found[0]] * 4
print(*found[0], *counts())
"""
        )
        out = run(source, artifact, NUMBA_CACHE_DIR=str(warm), limit=200).split()
        assert [float(x) for x in out[: len(right)]] == pytest.approx(right, rel=1e-12)
        assert out[-1] == "2"


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def garbage(file: Path) -> None:
    file.write_bytes(bytes(i * i % 251 for i in range(5000)))


def flipped(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 4
    file.write_bytes(data)


def flipped_at_the_start(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[5] ^= 1
    file.write_bytes(data)


def swapped(file: Path) -> None:
    shutil.copy(of(file.parent, "columns"), file)


def a_pickle(file: Path) -> None:
    """As numba itself would have kept it; it must not be unpickled."""
    file.write_bytes(b"cos\nabort\n(tR.")


def of_another_version(file: Path) -> None:
    source = "import numba\nnumba.__version__ = '0.1'\n" + SHOW
    file.unlink()
    assert run(source, NUMBA_CACHE_DIR=str(file.parents[1]), limit=200).split() == ["0", "3", "0"]


DAMAGE = [
    truncated,
    emptied,
    garbage,
    flipped,
    flipped_at_the_start,
    swapped,
    a_pickle,
    pytest.param(of_another_version, marks=pytest.mark.wide),
]


class TestDamage:
    @pytest.mark.parametrize("damage", DAMAGE)
    def test_a_damaged_file_is_compiled_anew_and_mended(self, damage: Callable[[Path], None], warm: Path) -> None:
        file = of(warm, "begin")
        damage(file)
        found, compiled, not_kept = small(warm)
        assert (found, compiled, not_kept) == ((0, 3, 0) if damage is of_another_version else (2, 1, 0))
        assert small(warm) == [3, 0, 0]
        assert not list(warm.rglob(".*"))

    @pytest.mark.wide
    def test_a_model_with_one_of_each(self, artifact: str, right: list[float], warm: Path) -> None:
        kernels = ("begin", "judge", "advance", "settle")
        for kernel, damage in zip(kernels, (truncated, swapped, garbage, flipped), strict=True):
            damage(of(warm, kernel))
        assert called(artifact, right, warm)[1:] == [4, 0]
        assert called(artifact, right, warm)[1:] == [0, 0]

    @pytest.mark.parametrize("make", [os.mkdir, os.mkfifo], ids=["folder", "pipe"])
    def test_something_else_in_the_place_of_a_file(self, make: Callable[[Path], None], warm: Path) -> None:
        file = of(warm, "begin")
        file.unlink()
        make(file)
        assert small(warm) == [2, 1, 1]

    def test_code_of_another_processor_is_not_used(self, warm: Path) -> None:
        assert small(warm, NUMBA_CPU_NAME="generic") == [0, 3, 0]
        assert small(warm, NUMBA_CPU_NAME="generic") == [3, 0, 0]
        assert small(warm) == [3, 0, 0]

    @pytest.mark.long
    def test_code_of_other_sources_is_not_used(self, tmp_path: Path) -> None:
        package, folder = tmp_path / "site" / "neml2_aoti_plugin", tmp_path / "cache"
        shutil.copytree(REPOSITORY / "neml2_aoti_plugin", package, ignore=shutil.ignore_patterns("__pycache__"))
        source = SMALL + "print(begin()[1], counts())"

        def found(seed: str) -> str:
            variables = environment(PYTHONPATH=str(package.parent), NUMBA_CACHE_DIR=str(folder), PYTHONHASHSEED=seed)
            variables.pop("PYTHONDONTWRITEBYTECODE", None)
            done = subprocess.run(
                [sys.executable, "-c", source],
                env=variables,
                cwd=tmp_path,
                capture_output=True,
                text=True,
                timeout=200,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            return done.stdout.strip()

        assert found("1") == "5.0 [0, 1]"
        assert found("2") == "5.0 [1, 0]"
        # A number of another module, which no code of the kernel itself shows; size and time of the file stay.
        file = package / "solve" / "criteria.py"
        before, text = file.stat(), file.read_text()
        changed = text.replace("MOST_SQUARES = 1e-280, 1e300", "MOST_SQUARES = 1e-280, 1e000")
        kernel = package / "solve" / "elimination.py"
        lines = kernel.read_text()
        scaled = lines.replace("return peak * sqrt(total)", "return peak + sqrt(total)")
        assert changed != text and scaled != lines
        times = kernel.stat()
        kernel.write_text(scaled)
        os.utime(kernel, ns=(times.st_atime_ns, times.st_mtime_ns))
        file.write_text(changed)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
        # Python itself does not see the change as long as it has its own files of the old sources.
        assert found("1") == "5.0 [1, 0]"
        for compiled in (package / "solve" / "__pycache__").iterdir():
            compiled.unlink()
        assert found("1") == "5.25 [0, 1]"
        assert found("2") == "5.25 [1, 0]"


FORK = (
    SMALL
    + """
import os, signal, sys, threading, time

def in_fork(work, limit=60):
    pid = os.fork()
    if pid == 0:
        signal.alarm(limit)
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", flush=True)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""
)


class TestForksAndSignals:
    @pytest.mark.wide
    def test_a_fork_while_another_thread_compiles(self) -> None:
        run(
            FORK
            + """
for kernel, work in ((elimination.columns, columns), (kernels.settle, settle)):
    thread = threading.Thread(target=work)
    thread.start()
    while not sum(kernel.stats.cache_misses.values()):
        time.sleep(0.001)
    time.sleep(0.1)
    # The kernel that was being compiled, and others that were not.
    assert in_fork(right) == 0
    thread.join()
right()
""",
            NUMBA_CACHE_DIR="/dev/null",
            limit=200,
        )

    @pytest.mark.wide
    def test_a_signal_handler_that_forks_in_mid_compile(self) -> None:
        run(
            FORK
            + """
def ring(number, frame):
    global child
    if child is None:
        child = os.fork()
        signal.alarm(60 if child == 0 else 0)

child = None
signal.signal(signal.SIGUSR1, ring)
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR1)).start()
right()
if child == 0:
    os._exit(0)
assert child, "the compile was over before"
assert os.waitpid(child, 0)[1] == 0
""",
            NUMBA_CACHE_DIR="/dev/null",
            limit=200,
        )

    @pytest.mark.long
    def test_after_a_handler_that_raises_at_any_moment_the_next_call_is_right(self, warm: Path) -> None:
        of(warm, "begin").unlink()
        out = run(
            FORK
            + """
class Ring(Exception):
    pass

def ring(number, frame):
    raise Ring

def work():
    signal.signal(signal.SIGVTALRM, ring)
    signal.setitimer(signal.ITIMER_VIRTUAL, delay)
    try:
        right()
        # It has not rung yet, or what it raised was lost.
        left = signal.setitimer(signal.ITIMER_VIRTUAL, 0)[0]
        assert left > 0, "lost"
    except Ring:
        print("rang", flush=True)
    right()

for delay in np.geomspace(1e-3, 1.0, 12):
    assert in_fork(work) == 0
""",
            NUMBA_CACHE_DIR=str(warm),
            limit=250,
        )
        assert out.count("rang") > 3
        assert not list(warm.rglob(".*"))


REPORT = (
    MODEL.replace("from neml2_aoti_plugin.solve import elimination, kernels, machine_code\n", "").replace(
        "import numpy as np", ""
    )
    + """
import neml2_aoti_plugin
from neml2_aoti_plugin import status
before = status().kernels
print("numbers", *call(Model(sys.argv[1])))
print("before", before)
print("after", status().kernels)
"""
)


class TestChoice:
    def check(self, out: str, right: list[float]) -> str:
        (numbers,) = [line.split()[1:] for line in out.splitlines() if line.startswith("numbers")]
        assert [float(x) for x in numbers] == pytest.approx(right, rel=1e-12)
        (after,) = [line.partition(" ")[2] for line in out.splitlines() if line.startswith("after")]
        name = after.partition(" ")[0]
        (line,) = {line for line in out.splitlines() if "Newton loop of" in line}
        assert line.startswith("[neml2:model  ][info] ") and line.endswith(f": {after}"), line
        assert name in ("numba", "torch")
        return after

    def report(self, artifact: str, right: list[float], before: str = "", **variables: str) -> str:
        out = run(LISTEN + before + REPORT, artifact, NEML2_LOGS="model=info", limit=200, **variables)
        return self.check(out, right)

    def test_numba(self, artifact: str, right: list[float], filled: Path) -> None:
        folder = str(filled)
        assert self.report(artifact, right, NUMBA_CACHE_DIR=folder) == "numba (numba is installed)"
        asked = self.report(artifact, right, NUMBA_CACHE_DIR=folder, NEML2_AOTI_PLUGIN_KERNELS="numba")
        assert asked == "numba (NEML2_AOTI_PLUGIN_KERNELS=numba)"

    def test_torch(self, artifact: str, right: list[float]) -> None:
        after = self.report(artifact, right, NEML2_AOTI_PLUGIN_KERNELS="torch")
        assert after == "torch (NEML2_AOTI_PLUGIN_KERNELS=torch)"

    def test_without_numba(self, artifact: str, right: list[float]) -> None:
        before = "import sys\nsys.modules['numba'] = None\n"
        reason = "numba is not installed (pip install numba)"
        assert self.report(artifact, right, before) == f"torch ({reason})"
        asked = self.report(artifact, right, before, NEML2_AOTI_PLUGIN_KERNELS="numba")
        assert asked == f"torch (NEML2_AOTI_PLUGIN_KERNELS=numba, but {reason})"

    @pytest.mark.parametrize("error", ["RuntimeError", "ImportError", "Exception"])
    def test_a_broken_numba(self, error: str, artifact: str, right: list[float], tmp_path: Path) -> None:
        (tmp_path / "numba").mkdir()
        (tmp_path / "numba" / "__init__.py").write_text(f"raise {error}('needs another numpy')\n")
        before = f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n"
        after = self.report(artifact, right, before)
        assert after == f"torch (numba cannot be imported ({error}: needs another numpy))"

    def test_a_signal_handler_that_raises_in_the_import_is_not_taken_for_a_broken_numba(
        self, artifact: str, right: list[float], filled: Path
    ) -> None:
        before = """
import signal, sys
import torch
from neml2_aoti_plugin import Model

class Ring(Exception):
    pass

def ring(number, frame):
    raise Ring

model = None
signal.signal(signal.SIGVTALRM, ring)
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "numba.core.typing":
            sys.meta_path.remove(self)
            signal.raise_signal(signal.SIGVTALRM)
sys.meta_path.insert(0, Watch())
try:
    Model(sys.argv[1]).jacobian
except Ring:
    print("rang")
"""
        out = run(LISTEN + before + REPORT, artifact, NEML2_LOGS="model=info", NUMBA_CACHE_DIR=str(filled), limit=200)
        assert out.startswith("rang")
        assert self.check(out, right) == "numba (numba is installed)"

    def test_a_wrong_word(self, artifact: str) -> None:
        source = """
import sys
from neml2_aoti_plugin import InputError, Model, status
try:
    Model(sys.argv[1])
except InputError as error:
    print(error)
print(status().kernels)
"""
        message = "the environment variable NEML2_AOTI_PLUGIN_KERNELS is 'fast', expected numba or torch."
        assert run(source, artifact, NEML2_AOTI_PLUGIN_KERNELS="fast").splitlines() == [message, message]

    def test_numba_is_imported_for_implicit_models_only(self, artifact: str, filled: Path) -> None:
        source = """
import sys
import neml2_aoti_plugin
assert "numba" not in sys.modules
import torch
assert "numba" not in sys.modules
import neml2
neml2_aoti_plugin.status()
elasticity = neml2_aoti_plugin.Model(sys.argv[2])
elasticity.forward({"strain": torch.zeros(3, 6, dtype=torch.float64)})
elasticity.jacobian({"strain": torch.zeros(3, 6, dtype=torch.float64)})
assert "numba" not in sys.modules
neml2_aoti_plugin.Model(sys.argv[1])
assert "numba" in sys.modules
"""
        elasticity = str(references.case("elasticity").artifact)
        done = subprocess.run(
            [sys.executable, "-c", source, artifact, elasticity],
            env=environment(NUMBA_CACHE_DIR=str(filled)),
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert done.returncode == 0, done.stderr
