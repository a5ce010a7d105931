"""Blocks of rows shared by the threads that torch may use, as its own operators do."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress

import torch

from .._solve.tables import VECTOR
from .c_interface import Unavailable, function, libtorch

Work = Callable[[], None]

_lock = threading.Lock()
# Threads that wait for tasks, and how many; made when they are first needed.
_pool: ThreadPoolExecutor | None = None
_size = 0


def cut(rows: int, block: int) -> Iterator[slice]:
    """Cut a batch into blocks of about the same size, of whole vectors; a batch of up to one and a half is one."""
    if rows <= block + block // 2:
        yield slice(0, rows)
        return
    size = -(-rows // -(-rows // block))
    size = -(-size // VECTOR) * VECTOR
    yield from (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def run_all(tasks: Sequence[Work]) -> None:
    """Run tasks that do not depend on each other, by this thread and as many others as torch has threads.

    The others help: tasks are taken one by one by whoever is free, so that a call never waits for threads that are
    busy with another one, be it that of the caller's caller.
    """
    helpers = min(torch.get_num_threads(), len(tasks)) - 1
    if helpers < 1:
        with one_thread():
            for task in tasks:
                task()
        return
    left = iter(tasks)
    failures: list[BaseException] = []
    inference = torch.is_inference_mode_enabled()

    def work() -> None:
        while not failures:
            # An iterator over a list gives each entry once, also to threads.
            task = next(left, None)
            if task is None:
                return
            task()

    def help_out() -> None:
        try:
            with torch.inference_mode(inference), torch.no_grad(), one_thread():
                work()
        except BaseException as error:
            failures.append(error)

    others: list[Future[None]] = []
    try:
        # None are to be had while the interpreter ends; then this thread does all of it.
        with suppress(RuntimeError):
            pool = _threads(helpers)
            others.extend(pool.submit(help_out) for _ in range(helpers))
        with one_thread():
            work()
    except BaseException as error:
        failures.append(error)
        raise
    finally:
        for other in others:
            other.cancel()
        wait(others)
    if failures:
        raise failures[0]


@contextmanager
def one_thread() -> Iterator[None]:
    """Have torch's operators stay in this thread: no threads inside of threads, and the same bits with any number."""
    number = torch.get_num_threads()
    try:
        _set_threads(1)
        yield
    finally:
        _set_threads(number)


def _set_threads(number: int) -> None:
    # torch.set_num_threads would set the number of all threads that are yet to come.
    with suppress(Unavailable):
        function(libtorch(), "omp_set_num_threads")(number)


def _threads(helpers: int) -> ThreadPoolExecutor:
    """The threads of this process, that many at least."""
    global _pool, _size
    with _lock:
        if _pool is None or _size < helpers:
            # One that is too small ends by itself when its tasks are done.
            if _pool is not None:
                _pool.shutdown(wait=False)
            _pool, _size = ThreadPoolExecutor(helpers, thread_name_prefix="neml2-aoti"), helpers
        return _pool


def _in_child() -> None:
    """A forked process has none of the threads."""
    global _pool, _size, _lock
    _pool, _size, _lock = None, 0, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
