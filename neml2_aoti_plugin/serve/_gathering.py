"""Requests gathered as they come: a compiled call takes all that waited during the last one, and each gets its rows."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from time import perf_counter

import anyio
import numpy as np
import torch
from torch import Tensor

from .._solve.outcome import failed_where, not_finite_rows
from ..errors import AOTIError, ConvergenceError
from ..model import Outcome
from ..model._operations import BY_SOLVE
from ..model._outcomes import Given, reasons
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
    """Evaluate each operation of a model once, so that its graphs and the machine code are loaded.

    Whether the row converges does not matter: nobody knows which values suit the model.
    """
    for signature in served.signatures.values():
        known = dict(signature.inputs)
        # One tangent is enough, and there is one at least.
        known.update([(name, x) for name, x in signature.optional.items() if name.startswith(TANGENT)][:1])
        arrays = {}
        for name, tensor in known.items():
            # At zero strain most models have a solution. Scalars are one now and zero a step earlier: time passes.
            one = (not tensor.shape and "~" not in name) or name.startswith((TANGENT, COTANGENT))
            arrays[name] = np.full((1, *tensor.shape), float(one), DTYPES[tensor.datatype])
        (answer,) = evaluate(served, [Call(signature, arrays, 1, {}, tuple(signature.pairs.values()) or None, ())])
        if isinstance(answer, Exception) and not (isinstance(answer, Refused) and answer.status == 422):
            raise RuntimeError(f"{signature.name} of model {served.name!r} failed") from answer


def evaluate(served: Served, calls: Sequence[Call]) -> list[Answer]:
    """What each of some calls with the same key gets.

    Where the evaluation raises, each call is evaluated by itself, so that none suffers for another.
    """
    run = _solve if calls[0].signature.name in BY_SOLVE else _with_rows_that_converge
    try:
        return run(served, calls)
    except Exception as error:
        if len(calls) > 1:
            return [answer for call in calls for answer in evaluate(served, [call])]
        return [_refusal(served, error)]


def _solve(served: Served, calls: Sequence[Call]) -> list[Answer]:
    found = served.model.solve(_inputs(served, calls), _overrides(served, calls), pairs=calls[0].pairs)
    arrays = {name: _array(value) for name, value in found.outputs.items()}
    arrays.update((f"{out}:{by}", _array(x)) for out, row in found.blocks.items() for by, x in row.items())
    outcome, rows_told = _array(found.outcome), calls[0].signature.name == "solve"
    if rows_told:
        rows = {CONVERGED: _array(found.converged), ITERATIONS: _array(found.iterations), OUTCOME: outcome}
        arrays.update(rows)
    answers: list[Answer] = [*_split(calls, arrays)]
    if outcome.any() and not rows_told:
        _refuse_failed(served, calls, answers, outcome)
    return answers


def _with_rows_that_converge(served: Served, calls: Sequence[Call]) -> list[Answer]:
    """Evaluate by a method that says nothing of single rows: calls without failing rows once more by themselves."""
    rows, takes = sum(call.rows for call in calls), calls[0].signature.operation.takes
    given = _inputs(served, calls)
    tangents, cotangents = _taken(given, TANGENT), _taken(given, COTANGENT)
    # Each row has its own parameters, and so its own gradient; those of a call with common ones are summed.
    summed = takes == "cotangents" and served.per_row
    own = list(served.model.parameter_base_shapes)
    overrides = _per_row(served, calls, own) if summed else _overrides(served, calls)
    try:
        if takes == "tangents":
            outputs, along = served.model.jvp(given, tangents, overrides)
            values = {**outputs, **{TANGENT + name: value for name, value in along.items()}}
        elif takes == "cotangents":
            found = served.model.param_vjp(given, cotangents, overrides)
            values = {GRADIENT + name: value for name, value in found.items()}
        else:
            outputs, blocks = served.model.param_jacobian(given, overrides)
            values = {**outputs, **{f"{out}:{by}": x for out, row in blocks.items() for by, x in row.items()}}
        # A gradient by parameters that are common to the rows is one for all of them.
        lost = not_finite_rows(values.values(), () if takes == "cotangents" and not summed else (rows,))
        if lost is None:
            split = _split(calls, {name: _array(value) for name, value in values.items()})
            return [*(_summed(served, calls, split) if summed else split)]
        outcome = failed_where(served.model.solve(given, overrides).outcome, lost.expand(rows))
    except ConvergenceError as error:
        outcome = error.outcome  # type: ignore[attr-defined]
    answers: list[Answer] = [{} for _ in calls]
    _refuse_failed(served, calls, answers, _array(outcome))
    fine = [place for place, answer in enumerate(answers) if not isinstance(answer, Exception)]
    if fine:
        again = _with_rows_that_converge(served, [calls[place] for place in fine])
        for place, answer in zip(fine, again, strict=True):
            answers[place] = answer
    return answers


def _summed(served: Served, calls: Sequence[Call], answers: Sequence[dict[str, Array]]) -> list[dict[str, Array]]:
    """Gradients of calls out of those of their rows, which are summed where the rows have a parameter in common."""
    shapes = served.model.parameter_base_shapes

    def common(call: Call, name: str) -> bool:
        return name not in call.overrides or call.overrides[name].ndim == len(shapes[name])

    return [
        {name: x.sum(0) if common(call, name.removeprefix(GRADIENT)) else x for name, x in answer.items()}
        for call, answer in zip(calls, answers, strict=True)
    ]


# -- in and out ------------------------------------------------------------------------------------------------------


def _inputs(served: Served, calls: Sequence[Call]) -> Tensors:
    """The tensors of all calls, one behind the other; torch warns of arrays that are not to be written to."""
    device, found = served.model.device, {}
    for name in calls[0].arrays:
        found[name] = torch.from_numpy(np.concatenate([call.arrays[name] for call in calls])).to(device)
    return found


def _taken(given: Tensors, prefix: str) -> Tensors:
    """What has a prefix, taken out of the inputs."""
    return {name.removeprefix(prefix): given.pop(name) for name in list(given) if name.startswith(prefix)}


def _overrides(served: Served, calls: Sequence[Call]) -> Tensors | None:
    """Values of promoted parameters for all calls: common ones, or one for each row where calls differ."""
    first, shapes = calls[0].overrides, served.model.parameter_base_shapes
    if not first:
        return None
    for call in calls[1:]:
        own = call.overrides
        if own.keys() != first.keys() or not all(
            x.ndim == len(shapes[n]) and np.array_equal(x, own[n]) for n, x in first.items()
        ):
            return _per_row(served, calls, list(dict.fromkeys(name for call in calls for name in call.overrides)))
    return {name: torch.from_numpy(np.array(value)).to(served.model.device) for name, value in first.items()}


def _per_row(served: Served, calls: Sequence[Call], names: list[str]) -> Tensors:
    """A value of each parameter for each row."""
    present, found = served.model.named_parameters(), {}
    for name in names:
        base = tuple(served.model.parameter_base_shapes[name])
        own = present[name].detach().cpu().numpy()
        rows = [np.broadcast_to(call.overrides.get(name, own), (call.rows, *base)) for call in calls]
        found[name] = torch.from_numpy(np.concatenate(rows)).to(served.model.device)
    return found


def _array(value: Tensor) -> Array:
    found: Array = value.detach().cpu().numpy()
    return found


def _split(calls: Sequence[Call], arrays: dict[str, Array]) -> list[dict[str, Array]]:
    """The rows of each call."""
    if len(calls) == 1:
        return [arrays]
    ends = np.cumsum([call.rows for call in calls]).tolist()
    return [
        {name: value[end - call.rows : end] for name, value in arrays.items()}
        for call, end in zip(calls, ends, strict=True)
    ]


# -- refusals --------------------------------------------------------------------------------------------------------


def _refuse_failed(served: Served, calls: Sequence[Call], answers: list[Answer], outcome: Array) -> None:
    """Put refusals in the place of the answers to calls with rows that failed; `outcome` is of all rows."""
    for place, (call, own) in enumerate(zip(calls, _split(calls, {OUTCOME: outcome}), strict=True)):
        codes = own[OUTCOME]
        if codes.any():
            ended = {
                Outcome(code).words: np.flatnonzero(codes == code).tolist() for code in np.unique(codes[codes > 0])
            }
            rows = np.flatnonzero(codes).tolist()
            told = "; ".join(f"{words}: {listed(some)}" for words, some in ended.items())
            why = " ".join([*reasons(torch.from_numpy(codes), _given(served, call)), REST])
            answers[place] = Refused(422, f"{len(rows)} of {call.rows} rows failed ({told}). {why}", rows=rows)


def _given(served: Served, call: Call) -> Given:
    bases = served.model.parameter_base_shapes
    overrides = {name: x[None] if x.ndim == len(bases[name]) else x for name, x in call.overrides.items()}
    # Copied: torch warns of arrays that are not to be written to.
    inputs, parameters = (
        {name: torch.from_numpy(np.array(x)) for name, x in arrays.items()} for arrays in (call.arrays, overrides)
    )
    return Given(inputs, parameters)


def _refusal(served: Served, error: Exception) -> Exception:
    """An error that a single call has met, as a refusal where it is the client's."""
    if isinstance(error, AOTIError) and isinstance(error, ValueError):
        # Paths of this machine are nobody's business.
        return Refused(400, str(error).replace(str(served.model.artifact), served.name))
    return error
