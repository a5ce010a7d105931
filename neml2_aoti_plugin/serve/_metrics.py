"""What Prometheus is told, by prometheus_client; with several processes through files that they share."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from ._operations import CONVERGED
from ._refusals import Refused
from ._served import VERSION, Served

if TYPE_CHECKING:
    from ._calls import Call
    from ._evaluation import Answer
    from ._gathering import Waiting

# The variable by which prometheus_client learns of the folder that processes share.
SHARED = "PROMETHEUS_MULTIPROC_DIR"
CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 16384, 65536)


class Metrics:
    """Counters of one application."""

    def __init__(self) -> None:
        own = self._own = CollectorRegistry()
        model, both = ["model"], ["model", "operation"]
        self._requests = Counter("neml2_requests", "Requests that were answered.", [*both, "status"], registry=own)
        self._seconds = Histogram(
            "neml2_request_seconds",
            "Time from a request to its answer.",
            [*both, "status"],
            registry=own,
            buckets=_SECONDS,
        )
        self._rows = Counter("neml2_rows", "Rows that were evaluated.", both, registry=own)
        self._calls = Histogram("neml2_call_seconds", "Time of a compiled call.", both, registry=own, buckets=_SECONDS)
        self._gathered = Histogram(
            "neml2_gathered_rows", "Rows that a compiled call gathered.", both, registry=own, buckets=_ROWS
        )
        self._failed = Counter("neml2_rows_not_converged", "Rows that failed.", both, registry=own)
        self._queue = Gauge("neml2_queue_rows", "Rows that wait.", model, registry=own, multiprocess_mode="livesum")
        # Finding a child by its labels costs more than counting.
        self._children: dict[tuple[Any, ...], Any] = {}

    def answered(self, model: str, operation: str, status: int, seconds: float) -> None:
        """Count a request.

        Args:
            model: that it named; empty where there is none.
            operation: that it asked for; for others than evaluations their kind.
            status: of the answer.
            seconds: that it took.
        """
        self._child(self._requests, model, operation, str(status)).inc()
        self._child(self._seconds, model, operation, str(status)).observe(seconds)

    def evaluated(
        self, model: str, call: Call, taken: Sequence[Waiting], answers: Sequence[Answer], seconds: float
    ) -> None:
        """Count a compiled call.

        Args:
            model: that was called.
            call: one of the requests.
            taken: all of them.
            answers: what each gets.
            seconds: that it took.
        """
        operation, rows = call.operation.name, sum(waiting.call.rows for waiting in taken)
        self._child(self._rows, model, operation).inc(rows)
        self._child(self._gathered, model, operation).observe(rows)
        self._child(self._calls, model, operation).observe(seconds)
        failed = 0
        for answer in answers:
            if isinstance(answer, Refused):
                failed += len(answer.rows or ())
            elif CONVERGED in answer:
                failed += int((~answer[CONVERGED]).sum())
        if failed:
            self._child(self._failed, model, operation).inc(failed)

    def queued(self, model: str, rows: int) -> None:
        """Note how many rows wait for a model."""
        self._child(self._queue, model).set(rows)

    def page(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._every())

    def statistics(self, served: Served) -> dict[str, object]:
        """What the protocol's extension tells of the evaluations of a model."""
        totals: defaultdict[str, float] = defaultdict(float)
        for family in self._every().collect():
            for sample in family.samples:
                labels = sample.labels
                # Those that could not be read have no operation.
                if labels.get("model") == served.name and labels.get("operation") in ("", *served.operations):
                    fared = {"": "", "200": "success "}.get(labels.get("status", ""), "fail ")
                    totals[fared + sample.name] += sample.value

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
