"""Bodies of requests: read within bounds of size, memory and time."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from ._asgi import Message, poll
from ._http_exchange import Exchange
from ._limits import Limits
from ._refusals import Refused


class Bodies:
    """The memory that bodies of unanswered requests take, and may take.

    What counts is what has come: a length that a client claims costs nothing, and keeps nobody else out.

    Args:
        limits: of the service.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._held = 0

    async def read(self, exchange: Exchange) -> bytes:
        """The body of a request, which takes room until it is released.

        Args:
            exchange: the request.

        Raises:
            Refused: it is compressed, too large or too slow, there is no room for it, or the client has gone.
        """
        self._check(exchange.headers)
        message = poll(exchange.receive)
        if message is not None and message["type"] == "http.request" and not message.get("more_body", False):
            # It has come together with the headers, as small ones do.
            return self._take(exchange, message)
        parts: list[bytes] = []
        try:
            await asyncio.wait_for(self._rest(exchange, message, parts), self._limits.receive_seconds)
        except asyncio.TimeoutError:
            limit = self._limits.receive_seconds
            raise Refused(
                408, f"the body did not arrive within {limit:g} s; {exchange.held} bytes of it did."
            ) from None
        return b"".join(parts)

    def release(self, exchange: Exchange) -> None:
        """Give room back once the request is answered."""
        self._held -= exchange.held

    def _check(self, headers: Mapping[bytes, bytes]) -> None:
        """Refuse what the headers tell to be wrong."""
        coding = headers.get(b"content-encoding", b"identity")
        if coding.lower() != b"identity":
            raise Refused(
                415,
                f"the body is compressed by {coding.decode('latin-1')!r}, which is not read here. Send it as it is.",
            )
        told = headers.get(b"content-length")
        if told is not None and int(told) > self._limits.body_bytes:
            raise self._too_large(int(told))

    async def _rest(self, exchange: Exchange, message: Message | None, parts: list[bytes]) -> None:
        while True:
            message = message or await exchange.receive()
            if message["type"] != "http.request":
                raise Refused(400, "the client has closed the connection before the end of the body.")
            parts.append(self._take(exchange, message))
            if not message.get("more_body", False):
                return
            message = None

    def _take(self, exchange: Exchange, message: Message) -> bytes:
        """A part of a body, counted."""
        part: bytes = message.get("body", b"")
        size = exchange.held + len(part)
        if size > self._limits.body_bytes:
            raise self._too_large(size)
        if self._held + len(part) > self._limits.bodies_bytes:
            raise Refused(
                503,
                f"bodies of {self._held} bytes have come with requests that are not answered yet; there is no room for "
                f"{len(part)} more.",
                retry_after=1,
                close=True,
            )
        self._held += len(part)
        exchange.held = size
        return part

    def _too_large(self, size: int) -> Refused:
        return Refused(413, f"the body has {size} bytes or more; {self._limits.body_bytes} are the most here.")
