"""One model in many threads: no hang, right results, one snapshot of the parameters per call.

That threads with other rows do not disturb one another, test_ways.py asks of every model.
"""

from __future__ import annotations

import asyncio
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import references
from attacks.children import run
from neml2_aoti_plugin import Model
from neml2_aoti_plugin._program.program import Program
from references import Tensors

# A power law: its graphs call neml2::opaque_pow, which is Python, while torch's runner is held.
POWER_LAW = "calibration"
SY, K = "residual.overstress.sy", "residual.hardening.K"
THREADS = 8


@pytest.fixture
def model() -> Model:
    return references.case(POWER_LAW).load(tight=False)


def override(k: int) -> Tensors:
    return {SY: torch.tensor(150.0 + 10.0 * k).double(), K: torch.full((9,), 1000.0 + 100.0 * k, dtype=torch.float64)}


def same(found: Tensors, right: Tensors) -> bool:
    return all(torch.equal(found[name], value) for name, value in right.items())


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "calls", [8, pytest.param(2000, marks=[pytest.mark.long, pytest.mark.timeout(2000)])], ids=["few", "many"]
)
def test_calls_with_overrides_on_a_power_law(model: Model, calls: int) -> None:
    rows = references.case(POWER_LAW).rows()
    known = [model.forward(rows, override(k)) for k in range(6)]
    assert not any(same(known[0], other) for other in known[1:])
    stored = {}
    for value in (170.0, 190.0):
        model.set_parameter(SY, value)
        stored[value] = model.forward(rows)

    def work(i: int) -> int:
        pick = random.Random(i)
        for n in range(calls):
            if i == 0 and n % 5 == 0:
                model.set_parameter(SY, pick.choice([*stored]))
            k = pick.randrange(8)
            if k < 6:
                assert same(model.forward(rows, override(k)), known[k]), f"thread {i}, call {n}, override {k}"
            else:
                found = model.forward(rows)
                assert any(same(found, right) for right in stored.values()), f"thread {i}, call {n}, stored"
        return calls

    with ThreadPoolExecutor(THREADS) as pool:
        assert list(pool.map(work, range(THREADS))) == [calls] * THREADS


def test_a_change_in_the_middle_of_a_call_does_not_reach_it(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, evaluate = references.case(POWER_LAW).rows(), Program.evaluate
    right = model.forward(rows)

    def late(*arguments: Any, **options: Any) -> Any:
        model.set_parameter(SY, 1.0)
        return evaluate(*arguments, **options)

    monkeypatch.setattr(Program, "evaluate", late)
    assert same(model.forward(rows), right) and not same(model.forward(rows), right)


@pytest.mark.timeout(120)
def test_asyncio_with_a_thread_pool(model: Model) -> None:
    rows = references.case(POWER_LAW).rows()
    known = [model.forward(rows, override(k)) for k in range(4)]

    async def main() -> list[Tensors]:
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(4) as pool:
            calls = [loop.run_in_executor(pool, model.forward, rows, override(k % 4)) for k in range(24)]
            return await asyncio.wait_for(asyncio.gather(*calls), 60)

    assert all(same(found, known[k % 4]) for k, found in enumerate(asyncio.run(main())))


@pytest.mark.parametrize("name", [POWER_LAW, "composed"])
def test_models_made_and_first_called_in_parallel(name: str) -> None:
    run(
        """
        import sys, threading
        from concurrent.futures import ThreadPoolExecutor
        import neml2, torch
        from neml2_aoti_plugin import Model

        torch.set_num_threads(1)
        artifact, threads = sys.argv[1], 8
        shared = Model(artifact)
        values = {n: torch.full(v.base_shape, 1e-3, dtype=torch.float64) for n, v in shared.inputs.items()}
        values.update({n: values[n] + 1.0 for n in ("t",) if n in values})
        ready = threading.Barrier(threads)

        def work(i):
            ready.wait()
            return [model.forward(values) for _ in range(2) for model in (Model(artifact), shared)]

        with ThreadPoolExecutor(threads) as pool:
            results = [found for part in pool.map(work, range(threads)) for found in part]
        assert len(results) == 4 * threads
        assert all(torch.equal(found[n], x) for found in results for n, x in results[0].items())
        """,
        references.case(name).artifact,
        limit=120,
    )
