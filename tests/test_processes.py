"""Many processes, forked, spawned or killed; folders that are full, read-only, or left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import references
from attacks.children import environment, run, run_fresh, start

pytestmark = pytest.mark.processes

SETUP = """
import multiprocessing, os, resource, signal, sys, tempfile, threading, time
import neml2, torch
from neml2_aoti_plugin import AOTIError, Model

artifact = sys.argv[1]

def zeros(*shape):
    return torch.zeros(shape, dtype=torch.float64)

def inputs(rows=3):
    return {
        "strain": 2e-3 * torch.ones(rows, 6, dtype=torch.float64),
        "strain~1": zeros(6), "stress~1": zeros(6), "equivalent_plastic_strain~1": zeros(),
        "t": zeros() + 1.0, "t~1": zeros(),
    }

def stress(model, rows=3):
    return model.forward(inputs(rows))["stress"]

def left():
    # Files and folders in the temporary folder, beside the empty one that the next load uses again.
    walk = os.walk(tempfile.gettempdir())
    names = [name for _, folders, files in walk for name in folders + files]
    return len([name for name in names if name != f"neml2-aoti-plugin-{os.getuid()}"])

def in_fork(work, limit=30):
    pid = os.fork()
    if pid == 0:
        signal.alarm(limit)
        try:
            work()
            sys.stdout.flush()
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", flush=True)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""

# Processes that have torch and neml2 at hand, but nothing of the artifact; they start to load at the same moment.
AT_ONCE = (
    SETUP
    + """
processes, rounds, right = int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
context = multiprocessing.get_context("fork")

def load(barrier):
    barrier.wait()
    found = stress(Model(artifact))
    assert abs(found[0, 0].item() - right) < 1e-9, found

for number in range(rounds):
    barrier = context.Barrier(processes)
    children = [context.Process(target=load, args=(barrier,)) for _ in range(processes)]
    [c.start() for c in children]
    [c.join(120) for c in children]
    assert [c.exitcode for c in children] == [0] * processes, (number, [c.exitcode for c in children])
print(processes * rounds, left())
"""
)

LOAD = SETUP + "print(stress(Model(artifact))[0, 0].item(), left())"


@pytest.fixture
def artifact() -> str:
    """Viscoplasticity with a power law: six graphs on the way of a call."""
    return str(references.case("calibration").artifact)


@pytest.fixture
def right() -> float:
    """The first stress component of the call that the processes make."""
    import torch

    case = references.case("calibration")
    zero = torch.zeros((), dtype=torch.float64)
    found = case.load(tight=False).forward(
        {n: torch.zeros(v.base_shape, dtype=torch.float64) for n, v in case.model.inputs.items()}
        | {"strain": torch.full((3, 6), 2e-3, dtype=torch.float64), "t": zero + 1.0}
    )
    return float(found["stress"][0, 0])


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    """An empty folder for temporary files."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


def leftovers(scratch: Path) -> list[Path]:
    """What is in a temporary folder beside the empty one that the next load uses again."""
    return [path for path in scratch.rglob("*") if path != scratch / f"neml2-aoti-plugin-{os.getuid()}"]


class TestAtOnce:
    @pytest.mark.parametrize(
        ("processes", "rounds"),
        [
            pytest.param(8, 1, marks=pytest.mark.wide),
            pytest.param(16, 20, marks=[pytest.mark.long, pytest.mark.timeout(1500)]),
        ],
    )
    def test_many_load_cold_at_once(
        self, processes: int, rounds: int, artifact: str, right: float, scratch: Path
    ) -> None:
        out = run(AT_ONCE, artifact, processes, rounds, right, limit=200 if rounds == 1 else 1200, TMPDIR=str(scratch))
        assert out.split() == [str(processes * rounds), "0"]

    @pytest.mark.long
    def test_fresh_interpreters_at_once(self, artifact: str, right: float, scratch: Path) -> None:
        with ThreadPoolExecutor(6) as pool:
            before = ("env", f"TMPDIR={scratch}")
            found = list(pool.map(lambda _: run_fresh(LOAD, artifact, limit=200, before=before), range(6)))
        assert all(abs(float(out.split()[0]) - right) < 1e-9 for out in found)
        assert leftovers(scratch) == []


# Programs whose forked processes must call the model as they do.
FORKS = {
    "after a call on several threads": """
# Blocks of so many rows are shared with a thread of ours.
torch.set_num_threads(2)
model = Model(artifact)
before = stress(model, 20_000)
assert threading.active_count() > 1

def work():
    torch.set_num_threads(1)
    assert torch.equal(stress(model, 20_000), before)
    assert torch.equal(stress(Model(artifact), 20_000), before)

assert [in_fork(work) for _ in range(3)] == [0, 0, 0]
assert torch.equal(stress(model, 20_000), before)
""",
    "while another thread is in a call": """
torch.set_num_threads(1)
model = Model(artifact)
before = stress(model)
stop = threading.Event()

def busy():
    while not stop.is_set():
        stress(model)

def work():
    assert torch.equal(stress(model), before)

thread = threading.Thread(target=busy)
thread.start()
ends = [in_fork(work, 20) for _ in range(15)]
stop.set()
thread.join()
assert ends == [0] * 15, ends
""",
    "by another thread in mid-call": """
torch.set_num_threads(1)
model = Model(artifact)
before = stress(model)
ring = lambda number, frame: None
signal.signal(signal.SIGTERM, ring)
ends, over = [], threading.Event()

def work():
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is ring
    torch.set_num_threads(1)
    assert torch.equal(stress(model), before)

def forks():
    ends.extend(in_fork(work, 20) for _ in range(25))
    over.set()

thread = threading.Thread(target=forks)
thread.start()
while not over.is_set():
    stress(model)
thread.join()
assert ends == [0] * 25, ends
""",
    "by a signal handler in mid-call": """
torch.set_num_threads(1)
model = Model(artifact)
before = stress(model)
ends = []

def ring(number, frame):
    # The new process has a call to go on with, as this one has.
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        ends.append(torch.equal(stress(model), before))
        child.append(1)
    else:
        ends.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0)

child = []
signal.signal(signal.SIGUSR1, ring)
for number in range(20):
    timer = threading.Timer(2e-4 * number, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    timer.start()
    found = stress(model)
    if not child:
        timer.join()
        [None for _ in range(1000)]
    assert torch.equal(found, before)
    if child:
        os._exit(0 if all(ends) else 1)
assert ends == [True] * 20, ends
""",
}


class TestFork:
    def test_before_the_first_call(self, artifact: str, right: float) -> None:
        out = run(
            SETUP + "model = Model(artifact)\nassert in_fork(lambda: print(stress(model)[0, 0].item())) == 0", artifact
        )
        assert abs(float(out) - right) < 1e-9

    def test_after_a_call_it_is_refused_with_what_to_do(self, artifact: str) -> None:
        out = run(
            SETUP
            + """
torch.set_num_threads(2)
model = Model(artifact)
before = stress(model, 100)
assert in_fork(lambda: stress(model)) == 1
assert in_fork(lambda: stress(Model(artifact))) == 1
assert torch.equal(stress(model, 100), before)
""",
            artifact,
        )
        lines = out.splitlines()
        assert len(lines) == 2
        for line in lines:
            assert line.startswith("AOTIError: ") and "forked" in line
            assert "get_context('spawn')" in line and "torch.set_num_threads(1)" in line

    @pytest.mark.parametrize("when", FORKS)
    def test_a_fork_goes_on(self, artifact: str, when: str) -> None:
        run(SETUP + FORKS[when], artifact, limit=120)

    @pytest.mark.long
    def test_spawned_pool(self, artifact: str, right: float, tmp_path: Path) -> None:
        program = tmp_path / "program.py"
        program.write_text(
            textwrap.dedent(SETUP)
            + """
def one(k):
    return stress(Model(artifact))[0, 0].item()

if __name__ == "__main__":
    stress(Model(artifact), 100)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        print(*pool.map(one, range(4)))
"""
        )
        command = [sys.executable, str(program), artifact]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stderr
        assert all(abs(float(x) - right) < 1e-9 for x in done.stdout.split())


FINALIZER = """
import sys
import torch
from neml2_aoti_plugin import Model

class Left:
    def __init__(self, path, call):
        self.model, self.write = Model(path), sys.stdout.write
        self.inputs = {n: torch.ones((2, *v.natural_shape), dtype=torch.float64) for n, v in self.model.inputs.items()}
        self.call = getattr(self.model, call)
        self.call(self.inputs)

    def __del__(self):
        self.call(self.inputs)
        self.write("evaluated\\n")

left = [Left(path, call) for path, call in zip(sys.argv[1::2], sys.argv[2::2])]
"""


def test_finalizer_at_the_end_of_the_interpreter_is_refused() -> None:
    """torch aborts the process there, where a view outlives its base; without the plugin too."""
    calls = [("calibration", "solve"), ("elasticity", "jacobian"), ("elasticity", "forward")]
    arguments = [word for name, call in calls for word in (str(references.case(name).artifact), call)]
    done = subprocess.run(
        [sys.executable, "-c", FINALIZER, *arguments], env=environment(), capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and done.stderr.count("called while the interpreter ends") == len(calls), done.stderr


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells what a process has mapped")
def test_a_process_that_loads_again_and_again_does_not_grow(artifact: str) -> None:
    out = run(
        SETUP
        + """
for number in range(8):
    stress(Model(artifact))
    with open("/proc/self/maps") as maps:
        print(sum("neml2-aoti-" in line for line in maps), len(os.listdir("/proc/self/fd")))
""",
        artifact,
    )
    first, *others = out.splitlines()
    assert first != "0" and others == [first] * 7


class TestTemporaryFolders:
    def test_nothing_is_there_once_the_model_has_run(self, artifact: str, right: float, scratch: Path) -> None:
        value, count = run(LOAD, artifact, TMPDIR=str(scratch)).split()
        assert abs(float(value) - right) < 1e-9 and count == "0"
        assert leftovers(scratch) == []

    def test_nothing_is_left_after_sigterm(self, artifact: str, scratch: Path) -> None:
        child = start(
            SETUP + "model = Model(artifact); stress(model); print('ready', flush=True); time.sleep(60)",
            artifact,
            TMPDIR=str(scratch),
        )
        assert child.line() == "ready"
        assert child.send(signal.SIGTERM) == -signal.SIGTERM
        assert leftovers(scratch) == []

    def test_what_a_killed_process_left_harms_nobody_and_goes(self, artifact: str, right: float, scratch: Path) -> None:
        child = start(
            """
            import sys, time
            from pathlib import Path
            from neml2_aoti_plugin._graphs.unpack import scratch_folder
            with scratch_folder(Path("x.pt2")) as folder:
                folder.write("half.so", b"half", Path("x.pt2"))
                print(folder.path, flush=True)
                time.sleep(60)
            """,
            TMPDIR=str(scratch),
        )
        folder = Path(child.line())
        assert folder.parent == scratch / f"neml2-aoti-plugin-{os.getuid()}" and folder.is_dir()
        assert folder.parent.stat().st_mode & 0o777 == 0o700
        assert folder.stat().st_mode & 0o777 == 0o700
        # As long as it is in use, it stays.
        value, count = run(LOAD, artifact, TMPDIR=str(scratch)).split()
        assert abs(float(value) - right) < 1e-9 and count == "3"
        assert (folder / "half.so").exists()
        child.send(signal.SIGKILL)
        assert folder.is_dir()
        value, count = run(LOAD, artifact, TMPDIR=str(scratch)).split()
        assert abs(float(value) - right) < 1e-9 and count == "0"

    @pytest.mark.long
    @pytest.mark.timeout(900)
    def test_processes_killed_at_any_moment(self, artifact: str, right: float, scratch: Path) -> None:
        source = SETUP + "print('ready', flush=True)\nwhile True: stress(Model(artifact))"
        for number in range(25):
            child = start(source, artifact, TMPDIR=str(scratch))
            assert child.line() == "ready"
            time.sleep(0.02 + 0.013 * number)
            child.send(signal.SIGKILL)
        assert abs(float(run(LOAD, artifact, TMPDIR=str(scratch)).split()[0]) - right) < 1e-9
        assert leftovers(scratch) == []

    @pytest.mark.parametrize(
        ("spoil", "mend", "words"),
        [
            pytest.param(
                "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
                "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))",
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
    def test_nowhere_to_unpack(self, artifact: str, right: float, spoil: str, mend: str, words: list[str]) -> None:
        program = f"""
model = Model(artifact)
{spoil}
try:
    stress(model)
except AOTIError as error:
    print(str(error).replace("\\n", " "))
{mend}
print(stress(model)[0, 0].item())
"""
        text, value = run(SETUP + program, artifact).splitlines()
        assert all(word in text for word in words), text
        assert abs(float(value) - right) < 1e-9


MOUNTS = {
    "full": ("size=1m", ["cannot unpack it to", "No space left on device", "TMPDIR"]),
    "read-only": ("ro", ["cannot make a folder", "Read-only file system", "TMPDIR"]),
    "noexec": ("noexec,size=64m", ["does not let programs run", "TMPDIR", "noexec"]),
}


@pytest.mark.long
def test_file_systems_that_do_not_serve(artifact: str, scratch: Path) -> None:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("only root can mount a file system of its own")
    lines = [
        f"mkdir {scratch}/{k} && mount -t tmpfs -o {options} none {scratch}/{k}" for k, (options, _) in MOUNTS.items()
    ]
    before = ("unshare", "-m", "sh", "-c", " && ".join([*lines, 'exec "$@"']), "sh")
    if subprocess.run([*before, "true"], capture_output=True).returncode != 0:
        pytest.skip("this system does not let a file system be mounted")
    for kind in MOUNTS:
        (scratch / kind).rmdir()
    source = (
        SETUP
        + """
model = Model(artifact)
for folder in sys.argv[2:]:
    tempfile.tempdir = folder
    try:
        stress(model)
    except AOTIError as error:
        print(str(error).replace("\\n", " "))
tempfile.tempdir = None
assert stress(model).shape == (3, 6)
"""
    )
    out = run_fresh(source, artifact, *(scratch / kind for kind in MOUNTS), before=before)
    for line, (_, words) in zip(out.splitlines(), MOUNTS.values(), strict=True):
        for word in words:
            assert word in line, line
