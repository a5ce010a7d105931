"""The service's log: one JSON object a line, without any tensor."""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any, BinaryIO

import orjson

# What a pipe takes at once.
WHOLE = 4096


class EventLog:
    """Lines for a stream; those of one turn of the event loop are written together.

    Args:
        stream: where lines go; nowhere if not given.
        requests: whether each request gets a line, or only those that were answered with an error of the service.
    """

    def __init__(self, stream: BinaryIO | None = None, *, requests: bool = True) -> None:
        self._stream = stream
        self.requests = requests and stream is not None
        self._lines: list[bytes] = []

    def write(self, event: str, **fields: Any) -> None:
        """Write a line.

        Args:
            event: what happened.
            fields: more about it.
        """
        if self._stream is None:
            return
        time = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        self._lines.append(orjson.dumps({"time": time, "event": event, **fields}, default=str))
        if len(self._lines) > 1:
            return
        try:
            asyncio.get_running_loop().call_soon(self.flush)
        except RuntimeError:
            self.flush()

    def error(self, event: str, error: BaseException, **fields: Any) -> None:
        """Write a line about an exception, with where it came from."""
        told = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        self.write(event, level="error", error=f"{type(error).__name__}: {error}", traceback=told, **fields)

    def flush(self) -> None:
        """Write what waits."""
        lines, self._lines = self._lines, []
        try:
            for part in _parts(lines):
                if self._stream is not None:
                    self._stream.write(part)
                    self._stream.flush()
        except (OSError, ValueError):
            # Nobody reads any more: the service goes on.
            self._stream = None


def _parts(lines: list[bytes]) -> Iterator[bytes]:
    """Lines in parts that a pipe takes whole, so that those of several processes do not get mixed."""
    part: list[bytes] = []
    size = 0
    for line in lines:
        if part and size + len(line) >= WHOLE:
            yield b"\n".join(part) + b"\n"
            part, size = [], 0
        part.append(line)
        size += len(line) + 1
    if part:
        yield b"\n".join(part) + b"\n"


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
