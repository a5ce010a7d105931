"""One process of the service: uvicorn around the application, until it is told to stop."""

from __future__ import annotations

import gc
import logging
import math
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from types import FrameType

import uvicorn

from ._app import build
from ._connection import bounded
from ._event_log import EventLog, Handler
from ._front import Gate
from ._limits import Limits
from ._listening import Bound
from ._served import Source

# After the time that accepted requests have, for the process itself to end; seconds.
LEAVE = 3.0


@dataclass(frozen=True)
class Service:
    """What a process of the service needs to know.

    Args:
        sources: the models.
        limits: of each process.
        token: that requests must have.
        threads: that torch may use for one operation.
        log_requests: whether each request gets a line in the log.
    """

    sources: tuple[Source, ...]
    limits: Limits = field(default_factory=Limits)
    token: str | None = field(default=None, repr=False)
    threads: int = 1
    log_requests: bool = True

    def event_log(self) -> EventLog:
        """The log, on the standard output, if there is one."""
        return EventLog(sys.stdout.fileno() if sys.stdout else None, requests=self.log_requests)


class Server(uvicorn.Server):
    """uvicorn's server, which takes no new requests once it was told to stop, and ends in time.

    Args:
        config: of uvicorn.
        gate: that is closed then.
        listening: called once connections are accepted.
        leave: called where it is told to stop before that.
    """

    def __init__(
        self, config: uvicorn.Config, gate: Gate, listening: Callable[[], None], leave: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._gate, self._listening, self._leave = gate, listening, leave
        # A compiled call cannot be broken off; where it takes longer than all may, the process leaves it.
        seconds = (config.timeout_graceful_shutdown or 0) + LEAVE
        self.last = threading.Timer(seconds, os._exit, (0,))
        self.last.daemon = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start; what was loaded is left out of garbage collections, which would look at all of it each time."""
        await super().startup(sockets)
        # Where models cannot be loaded, newer releases of uvicorn raise here, and older ones do not.
        if self.started:
            gc.collect()
            gc.freeze()
            self._listening()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop, by a signal."""
        if not self.started:
            # Nothing was accepted. What makes machine code or runs a graph can be neither broken off nor relied on to
            # pass an exception on.
            self._leave()
            os._exit(0)
        if self._gate.open:
            self._gate.open = False
            self.last.start()
        super().handle_exit(sig, frame)


def run(service: Service, bound: Bound, *, owner: bool = True) -> None:
    """Serve until a signal to stop; then finish what was accepted, and return.

    Args:
        service: what to serve.
        bound: the socket to listen on.
        owner: whether the socket is for this process to remove, where it is told to stop before it listens.

    Raises:
        AOTIError: a model cannot be loaded.
        RuntimeError: a model cannot be evaluated.
    """
    event_log, gate = service.event_log(), Gate(service.token.encode() if service.token is not None else None)
    _take_logs(event_log)
    application, models = build(service.sources, service.limits, event_log, gate)

    def listening() -> None:
        event_log.write("listening", address=bound.address, models=list(models.infers), process=os.getpid())

    def leave() -> None:
        event_log.write("stopped", process=os.getpid())
        event_log.flush()
        if owner:
            bound.release()

    config = uvicorn.Config(
        application,
        http=bounded(service.limits),
        loop="uvloop" if find_spec("uvloop") else "asyncio",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=math.ceil(service.limits.idle_seconds),
        timeout_graceful_shutdown=math.ceil(service.limits.stop_seconds),
    )
    server = Server(config, gate, listening, leave)
    # From now on, and not only within uvicorn, which restores these handlers and raises the signal again once it has
    # stopped: the exit status is then ours.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, server.handle_exit)
    import torch

    torch.set_num_threads(service.threads)
    try:
        server.run(sockets=[bound.socket])
    except SystemExit:
        if models.failure is None:
            raise
    finally:
        server.last.cancel()
        event_log.flush()
    if models.failure is not None:
        raise models.failure


def _take_logs(event_log: EventLog) -> None:
    """Let uvicorn and asyncio speak through the log."""
    handler = Handler(event_log)
    for name in ("uvicorn", "asyncio"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.WARNING)
