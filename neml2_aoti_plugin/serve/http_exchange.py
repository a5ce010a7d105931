"""One request on its way: what is told of it, and how it is read and answered."""

from __future__ import annotations

from time import perf_counter

from .asgi import Direct, Headers, Message, Receive, Send, length_of, poll, respond

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

    Args:
        id: of the request.
        headers: of the request.
        receive: of the request.
        send: of the request.
        direct: the request in the hands of the service's own server, where it came through that.
    """

    __slots__ = (
        "_direct",
        "_send",
        "error",
        "headers",
        "id",
        "model",
        "operation",
        "receive",
        "rows",
        "start",
        "status",
    )

    def __init__(
        self, id: str, headers: dict[bytes, bytes], receive: Receive, send: Send, direct: Direct | None = None
    ) -> None:
        self.id, self.headers, self.start = id, headers, perf_counter()
        self.receive, self._send, self._direct = receive, send, direct
        self.model = self.operation = self.error = ""
        self.status = self.rows = 0

    def poll(self) -> Message | None:
        """The first message of the request, where it has come already; else None, and nothing has happened."""
        if self._direct is None:
            return poll(self.receive)
        body = self._direct.body()
        return None if body is None else {"type": "http.request", "body": body}

    def has_gone(self) -> bool:
        """Whether the client of a request that was read to its end has closed the connection."""
        if self._direct is not None:
            return self._direct.has_gone()
        message = poll(self.receive)
        return message is not None and message["type"] == "http.disconnect"

    async def send(self, message: Message) -> None:
        """Send a message of the answer, with the id."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), self._own]
        await self._send(message)

    async def respond(self, status: int, headers: Headers, body: bytes) -> None:
        """Send a whole answer, with the id.

        Args:
            status: of the answer.
            headers: without that of the length.
            body: of the answer.
        """
        self.status = status
        every = [*headers, self._own, length_of(body)]
        if self._direct is None or not self._direct.answer(status, every, body):
            await respond(self._send, status, every, body)

    @property
    def _own(self) -> tuple[bytes, bytes]:
        return b"x-request-id", self.id.encode()
