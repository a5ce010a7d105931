"""ASGI's own terms: messages received and sent."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import orjson

from .refusals import Refused

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

JSON: Headers = [(b"content-type", b"application/json")]
# Of status, headers and body: writes an answer at once, and tells whether it could.
AtOnce = Callable[[int, Headers, bytes], bool]
# Where the service's own server puts one into the scope of a request.
AT_ONCE = "neml2_aoti_plugin.at_once"


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


def has_gone(receive: Receive) -> bool:
    """Whether the client of a request that was read to its end has closed the connection."""
    message = poll(receive)
    return message is not None and message["type"] == "http.disconnect"


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
