"""Several processes on one socket: started, watched, started again where one dies, and stopped together.

uvicorn has such a supervisor too. It takes a process for dead whose Python does not answer within seconds, as in a
large compiled call, and starts one that cannot load its models again and again.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import connection
from multiprocessing.process import BaseProcess

from ..errors import ArtifactError
from ._listening import Bound
from ._metrics import SHARED
from ._server import Service, run

# One that dies sooner than this after its start is not started again at once; seconds.
SOON = 60.0
# The seconds before that; and how many in a row may fail to load their models.
PAUSE, TRIES = 1.0, 5
# Beyond what accepted requests have to finish: for a process to leave; seconds.
LEAVE = 5.0


def run_many(service: Service, bound: Bound, count: int) -> None:
    """Serve by several processes until a signal to stop.

    Args:
        service: what each serves.
        bound: the socket that all listen on.
        count: number of processes.

    Raises:
        ArtifactError: processes die again and again before they have loaded their models.
    """
    folder = tempfile.mkdtemp(prefix="neml2-aoti-serve-")
    os.environ[SHARED] = folder
    try:
        Workers(service, bound, count).run()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Workers:
    """The processes.

    Args:
        service: what each serves.
        bound: the socket that all listen on.
        count: number of processes.
    """

    def __init__(self, service: Service, bound: Bound, count: int) -> None:
        self._service, self._bound, self._count = service, bound, count
        self._event_log = service.event_log()
        # Not forked: torch's threads and loaded graphs do not survive a fork.
        self._context = multiprocessing.get_context("spawn")
        self._running: dict[BaseProcess, float] = {}
        self._failed = 0
        self._stop = False

    def run(self) -> None:
        """Keep the processes running until a signal to stop."""
        wake, woken = socket.socketpair()
        wake.setblocking(False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._told_to_stop)
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        try:
            while not self._stop:
                while len(self._running) < self._count and not self._stop:
                    self._start()
                connection.wait([*(process.sentinel for process in self._running), woken])
                if not self._stop:
                    self._replace_dead()
        finally:
            signal.set_wakeup_fd(-1)
            self._end()

    def _told_to_stop(self, *_: object) -> None:
        self._stop = True

    def _start(self) -> None:
        process = self._context.Process(target=work, args=(self._service, self._bound), name="neml2-aoti-serve")
        # Ctrl-C goes to all processes; this one tells the others, also those that do not listen to signals yet.
        with _interrupts_wait():
            process.start()
        self._running[process] = time.monotonic()

    def _replace_dead(self) -> None:
        from prometheus_client.multiprocess import mark_process_dead

        for process in [process for process in self._running if process.exitcode is not None]:
            lived = time.monotonic() - self._running.pop(process)
            self._event_log.write("process died", level="error", process=process.pid, exitcode=process.exitcode)
            mark_process_dead(process.pid)  # type: ignore[no-untyped-call]
            failed = lived < SOON and process.exitcode == FAILED
            self._failed = self._failed + 1 if failed else 0
            if self._failed >= TRIES or (failed and not self._running):
                raise ArtifactError("the processes cannot load their models; the log says why.")
            if lived < SOON:
                time.sleep(PAUSE)

    def _end(self) -> None:
        """Stop all processes: by a signal, and after the time that they have by another one."""
        for process in self._running:
            process.terminate()
        until = time.monotonic() + self._service.limits.stop_seconds + LEAVE
        for process in self._running:
            process.join(max(0.0, until - time.monotonic()))
            if process.exitcode is None:
                self._event_log.write("process killed", level="error", process=process.pid)
                process.kill()
                process.join()
        self._event_log.flush()


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Let Ctrl-C wait; processes that are started meanwhile never get it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# Exit status of a process that could not load its models.
FAILED = 3


def work(service: Service, bound: Bound) -> None:
    """What each process does."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        """Stop when the process that has started this one is gone."""
        connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=follow, daemon=True).start()
    try:
        run(service, bound, owner=False)
    except Exception:
        # The application has logged it.
        raise SystemExit(FAILED) from None
    finally:
        if not parent.is_alive():
            shutil.rmtree(os.environ[SHARED], ignore_errors=True)
