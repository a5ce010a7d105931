"""Time the cases of one model and one kind of batch; runs in the environment with the C++ runtime.

Reads its orders as JSON from the standard input and writes a line `RESULT {...}` after each case, so that nothing is
lost when it is stopped or killed.
"""

from __future__ import annotations

import faulthandler
import functools
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stubs.catalogue import CATALOGUE

from . import machine, timing
from .agreement import DERIVATIVE_TOLERANCE, EAGER_TOLERANCE, TOLERANCE, compare, deviations
from .batches import make_pools, taken
from .cases import COMPILED, COPY, ESSENTIAL, NATIVE, PLUGIN, SUBJECTS, TWO_THREADS, Case
from .peers import Loaded
from .results import HANGS, Found, Orders, median

# A call of an essential peer may take this part of the time for the case, or so many seconds.
PART, LEAST_LIMIT = 0.25, 3.0
# Calls of a peer that is not essential are made in the first check and twice in a round; its rounds may take half.
LEAST_PEER_CALLS = 2 * (1 + 2 * timing.LEAST_ROUNDS)
# The part of a case's time that the rounds may take, however long the checks took.
LEAST_PART = 0.3
# Up to so many rows, a call takes about as long as on one.
FEW = 1_000
# What neml2.compile takes for one number of rows of an implicit model, until it has been seen.
COMPILE_SECONDS = {True: 120.0, False: 20.0}


class Worker:
    """A model with its pools, and what its cases have taken so far."""

    def __init__(self, orders: Orders) -> None:
        self.orders = orders
        self.loaded = Loaded(CATALOGUE[orders.model], Path(orders.folder))
        self.pool: dict[str, Tensor] = torch.load(orders.pool)[orders.batch]
        # For a quantity and a peer: the most rows it has been timed on, and the seconds of one call.
        self.known: dict[tuple[str, str], tuple[int, float]] = {(q, p): (n, s) for q, p, n, s in orders.known}
        self.compile_seconds: float | None = None

    def run(self, case: Case, seconds: float) -> Found:
        """Check and time one case."""
        begun = time.monotonic()
        torch.set_num_threads(self.orders.threads)
        inputs = taken(self.pool, case.rows)
        found = Found(case.key)
        calls: dict[str, Callable[[], object]] = {}
        results: dict[str, dict[str, Tensor]] = {}
        took: dict[str, float] = {}
        compiling = 0.0
        for peer in case.peers:
            if peer == COPY:
                continue
            reason = self.reason_to_skip(case, peer, seconds)
            if reason:
                found.skipped[peer] = reason
                continue
            try:
                call = self._call(case, peer, inputs)
                start = time.monotonic()
                results[peer] = self.loaded.plain(case.quantity, call(), case.rows)
                took[peer] = time.monotonic() - start
                if peer == COMPILED:
                    compiling = self.compile_seconds = took.pop(peer)
            except Exception as error:
                if peer == PLUGIN:
                    raise
                found.skipped[peer] = f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
                continue
            calls[peer] = call
        if PLUGIN not in results:
            found.trouble = found.skipped[PLUGIN]
            return found
        self._check(case, found, inputs, calls, results)
        results = {PLUGIN: results[PLUGIN]}
        if found.trouble:
            return found
        if case.quantity == "forward":
            self._add_copy(case, found, inputs, results[PLUGIN], calls)
        del results
        # What compiling took is not taken from the rounds; some time is left for them in any case.
        left = max(seconds - (time.monotonic() - begun - compiling), LEAST_PART * seconds)
        found.seconds = timing.measure({p: calls[p] for p in case.peers if p in calls}, left, took)
        for peer, samples in found.seconds.items():
            self.known[case.quantity, peer] = (case.rows, median(samples))
        return found

    def reason_to_skip(self, case: Case, peer: str, seconds: float) -> str:
        """Why a peer is left out of a case, or nothing."""
        if peer not in ESSENTIAL and self.orders.only_essential:
            return self.orders.only_essential
        if peer == TWO_THREADS and (os.cpu_count() or 1) < 2:
            return "this machine has one core"
        if peer == NATIVE and self.orders.only_plugin:
            return "left out after the process had been killed with it"
        if peer == COMPILED:
            expected = self.compile_seconds or COMPILE_SECONDS[SUBJECTS[case.model].implicit]
            left = self.orders.deadline - time.time()
            if expected > 0.4 * left:
                return f"compiling for this number of rows takes about {expected:.0f} s"
            return ""
        memory = self.orders.memory.get(peer, 0.0) * case.rows
        free = machine.available_bytes()
        if peer == NATIVE and memory > 0.85 * free:
            return f"needs about {memory / 2**30:.0f} GiB of memory; {free / 2**30:.0f} GiB are free"
        rows, took = self.known.get((case.quantity, peer), (0, 0.0))
        if not rows:
            return ""
        expected = took * max(1.0, case.rows / max(rows, FEW))
        limit = max(LEAST_LIMIT, PART * seconds) if peer in ESSENTIAL else seconds / LEAST_PEER_CALLS
        if case.rows > rows and expected > limit:
            return f"a call would take about {expected:.2g} s, by its time for {rows:,} rows"
        return ""

    def _call(self, case: Case, peer: str, inputs: dict[str, Tensor]) -> Callable[[], Any]:
        if case.quantity == "driver":
            return self.loaded.driver(peer)
        make: Callable[[str, dict[str, Tensor]], Callable[[], Any]] = getattr(self.loaded, case.quantity)
        return make(peer, inputs)

    def _check(
        self,
        case: Case,
        found: Found,
        inputs: dict[str, Tensor],
        calls: dict[str, Callable[[], Any]],
        results: dict[str, dict[str, Tensor]],
    ) -> None:
        """Compare all peers with the plugin; a peer with other numbers is not timed."""
        mine = results[PLUGIN]
        again = self.loaded.plain(case.quantity, calls[PLUGIN](), case.rows)
        found.stable = all(torch.equal(value, again[name]) for name, value in mine.items())
        del again
        for peer in [peer for peer in results if peer != PLUGIN]:
            theirs = results.pop(peer)
            if peer == NATIVE:
                tight = functools.partial(self.loaded.tight, case.quantity, inputs)
                found.deviations[peer], found.judged = compare(mine, theirs, inputs, tight)
                limit = DERIVATIVE_TOLERANCE if case.quantity == "jacobian" else TOLERANCE
                if found.deviations[peer] > limit:
                    found.trouble = f"the plugin differs from the C++ runtime by {found.deviations[peer]:.1e}"
                continue
            found.deviations[peer] = float(deviations(mine, theirs, inputs).max())
            if found.deviations[peer] > (TOLERANCE if peer == TWO_THREADS else EAGER_TOLERANCE):
                found.skipped[peer] = f"differs from the plugin by {found.deviations[peer]:.1e}"
                del calls[peer]

    def _add_copy(
        self,
        case: Case,
        found: Found,
        inputs: dict[str, Tensor],
        outputs: dict[str, Tensor],
        calls: dict[str, Callable[[], object]],
    ) -> None:
        """Add what no runtime can be faster than: the copy of inputs and outputs."""
        iterations = self.loaded.plugin.solve(inputs).iterations
        found.updates = [int(n) for n in torch.bincount(iterations)]
        both = [*inputs.values(), *(value.contiguous() for value in outputs.values())]
        calls[COPY] = lambda: [value.clone() for value in both]


def main() -> int:
    """Do what the standard input orders."""
    machine.be_killed_first()
    orders = Orders(**json.loads(sys.stdin.read()))
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(orders.threads)
    faulthandler.dump_traceback_later(HANGS, exit=True)
    if not Path(orders.pool).exists():
        stub = CATALOGUE[orders.model]
        folder = Path(orders.folder)
        pools = make_pools(folder / stub.model, folder / f"{stub.model}_aoti.i", stub.driver)
        Path(orders.pool).parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(f"{orders.pool}.{os.getpid()}")
        torch.save(pools, scratch)
        scratch.replace(orders.pool)
    if not orders.cases:
        return 0
    worker = Worker(orders)
    cases = [Case(*order) for order in orders.cases]
    for number, case in enumerate(cases):
        print(f"START {case.key}", flush=True)
        faulthandler.dump_traceback_later(HANGS, exit=True)
        share = case.weight / sum(other.weight for other in cases[number:])
        seconds = share * (orders.deadline - time.time())
        try:
            found = worker.run(case, seconds)
        except Exception as error:
            found = Found(case.key, trouble=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}")
        print(f"RESULT {json.dumps(asdict(found))}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
