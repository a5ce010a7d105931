"""Bodies of requests: read within bounds of size, memory and time."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from .asgi import Message, Receive
from .http_exchange import Exchange
from .limits import Limits
from .refusals import Refused


class Bodies:
    """The memory that bodies of unanswered requests take, and may take.

    Args:
        limits: of the service.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._held = 0

    def take(self, size: int) -> None:
        """Take room for a body, until the request is answered.

        Args:
            size: number of bytes.

        Raises:
            Refused: there is none.
        """
        if self._held + size > self._limits.bodies_bytes:
            raise Refused(
                503,
                f"requests with {self._held} bytes are being answered; there is no room for {size} more.",
                retry_after=1,
            )
        self._held += size

    def release(self, size: int) -> None:
        """Give room back."""
        self._held -= size

    def size_of(self, headers: Mapping[bytes, bytes]) -> int:
        """How much room a request needs: as much as it tells, or as much as it may have.

        Args:
            headers: of the request.

        Raises:
            Refused: it tells more than it may have, or the body is compressed.
        """
        coding = headers.get(b"content-encoding", b"identity")
        if coding.lower() != b"identity":
            raise Refused(
                415,
                f"the body is compressed by {coding.decode('latin-1')!r}, which is not read here. Send it as it is.",
            )
        told = headers.get(b"content-length")
        size = self._limits.body_bytes if told is None else int(told)
        if size > self._limits.body_bytes:
            raise self._too_large(size)
        return size

    async def read(self, exchange: Exchange) -> bytes:
        """The body of a request.

        Args:
            exchange: the request.

        Raises:
            Refused: it is too large or too slow, or the client has gone.
        """
        message = exchange.poll()
        if message is not None and not message.get("more_body", False) and message["type"] == "http.request":
            # It has come together with the headers, as small ones do.
            body: bytes = message.get("body", b"")
            if len(body) > self._limits.body_bytes:
                raise self._too_large(len(body))
            return body
        parts: list[bytes] = []
        try:
            await asyncio.wait_for(self._rest(message, exchange.receive, parts), self._limits.receive_seconds)
        except asyncio.TimeoutError:
            came, limit = sum(map(len, parts)), self._limits.receive_seconds
            raise Refused(408, f"the body did not arrive within {limit:g} s; {came} bytes of it did.") from None
        return b"".join(parts)

    async def _rest(self, message: Message | None, receive: Receive, parts: list[bytes]) -> None:
        size = 0
        while True:
            message = message or await receive()
            if message["type"] != "http.request":
                raise Refused(400, "the client has closed the connection before the end of the body.")
            part: bytes = message.get("body", b"")
            size += len(part)
            if size > self._limits.body_bytes:
                raise self._too_large(size)
            parts.append(part)
            if not message.get("more_body", False):
                return
            message = None

    def _too_large(self, size: int) -> Refused:
        return Refused(413, f"the body has {size} bytes or more; {self._limits.body_bytes} are the most here.")
