"""The chunks of a call on their way: which is next, and which is tried again after a process has died."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

R = TypeVar("R")

# How often a chunk is tried again that was in flight when a process died.
RETRIES = 2


@dataclass(eq=False)
class Chunk(Generic[R]):
    """Some rows, and what a worker is asked to do with them.

    Args:
        rows: of the batch.
        order: gives the argument for the worker, for a number of earlier tries.
        finish: takes the worker's answer.
        tries: how often a process died that may have had this chunk.
    """

    rows: slice
    order: Callable[[int], Any]
    finish: Callable[[R], None]
    tries: int = 0

    @property
    def is_last_try(self) -> bool:
        """Whether it is to be tried with nothing else going on, so that no other chunk is blamed."""
        return self.tries == RETRIES


class Waiting(Generic[R]):
    """Chunks that are to be done.

    Args:
        chunks: taken one after the other.
    """

    def __init__(self, chunks: Iterable[Chunk[R]]) -> None:
        self._coming = iter(chunks)
        self._again: deque[Chunk[R]] = deque()
        self._alone: deque[Chunk[R]] = deque()

    def next(self, *, idle: bool) -> Chunk[R] | None:
        """The next chunk; None where there is none, or it must wait until nothing else goes on.

        Args:
            idle: whether nothing goes on.
        """
        chunk = self._again.popleft() if self._again else next(self._coming, None)
        if chunk is None and idle and self._alone:
            return self._alone.popleft()
        return chunk

    def put_back(self, chunk: Chunk[R]) -> None:
        """Take a chunk back that no process has had."""
        (self._alone if chunk.is_last_try else self._again).appendleft(chunk)

    def try_again(self, chunk: Chunk[R]) -> bool:
        """Take a chunk back that was in flight when a process died; tells whether it is tried once more."""
        chunk.tries += 1
        if chunk.tries > RETRIES:
            return False
        (self._alone if chunk.is_last_try else self._again).append(chunk)
        return True
