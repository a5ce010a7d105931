"""All cores in one process: the same bits on any number of threads; errors, interrupts, forks, exits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

import references
from attacks.children import run, run_fresh
from neml2_aoti_plugin._graphs.threads import run_all
from neml2_aoti_plugin.model._operations import OPERATIONS
from references import Tensors
from test_ways import Question, loaded, question

pytestmark = pytest.mark.processes

# Blocks of viscoplasticity have 1,024 rows: five of them, the last one not of whole vectors.
ROWS = 4_711


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def many(name: str, operation: str = "forward", count: int = ROWS) -> Question:
    """An operation for many rows, each with numbers of its own."""
    factors = 1.0 + 0.2 * torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    which = torch.arange(count)
    return question(name, OPERATIONS[operation]).changed(
        lambda x: x[which % len(x)] * factors.reshape(-1, *[1] * (x.ndim - 1))
    )


def everything(name: str, count: int) -> Tensors:
    """All that the calls of a model give for many rows, and what autograd does."""
    found: Tensors = {}
    for operation in OPERATIONS.values():
        if not operation.lacking(loaded(name)):
            asked = many(name, operation.name, count)
            found |= {f"{operation.name} {key}": x for key, x in asked.by_model().items()}
    pairs = loaded(name).derivative_pairs
    compiled, outputs = {by for _, by in pairs}, {out for out, _ in pairs}
    asked_for = {n: x.requires_grad_(n in compiled) for n, x in many(name, count=count).rows.items()}
    values = loaded(name).forward(asked_for)
    torch.stack([x.sum() for out, x in values.items() if out in outputs]).sum().backward()
    return found | {f"gradient {n}": x.grad for n, x in asked_for.items() if x.grad is not None}


@pytest.mark.parametrize("name", ["viscoplasticity", "composed", "elasticity"])
def test_results_have_the_same_bits_on_any_number_of_threads_and_beside_other_calls(name: str) -> None:
    count = ROWS if name != "elasticity" else 70_001
    torch.set_num_threads(1)
    right = everything(name, count)

    def require_the_same(found: Tensors) -> None:
        assert found.keys() == right.keys()
        assert [key for key, value in right.items() if not torch.equal(found[key], value)] == []

    for threads in (2, 3):
        torch.set_num_threads(threads)
        require_the_same(everything(name, count))
        assert torch.get_num_threads() == threads
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: everything(name, count), range(4)):
            require_the_same(found)


@pytest.mark.parametrize("threads", [2, 3])
def test_as_many_threads_work_as_torch_has(threads: int) -> None:
    """The barrier lets nobody pass before that many tasks run at once."""
    torch.set_num_threads(threads)
    barrier, who = threading.Barrier(threads), set[int]()

    def task() -> None:
        barrier.wait(30)
        who.add(threading.get_ident())
        # torch's operators in a task stay in its thread.
        assert torch.get_num_threads() == 1

    run_all([task] * threads)
    assert len(who) == threads and threading.get_ident() in who
    assert torch.get_num_threads() == threads


def test_an_error_in_a_task_is_raised_and_nothing_is_begun_after_it() -> None:
    begun: list[int] = []

    def task(number: int) -> None:
        begun.append(number)
        if number == 3:
            raise LookupError("task 3")

    tasks: list[Callable[[], None]] = [partial(task, number) for number in range(100)]
    with pytest.raises(LookupError, match="task 3"):
        run_all(tasks)
    # The other thread may have been in one, and taken another before it saw the error.
    assert len(begun) <= 6
    begun.clear()
    run_all(tasks[10:20])
    assert len(begun) == 10


def test_a_call_within_a_call_waits_for_nobody() -> None:
    done: list[int] = []
    run_all([lambda: run_all([lambda: done.append(1)] * 5)] * 8)
    assert len(done) == 40


def test_rows_that_fail_are_those_rows_in_any_block(monkeypatch: pytest.MonkeyPatch) -> None:
    # Only the native loop promises the same bits beside other rows.
    monkeypatch.setenv("NEML2_AOTI_PLUGIN_KERNELS", "native")
    model, rows = references.case("viscoplasticity").load(), many("viscoplasticity").rows
    right, bad = model.forward(rows), torch.tensor([0, 1023, 1024, 3000, ROWS - 1])
    found = model.solve({**rows, "strain": rows["strain"].index_fill(0, bad, torch.nan)})
    assert (~found.converged).nonzero().squeeze(-1).tolist() == bad.tolist()
    for name, value in right.items():
        assert torch.equal(found.outputs[name][found.converged], value[found.converged])
        assert bool(found.outputs[name][bad].isnan().all())


# -- processes of their own -------------------------------------------------------------------------------------------


# A model with many rows.
SETUP = """
import atexit, multiprocessing, os, signal, sys, threading, time
import torch
from torch.utils.data import DataLoader, Dataset
from neml2_aoti_plugin import Model

def given(model, count):
    rows = {n: torch.zeros(count, *v.natural_shape, dtype=torch.float64) for n, v in model.inputs.items()}
    rows["t"] += 1.0
    rows["strain"] += 2e-3 * torch.rand(count, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return rows

def repeated(rows, times):
    return {n: x.repeat(times, *[1] * (x.ndim - 1)) for n, x in rows.items()}

torch.set_num_threads(2)
"""
PROGRAMS = {
    "few rows stay in the thread of the caller": """
torch.set_num_threads(4)
model = Model(sys.argv[1])
model.forward(given(model, 1024))
assert threading.active_count() == 1
model.forward(given(model, 8 * 1024))
assert 1 < threading.active_count() <= 4
""",
    # A handler that raises ends the call after a block at most, of many that take a second in all.
    "an interrupt is heeded and the model stays usable": """
model = Model(sys.argv[1])
rows = given(model, 20_000)
right = model.forward(rows)["stress"]
big = repeated(rows, 20)
begun = time.perf_counter()
model.forward(big)
whole = time.perf_counter() - begun
for k in range(5):
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.1 * whole * (k + 1) / 2)
    try:
        model.forward(big)
    except KeyboardInterrupt:
        pass
    else:
        raise AssertionError("not interrupted")
    assert torch.equal(model.forward(rows)["stress"], right)
""",
    "daemonic processes and workers of a data loader": """
class Stresses(Dataset):
    def __init__(self, artifact):
        self.model = Model(artifact)
    def __len__(self):
        return 4
    def __getitem__(self, k):
        rows = given(self.model, 3000)
        rows["strain"] += 1e-3 * (k + 1)
        return self.model.forward(rows)["stress"][-1]

def work(artifact, queue):
    torch.set_num_threads(2)
    queue.put(Stresses(artifact)[2].sum().item())

data = Stresses(sys.argv[1])
right = torch.stack([data[k] for k in range(4)])
found = torch.cat(list(DataLoader(data, num_workers=2, batch_size=2, multiprocessing_context="fork")))
assert torch.equal(found, right)
context = multiprocessing.get_context("fork")
queue = context.SimpleQueue()
process = context.Process(target=work, args=(sys.argv[1], queue), daemon=True)
process.start()
process.join(60)
assert process.exitcode == 0 and queue.get() == right[2].sum().item()
""",
    # A call in the last moment is made by its own thread; one that a daemon thread is in is left where it is.
    "the end of the interpreter": """
model = Model(sys.argv[1])
rows = given(model, 20_000)
right = model.forward(rows)["stress"]
atexit.register(lambda: print("right" if torch.equal(model.forward(rows)["stress"], right) else "wrong"))
def for_ever():
    while True:
        model.forward(rows)
threading.Thread(target=for_ever, daemon=True).start()
time.sleep(0.2)
""",
}


@pytest.mark.parametrize("what", PROGRAMS, ids=lambda what: what.replace(" ", "_"))
def test_a_process(what: str) -> None:
    start = run if "interrupt" in what else run_fresh
    said = start(SETUP + PROGRAMS[what], references.case("viscoplasticity").artifact)
    assert said == ("right\n" if "end of" in what else "")
