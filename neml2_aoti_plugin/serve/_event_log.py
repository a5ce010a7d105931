"""The service's log: one JSON object a line, without any tensor."""

from __future__ import annotations

import logging
import os
import select
import threading
import traceback
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any

import orjson

# What a pipe takes at once.
WHOLE = 4096
# How many bytes of lines may wait.
ROOM = 2**20


class EventLog:
    """Lines for a file, pipe or terminal, written by a thread: whoever reads slowly, or not at all, keeps nobody.

    Lines that find no room, or cannot be written, are counted, and a line `lines lost` says how many.

    Args:
        descriptor: of the file where lines go; nowhere if not given.
        requests: whether each request gets a line, or only those that were answered with an error of the service.
    """

    def __init__(self, descriptor: int | None = None, *, requests: bool = True) -> None:
        self._descriptor = descriptor
        self.requests = requests and descriptor is not None
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        # What waits or is being written, in bytes; of that, what waits; and how many lines are lost and not told of.
        self._held = 0
        self._lines: list[bytes] = []
        self._lost = 0
        # Whether the last line could not be written, and whether it was in part.
        self._failed = self._torn = False

    def write(self, event: str, **fields: Any) -> None:
        """Write a line.

        Args:
            event: what happened.
            fields: more about it.
        """
        if self._descriptor is None:
            return
        line = _line(event, fields)
        with self._changed:
            if self._held + len(line) > ROOM:
                self._lost += 1
                return
            self._held += len(line)
            self._lines.append(line)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, args=(self._descriptor,), daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def error(self, event: str, error: BaseException, **fields: Any) -> None:
        """Write a line about an exception, with where it came from."""
        told = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        self.write(event, level="error", error=f"{type(error).__name__}: {error}", traceback=told, **fields)

    def flush(self, seconds: float = 1.0) -> None:
        """Wait until what waits is written, but not for longer than some seconds."""
        with self._changed:
            self._changed.wait_for(lambda: not self._held, seconds)

    def _work(self, descriptor: int) -> None:
        while True:
            with self._changed:
                # After a failure the next line tries again.
                self._changed.wait_for(lambda: self._lines or (self._lost and not self._failed))
                lines, self._lines = self._lines, []
                lost, self._lost = self._lost, 0
            missed = lost if lost and self._put(descriptor, [_line("lines lost", {"count": lost})]) else 0
            missed += sum(self._put(descriptor, part) for part in _parts(lines))
            self._failed = missed > 0
            with self._changed:
                self._lost += missed
                self._held -= sum(map(len, lines))
                self._changed.notify_all()

    def _put(self, descriptor: int, lines: list[bytes]) -> int:
        """Write lines; how many could not be, as on a full disk."""
        left = memoryview(b"\n" * self._torn + b"\n".join(lines) + b"\n")
        while left:
            try:
                left = left[os.write(descriptor, left) :]
                self._torn = bool(left)
            except BlockingIOError:
                # Somebody who has the same pipe does not want to wait for it.
                select.select([], [descriptor], [])
            except OSError:
                return min(len(lines), left.tobytes().count(b"\n"))
        return 0


def _line(event: str, fields: dict[str, Any]) -> bytes:
    time = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    return orjson.dumps({"time": time, "event": event, **fields}, default=str)


def _parts(lines: list[bytes]) -> Iterator[list[bytes]]:
    """Lines in parts that a pipe takes whole, so that those of several processes do not get mixed."""
    part: list[bytes] = []
    size = 0
    for line in lines:
        if part and size + len(line) >= WHOLE:
            yield part
            part, size = [], 0
        part.append(line)
        size += len(line) + 1
    if part:
        yield part


class Handler(logging.Handler):
    """Takes what other packages log, such as uvicorn.

    Args:
        event_log: that it goes to.
    """

    def __init__(self, event_log: EventLog) -> None:
        super().__init__()
        self._event_log = event_log

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record as a line."""
        level, error = record.levelname.lower(), record.exc_info[1] if record.exc_info else None
        told = "".join(traceback.format_exception(type(error), error, error.__traceback__)) if error else None
        more = {"traceback": told} if told else {}
        self._event_log.write("log", level=level, logger=record.name, message=record.getMessage(), **more)
