"""Requests gathered as they come: one compiled call takes all that waited during the last one."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Hashable
from concurrent.futures import Executor
from dataclasses import dataclass
from time import perf_counter

import anyio

from ._evaluation import Answer, evaluate
from ._limits import GONE, Limits, Refused
from ._requests import Array, Call
from ._served import CONVERGED, Served
from ._telemetry import Metrics

# How often a call waits for one more turn of the event loop, while requests come in each.
TURNS = 4
# How often requests that have waited for too long are looked for; seconds.
SWEEP = 0.25
# A client that has waited for longer than this may have gone, which is looked for before its evaluation; seconds.
SOON = 0.2


@dataclass(eq=False)
class Waiting:
    """A call that waits for its evaluation since some time; `has_gone` says whether its client has."""

    call: Call
    has_gone: Callable[[], Awaitable[bool]]
    answer: asyncio.Future[dict[str, Array]]
    since: float


class Gatherer:
    """The calls of one model that wait, and the one that is being evaluated.

    Calls are evaluated in a thread (`worker`), which holds the interpreter only before and after the compiled part. So
    the event loop reads and answers requests meanwhile, and the next call takes what has come.
    """

    def __init__(self, served: Served, limits: Limits, metrics: Metrics, worker: Executor) -> None:
        self.served = served
        self._limits, self._metrics, self._worker = limits, metrics, worker
        # By key, in the order in which keys take their turns.
        self._queues: dict[Hashable, deque[Waiting]] = {}
        self._rows = 0
        # Set while calls wait; and while they are as many as one evaluation may have.
        self._some, self._full = asyncio.Event(), asyncio.Event()
        self._tasks = [asyncio.create_task(self._work()), asyncio.create_task(self._sweep())]

    def stop(self) -> None:
        """Evaluate nothing more."""
        for task in self._tasks:
            task.cancel()

    async def evaluate(self, call: Call, has_gone: Callable[[], Awaitable[bool]]) -> dict[str, Array]:
        """The tensors that answer a call, by name, once it had its turn; raises `Refused`."""
        if self._rows + call.rows > self._limits.queue_rows:
            raise Refused(
                429,
                f"{self._rows} rows wait for model {self.served.name!r}, and there is room for "
                f"{self._limits.queue_rows}. Try again later.",
                retry_after=1,
            )
        waiting = Waiting(call, has_gone, asyncio.get_running_loop().create_future(), perf_counter())
        self._queues.setdefault(call.key, deque()).append(waiting)
        self._rows += call.rows
        self._some.set()
        if self._rows >= self._limits.gather_rows:
            self._full.set()
        return await waiting.answer

    async def _work(self) -> None:
        """Evaluate what waits, one compiled call after the other."""
        loop = asyncio.get_running_loop()
        while True:
            if not self._queues:
                self._some.clear()
                await self._some.wait()
                await self._let_others_come()
            if self._limits.wait_ms:
                await self._wait_for_others()
            taken = [waiting for waiting in self._take() if await self._is_wanted(waiting)]
            if taken:
                calls = [waiting.call for waiting in taken]
                started = perf_counter()
                answers = await loop.run_in_executor(self._worker, evaluate, self.served, calls)
                # What waits is evaluated while these answers are written.
                loop.call_soon(self._hand_out, taken, answers, perf_counter() - started)

    async def _let_others_come(self) -> None:
        """Let requests be read whose bytes have come meanwhile, while there are more in each turn of the loop."""
        for _ in range(TURNS):
            before = self._rows
            await asyncio.sleep(0)
            if self._rows == before or self._full.is_set():
                return

    async def _wait_for_others(self) -> None:
        """Wait until there are as many rows as one evaluation may have, or the first call has waited long enough."""
        first = min((queue[0].since for queue in self._queues.values()), default=0.0)
        left = first + self._limits.wait_ms / 1e3 - perf_counter()
        if left > 0 and not self._full.is_set():
            with anyio.move_on_after(left):
                await self._full.wait()

    def _take(self) -> list[Waiting]:
        """The calls of the next key that has some, as many as one compiled call may have rows."""
        taken: list[Waiting] = []
        rows, limit = 0, self._limits.gather_rows
        while self._queues and not taken:
            key = next(iter(self._queues))
            queue = self._queues.pop(key)
            while queue and (not taken or rows + queue[0].call.rows <= limit):
                waiting = queue.popleft()
                self._rows -= waiting.call.rows
                if not waiting.answer.done():
                    taken.append(waiting)
                    rows += waiting.call.rows
            if queue:
                # Behind the other keys.
                self._queues[key] = queue
        if self._rows < limit:
            self._full.clear()
        return taken

    async def _is_wanted(self, waiting: Waiting) -> bool:
        """Whether somebody still waits for the answer."""
        if perf_counter() - waiting.since > SOON and await waiting.has_gone() and not waiting.answer.done():
            waiting.answer.set_exception(Refused(GONE, "the client has gone."))
        return not waiting.answer.done()

    def _hand_out(self, taken: list[Waiting], answers: list[Answer], seconds: float) -> None:
        failed = 0
        for waiting, answer in zip(taken, answers, strict=True):
            if isinstance(answer, Refused):
                failed += len(answer.rows or ())
            elif not isinstance(answer, Exception) and CONVERGED in answer:
                failed += int((~answer[CONVERGED]).sum())
            if waiting.answer.done():
                continue
            if isinstance(answer, Exception):
                waiting.answer.set_exception(answer)
            else:
                waiting.answer.set_result(answer)
        rows = sum(waiting.call.rows for waiting in taken)
        self._metrics.evaluated(self.served.name, taken[0].call.signature.name, rows, failed, seconds)

    async def _sweep(self) -> None:
        """From time to time refuse calls that have waited for too long, and tell how many rows wait."""
        while True:
            await asyncio.sleep(SWEEP)
            limit = perf_counter() - self._limits.answer_seconds
            for key, queue in list(self._queues.items()):
                while queue and queue[0].since < limit:
                    late = queue.popleft()
                    self._rows -= late.call.rows
                    if not late.answer.done():
                        late.answer.set_exception(
                            Refused(504, f"not answered within {self._limits.answer_seconds:g} s.", retry_after=1)
                        )
                if not queue:
                    del self._queues[key]
            self._metrics.queued(self.served.name, self._rows)
