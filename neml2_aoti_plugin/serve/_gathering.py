"""Requests gathered as they come: one compiled call takes all that waited during the last one."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Hashable
from concurrent.futures import Executor
from dataclasses import dataclass
from time import perf_counter

from ._calls import Call
from ._evaluation import Answer, evaluate
from ._http_exchange import Exchange
from ._limits import Limits
from ._metrics import Metrics
from ._refusals import GONE, Refused
from ._served import Served
from ._tensors import Array

# How often a call waits for one more turn of the event loop, while requests come in each.
ROUNDS = 4


@dataclass(eq=False)
class Waiting:
    """A call that waits for its evaluation.

    Args:
        call: as it was read.
        exchange: its request, which tells when the client has gone.
        future: gets the answer.
        since: when it came.
    """

    call: Call
    exchange: Exchange
    future: asyncio.Future[dict[str, Array]]
    since: float


class Gatherer:
    """The calls of one model that wait, and the one that is being made.

    A call is made in the event loop itself: compiled graphs hold the interpreter, and a second thread would only add
    its changes. Large calls are made in a thread, since other requests can be answered between their blocks of rows.

    Args:
        served: the model.
        limits: of the service.
        metrics: that it counts in.
        pool: runs large calls.
    """

    def __init__(self, served: Served, limits: Limits, metrics: Metrics, pool: Executor) -> None:
        self.served = served
        self._limits, self._metrics, self._pool = limits, metrics, pool
        self._loop = asyncio.get_running_loop()
        # By key, in the order in which keys take their turns.
        self._queues: dict[Hashable, deque[Waiting]] = {}
        self._rows = 0
        self._busy = False
        self._due: asyncio.Handle | None = None
        # How many rows there were when it was last looked, and how often that was.
        self._seen = self._rounds = 0

    def submit(self, call: Call, exchange: Exchange) -> asyncio.Future[dict[str, Array]]:
        """Let a call wait for its turn.

        Args:
            call: as it was read.
            exchange: its request.

        Returns:
            What gets its tensors by name, or the refusal.

        Raises:
            Refused: there is no room in the queue.
        """
        if self._rows + call.rows > self._limits.queue_rows:
            raise Refused(
                429,
                f"{self._rows} rows wait for model {self.served.name!r}, and there is room for "
                f"{self._limits.queue_rows}. Try again later.",
                retry_after=1,
            )
        future: asyncio.Future[dict[str, Array]] = self._loop.create_future()
        queue = self._queues.get(call.head.key)
        if queue is None:
            queue = self._queues[call.head.key] = deque()
        queue.append(Waiting(call, exchange, future, perf_counter()))
        self._rows += call.rows
        if not self._busy:
            self._schedule()
        return future

    def sweep(self) -> None:
        """Refuse calls that have waited for too long, and tell how many rows wait; called from time to time."""
        limit = perf_counter() - self._limits.answer_seconds
        for key, queue in list(self._queues.items()):
            while queue and queue[0].since < limit:
                late = queue.popleft()
                self._rows -= late.call.rows
                if not late.future.done():
                    late.future.set_exception(
                        Refused(504, f"not answered within {self._limits.answer_seconds:g} s.", retry_after=1)
                    )
            if not queue:
                del self._queues[key]
        self._metrics.queued(self.served.name, self._rows)

    def _schedule(self) -> None:
        wait = self._limits.wait_ms
        full = self._rows >= self._limits.gather_rows
        if self._due is not None:
            if not (wait and full):
                return
            self._due.cancel()
        # The requests whose bytes have come meanwhile are read before a callback that is scheduled now is called.
        self._seen, self._rounds = self._rows, 0
        self._due = (
            self._loop.call_later(wait / 1e3, self._run) if wait and not full else self._loop.call_soon(self._run)
        )

    def _run(self) -> None:
        """Make one call."""
        self._due = None
        if self._rows > self._seen and self._rounds < ROUNDS and self._rows < self._limits.gather_rows:
            # They are still coming.
            self._seen, self._rounds = self._rows, self._rounds + 1
            self._due = self._loop.call_soon(self._run)
            return
        taken = self._take()
        if not taken:
            return
        calls = [waiting.call for waiting in taken]
        started = perf_counter()
        if sum(call.rows for call in calls) <= self._limits.loop_rows:
            self._hand_out(taken, evaluate(self.served, calls), started)
            return
        self._busy = True
        done = self._pool.submit(evaluate, self.served, calls)
        done.add_done_callback(
            lambda found: self._loop.call_soon_threadsafe(self._hand_out, taken, found.result(), started)
        )

    def _take(self) -> list[Waiting]:
        """The calls of the next key, as many as one compiled call may have rows; those whose clients are there."""
        taken: list[Waiting] = []
        rows, limit = 0, self._limits.gather_rows
        while self._queues and not taken:
            key = next(iter(self._queues))
            queue = self._queues.pop(key)
            while queue and (not taken or rows + queue[0].call.rows <= limit):
                waiting = queue.popleft()
                self._rows -= waiting.call.rows
                if waiting.future.done():
                    continue
                if waiting.exchange.has_gone():
                    waiting.future.set_exception(Refused(GONE, "the client has gone."))
                    continue
                taken.append(waiting)
                rows += waiting.call.rows
            if queue:
                # Behind the other keys.
                self._queues[key] = queue
        return taken

    def _hand_out(self, taken: list[Waiting], answers: list[Answer], started: float) -> None:
        self._busy = False
        self._metrics.evaluated(self.served.name, taken[0].call, taken, answers, perf_counter() - started)
        for waiting, answer in zip(taken, answers, strict=True):
            if waiting.future.done():
                continue
            if isinstance(answer, Refused):
                waiting.future.set_exception(answer)
            else:
                waiting.future.set_result(answer)
        if self._queues:
            self._schedule()
