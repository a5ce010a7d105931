"""One connection of uvicorn's, within bounds: slow and long headers, many connections, answers that nobody reads."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from .asgi import Receive, Scope, Send, refuse
from .limits import Limits
from .refusals import Refused


class Connection(HttpToolsProtocol):
    """A connection; `bounded` makes the class for some limits."""

    limits = Limits()

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # Bytes of headers that are not complete yet, and until when they must be.
        self._bytes = 0
        self._due: asyncio.TimerHandle | None = None
        self._unread = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request, but not for ever."""
        super().connection_made(transport)
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        self._headers_came()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read what has come."""
        idle = self.cycle is None or self.cycle.response_complete
        if idle:
            self._bytes += len(data)
        super().data_received(data)
        # Most requests come at once, and need no timer.
        if self.transport.is_closing():
            return
        if idle and self._due is None and (self.cycle is None or self.cycle.response_complete):
            self._await_headers()
        if self._bytes > self.limits.header_bytes:
            self._bytes = 0
            self._refuse(431, self._too_long())

    def on_headers_complete(self) -> None:
        """Start with a request, or refuse it."""
        self._headers_came()
        long = self._bytes > self.limits.header_bytes
        self._bytes = 0
        app = self.app
        if long and sum(len(n) + len(v) + 4 for n, v in self.headers) + len(self.url) > self.limits.header_bytes:
            self.app = _refusing(Refused(431, self._too_long()))
        elif len(self.connections) > self.limits.connections:
            self.app = _refusing(
                Refused(503, f"there are {self.limits.connections} connections, which is the limit.", retry_after=1)
            )
        try:
            super().on_headers_complete()
        finally:
            self.app = app

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP."""
        self._refuse(400, "this is no valid HTTP request.")

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection on which nothing happens; with an answer on its way, once nobody reads it any more."""
        left = self.transport.get_write_buffer_size()
        if not left:
            super().timeout_keep_alive_handler()
        elif left == self._unread:
            self.transport.abort()
        else:
            self._unread = left
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _await_headers(self) -> None:
        self._due = self.loop.call_later(self.limits.receive_seconds, self._late)

    def _headers_came(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None

    def _late(self) -> None:
        self._due = None
        if self.transport.is_closing():
            return
        if self._bytes:
            self._refuse(408, f"the headers did not arrive within {self.limits.receive_seconds:g} s.")
        else:
            self.transport.close()

    def _too_long(self) -> str:
        return f"the headers have more than {self.limits.header_bytes} bytes, which are the most here."

    def _refuse(self, status: int, message: str) -> None:
        """Answer without a request, and close."""
        body = orjson.dumps({"error": message})
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()


def bounded(limits: Limits) -> type[Connection]:
    """The class of connections for some limits."""
    return type("BoundedConnection", (Connection,), {"limits": limits})


def _refusing(refused: Refused) -> Any:
    """An application that refuses one request, and closes the connection."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def closing(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
            await send(message)

        await refuse(refused, closing)

    return app
