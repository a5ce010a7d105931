"""Signals at any moment, and calls within calls: what a handler raises is what the caller sees, and nothing is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

import references
from attacks.archives import edited
from attacks.children import run

pytestmark = pytest.mark.processes

# A power law: its graphs name neml2::opaque_pow, which is written in Python.
POWER_LAW = "calibration"

SETUP = """
import gc, os, random, signal, sys, threading, time, timeit
import neml2, torch
from attacks.scene import in_fork, inputs
from neml2_aoti_plugin import AOTIError, Model

torch.set_num_threads(1)
artifact = sys.argv[1]
model = Model(artifact)
given = inputs(model)

def stress(of=model):
    return of.forward(given)["stress"]

right = stress()
takes = timeit.timeit(stress, number=20) / 20
lost = []
sys.unraisablehook = lambda found: lost.append(repr(found.exc_value))
"""


def play(program: str, name: str = POWER_LAW, *more: object, limit: float = 60, **variables: str) -> None:
    """Run a program on a model of the catalogue."""
    run(SETUP + program, references.case(name).artifact, *more, limit=limit, **variables)


@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_no_python_runs_inside_the_graphs_of_a_power_law(kernels: str) -> None:
    play(
        """
calls = []

def watch(frame, event, what):
    # What runs in Python while a graph does is called by C++: neml2's power is, where it was not replaced.
    if event == "call" and "/neml2/" in frame.f_code.co_filename:
        calls.append(frame.f_code.co_name)

sys.setprofile(watch)
found = stress()
sys.setprofile(None)
assert torch.equal(found, right) and not calls, calls
""",
        NEML2_AOTI_PLUGIN_KERNELS=kernels,
    )


HAMMERED = """
interval, calls = float(sys.argv[2]), int(sys.argv[3])
armed, rung = [], []

def ring(number, frame):
    rung.append(number)
    if armed:
        armed.clear()
        raise TimeoutError("at once")

signal.signal(signal.SIGALRM, ring)
pick = random.Random(1)
ends = {"raised": 0, "done": 0}
for number in range(calls):
    own = Model(artifact) if number % 10 == 0 else model
    seen = None
    try:
        armed.append(1)
        signal.setitimer(signal.ITIMER_REAL, pick.uniform(2e-5, 1.2 * takes), interval)
        found = stress(own)
        armed.clear()
    except BaseException as error:
        seen = error
    before = len(rung)
    assert not armed or seen is None, repr(seen)
    end = time.monotonic() + 5
    # The user's handler is at its place and still gets its signals.
    while interval and len(rung) == before:
        assert time.monotonic() < end
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert signal.getsignal(signal.SIGALRM) is ring
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    armed.clear()
    if seen is None:
        assert torch.equal(found, right)
        ends["done"] += 1
    else:
        # While a package is opened, Python's own codecs put words before the text.
        assert type(seen) is TimeoutError and "at once" in str(seen), repr(seen)
        ends["raised"] += 1
    assert torch.equal(stress(), right)
assert ends["raised"] > calls // 8, ends
assert not lost, lost
print(ends)
"""


@pytest.mark.parametrize("interval", [0, 5e-5, 1e-3])
@pytest.mark.parametrize("calls", [120, pytest.param(6000, marks=pytest.mark.long)])
def test_a_timer_at_any_moment(calls: int, interval: float) -> None:
    play(HAMMERED, POWER_LAW, interval, calls, limit=100 if calls == 120 else 280)


# Another process sends both at once while a graph of so many rows runs, which takes longer than the rest of a call.
TWO = """
import subprocess
given = inputs(model, int(sys.argv[3]))
came, raised = [], []

def handler(kind):
    def ring(number, frame):
        came.append(number)
        if kind:
            raise kind("rung")
    return ring

def wait():
    end = time.monotonic() + 5
    while len(came) < 2:
        assert time.monotonic() < end, came

shoot = "import os, signal, sys, time"
shoot += "\\nfor line in sys.stdin: time.sleep(8e-3); [os.kill(int(line), s) for s in (signal.SIGALRM, signal.SIGTERM)]"
sender = subprocess.Popen([sys.executable, "-c", shoot], stdin=subprocess.PIPE, text=True)
first, second = handler(eval(sys.argv[2])), handler(None)
signal.signal(signal.SIGALRM, first)
signal.signal(signal.SIGTERM, second)
stress()
for number in range(8):
    came.clear()
    raised.clear()
    try:
        print(os.getpid(), file=sender.stdin, flush=True)
        stress()
        wait()
    except (TimeoutError, RuntimeError) as error:
        raised.append(f"{type(error).__name__}: {error}")
    wait()
    assert sorted(came) == [signal.SIGALRM, signal.SIGTERM]
    assert raised == [f"{sys.argv[2]}: rung"], raised
    assert signal.getsignal(signal.SIGALRM) is first and signal.getsignal(signal.SIGTERM) is second
sender.stdin.close()
assert sender.wait(10) == 0
given = inputs(model)
assert torch.equal(stress(), right) and not lost
"""


@pytest.mark.parametrize(("name", "rows"), [(POWER_LAW, 100_000), ("elasticity", 1_500_000)])
@pytest.mark.parametrize("kind", ["TimeoutError", "NotImplementedError"])
def test_two_signals_within_one_graph(name: str, rows: int, kind: str) -> None:
    play(TWO, name, kind, rows, limit=100)


# Another process sends them, as a terminal does: a thread of this one would have to wait for the graph.
BURSTS = """
import subprocess
shoot = "import os, sys, time"
shoot += "\\nfor _ in range(1000): os.kill(int(sys.argv[1]), 2); time.sleep(3e-4)"
shoot += "\\nos.kill(int(sys.argv[1]), int(sys.argv[2]))"
armed, came, raised, ends, over = [], [], [], [], []

def interrupted(number, frame):
    came.append(number)
    if armed:
        armed.clear()
        raised.append(1)
        raise KeyboardInterrupt

signal.signal(signal.SIGINT, interrupted)
signal.signal(signal.SIGUSR1, lambda number, frame: over.append(1))
sender = subprocess.Popen([sys.executable, "-c", shoot, str(os.getpid()), str(int(signal.SIGUSR1))])
while not over:
    try:
        armed.append(1)
        while not over:
            stress()
        armed.clear()
    except KeyboardInterrupt:
        ends.append(1)
assert sender.wait(10) == 0
assert ends and len(raised) == len(ends) and not lost
assert signal.getsignal(signal.SIGINT) is interrupted
signal.signal(signal.SIGINT, signal.default_int_handler)
assert torch.equal(stress(), right)
"""


def test_bursts_of_interrupts() -> None:
    play(BURSTS, limit=100)


# Calls that a thread makes while it is in a call.
WITHIN = {
    "a handler": """
deep = []

def ring(number, frame):
    assert torch.equal(stress(), right)
    deep.append(1)

signal.signal(signal.SIGALRM, ring)
end = time.monotonic() + 4
while time.monotonic() < end:
    signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, takes))
    assert torch.equal(stress(), right)
assert len(deep) > 50, len(deep)
""",
    "a finalizer": """
class Circle:
    def __init__(self):
        self.itself = self

    def __del__(self):
        if len(done) < 60 and not busy:
            busy.append(1)
            done.append(torch.equal(stress(), right))
            busy.clear()
            Circle()

busy, done = [], []
# All that there is so far need not be looked at each time.
gc.freeze()
gc.set_threshold(7, 1000, 1000)
while len(done) < 60:
    Circle()
    assert torch.equal(stress(), right)
gc.set_threshold(700, 10, 10)
assert all(done) and not lost, (done, lost)
""",
    "a handler while the model is loaded": """
deep = []

def ring(number, frame):
    deep.append(torch.equal(stress(Model(artifact)), right))

signal.signal(signal.SIGALRM, ring)
from neml2_aoti_plugin._graphs import loaded

def load():
    loaded._loaded.clear()
    return stress(Model(artifact))

takes = timeit.timeit(load, number=3) / 3
end = time.monotonic() + 40
while len(deep) < 20:
    assert time.monotonic() < end, deep
    signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-4, 0.8 * takes))
    assert torch.equal(load(), right)
assert all(deep), deep
""",
}


@pytest.mark.parametrize("name", [POWER_LAW, "elasticity"])
@pytest.mark.parametrize("what", WITHIN)
def test_within_a_call(what: str, name: str) -> None:
    play(WITHIN[what], name)


# Operators in Python that are not neml2's run inside the graph, which cannot be freed of them.
FOREIGN = """
import torch
library, hooks = torch.library.Library("ours", "DEF"), []
library.define("power(Tensor base, Tensor exponent) -> Tensor")

def power(base, exponent):
    for hook in hooks:
        hook()
    return torch.pow(base, exponent)

library.impl("power", power, "CompositeExplicitAutograd")
"""
OTHERS = {
    "a call from within is refused at once": """
told = []

def again():
    hooks.clear()
    try:
        stress()
    except AOTIError as error:
        told.append(str(error))

hooks.append(again)
assert torch.equal(stress(), right)
hooks.append(again)
assert torch.equal(stress(), right)
first, second = told
assert first == second and ".pt2: called again from within itself" in first
assert "in another thread, or after the first one" in first
""",
    "an interrupt inside": """
hooks.append(lambda: signal.raise_signal(signal.SIGINT))
for _ in range(3):
    try:
        stress()
        raise AssertionError
    except KeyboardInterrupt as error:
        assert isinstance(error.__cause__, RuntimeError)
hooks.clear()
assert torch.equal(stress(), right)

def fail():
    raise ValueError("odd")

hooks.append(fail)
try:
    stress()
    raise AssertionError
except AOTIError as error:
    assert ".pt2: the compiled graph failed: ValueError: odd" in str(error)
hooks.clear()
assert torch.equal(stress(), right)
""",
    "threads take turns": """
found = []
hooks.append(lambda: time.sleep(1e-4))
threads = [threading.Thread(target=lambda: found.extend(stress() for _ in range(10))) for _ in range(6)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert len(found) == 60 and all(torch.equal(one, right) for one in found)
""",
    "a fork while another thread is inside": """
inside = threading.Event()

def linger():
    inside.set()
    time.sleep(0.3)

hooks.append(linger)
thread = threading.Thread(target=stress)
thread.start()
assert inside.wait(10)
hooks.clear()

def work():
    torch.set_num_threads(1)
    assert torch.equal(stress(), right) and torch.equal(stress(Model(artifact)), right)

assert in_fork(work) == 0
thread.join()
assert torch.equal(stress(), right)
""",
}
# torch keeps nothing of an exception before 2.13.
KEPT = [what for what in OTHERS if not (references.OLD_TORCH and "interrupt" in what)]


@pytest.mark.parametrize("what", KEPT)
def test_operators_of_others(what: str, tmp_path: Path) -> None:
    copy = references.copied(POWER_LAW, tmp_path)
    rename = edited("", lambda data: data.replace(b'"neml2::opaque_pow"', b'"ours::power"'))
    for file in copy.rglob("*.pt2"):
        file.write_bytes(rename(file.read_bytes()))
    run(FOREIGN + SETUP + OTHERS[what], copy)
