"""Executors that users bring: anything with `submit` in the way of concurrent.futures, and Dask's client."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from ..errors import AOTIError, InputTypeError
from .count import require_joblib, require_workers
from .remote import ModelRef
from .tries import Chunk
from .workers import AHEAD, Workers

R = TypeVar("R")

# Of an executor that does not tell how many workers it has.
UNKNOWN = 64


class Runner(Protocol):
    """What has chunks done."""

    def run(self, function: Callable[[Any], R], chunks: Iterable[Chunk[R]]) -> None:
        """See `Workers.run`."""


def require_executor(executor: object, workers: int | None) -> None:
    """Refuse what has no chunks done, before anything is written.

    Args:
        executor: as for `map_rows`.
        workers: as for `map_rows`.

    Raises:
        InputTypeError: it is no executor.
        InputError: there is no such number of workers.
        AOTIError: a package is not installed.
    """
    if executor is None:
        require_joblib()
        require_workers(workers)
        return
    if workers is not None:
        raise InputTypeError("workers= is for processes of this machine; an executor has its own. Give one of the two.")
    if not callable(getattr(executor, "submit", None)):
        raise InputTypeError(
            f"executor is a {type(executor).__name__}, expected one with submit() in the way of concurrent.futures, or "
            "a dask.distributed.Client."
        )


@contextmanager
def runner_for(executor: object, workers: int | None, model: ModelRef) -> Iterator[Runner]:
    """What has the chunks of a long run done.

    Args:
        executor: as for `map_rows`.
        workers: as for `map_rows`.
        model: that the workers will need.
    """
    if executor is None:
        own = Workers(require_workers(workers))
        try:
            yield own
        finally:
            own.close()
        return
    if type(executor).__module__.partition(".")[0] == "distributed" and hasattr(executor, "get_executor"):
        from .dask import cluster

        with cluster(executor, model) as (found, count):
            yield Foreign(found, AHEAD * count)
        return
    yield Foreign(executor, AHEAD * _workers_of(executor))


class Foreign:
    """Chunks on an executor that somebody else started, and will end.

    Args:
        executor: with a `submit` that gives futures of concurrent.futures.
        most: chunks in flight.
    """

    def __init__(self, executor: Any, most: int) -> None:
        self._executor, self._most = executor, most

    def run(self, function: Callable[[Any], R], chunks: Iterable[Chunk[R]]) -> None:
        """See `Workers.run`; whether chunks are tried again is for the executor to say.

        Raises:
            AOTIError: the executor has broken.
        """
        running: dict[Future[R], Chunk[R]] = {}
        coming = iter(chunks)
        try:
            while True:
                while len(running) < self._most and (chunk := next(coming, None)) is not None:
                    running[self._executor.submit(function, chunk.order(0))] = chunk
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    running.pop(future).finish(future.result())
        except BrokenExecutor as error:
            raise AOTIError(
                f"the executor has lost a worker and takes no more work ({error}). What was done is kept: call "
                "map_rows again with a new executor, and it goes on from the journal."
            ) from error
        finally:
            for future in running:
                future.cancel()
            # What has begun still writes to the sink, which is the next run's afterwards.
            wait(running)


def _workers_of(executor: object) -> int:
    for name in ("_max_workers", "max_workers", "num_workers"):
        found = getattr(executor, name, None)
        if isinstance(found, int) and found > 0:
            return found
    return UNKNOWN
