"""One request on its way: what is told of it, and how it is read and answered."""

from __future__ import annotations

from time import perf_counter

from ._asgi import Message, Receive, Send, poll

# Where it is in the scope of its request.
EXCHANGE = "neml2_aoti_plugin.exchange"


class Exchange:
    """One request and its answer, as log and metrics tell them.

    Attributes:
        id: of the request.
        headers: of the request; the last one where there are several of a name.
        start: when it came.
        status: of the answer; 0 before.
        model: that it named.
        operation: that it asked for.
        rows: that it has.
        error: that the client was told.
        held: bytes of its body that have come.

    Args:
        id: of the request.
        headers: of the request.
        receive: of the request.
        send: of the request.
    """

    __slots__ = ("_send", "error", "headers", "held", "id", "model", "operation", "receive", "rows", "start", "status")

    def __init__(self, id: str, headers: dict[bytes, bytes], receive: Receive, send: Send) -> None:
        self.id, self.headers, self.start = id, headers, perf_counter()
        self.receive, self._send = receive, send
        self.model = self.operation = self.error = ""
        self.status = self.rows = self.held = 0

    def has_gone(self) -> bool:
        """Whether the client of a request that was read to its end has closed the connection."""
        message = poll(self.receive)
        return message is not None and message["type"] == "http.disconnect"

    async def send(self, message: Message) -> None:
        """Send a message of the answer, with the id."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", self.id.encode())]
        await self._send(message)
