"""What the service bears, and the error by which it refuses a request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from ..errors import InputError

# How many row numbers a message lists, and how many the document does.
SHOWN, LISTED = 20, 1000
# The client has gone; nobody sees this status but the log.
GONE = 499
# A full queue, no room or not open, and too late: the same request may be answered soon.
PASSING = (429, 503, 504)


@dataclass(frozen=True)
class Limits:
    """Bounds of one process of the service.

    Args:
        gather_rows: rows that a compiled call gathers; 1 gives each request a call of its own.
        wait_ms: how long the first request of a call may wait for others, in milliseconds; 0 is not at all.
        queue_rows: rows that may wait for each model; what comes then is refused.
        request_rows: rows of one request.
        body_bytes: size of the body of one request.
        bodies_bytes: size of the bodies of all requests that are not answered yet.
        header_bytes: size of the headers of one request.
        receive_seconds: time in which the body must have arrived.
        answer_seconds: time in which a request must be answered.
        idle_seconds: time that a connection may be open after an answer without another request.
        stop_seconds: time in which accepted requests must be answered after the signal to stop.
        connections: number of open connections.
    """

    gather_rows: int = 2048
    wait_ms: float = 0.0
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
            least = 0 if field.name == "wait_ms" else 1 if isinstance(field.default, int) else 0.001
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


class Refused(Exception):
    """A request that is not answered as asked: the status, the message for the client, and the rows at fault from 0."""

    def __init__(
        self, status: int, message: str, *, rows: Sequence[int] | None = None, allow: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.rows = status, message, rows
        self.headers: dict[str, str] = {"www-authenticate": "Bearer"} if status == 401 else {}
        if status in PASSING:
            self.headers["retry-after"] = "1"
        if allow is not None:
            self.headers["allow"] = allow

    @property
    def document(self) -> dict[str, object]:
        """The body of the answer."""
        found: dict[str, object] = {"error": self.message}
        if self.rows is not None:
            found["rows"] = list(self.rows[:LISTED])
        return found


def bad_request(message: str) -> Refused:
    """The refusal of a request that is wrong in itself."""
    return Refused(400, message)


def listed(rows: Sequence[int]) -> str:
    """Numbers of rows as a message has them."""
    more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
    return ", ".join(map(str, rows[:SHOWN])) + more


def shown(value: object) -> str:
    """A value out of a request, short enough for a message, and in no time however large it is."""
    if isinstance(value, dict) and len(value) > 4:
        return f"an object with {len(value)} keys"
    if isinstance(value, list) and (len(value) > 8 or any(isinstance(entry, (list, dict)) for entry in value)):
        return f"a list of {len(value)} entries"
    if isinstance(value, dict) and any(isinstance(entry, (list, dict)) for entry in value.values()):
        return f"an object with the keys {', '.join(shown(key) for key in value)}"
    if isinstance(value, str) and len(value) > 80:
        return f"{value[:60]!r}... ({len(value)} characters)"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:60]}... ({len(text)} characters)"
