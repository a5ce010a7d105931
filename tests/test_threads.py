"""One model in many threads: no hang, right results, one snapshot of the parameters per call.

That threads with other rows do not disturb one another, test_ways.py asks of every model.
"""

from __future__ import annotations

import pytest

import references
from attacks.children import run

# A power law: its graphs call neml2::opaque_pow, which is Python, while torch's runner is held.
POWER_LAW = "calibration"

SETUP = """
import asyncio, random, sys, threading
from concurrent.futures import ThreadPoolExecutor
import neml2, torch
from neml2_aoti_plugin import Model

torch.set_num_threads(1)
artifact, threads, calls = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

def zeros(*shape):
    return torch.zeros(shape, dtype=torch.float64)

inputs = {
    "strain": 2e-3 * torch.eye(6, dtype=torch.float64)[:3],
    "strain~1": zeros(6), "stress~1": zeros(6), "equivalent_plastic_strain~1": zeros(),
    "t": zeros() + 1.0, "t~1": zeros(),
}
SY, K = "residual.overstress.sy", "residual.hardening.K"

def override(k):
    return {SY: zeros() + 150.0 + 10.0 * k, K: zeros(3) + 1000.0 + 100.0 * k}

def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in b)

def all_threads(work):
    failures = []
    def guarded(i):
        try:
            work(i)
        except BaseException as error:
            failures.append(f"{type(error).__name__}: {error}")
    running = [threading.Thread(target=guarded, args=(i,)) for i in range(threads)]
    [t.start() for t in running]
    [t.join() for t in running]
    assert not failures, failures[:3]
"""

MIXED = (
    SETUP
    + """
model = Model(artifact)
known = [model.forward(inputs, override(k)) for k in range(6)]
assert not any(same(known[0], other) for other in known[1:])
model.set_parameter(SY, 170.0)
stored = {170.0: model.forward(inputs)}
model.set_parameter(SY, 190.0)
stored[190.0] = model.forward(inputs)
done = []

def work(i):
    pick = random.Random(i)
    for n in range(calls):
        if i == 0 and n % 5 == 0:
            model.set_parameter(SY, pick.choice([170.0, 190.0]))
        k = pick.randrange(8)
        if k < 6:
            assert same(model.forward(inputs, override(k)), known[k]), f"thread {i}, call {n}, override {k}"
        else:
            found = model.forward(inputs)
            assert any(same(found, right) for right in stored.values()), f"thread {i}, call {n}, stored"
        done.append(1)

all_threads(work)
print(len(done))
"""
)


@pytest.mark.parametrize(
    "calls", [8, pytest.param(2000, marks=[pytest.mark.long, pytest.mark.timeout(2000)])], ids=["few", "many"]
)
def test_calls_with_overrides_on_a_power_law(calls: int) -> None:
    assert (
        int(run(MIXED, references.case(POWER_LAW).artifact, 8, calls, limit=120 if calls == 8 else 1800)) == 8 * calls
    )


@pytest.mark.parametrize("name", [POWER_LAW, "composed"])
def test_models_made_and_first_called_in_parallel(name: str) -> None:
    run(
        SETUP
        + """
models, results = [], []
shared = Model(artifact)
values = {n: zeros(*v.base_shape) + 1e-3 for n, v in shared.inputs.items()}
values.update({n: zeros() + 1.0 for n in ("t",) if n in values})
ready = threading.Barrier(threads)

def work(i):
    ready.wait()
    for _ in range(calls):
        own = Model(artifact)
        results.append(own.forward(values))
        results.append(shared.forward(values))

all_threads(work)
assert len(results) == 2 * threads * calls
assert all(same(found, results[0]) for found in results)
""",
        references.case(name).artifact,
        8,
        2,
        limit=120,
    )


def test_asyncio_with_a_thread_pool() -> None:
    run(
        SETUP
        + """
model = Model(artifact)
known = [model.forward(inputs, override(k)) for k in range(4)]

async def main():
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(threads) as pool:
        calls_ = [loop.run_in_executor(pool, model.forward, inputs, override(k % 4)) for k in range(calls)]
        found = await asyncio.wait_for(asyncio.gather(*calls_), 60)
    assert all(same(found[k], known[k % 4]) for k in range(calls))

asyncio.run(main())
""",
        references.case(POWER_LAW).artifact,
        4,
        24,
        limit=120,
    )
