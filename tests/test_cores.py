"""All cores in one process: the same bits on any number of threads; errors, interrupts, forks, exits."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import cache

import pytest
import torch
from torch import Tensor

import references
from attacks.children import run, run_fresh
from neml2_aoti_plugin._graphs.threads import run_all
from references import Tensors

pytestmark = pytest.mark.processes

# Blocks of viscoplasticity have 1,024 rows: five of them, the last one not of whole vectors.
ROWS = 4_711


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@cache
def many(name: str, count: int = ROWS) -> Tensors:
    """Rows of a case, each with a strain of its own."""
    case = references.case(name)
    few = case.rows()
    which = torch.arange(count) % len(few[case.driven])
    rows = {n: x[which].clone() for n, x in few.items()}
    factor = 1.0 + 0.2 * torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    rows[case.driven] *= factor.reshape(-1, *[1] * (rows[case.driven].ndim - 1))
    return rows


def everything(name: str, count: int = ROWS) -> dict[str, Tensor]:
    """All that the calls of a model give for many rows."""
    model, rows = references.case(name).load(), many(name, count)
    found = dict(model.forward(rows))
    solution = model.solve(rows)
    found |= {"converged": solution.converged, "iterations": solution.iterations}
    if model.derivative_pairs:
        compiled = {by for _, by in model.derivative_pairs}
        tangents = {n: torch.ones_like(x) for n, x in rows.items() if n in compiled}
        found |= {f"jvp {out}": x for out, x in model.jvp(rows, tangents)[1].items()}
        for out, row in model.jacobian(rows, expand=True)[1].items():
            found |= {f"{out}@{by}": x for by, x in row.items()}
        asked = {n: x.clone().requires_grad_(n in compiled) for n, x in rows.items()}
        outputs = {out for out, _ in model.derivative_pairs}
        torch.stack([x.sum() for out, x in model.forward(asked).items() if out in outputs]).sum().backward()
        found |= {f"gradient {n}": x.grad for n, x in asked.items() if x.grad is not None}
    return found


@pytest.mark.parametrize("name", ["viscoplasticity", "composed", "elasticity"])
def test_results_have_the_same_bits_on_any_number_of_threads(name: str) -> None:
    count = ROWS if name != "elasticity" else 70_001
    torch.set_num_threads(1)
    right = everything(name, count)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        found = everything(name, count)
        assert found.keys() == right.keys()
        assert [key for key, value in right.items() if not torch.equal(found[key], value)] == []
        assert torch.get_num_threads() == threads


def test_as_many_threads_work_as_torch_has() -> None:
    """The barrier lets nobody pass before that many tasks run at once."""
    for threads in (2, 3):
        torch.set_num_threads(threads)
        barrier = threading.Barrier(threads)
        who: set[int] = set()

        def task(barrier: threading.Barrier = barrier, who: set[int] = who) -> None:
            barrier.wait(30)
            who.add(threading.get_ident())
            # torch's operators in a task stay in its thread.
            assert torch.get_num_threads() == 1

        run_all([task] * threads)
        assert len(who) == threads and threading.get_ident() in who
        assert torch.get_num_threads() == threads


def test_few_rows_stay_in_the_thread_of_the_caller() -> None:
    torch.set_num_threads(2)
    run_fresh(
        """
        import sys, threading, torch
        from neml2_aoti_plugin import Model
        torch.set_num_threads(4)
        model = Model(sys.argv[1])
        rows = {n: torch.zeros(1024, *v.natural_shape, dtype=torch.float64) for n, v in model.inputs.items()}
        rows["t"] += 1.0
        model.forward(rows)
        assert threading.active_count() == 1
        model.forward({n: x.repeat(8, *[1] * (x.ndim - 1)) for n, x in rows.items()})
        assert 1 < threading.active_count() <= 4
        """,
        references.case("viscoplasticity").artifact,
    )


def test_an_error_in_a_task_is_raised_and_nothing_is_begun_after_it() -> None:
    torch.set_num_threads(2)
    begun: list[int] = []

    def task(number: int) -> None:
        begun.append(number)
        if number == 3:
            raise LookupError("task 3")

    with pytest.raises(LookupError, match="task 3"):
        run_all([lambda number=number: task(number) for number in range(100)])  # type: ignore[misc]
    # The other thread may have been in one, and taken another before it saw the error.
    assert len(begun) <= 6
    done: list[int] = []
    run_all([lambda: done.append(1)] * 10)
    assert len(done) == 10


def test_a_call_within_a_call_waits_for_nobody() -> None:
    torch.set_num_threads(2)
    done: list[int] = []

    def outer() -> None:
        run_all([lambda: done.append(1)] * 5)

    run_all([outer] * 8)
    assert len(done) == 40


def test_calls_of_many_threads_at_once() -> None:
    torch.set_num_threads(2)
    model, rows = references.case("viscoplasticity").load(), many("viscoplasticity")
    right = model.forward(rows)
    wrong: list[str] = []

    def call() -> None:
        found = model.forward(rows)
        wrong.extend(name for name, value in right.items() if not torch.equal(found[name], value))

    callers = [threading.Thread(target=call) for _ in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_rows_that_fail_are_those_rows_in_any_block(monkeypatch: pytest.MonkeyPatch) -> None:
    # Only the native loop promises the same bits beside other rows.
    monkeypatch.setenv("NEML2_AOTI_PLUGIN_KERNELS", "native")
    torch.set_num_threads(2)
    model, rows = references.case("viscoplasticity").load(), dict(many("viscoplasticity"))
    bad = torch.tensor([0, 1023, 1024, 3000, ROWS - 1])
    rows["strain"] = rows["strain"].index_fill(0, bad, torch.nan)
    found, right = model.solve(rows), model.forward(many("viscoplasticity"))
    assert (~found.converged).nonzero().squeeze(-1).tolist() == bad.tolist()
    for name, value in right.items():
        assert torch.equal(found.outputs[name][found.converged], value[found.converged])
        assert bool(found.outputs[name][bad].isnan().all())


# A model with many rows, in a process of its own.
SETUP = """
import multiprocessing, os, signal, sys, threading, time
import torch
from neml2_aoti_plugin import Model
torch.set_num_threads(2)
model = Model(sys.argv[1])
rows = {n: torch.zeros(ROWS, *v.natural_shape, dtype=torch.float64) for n, v in model.inputs.items()}
rows["t"] += 1.0
rows["strain"] += 2e-3 * torch.rand(ROWS, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
""".replace("ROWS", "20_000")


def artifact() -> object:
    return references.case("viscoplasticity").artifact


def test_interrupt_is_heeded_and_the_model_stays_usable() -> None:
    """A handler that raises ends the call after a block at most, of many that take a second in all."""
    said = run(
        SETUP
        + """
right = model.forward(rows)["stress"]
big = {n: x.repeat(20, *[1] * (x.ndim - 1)) for n, x in rows.items()}
begun = time.perf_counter()
model.forward(big)
whole = time.perf_counter() - begun
for k in range(5):
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.1 * whole * (k + 1) / 2)
    begun = time.perf_counter()
    try:
        model.forward(big)
    except KeyboardInterrupt:
        print("interrupted")
    else:
        print("not interrupted")
    assert torch.equal(model.forward(rows)["stress"], right)
""",
        artifact(),
    )
    assert said.splitlines() == ["interrupted"] * 5


def test_daemonic_processes_and_workers_of_a_data_loader() -> None:
    run_fresh(
        """
        import multiprocessing, sys, torch
        from torch.utils.data import DataLoader, Dataset
        from neml2_aoti_plugin import Model

        class Stresses(Dataset):
            def __init__(self, artifact):
                self.model = Model(artifact)
            def __len__(self):
                return 4
            def __getitem__(self, k):
                shapes = {n: v.natural_shape for n, v in self.model.inputs.items()}
                rows = {n: torch.zeros(3000, *shape, dtype=torch.float64) for n, shape in shapes.items()}
                rows["t"] += 1.0
                rows["strain"] += 1e-3 * (k + 1)
                return self.model.forward(rows)["stress"][-1]

        def work(artifact, queue):
            torch.set_num_threads(2)
            queue.put(Stresses(artifact)[2].sum().item())

        if __name__ == "__main__":
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
        artifact(),
    )


def test_end_of_the_interpreter() -> None:
    """A call in the last moment is made by its own thread; one that a daemon thread is in is left where it is."""
    said = run_fresh(
        SETUP
        + """
import atexit
right = model.forward(rows)["stress"]
atexit.register(lambda: print("right" if torch.equal(model.forward(rows)["stress"], right) else "wrong"))
def for_ever():
    while True:
        model.forward(rows)
threading.Thread(target=for_ever, daemon=True).start()
time.sleep(0.2)
""",
        artifact(),
    )
    assert said == "right\n"
