"""ASGI's own terms: messages received and sent."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Protocol

import orjson

from .refusals import Refused

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

JSON: Headers = [(b"content-type", b"application/json")]
# Where the service's own server puts a `Direct` into the scope of a request.
DIRECT = "neml2_aoti_plugin.direct"


class Direct(Protocol):
    """A request in the hands of its server: what messages say too, but in less time."""

    def body(self) -> bytes | None:
        """The body, where all of it has come; else None, and nothing has happened."""

    def has_gone(self) -> bool:
        """Whether the client has closed the connection."""

    def answer(self, status: int, headers: Headers, body: bytes) -> bool:
        """Write an answer at once; tells whether it could."""


def poll(receive: Receive) -> Message | None:
    """The next message of a request, where it has come already; else None, and nothing has happened."""
    waiting = receive().__await__()
    try:
        waiting.send(None)
    except StopIteration as done:
        message: Message = done.value
        return message
    waiting.close()
    return None


async def respond(send: Send, status: int, headers: Headers, body: bytes) -> None:
    """Send an answer.

    Args:
        send: of the request.
        status: of the answer.
        headers: with that of the length.
        body: of the answer.
    """
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def length_of(body: bytes) -> tuple[bytes, bytes]:
    """The header that tells the length of a body."""
    return b"content-length", b"%d" % len(body)


async def refuse(refused: Refused, send: Send) -> None:
    """Answer with an error."""
    body = orjson.dumps(refused.document)
    await respond(send, refused.status, [*JSON, *refused.headers, length_of(body)], body)
