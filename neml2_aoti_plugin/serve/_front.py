"""What each request passes first: its id, the token, whether the service is still open; and its line in the log."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from secrets import token_hex
from time import perf_counter
from typing import Any

from starlette.exceptions import HTTPException

from ._asgi import REFUSED, App, Receive, Scope, Send, refuse
from ._event_log import EventLog
from ._http_exchange import EXCHANGE, Exchange
from ._metrics import Metrics
from ._refusals import Refused

# What anybody may ask for, with or without a token: whether the service is there, and the page, which holds nothing.
OPEN = frozenset({"/", "/v2/health/live", "/v2/health/ready"})
# Longest id of a request that is taken from the client.
LONGEST = 128


@dataclass(eq=False)
class Gate:
    """Whether requests are let in.

    Args:
        token: that they must have; None for none.
        open: whether new ones are taken.
    """

    token: bytes | None = None
    open: bool = True

    def check(self, path: str, headers: Mapping[bytes, bytes]) -> None:
        """Refuse a request that may not come in.

        Args:
            path: that it asks for.
            headers: of it.

        Raises:
            Refused: it has no right token, or the service stops.
        """
        if self.token is not None and path not in OPEN:
            kind, _, token = headers.get(b"authorization", b"").partition(b" ")
            # Compared in full either way, so that the time tells nothing.
            fits = hmac.compare_digest(token.strip(), self.token)
            if kind.lower() != b"bearer" or not fits:
                raise Refused(401, "a token is needed: the header 'Authorization: Bearer TOKEN' is absent or wrong.")
        if not self.open and path not in OPEN:
            raise Refused(503, "the service is stopping.", retry_after=1, close=True)


class Front:
    """ASGI application around all others.

    Args:
        app: answers requests.
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
        # With it, Starlette's router raises where there is nothing to be found.
        scope["app"] = self
        headers = dict(scope["headers"])
        exchange = scope[EXCHANGE] = Exchange(self._id(headers), headers, receive, send)
        try:
            if REFUSED in scope:
                raise scope[REFUSED]
            self._gate.check(scope["path"], headers)
            await self._app(scope, receive, exchange.send)
        except (Refused, HTTPException) as error:
            refused = error if isinstance(error, Refused) else _told(scope, error)
            exchange.error = refused.message
            if refused.__cause__ is not None:
                self._event_log.error("failed", refused.__cause__, id=exchange.id)
            await refuse(refused, exchange.send)
        except asyncio.CancelledError:
            # The service has stopped, and waits no longer.
            if exchange.status:
                raise
            text = "the service stops, and was not done in time."
            await refuse(Refused(503, text, retry_after=1), exchange.send)
        except Exception as error:
            self._event_log.error("failed", error, id=exchange.id)
            if not exchange.status:
                text = f"the service failed; its log says more of request {exchange.id}."
                await refuse(Refused(500, text), exchange.send)
        finally:
            self._account(scope, exchange)
            # It leads back to the scope: left there, the garbage collector would have to find all of it.
            del scope[EXCHANGE]

    def _id(self, headers: dict[bytes, bytes]) -> str:
        """The client's own id of the request, or a new one."""
        given = headers.get(b"x-request-id")
        if given is not None and len(given) <= LONGEST and given.isascii():
            text = given.decode()
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


def _told(scope: Scope, error: HTTPException) -> Refused:
    """What Starlette refuses, such as an address that there is not, in the protocol's form."""
    path, method = scope["path"], scope["method"]
    texts = {404: f"there is nothing at {path!r}.", 405: f"{method} does nothing at {path!r}."}
    text = texts.get(error.status_code, error.detail)
    return Refused(error.status_code, text, allow=(error.headers or {}).get("Allow"))
