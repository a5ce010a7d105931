"""One connection of uvicorn's, within bounds: slow and long headers, many connections, answers that nobody reads."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import httptools
import orjson
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from ._asgi import REFUSED
from ._limits import Limits
from ._refusals import Refused


class Connection(HttpToolsProtocol):
    """A connection; `bounded` makes the class for some limits."""

    limits = Limits()

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.parser = Parser(self)
        # Until when the headers of the next request must be complete, and how many bytes have come of them.
        self._due: asyncio.TimerHandle | None = None
        self._bytes = 0
        # Whether a body is on its way, and how much of it came after the answer.
        self._in_body = False
        self._spare = 0
        # When it is looked whether the client reads its answer, and how much was left of it the last time.
        self._look: asyncio.TimerHandle | None = None
        self._unread = 0
        # The answer to what is no request, once those before it are answered. Nothing is read after it.
        self._last: bytes | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request, but not for ever."""
        super().connection_made(cast(asyncio.Transport, Outgoing(transport)))
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        self._wait_no_longer()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read what has come."""
        if self._last is not None:
            return
        if not self._in_body:
            self._bytes += len(data)
        elif self._is_answered:
            self._spare += len(data)
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
        """Start with a request, or have it refused."""
        if self.parser.should_upgrade():
            # The parser begins it again without the upgrade.
            return
        self._wait_no_longer()
        # What came may be a body too; the headers are counted one by one only where that matters.
        long = self._bytes > self.limits.header_bytes
        self._bytes, self._spare, self._in_body = 0, 0, True
        if long and sum(len(n) + len(v) + 4 for n, v in self.headers) + len(self.url) > self.limits.header_bytes:
            self._pass_on(Refused(431, self._too_long))
        elif len(self.connections) > self.limits.connections:
            text = f"there are {self.limits.connections} connections, which is the limit."
            self._pass_on(Refused(503, text, retry_after=1, close=True))
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Note the end of a request."""
        if not self.parser.should_upgrade():
            self._in_body = False
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP."""
        self._refuse(400, "this is no valid HTTP request.")

    def on_response_complete(self) -> None:
        """Go on with the next request."""
        more = bool(self.pipeline)
        super().on_response_complete()
        if self._last is not None and not more:
            self._end(self._last)
        elif self._in_body and self._is_answered and not self.transport.is_closing():
            # Answered before its body has come.
            self._wait_no_longer()
            self._wait()

    def pause_writing(self) -> None:
        """Look whether the client reads its answer."""
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        """Look no longer."""
        super().resume_writing()
        if self._look is not None:
            self._look.cancel()
            self._look = None

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection on which nothing happens; one whose answer is still being read is not idle."""
        if self._look is not None:
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )
        elif self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    def _watch(self) -> None:
        left = self.transport.get_write_buffer_size()
        if self._look is not None and left == self._unread:
            self.transport.abort()
            return
        self._unread = left
        self._look = self.loop.call_later(self.limits.receive_seconds, self._watch)

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

    def _pass_on(self, refused: Refused) -> None:
        self.scope[REFUSED] = refused  # type: ignore[literal-required]

    def _refuse(self, status: int, message: str) -> None:
        """Answer what is no request, and close; the requests before it are answered first."""
        body = orjson.dumps({"error": message})
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self._last = STATUS_LINE[status] + head + body
        broken = self.cycle if self._in_body and not self._is_answered else None
        if broken is not None and self.pipeline:
            # The body of a request that waits for its turn, which it gets no more.
            self.pipeline.popleft()
        elif broken is not None:
            broken.disconnected = True
            broken.message_event.set()
            self._end(self._last)
        elif self._is_answered:
            self._end(self._last)

    def _end(self, answer: bytes) -> None:
        self.transport.write(answer)
        self.transport.close()


class Parser(httptools.HttpRequestParser):
    """httptools' parser, which passes over the wish to speak another protocol, as HTTP lets a server do.

    httptools takes what follows such a request for that protocol: the body would be lost, or read as a request.

    Args:
        connection: that is told what is found.
    """

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self._connection = connection
        # What follows a request that asks for the connection to be closed is passed over.
        self.set_dangerous_leniencies(lenient_data_after_close=True)

    def feed_data(self, data: bytes) -> None:  # type: ignore[override]
        """Read what has come."""
        while True:
            try:
                return super().feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                if self.get_method() == b"CONNECT":
                    raise httptools.HttpParserError("this is no proxy") from None
                (end,) = upgrade.args
            super().feed_data(self._head())
            data = data[end:]

    def _head(self) -> bytes:
        """The head of the request that is read, without the upgrade."""
        lines = [b"%s %s HTTP/%s" % (self.get_method(), self._connection.url, self.get_http_version().encode())]
        lines += [b"%s: %s" % header for header in self._connection.headers if header[0] != b"upgrade"]
        return b"\r\n".join([*lines, b"", b""])


class Outgoing:
    """A transport to which nothing is written any more once it closes: an answer may come after its client has gone.

    Args:
        transport: of the connection.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Write, where there is somebody to read."""
        if not self._transport.is_closing():
            self._transport.write(data)


def bounded(limits: Limits) -> type[Connection]:
    """The class of connections for some limits."""
    return type("BoundedConnection", (Connection,), {"limits": limits})
