"""Worker processes of this machine: chunks go to them, and come back or are tried again when a process dies.

loky gives up all chunks in flight when one of its processes is killed. They are tried again on fresh processes, the
last time each by itself, so that the chunk at fault is known and no other one is blamed.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, BrokenExecutor, Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..errors import AOTIError
from . import remote
from .count import WORKERS, require_joblib
from .folder import RowsFolder, remove_parent
from .malloc import keep_freed_memory
from .tries import RETRIES, Chunk, Waiting

R = TypeVar("R")

# Chunks that are sent ahead for each process, so that none waits for the caller.
AHEAD = 2
# How often a worker looks whether its caller is still there, in seconds.
WATCH = 0.2
# One thread each, in whatever library; and a worker starts no workers.
ENVIRONMENT = {
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1"),
    WORKERS: "",
}


class Workers:
    """Processes that are started when they are first needed, and stay.

    Args:
        count: how many.

    Raises:
        AOTIError: joblib is not installed, or there is no room for a folder.
    """

    def __init__(self, count: int) -> None:
        require_joblib()
        self.count = count
        self._lock = threading.Lock()
        self._state = _State(os.getpid())
        self._finalizer = weakref.finalize(self, _close, self._state)

    @property
    def rows_folder(self) -> RowsFolder:
        """The private folder through which rows pass; made when it is first asked for."""
        with self._lock:
            self._require_open()
            if self._state.folder is None:
                self._state.folder = RowsFolder(self.count)
            return self._state.folder

    @property
    def folder(self) -> Path:
        """Where it is."""
        return self.rows_folder.path

    @property
    def processes(self) -> list[int]:
        """Identifiers of the processes there are now."""
        executor = self._state.executor
        return [] if executor is None else list(executor._processes)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._state.closed

    def run(self, function: Callable[[Any], R], chunks: Iterable[Chunk[R]]) -> None:
        """Have all chunks done.

        Args:
            function: of this package, called in a worker with what `Chunk.order` gives.
            chunks: taken one after the other as there is room for them.

        Raises:
            AOTIError: a process died at each try of a chunk.
            Exception: what `function` or `Chunk.finish` raised first; then nothing of these chunks is going on.
        """
        waiting = Waiting(chunks)
        running: dict[Future[R], Chunk[R]] = {}
        refused = 0
        try:
            while True:
                executor = self._executor()
                broken = self._send(executor, function, waiting, running)
                lost: list[Chunk[R]] = []
                if broken is None:
                    if not running:
                        return
                    broken, lost = self._take(running, FIRST_COMPLETED)
                if broken is None:
                    refused = 0
                    continue
                lost += self._take(running, ALL_COMPLETED)[1]
                for chunk in lost:
                    if not waiting.try_again(chunk):
                        raise self._died(chunk.rows, broken) from broken
                # With nothing in flight: a process died between two calls, or before it could begin.
                refused += not lost
                if refused > RETRIES:
                    raise self._died(slice(0, 0), broken) from broken
                self._renew(executor)
        except BaseException as error:
            self._abandon(running, error)
            raise

    def close(self) -> None:
        """End the processes and remove the folder; a second call does nothing."""
        self._finalizer()

    def _send(
        self,
        executor: Any,
        function: Callable[[Any], R],
        waiting: Waiting[R],
        running: dict[Future[R], Chunk[R]],
    ) -> BaseException | None:
        """Send chunks as long as there is room; gives the reason where the executor takes none."""
        while len(running) < AHEAD * self.count:
            chunk = waiting.next(idle=not running)
            if chunk is None:
                return None
            order = chunk.order(chunk.tries)
            try:
                # Ctrl-C goes to all processes of a terminal. It is for the caller, who ends the others: they inherit
                # its mask.
                with _no_interrupts():
                    running[executor.submit(function, order)] = chunk
            except RuntimeError as error:
                if not _is_broken(error):
                    raise
                waiting.put_back(chunk)
                return error
            if chunk.is_last_try:
                return None
        return None

    def _take(self, running: dict[Future[R], Chunk[R]], when: str) -> tuple[BaseException | None, list[Chunk[R]]]:
        """Wait for answers and take them; gives the chunks that were lost with a process, and the reason."""
        broken: BaseException | None = None
        lost = []
        for future in wait(running, return_when=when).done:
            chunk = running.pop(future)
            try:
                answer = future.result()
            except RuntimeError as error:
                if not _is_broken(error):
                    raise
                broken = error
                lost.append(chunk)
                continue
            chunk.finish(answer)
        return broken, lost

    def _abandon(self, running: dict[Future[R], Chunk[R]], error: BaseException) -> None:
        """Have nothing going on any more of a call that has failed."""
        if not isinstance(error, Exception):
            # An interrupt: what the processes are at is not waited for.
            self._kill()
            return
        try:
            for future in running:
                future.cancel()
            wait(running)
        except BaseException:
            self._kill()
            raise

    def _executor(self) -> Any:
        folder = self.folder
        with self._lock:
            self._require_open()
            if self._state.executor is None:
                from joblib.externals.loky import ProcessPoolExecutor

                self._state.executor = ProcessPoolExecutor(
                    max_workers=self.count,
                    initializer=begin,
                    initargs=(os.getpid(), str(folder)),
                    env=ENVIRONMENT,
                )
            return self._state.executor

    def _renew(self, broken: Any) -> None:
        """Let go an executor that has lost a process; another thread may have done so already."""
        with self._lock:
            if self._state.executor is broken:
                self._state.executor = None
        broken.shutdown(wait=True)

    def _kill(self) -> None:
        with self._lock:
            executor, self._state.executor = self._state.executor, None
        if executor is not None:
            executor.shutdown(wait=True, kill_workers=True)

    def _require_open(self) -> None:
        if self._state.closed:
            raise AOTIError("this pool of processes is closed. Make a new one.")
        if self._state.owner != os.getpid():
            raise AOTIError(
                f"this pool of processes belongs to process {self._state.owner}, from which this one was forked. Make "
                "a new one here."
            )

    def _died(self, rows: slice, error: BaseException) -> AOTIError:
        codes = str(error).partition("exit codes of the workers are ")[2].partition("\n")[0]
        how = f" (exit status {codes.strip('{}')})" if codes else ""
        if rows.stop == 0:
            return AOTIError(
                f"worker processes die before they can begin{how}. Each needs some hundred MiB of memory: use fewer of "
                "them (workers=)."
            )
        return AOTIError(
            f"rows {rows.start} to {rows.stop - 1}: the worker process died{how} at each of {RETRIES + 1} tries, the "
            "last time with nothing else going on. It may have run out of memory: use smaller chunks "
            "(chunk=) or fewer workers; or evaluate these rows with Model by themselves, to see what they do."
        )


@dataclass
class _State:
    """What is to be closed, apart from `Workers`, so that a finalizer can hold it."""

    owner: int
    executor: Any = None
    folder: RowsFolder | None = None
    closed: bool = False


def _close(state: _State) -> None:
    state.closed = True
    if state.owner != os.getpid():
        return
    executor, state.executor = state.executor, None
    if executor is not None:
        executor.shutdown(wait=True)
    if state.folder is not None:
        state.folder.remove()


def _is_broken(error: BaseException) -> bool:
    """Whether an executor has lost a process, or another thread has let it go for that."""
    return isinstance(error, BrokenExecutor) or type(error).__name__ == "ShutdownExecutorError"


@contextmanager
def _no_interrupts() -> Iterator[None]:
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def begin(caller: int, folder: str) -> None:
    """Be a worker: end when the caller is gone, and leave nothing behind then.

    Args:
        caller: identifier of its process.
        folder: through which rows pass.
    """
    keep_freed_memory()
    if sys.platform == "win32":
        return
    with suppress(ValueError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    remote.be_worker()
    threading.Thread(target=_watch, args=(caller, folder), name="caller-watch", daemon=True).start()


def _watch(caller: int, folder: str) -> None:
    import shutil

    while os.getppid() == caller:
        time.sleep(WATCH)
    shutil.rmtree(folder, ignore_errors=True)
    remove_parent(Path(folder))
    os._exit(1)


_shared: dict[tuple[int, int], Workers] = {}
_shared_lock = threading.Lock()


def shared(count: int) -> Workers:
    """The workers that all compiled models of neml2 input files in this process have in common.

    Args:
        count: how many.
    """
    with _shared_lock:
        key = (os.getpid(), count)
        found = _shared.get(key)
        if found is None or found.closed:
            found = _shared[key] = Workers(count)
        return found
