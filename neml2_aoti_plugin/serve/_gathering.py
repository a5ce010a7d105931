"""Requests gathered as they come: a compiled call takes all that waited during the last one, and each gets its rows."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from time import perf_counter

import anyio
import numpy as np
import torch
from torch import Tensor

from .._solve.outcome import failed_where, not_finite_rows
from ..errors import AOTIError, ConvergenceError
from ..model import Outcome
from ..model._outcomes import GivenTensors, reasons
from ._limits import GONE, Limits, Refused, listed
from ._requests import Array, Call
from ._served import CONVERGED, COTANGENT, DTYPES, GRADIENT, ITERATIONS, OUTCOME, TANGENT, Served
from ._telemetry import Metrics

# What a call gets: its tensors by name, or why it gets none.
Answer = dict[str, Array] | Exception
Tensors = dict[str, Tensor]

# How to get the rows that have not failed.
REST = f"The operation 'solve' answers with the other rows, and tells in {OUTCOME!r} how each ended."
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
    since: float = field(default_factory=perf_counter)


class Gatherer:
    """The calls of one model that wait, and the one that is being evaluated in a thread (`worker`).

    That holds the interpreter only before and after the compiled part, so that the event loop reads and answers.
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
            )
        waiting = Waiting(call, has_gone, asyncio.get_running_loop().create_future())
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
        # A parameter with values of its own along the batch leaves each call to itself.
        rows, limit = 0, self._limits.gather_rows if self.served.per_row else 0
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
        if self._rows < self._limits.gather_rows:
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
                            Refused(504, f"not answered within {self._limits.answer_seconds:g} s.")
                        )
                if not queue:
                    del self._queues[key]
            self._metrics.queued(self.served.name, self._rows)


# -- one compiled call ------------------------------------------------------------------------------------------------


def call_first(served: Served) -> None:
    """Evaluate each operation of a model once, so that its graphs and the machine code are loaded."""
    # Whether the row converges does not matter: nobody knows which values suit the model.
    for signature in served.signatures.values():
        known = dict(signature.inputs)
        # One tangent is enough, and there is one at least.
        known.update([(name, x) for name, x in signature.optional.items() if name.startswith(TANGENT)][:1])
        arrays = {}
        for name, shape in known.items():
            # At zero strain most models have a solution. Scalars are one now and zero a step earlier: time passes.
            one = (not shape and "~" not in name) or name.startswith((TANGENT, COTANGENT))
            arrays[name] = np.full((1, *shape), float(one), DTYPES[signature.datatype])
        (answer,) = evaluate(served, [Call(signature, arrays, 1, {}, tuple(signature.pairs.values()) or None, ())])
        if isinstance(answer, Exception) and not (isinstance(answer, Refused) and answer.status == 422):
            raise RuntimeError(f"{signature.name} of model {served.name!r} failed") from answer


def evaluate(served: Served, calls: Sequence[Call]) -> list[Answer]:
    """What each of some calls with the same key gets; where they raise together, each is evaluated by itself."""
    try:
        values, outcome = _evaluated(served, calls)
    except Exception as error:
        if len(calls) > 1:
            return [answer for call in calls for answer in evaluate(served, [call])]
        if isinstance(error, ConvergenceError):
            return [_failure(served, calls[0], error.outcome)]  # type: ignore[attr-defined]
        if isinstance(error, AOTIError) and isinstance(error, ValueError):
            # What the client gave; and paths of this machine are nobody's business.
            return [Refused(400, str(error).replace(str(served.model.artifact), served.name))]
        return [error]
    operation, start = calls[0].signature.operation, 0
    arrays = {name: value.detach().cpu().numpy() for name, value in values.items()}
    some_failed = "rows" not in operation.gives and bool(outcome.any())
    answers: list[Answer] = []
    for call in calls:
        rows = slice(start, start + call.rows)
        start += call.rows
        if some_failed and bool(outcome[rows].any()):
            answers.append(_failure(served, call, outcome[rows]))
        else:
            own = {name: array[rows] for name, array in arrays.items()}
            answers.append(_summed(served, call, own) if operation.takes == "cotangents" else own)
    return answers


def _evaluated(served: Served, calls: Sequence[Call]) -> tuple[Tensors, Tensor]:
    """The tensors of all calls by name, one behind the other and gradients of each row, and the rows' outcomes."""
    operation, device = calls[0].signature.operation, served.model.device
    given, beside = Tensors(), Tensors()
    prefix = {"tangents": TANGENT, "cotangents": COTANGENT}.get(operation.takes)
    for name in calls[0].arrays:
        value = torch.from_numpy(np.concatenate([call.arrays[name] for call in calls])).to(device)
        if prefix and name.startswith(prefix):
            beside[name.removeprefix(prefix)] = value
        else:
            given[name] = value
    overrides = _overrides(served, calls)
    if operation.takes == "tangents":
        outputs, along = served.model.jvp(given, beside, overrides)
        values = {**outputs, **{TANGENT + name: value for name, value in along.items()}}
        outcome = torch.zeros(sum(call.rows for call in calls), dtype=torch.int64, device=device)
        return values, failed_where(outcome, not_finite_rows(values.values(), outcome.shape))
    found = served.model.solve(given, overrides, pairs=calls[0].pairs)
    if operation.takes == "cotangents":
        values = {}
        for out, row in found.blocks.items():
            weights = beside[out].reshape(len(found.outcome), -1)
            for by, block in row.items():
                flat = block.reshape(*weights.shape, *block.shape[beside[out].ndim :])
                term = torch.einsum("re,re...->r...", weights, flat)
                values[GRADIENT + by] = values[GRADIENT + by] + term if GRADIENT + by in values else term
        return values, failed_where(found.outcome, not_finite_rows(values.values(), found.outcome.shape))
    values = {**found.outputs, **{f"{out}:{by}": x for out, row in found.blocks.items() for by, x in row.items()}}
    if "rows" in operation.gives:
        values.update({CONVERGED: found.converged, ITERATIONS: found.iterations, OUTCOME: found.outcome})
    return values, found.outcome


def _overrides(served: Served, calls: Sequence[Call]) -> Tensors:
    """Values of promoted parameters for all calls: one for all rows, or one for each row where calls differ."""
    present, found = served.model.named_parameters(), Tensors()
    for name in dict.fromkeys(name for call in calls for name in call.overrides):
        base = tuple(served.model.parameter_base_shapes[name])
        values = [call.overrides.get(name, present[name].detach().cpu().numpy()) for call in calls]
        value = values[0]
        if len(calls) > 1 and not all(x.shape == base and np.array_equal(x, value) for x in values):
            each = zip(calls, values, strict=True)
            value = np.concatenate([np.broadcast_to(x, (call.rows, *base)) for call, x in each])
        # Copied: torch warns of arrays that are not to be written to.
        found[name] = torch.from_numpy(np.array(value)).to(served.model.device)
    return found


def _summed(served: Served, call: Call, gradients: dict[str, Array]) -> dict[str, Array]:
    """Gradients of the rows of a call, summed where the rows have the value of a parameter in common."""
    present, found = served.model.named_parameters(), {}
    for name, gradient in gradients.items():
        parameter = name.removeprefix(GRADIENT)
        shape = call.overrides[parameter].shape if parameter in call.overrides else present[parameter].shape
        found[name] = torch.from_numpy(gradient).sum_to_size(shape).numpy()
    return found


def _failure(served: Served, call: Call, outcome: Tensor) -> Refused:
    """The refusal of a call with rows that failed."""
    # Copied: torch warns of arrays that are not to be written to.
    inputs = {name: torch.from_numpy(np.array(x)) for name, x in call.arrays.items()}
    parameters = {}
    for name, x in call.overrides.items():
        base = served.model.parameter_base_shapes[name]
        parameters[name] = torch.from_numpy(np.array(x if x.ndim > len(base) else x[None]))
    codes, rows = outcome.cpu(), outcome.cpu().nonzero().squeeze(-1).tolist()
    ended = "; ".join(
        f"{Outcome(code).words}: {listed((codes == code).nonzero().squeeze(-1).tolist())}"
        for code in codes[rows].unique().tolist()
    )
    why = " ".join([*reasons(codes, GivenTensors(inputs, parameters)), REST])
    return Refused(422, f"{len(rows)} of {call.rows} rows failed ({ended}). {why}", rows=rows)
