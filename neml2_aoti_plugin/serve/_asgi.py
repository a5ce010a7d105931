"""ASGI's own terms: messages received and sent."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import orjson

from ._refusals import Refused

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

JSON: Headers = [(b"content-type", b"application/json")]
# Where the service's own server puts a `Refused` into the scope of a request that has no room.
REFUSED = "neml2_aoti_plugin.refused"


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
        headers: without that of the length.
        body: of the answer.
    """
    length = (b"content-length", b"%d" % len(body))
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": body})


async def refuse(refused: Refused, send: Send) -> None:
    """Answer with an error."""
    await respond(send, refused.status, [*JSON, *refused.headers], orjson.dumps(refused.document))
