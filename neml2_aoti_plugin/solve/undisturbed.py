"""Run what must not be left half done, such as an import of numba, out of the reach of signal handlers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")


def undisturbed(work: Callable[[], T]) -> T:
    """Do some work in a thread of its own if this is the main thread, where Python runs signal handlers.

    What a handler raises is raised here at once, and the work goes on to its end.

    Args:
        work: takes a lock of its own, if two threads must not do it at once; may be done twice.
    """
    if threading.current_thread() is not threading.main_thread():
        return work()
    outcome: list[Callable[[], T]] = []

    def run() -> None:
        try:
            outcome.append(partial(_same, work()))
        except BaseException as error:
            outcome.append(partial(_raise, error))

    thread = threading.Thread(target=run)
    try:
        thread.start()
    except RuntimeError:
        # The interpreter ends, or the system has no room for another thread.
        return work()
    while thread.is_alive():
        thread.join(0.1)
    # In a process that a signal handler has forked meanwhile there is no such thread.
    return outcome[0]() if outcome else work()


def _raise(error: BaseException) -> Any:
    raise error


def _same(value: T) -> T:
    return value
