"""What has the chunks of a long run done: this process, executors that users bring, or Dask's client."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from ..errors import AOTIError, InputTypeError
from ..model import Model

T = TypeVar("T")
R = TypeVar("R")

# Chunks that are sent ahead for each worker, so that none waits for the caller; and of how many workers, where an
# executor does not tell.
AHEAD, UNKNOWN = 2, 64


@dataclass(frozen=True)
class Runner:
    """Chunks on an executor.

    Args:
        executor: with a `submit` that gives futures of concurrent.futures.
        most: chunks in flight.
        model: as `Part` has it.
    """

    executor: Any
    most: int
    model: Model | bytes

    def run(self, function: Callable[[T], R], chunks: Iterable[tuple[T, Callable[[R], None]]]) -> None:
        """Have all chunks done; whether one is tried again is for the executor to say.

        Args:
            function: of this package, called with the first part of each chunk.
            chunks: what to call it with, and what takes the result; taken one after the other as there is room.

        Raises:
            AOTIError: the executor has broken.
            Exception: what `function` or a chunk raised first; then nothing of these chunks is going on.
        """
        running: dict[Future[R], Callable[[R], None]] = {}
        coming = iter(chunks)
        try:
            while True:
                while len(running) < self.most and (chunk := next(coming, None)) is not None:
                    running[self.executor.submit(function, chunk[0])] = chunk[1]
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    running.pop(future)(future.result())
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


class _Here:
    """An executor that is the calling thread."""

    def submit(self, function: Callable[[T], R], given: T) -> Future[R]:
        found: Future[R] = Future()
        found.set_result(function(given))
        return found


@contextmanager
def runner_for(executor: object, model: Model) -> Iterator[Runner]:
    """What has the chunks of a long run done.

    Args:
        executor: as for `map_rows`.
        model: that they are for.

    Raises:
        InputTypeError: it is no executor.
        ArtifactError: the artifact is no longer what was loaded.
    """
    if executor is None:
        yield Runner(_Here(), 1, model)
        return
    if not callable(getattr(executor, "submit", None)):
        raise InputTypeError(
            f"executor is a {type(executor).__name__}, expected one with submit() in the way of concurrent.futures, or "
            "a dask.distributed.Client."
        )
    recipe = pickle.dumps(model)
    if type(executor).__module__.partition(".")[0] == "distributed" and hasattr(executor, "get_executor"):
        from .dask import cluster

        with cluster(executor, recipe) as (found, count):
            yield Runner(found, AHEAD * count, recipe)
        return
    yield Runner(executor, AHEAD * _workers_of(executor), recipe)


def _workers_of(executor: object) -> int:
    for name in ("_max_workers", "max_workers", "num_workers"):
        found = getattr(executor, name, None)
        if isinstance(found, int) and found > 0:
            return found
    return UNKNOWN
