"""The service as processes: uvicorn around the application on a socket, until it is told to stop; one or several.

uvicorn has a supervisor of several processes too. It takes a process for dead whose Python does not answer within
seconds, and starts one that cannot load its models again and again.
"""

from __future__ import annotations

import gc
import logging
import math
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from types import FrameType

import uvicorn

from ..errors import ArtifactError
from ._app import Service
from ._limits import Limits
from ._listening import Bound
from ._served import ModelSource
from ._telemetry import SHARED, EventLog, Handler

# After the time that accepted requests have: for the process itself to end, and for the last one to see that; seconds.
LEAVE, LAST = 3.0, 5.0
# How soon a thread that waits for the interpreter gets it: the one that evaluates, and that of the event loop, hand it
# over after each call, and Python's own 5 ms are longer than most calls; seconds.
SWITCH = 1e-4
# One that dies sooner than this after its start is not started again at once; seconds.
SOON = 60.0
# The seconds before that; and how many in a row may fail to load their models.
PAUSE, TRIES = 1.0, 5
# Exit status of a process that could not load its models.
FAILED = 3


@dataclass(frozen=True)
class Setup:
    """What each process needs to know: the models, its limits, the token, torch's threads, what the log has."""

    sources: tuple[ModelSource, ...]
    limits: Limits = field(default_factory=Limits)
    token: str | None = field(default=None, repr=False)
    threads: int = 1
    log_requests: bool = True

    def event_log(self) -> EventLog:
        """The log, on the standard output, if there is one."""
        return EventLog(sys.stdout.fileno() if sys.stdout else None, requests=self.log_requests)


class Server(uvicorn.Server):
    """uvicorn's server, which takes no new requests once it was told to stop, and ends in time.

    The socket is for an `owner` to remove where it is told to stop before it listens.
    """

    def __init__(self, config: uvicorn.Config, service: Service, bound: Bound, *, owner: bool) -> None:
        super().__init__(config)
        self._service, self._bound, self._owner = service, bound, owner
        # A compiled call cannot be broken off; where it takes longer than all may, the process leaves it.
        self.last = threading.Timer((config.timeout_graceful_shutdown or 0) + LEAVE, os._exit, (0,))
        self.last.daemon = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start; what was loaded is left out of garbage collections, which would look at all of it each time."""
        await super().startup(sockets)
        # Where models cannot be loaded, newer releases of uvicorn raise here, and older ones do not.
        if self.started:
            gc.collect()
            gc.freeze()
            address, models = self._bound.address, self._service.names
            self._service.event_log.write("listening", address=address, models=models, process=os.getpid())

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop, by a signal."""
        if not self.started:
            # Nothing was accepted. What makes machine code or runs a graph can be neither broken off nor relied on to
            # pass an exception on.
            self._service.event_log.write("stopped", process=os.getpid())
            self._service.event_log.flush()
            if self._owner:
                self._bound.release()
            os._exit(0)
        if self._service.open:
            self._service.open = False
            self.last.start()
        super().handle_exit(sig, frame)


def run(setup: Setup, bound: Bound, *, owner: bool = True) -> None:
    """Serve until a signal to stop, and finish what was accepted; raises what keeps models from being loaded."""
    event_log, limits = setup.event_log(), setup.limits
    # uvicorn and asyncio speak through the log.
    for name in ("uvicorn", "asyncio"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [Handler(event_log)], False
        logger.setLevel(logging.WARNING)
    service = Service(setup.sources, limits, setup.token, event_log)
    config = uvicorn.Config(
        service.application(),
        # In Python, and with what httptools lacks: a bound of the headers, and requests that ask for another protocol.
        http="h11",
        h11_max_incomplete_event_size=limits.header_bytes,
        # uvicorn counts the connection that asks as well.
        limit_concurrency=limits.connections + 1,
        timeout_keep_alive=math.ceil(limits.idle_seconds),
        timeout_graceful_shutdown=math.ceil(limits.stop_seconds),
        loop="uvloop" if find_spec("uvloop") else "asyncio",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
    )
    server = Server(config, service, bound, owner=owner)
    # From now on, and not only within uvicorn, which restores these handlers and raises the signal again once it has
    # stopped: the exit status is then ours.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, server.handle_exit)
    if owner:
        _starting(event_log, bound, 1)
    sys.setswitchinterval(SWITCH)
    if bound.path is None and hasattr(socket, "TCP_USER_TIMEOUT"):
        # The system ends connections whose clients do not read their answers.
        milliseconds = math.ceil(1e3 * limits.receive_seconds)
        bound.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
    import torch

    torch.set_num_threads(setup.threads)
    try:
        server.run(sockets=[bound.socket])
    except SystemExit:
        if service.failure is None:
            raise
    finally:
        server.last.cancel()
        event_log.flush()
    if service.failure is not None:
        raise service.failure


def _starting(event_log: EventLog, bound: Bound, workers: int) -> None:
    """Write the first line of the log; who reads it may send a signal to stop from then on."""
    event_log.write("starting", address=bound.address, workers=workers, process=os.getpid())
    event_log.flush()


# -- several processes -----------------------------------------------------------------------------------------------


def run_many(setup: Setup, bound: Bound, count: int) -> None:
    """Serve by several processes on one socket until a signal to stop; raises where they cannot load their models."""
    with tempfile.TemporaryDirectory(prefix="neml2-aoti-serve-", ignore_cleanup_errors=True) as folder:
        os.environ[SHARED] = folder
        Supervisor(setup, bound, count).run()


class Supervisor:
    """Starts processes, watches them, starts one again where it dies, and stops them together."""

    def __init__(self, setup: Setup, bound: Bound, count: int) -> None:
        self._setup, self._bound, self._count = setup, bound, count
        self._event_log = setup.event_log()
        # Not forked: torch's threads and loaded graphs do not survive a fork.
        self._context = multiprocessing.get_context("spawn")
        # When each was started.
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
        _starting(self._event_log, self._bound, self._count)
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
        process = self._context.Process(target=work, args=(self._setup, self._bound), name="neml2-aoti-serve")
        # Ctrl-C goes to all processes; this one tells the others, also those that do not listen to signals yet. So it
        # waits meanwhile, and a process that is started never gets it.
        mask = getattr(signal, "pthread_sigmask", None)
        before = mask(signal.SIG_BLOCK, [signal.SIGINT]) if mask else None
        try:
            process.start()
        finally:
            if mask:
                mask(signal.SIG_SETMASK, before)
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
        until = time.monotonic() + self._setup.limits.stop_seconds + LAST
        for process in self._running:
            process.join(max(0.0, until - time.monotonic()))
            if process.exitcode is None:
                self._event_log.write("process killed", level="error", process=process.pid)
                process.kill()
                process.join()
        self._event_log.flush()


def work(setup: Setup, bound: Bound) -> None:
    """What each process does."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        """Stop when the process that has started this one is gone."""
        connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=follow, daemon=True).start()
    try:
        run(setup, bound, owner=False)
    except Exception:
        # The application has logged it.
        raise SystemExit(FAILED) from None
    finally:
        if not parent.is_alive():
            shutil.rmtree(os.environ[SHARED], ignore_errors=True)
