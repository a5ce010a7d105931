"""All addresses of the service, and what is answered there."""

from __future__ import annotations

from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from .. import __version__
from .answers import write_answer
from .asgi import JSON, Receive, Scope, Send, respond
from .bodies import Bodies
from .calls import read_call
from .front import EXCHANGE, Exchange, Gate
from .gathering import Gatherer
from .limits import Limits
from .metrics import CONTENT_TYPE, Metrics
from .openapi import document
from .page import page
from .refusals import Refused
from .served import VERSION

HEADER_LENGTH = b"inference-header-content-length"


class Models:
    """The models of a process by name: none before they are loaded and each has been called once."""

    def __init__(self) -> None:
        self.gatherers: dict[str, Gatherer] = {}
        self.loaded = False
        # Why they could not be loaded.
        self.failure: Exception | None = None

    def find(self, scope: Scope) -> Gatherer:
        """The model that an address names.

        Raises:
            Refused: there is no such model or version, or models are still being loaded.
        """
        parameters = scope["path_params"]
        name, version = parameters["model"], parameters.get("version", VERSION)
        exchange: Exchange = scope[EXCHANGE]
        found = self.gatherers.get(name)
        if found is None:
            if not self.loaded:
                raise Refused(503, "the models are being loaded.", retry_after=1)
            raise Refused(404, f"there is no model {name!r}; there are: {', '.join(self.gatherers)}.")
        if version != VERSION:
            raise Refused(404, f"model {name!r} has no version {version!r}; it has {VERSION!r}.")
        exchange.model = name
        return found


class Infer:
    """The address where models are evaluated, as an ASGI application of its own: it is what must be fast.

    Args:
        models: by name.
        limits: of the service.
    """

    def __init__(self, models: Models, limits: Limits) -> None:
        self._models, self._limits, self._bodies = models, limits, Bodies(limits)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["method"] != "POST":
            raise Refused(405, f"{scope['method']} does nothing here; POST a request.")
        gatherer = self._models.find(scope)
        exchange: Exchange = scope[EXCHANGE]
        with self._bodies.room(self._bodies.size_of(scope)):
            body = await self._bodies.read(receive)
            length = next((value for name, value in scope["headers"] if name == HEADER_LENGTH), None)
            call = read_call(gatherer.served, body, length, self._limits)
            exchange.operation, exchange.rows = call.operation.name, call.rows
            arrays = await gatherer.submit(call, receive)
            headers, answer = write_answer(gatherer.served.name, call, arrays)
        await respond(send, 200, headers, answer)


def routes(models: Models, limits: Limits, metrics: Metrics, gate: Gate) -> list[BaseRoute]:
    """All routes; the one that must be fast first.

    Args:
        models: by name.
        limits: of the service.
        metrics: of the process.
        gate: who comes in.
    """

    async def server(request: Request) -> Response:
        return _json(
            request,
            "server",
            {"name": "neml2-aoti", "version": __version__, "extensions": ["binary_tensor_data"]},
        )

    async def live(request: Request) -> Response:
        return _json(request, "health", {"live": True})

    async def ready(request: Request) -> Response:
        if not models.loaded or not gate.open:
            reason = "the models are being loaded." if gate.open else "the service is stopping."
            raise Refused(503, reason, retry_after=1)
        return _json(request, "health", {"ready": True})

    async def listed(request: Request) -> Response:
        return _json(request, "metadata", {"models": list(models.gatherers)})

    async def model(request: Request) -> Response:
        return _json(request, "metadata", models.find(request.scope).served.metadata)

    async def model_ready(request: Request) -> Response:
        found = models.find(request.scope)
        return _json(request, "health", {"name": found.served.name, "ready": models.loaded and gate.open})

    async def openapi(request: Request) -> Response:
        return _json(request, "metadata", document([found.served for found in models.gatherers.values()]))

    async def home(request: Request) -> Response:
        _exchange(request).operation = "page"
        return page()

    async def measured(request: Request) -> Response:
        _exchange(request).operation = "metrics"
        return Response(metrics.page(), headers={"content-type": CONTENT_TYPE.decode()})

    infer = Infer(models, limits)
    one = "/v2/models/{model}"
    both = (one, one + "/versions/{version}")
    return [
        *(Route(path + "/infer", infer) for path in both),
        Route("/v2/health/live", live),
        Route("/v2/health/ready", ready),
        Route("/v2", server),
        Route("/v2/models", listed),
        *(Route(path, model) for path in both),
        *(Route(path + "/ready", model_ready) for path in both),
        Route("/openapi.json", openapi),
        Route("/metrics", measured),
        Route("/", home),
    ]


def _exchange(request: Request) -> Exchange:
    found: Exchange = request.scope[EXCHANGE]
    return found


def _json(request: Request, kind: str, content: Any) -> Response:
    _exchange(request).operation = kind
    return Response(orjson.dumps(content), headers={name.decode(): value.decode() for name, value in JSON})
