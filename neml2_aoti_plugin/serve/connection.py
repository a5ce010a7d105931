"""One connection of uvicorn's, within bounds: slow and long headers, many connections, answers that nobody reads."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from .asgi import DIRECT, Headers, Receive, Scope, Send, refuse
from .limits import Limits
from .refusals import Refused


class Connection(HttpToolsProtocol):
    """A connection; `bounded` makes the class for some limits."""

    limits = Limits()

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # Until when the headers of the next request must be complete, and how many bytes have come of them.
        self._due: asyncio.TimerHandle | None = None
        self._bytes = 0
        # Whether a body is on its way, and how much of it came after the answer.
        self._in_body = False
        self._spare = 0
        self._unread = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request, but not for ever."""
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        self._wait_no_longer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read what has come."""
        if self._is_answered:
            if self._in_body:
                self._spare += len(data)
            else:
                self._bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._bytes > self.limits.header_bytes:
            self._refuse(431, self._too_long)
        elif self._spare > self.limits.body_bytes:
            self.transport.close()
        elif self._due is None and self._is_answered:
            # A part of headers, or of a body that nobody waits for. Most requests come whole, and need no timer.
            self._wait()

    def on_headers_complete(self) -> None:
        """Start with a request, or refuse it."""
        self._wait_no_longer()
        # What came may be a body too; the headers are counted one by one only where that matters.
        long = self._bytes > self.limits.header_bytes
        self._bytes, self._spare, self._in_body = 0, 0, True
        app = self.app
        if long and sum(len(n) + len(v) + 4 for n, v in self.headers) + len(self.url) > self.limits.header_bytes:
            self.app = _refusing(Refused(431, self._too_long))
        elif len(self.connections) > self.limits.connections:
            text = f"there are {self.limits.connections} connections, which is the limit."
            self.app = _refusing(Refused(503, text, retry_after=1, close=True))
        try:
            super().on_headers_complete()
        finally:
            self.app = app

    def on_message_complete(self) -> None:
        """Note the end of a request."""
        self._in_body = False
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP."""
        self._refuse(400, "this is no valid HTTP request.")

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        cycle.scope[DIRECT] = DirectRequest(self, cycle)  # type: ignore[literal-required]
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        """Wait for the next request, and for the client to read a large answer."""
        super().on_response_complete()
        if self._in_body and not self.transport.is_closing():
            # Answered before its body has come.
            self._wait_no_longer()
            self._wait()
        if self.timeout_keep_alive_task is not None and self.transport.get_write_buffer_size() > HIGH_WATER_LIMIT:
            self._watch_reading()

    def _watch_reading(self) -> None:
        self._unread = self.transport.get_write_buffer_size()
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(
            self.limits.receive_seconds, self.timeout_keep_alive_handler
        )

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection on which nothing happens; with an answer on its way, once nobody reads it any more."""
        left = self.transport.get_write_buffer_size()
        if not left:
            super().timeout_keep_alive_handler()
        elif left == self._unread:
            self.transport.abort()
        else:
            self._watch_reading()

    @property
    def _is_answered(self) -> bool:
        """Whether all requests that have come were answered."""
        return self.cycle is None or self.cycle.response_complete

    def _wait(self) -> None:
        self._due = self.loop.call_later(self.limits.receive_seconds, self._late)

    def _wait_no_longer(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None

    def _late(self) -> None:
        self._due = None
        if self.transport.is_closing() or not self._is_answered:
            return
        if self._bytes:
            self._refuse(408, f"the headers did not arrive within {self.limits.receive_seconds:g} s.")
        elif self._in_body or self.cycle is None:
            self.transport.close()

    @property
    def _too_long(self) -> str:
        return f"the headers have more than {self.limits.header_bytes} bytes, which are the most here."

    def _refuse(self, status: int, message: str) -> None:
        """Answer what is no request yet, and close."""
        body = orjson.dumps({"error": message})
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()


class DirectRequest:
    """See `asgi.Direct`.

    uvicorn writes the head of an answer by itself, and looks at each header, which takes longer than all the rest.

    Args:
        connection: that the request came on.
        cycle: uvicorn's state of the request.
    """

    __slots__ = ("_connection", "_cycle")

    def __init__(self, connection: Connection, cycle: RequestResponseCycle) -> None:
        self._connection, self._cycle = connection, cycle

    def body(self) -> bytes | None:
        """See `asgi.Direct`."""
        cycle = self._cycle
        if cycle.more_body or cycle.disconnected or cycle.response_complete or cycle.waiting_for_100_continue:
            return None
        self._connection.flow.resume_reading()
        cycle.message_event.clear()
        body, cycle.body = bytes(cycle.body), bytearray()
        return body

    def has_gone(self) -> bool:
        """See `asgi.Direct`."""
        return self._cycle.disconnected

    def answer(self, status: int, headers: Headers, body: bytes) -> bool:
        """See `asgi.Direct`."""
        cycle, connection = self._cycle, self._connection
        if cycle.disconnected or cycle.response_started or not cycle.keep_alive or connection.flow.write_paused:
            return False
        parts = [STATUS_LINE[status]]
        for name, value in (*cycle.default_headers, *headers):
            parts += (name, b": ", value, b"\r\n")
        parts += (b"\r\n", body)
        cycle.response_started = cycle.response_complete = True
        connection.transport.write(b"".join(parts))
        cycle.message_event.set()
        cycle.on_response()
        return True


def bounded(limits: Limits) -> type[Connection]:
    """The class of connections for some limits."""
    return type("BoundedConnection", (Connection,), {"limits": limits})


def _refusing(refused: Refused) -> Any:
    """An application that refuses one request."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await refuse(refused, send)

    return app
