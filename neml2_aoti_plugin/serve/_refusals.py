"""Why a request is not answered as asked: an HTTP status and a sentence for the client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# How many row numbers a message lists, and how many the document does.
SHOWN, LISTED = 20, 1000
# The client has gone; nobody sees this status but the log.
GONE = 499
# After these the rest of the request is not worth reading.
_CLOSING = frozenset({408, 413, 415, 431})


class Refused(Exception):
    """A request that is not answered as asked.

    Args:
        status: of the HTTP answer.
        message: what was given, what was expected, and where.
        retry_after: seconds after which to try again, where that may help.
        rows: numbers of the rows at fault, counted from 0 within the request.
        close: whether the connection is of no more use.
        allow: methods that the address knows.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        retry_after: int | None = None,
        rows: Sequence[int] | None = None,
        close: bool = False,
        allow: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.retry_after = status, message, retry_after
        self.rows, self.close, self.allow = rows, close, allow

    @property
    def document(self) -> dict[str, object]:
        """The body of the answer."""
        found: dict[str, object] = {"error": self.message}
        if self.rows is not None:
            found["rows"] = list(self.rows[:LISTED])
        return found

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """Headers that belong to the answer, besides those of its body."""
        found = []
        if self.retry_after is not None:
            found.append((b"retry-after", str(self.retry_after).encode()))
        if self.status == 401:
            found.append((b"www-authenticate", b"Bearer"))
        if self.allow is not None:
            found.append((b"allow", self.allow.encode()))
        if self.close or self.status in _CLOSING:
            found.append((b"connection", b"close"))
        return found


def failed(outcomes: Mapping[str, Sequence[int]], total: int, advice: str) -> Refused:
    """The refusal of a request in which rows failed.

    Args:
        outcomes: numbers of the rows that ended so, by the words for it.
        total: number of rows of the request.
        advice: what to do about it.
    """
    rows = sorted(row for some in outcomes.values() for row in some)
    listed = "; ".join(f"{words}: {_listed(some)}" for words, some in outcomes.items())
    return Refused(422, f"{len(rows)} of {total} rows failed ({listed}). {advice}", rows=rows)


def _listed(rows: Sequence[int]) -> str:
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
