"""Why a request is not answered as asked: an HTTP status and a sentence for the client."""

from __future__ import annotations

from collections.abc import Sequence

# How many row numbers an answer lists.
SHOWN = 20


class Refused(Exception):
    """A request that is not answered as asked.

    Args:
        status: of the HTTP answer.
        message: what was given, what was expected, and where.
        retry_after: seconds after which to try again, where that may help.
        rows: numbers of the rows at fault, counted from 0 within the request.
    """

    def __init__(
        self, status: int, message: str, *, retry_after: int | None = None, rows: Sequence[int] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.retry_after = status, message, retry_after
        self.rows = rows

    @property
    def document(self) -> dict[str, object]:
        """The body of the answer."""
        found: dict[str, object] = {"error": self.message}
        if self.rows is not None:
            found["rows"] = list(self.rows)
        return found

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """Headers that belong to the answer, besides those of its body."""
        found = []
        if self.retry_after is not None:
            found.append((b"retry-after", str(self.retry_after).encode()))
        if self.status == 401:
            found.append((b"www-authenticate", b"Bearer"))
        return found


def not_converged(rows: Sequence[int], total: int) -> Refused:
    """The refusal of a request in which rows did not converge.

    Args:
        rows: their numbers.
        total: number of rows of the request.
    """
    listed = ", ".join(map(str, rows[:SHOWN])) + (f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else "")
    return Refused(
        422,
        f"{len(rows)} of {total} rows did not converge: {listed}. Take smaller steps there, or give the request "
        'the parameter "operation": "solve", which answers with the other rows and tells in the output '
        "'converged' which they are.",
        rows=rows,
    )


def shown(value: object) -> str:
    """A value out of a request, short enough for a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"
