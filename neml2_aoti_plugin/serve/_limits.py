"""What the service bears: sizes, numbers and times, read once."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..errors import InputError


@dataclass(frozen=True)
class Limits:
    """Bounds of one process of the service.

    Args:
        gather_rows: rows that a compiled call gathers; 1 gives each request a call of its own.
        wait_ms: how long the first request of a call may wait for others, in milliseconds; 0 is not at all.
        loop_rows: calls with more rows run in a thread, so that other requests are answered between their parts.
        queue_rows: rows that may wait for each model; what comes then is refused.
        request_rows: rows of one request.
        body_bytes: size of the body of one request.
        bodies_bytes: size of the bodies of all requests that are not answered yet.
        header_bytes: size of the headers of one request.
        receive_seconds: time in which the headers, and then the body, must have arrived.
        answer_seconds: time in which a request must be answered.
        idle_seconds: time that a connection may be open without a request.
        stop_seconds: time in which accepted requests must be answered after the signal to stop.
        connections: number of open connections.
    """

    gather_rows: int = 2048
    wait_ms: float = 0.0
    loop_rows: int = 1024
    queue_rows: int = 65536
    request_rows: int = 65536
    body_bytes: int = 16 * 2**20
    bodies_bytes: int = 256 * 2**20
    header_bytes: int = 32 * 2**10
    receive_seconds: float = 10.0
    answer_seconds: float = 30.0
    idle_seconds: float = 75.0
    stop_seconds: float = 20.0
    connections: int = 1024

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in ("wait_ms", "loop_rows") else 1 if isinstance(field.default, int) else 0.001
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= least:
                raise InputError(f"{_named(field.name)} is {value!r}, expected a number, {least} or more.")
        for whole, one, what in (("queue_rows", "request_rows", "rows"), ("bodies_bytes", "body_bytes", "bytes")):
            if getattr(self, whole) < getattr(self, one):
                raise InputError(
                    f"{_named(whole)} is {getattr(self, whole)}, but one request may have {getattr(self, one)} {what} "
                    f"({_named(one)}), and would never find room. Raise {whole}, or lower {one}."
                )


def _named(limit: str) -> str:
    """A limit by its name in Python and by that on the command line."""
    return f"{limit} (--{limit.replace('_', '-')})"
