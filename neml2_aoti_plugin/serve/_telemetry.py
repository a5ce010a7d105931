"""What the service tells of itself: metrics for Prometheus, and a log of one JSON object a line without any tensor."""

from __future__ import annotations

import logging
import os
import select
import threading
import traceback
from collections import defaultdict
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from starlette.responses import Response

from ._served import VERSION, Served

# The variable by which prometheus_client learns of the folder that processes share.
SHARED = "PROMETHEUS_MULTIPROC_DIR"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 16384, 65536)

# What a pipe takes at once; and how many bytes of lines may wait.
WHOLE, ROOM = 4096, 2**20


class Metrics:
    """Counters of one application; with several processes in files that they share."""

    def __init__(self) -> None:
        own = self._own = CollectorRegistry()
        both = ["model", "operation"]
        every = [*both, "status"]
        self._requests = Counter("neml2_requests", "Requests that were answered.", every, registry=own)
        self._seconds = Histogram(
            "neml2_request_seconds", "Time from a request to its answer.", every, registry=own, buckets=_SECONDS
        )
        self._rows = Counter("neml2_rows", "Rows that were evaluated.", both, registry=own)
        self._calls = Histogram("neml2_call_seconds", "Time of a compiled call.", both, registry=own, buckets=_SECONDS)
        self._gathered = Histogram(
            "neml2_gathered_rows", "Rows that a compiled call gathered.", both, registry=own, buckets=_ROWS
        )
        self._failed = Counter("neml2_rows_not_converged", "Rows that failed.", both, registry=own)
        self._queue = Gauge("neml2_queue_rows", "Rows that wait.", ["model"], registry=own, multiprocess_mode="livesum")
        # Finding a child by its labels costs more than counting.
        self._children: dict[tuple[Any, ...], Any] = {}

    def answered(self, model: str, operation: str, status: int, seconds: float) -> None:
        """Count a request; for others than evaluations `operation` is a kind, and it is empty where it was not read."""
        self._child(self._requests, model, operation, str(status)).inc()
        self._child(self._seconds, model, operation, str(status)).observe(seconds)

    def evaluated(self, model: str, operation: str, rows: int, failed: int, seconds: float) -> None:
        """Count a compiled call."""
        self._child(self._rows, model, operation).inc(rows)
        self._child(self._gathered, model, operation).observe(rows)
        self._child(self._calls, model, operation).observe(seconds)
        if failed:
            self._child(self._failed, model, operation).inc(failed)

    def queued(self, model: str, rows: int) -> None:
        """Note how many rows wait for a model."""
        self._child(self._queue, model).set(rows)

    def answer(self) -> Response:
        """All of it, in Prometheus' text format."""
        return Response(generate_latest(self._every()), headers={"content-type": CONTENT_TYPE})

    def statistics(self, served: Served) -> dict[str, object]:
        """What the protocol's extension tells of the evaluations of a model."""
        totals: defaultdict[str, float] = defaultdict(float)
        for family in self._every().collect():
            for sample in family.samples:
                labels = sample.labels
                # Those that could not be read have no operation.
                if labels.get("model") == served.name and labels.get("operation") in ("", *served.signatures):
                    ended = {"": "", "200": "success "}.get(labels.get("status", ""), "fail ")
                    totals[ended + sample.name] += sample.value

        def spent(name: str) -> dict[str, int]:
            return {"count": int(totals[name + "_count"]), "ns": int(1e9 * totals[name + "_sum"])}

        return {
            "name": served.name,
            "version": VERSION,
            "inference_count": int(totals["neml2_rows_total"]),
            "execution_count": int(totals["neml2_call_seconds_count"]),
            "inference_stats": {
                "success": spent("success neml2_request_seconds"),
                "fail": spent("fail neml2_request_seconds"),
                "compute_infer": spent("neml2_call_seconds"),
            },
        }

    def _every(self) -> CollectorRegistry:
        """What was counted; by all processes where there are several."""
        if SHARED not in os.environ:
            return self._own
        every = CollectorRegistry()
        MultiProcessCollector(every)  # type: ignore[no-untyped-call]
        return every

    def _child(self, metric: Any, *labels: str) -> Any:
        key = (metric, *labels)
        child = self._children.get(key)
        if child is None:
            child = self._children[key] = metric.labels(*labels)
        return child


class EventLog:
    """Lines for a file, pipe or terminal, written by a thread: whoever reads slowly, or not at all, keeps nobody.

    Lines that find no room, or cannot be written, are counted, and a line `lines lost` says how many. Without a
    `descriptor` nothing is written; without `requests`, only those that failed in the service have a line.
    """

    def __init__(self, descriptor: int | None = None, *, requests: bool = True) -> None:
        self._descriptor = descriptor
        self.requests = requests and descriptor is not None
        self._changed = threading.Condition()
        # What waits or is being written, in bytes; of that, what waits; and how many lines are lost and not told of.
        self._held = 0
        self._lines: list[bytes] = []
        self._lost = 0
        # Whether the last line could not be written, and whether it was in part.
        self._failed = self._torn = False
        if descriptor is not None:
            threading.Thread(target=self._work, args=(descriptor,), daemon=True).start()

    def write(self, event: str, *, cause: BaseException | None = None, **fields: Any) -> None:
        """Write a line about an event, with where the exception came from that is its cause."""
        if self._descriptor is None:
            return
        if cause is not None:
            fields["traceback"] = "".join(traceback.format_exception(cause))
        line = _line(event, fields)
        with self._changed:
            if self._held + len(line) > ROOM:
                self._lost += 1
                return
            self._held += len(line)
            self._lines.append(line)
            self._changed.notify_all()

    def error(self, event: str, error: BaseException, **fields: Any) -> None:
        """Write a line about an exception."""
        self.write(event, level="error", error=f"{type(error).__name__}: {error}", cause=error, **fields)

    def flush(self, seconds: float = 1.0) -> None:
        """Wait until what waits is written, but not for longer than some seconds."""
        with self._changed:
            self._changed.wait_for(lambda: not self._held, seconds)

    def _work(self, descriptor: int) -> None:
        while True:
            with self._changed:
                # After a failure the next line tries again.
                self._changed.wait_for(lambda: self._lines or (self._lost and not self._failed))
                lines, self._lines, lost, self._lost = self._lines, [], self._lost, 0
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
    return msgspec.json.encode({"time": time, "event": event, **fields}, enc_hook=str)


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
    """Takes what other packages log, such as uvicorn, into the service's log."""

    def __init__(self, event_log: EventLog) -> None:
        super().__init__()
        self._event_log = event_log

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record as a line."""
        level, error = record.levelname.lower(), record.exc_info[1] if record.exc_info else None
        self._event_log.write("log", level=level, logger=record.name, message=record.getMessage(), cause=error)
