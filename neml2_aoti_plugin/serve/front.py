"""What each request passes first: its id, the token, whether the service is still open; and its line in the log."""

from __future__ import annotations

import asyncio
import hmac
from dataclasses import dataclass
from itertools import count
from secrets import token_hex
from time import perf_counter
from typing import Any

from .asgi import App, Message, Receive, Scope, Send, refuse
from .event_log import EventLog
from .metrics import Metrics
from .refusals import Refused

EXCHANGE = "neml2_aoti_plugin.exchange"
# What anybody may ask for, with or without a token: whether the service is there, and the page, which holds nothing.
OPEN = frozenset({"/", "/v2/health/live", "/v2/health/ready"})
# Longest id of a request that is taken from the client.
LONGEST = 128


@dataclass(eq=False)
class Exchange:
    """One request and its answer, as log and metrics tell them.

    Args:
        id: of the request.
        start: when it came.
        status: of the answer; 0 before.
        model: that it named.
        operation: that it asked for.
        rows: that it has.
        error: that the client was told.
    """

    id: str
    start: float
    status: int = 0
    model: str = ""
    operation: str = ""
    rows: int = 0
    error: str = ""


@dataclass(eq=False)
class Gate:
    """Whether requests are let in.

    Args:
        token: that they must have; None for none.
        open: whether new ones are taken.
    """

    token: bytes | None = None
    open: bool = True

    def check(self, scope: Scope) -> None:
        """Refuse a request that may not come in.

        Raises:
            Refused: it has no right token, or the service stops.
        """
        if self.token is not None and scope["path"] not in OPEN:
            given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            kind, _, token = given.partition(b" ")
            # Compared in full either way, so that the time tells nothing.
            fits = hmac.compare_digest(token.strip(), self.token)
            if kind.lower() != b"bearer" or not fits:
                raise Refused(401, "a token is needed: the header 'Authorization: Bearer TOKEN' is absent or wrong.")
        if not self.open and scope["path"] not in OPEN:
            raise Refused(503, "the service is stopping.", retry_after=1, close=True)


class Front:
    """ASGI middleware around all routes.

    Args:
        app: what is behind it.
        gate: who comes in.
        event_log: gets a line for each request.
        metrics: count it.
    """

    def __init__(self, app: App, gate: Gate, event_log: EventLog, metrics: Metrics) -> None:
        self._app, self._gate, self._event_log, self._metrics = app, gate, event_log, metrics
        self._numbers, self._process = count(), token_hex(4)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = scope[EXCHANGE] = Exchange(self._id(scope), perf_counter())
        own = (b"x-request-id", exchange.id.encode())

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                message["headers"] = [*message.get("headers", ()), own]
            await send(message)

        try:
            self._gate.check(scope)
            await self._app(scope, receive, answer)
        except Refused as refused:
            exchange.error = refused.message
            if refused.__cause__ is not None:
                self._event_log.error("failed", refused.__cause__, id=exchange.id)
            await refuse(refused, answer)
        except asyncio.CancelledError:
            # The service has stopped, and waits no longer.
            if exchange.status:
                raise
            await refuse(Refused(503, "the service stops, and was not done in time.", retry_after=1), answer)
        except Exception as error:
            self._event_log.error("failed", error, id=exchange.id)
            if not exchange.status:
                await refuse(Refused(500, f"the service failed; its log says more of request {exchange.id}."), answer)
        finally:
            self._account(scope, exchange)

    def _id(self, scope: Scope) -> str:
        """The client's own id of the request, or a new one."""
        for name, value in scope["headers"]:
            if name == b"x-request-id" and len(value) <= LONGEST and value.isascii():
                text: str = value.decode()
                if text.isprintable():
                    return text
        return f"{self._process}-{next(self._numbers)}"

    def _account(self, scope: Scope, exchange: Exchange) -> None:
        seconds = perf_counter() - exchange.start
        self._metrics.answered(exchange.model, exchange.operation, exchange.status, seconds)
        if self._event_log.requests or exchange.status == 500:
            fields: dict[str, Any] = {
                "id": exchange.id,
                "method": scope["method"],
                "path": scope["path"],
                "status": exchange.status,
                "ms": round(seconds * 1e3, 3),
            }
            if exchange.operation:
                fields.update(operation=exchange.operation, rows=exchange.rows)
            if exchange.error:
                fields["error"] = exchange.error[:500]
            self._event_log.write("request", **fields)
