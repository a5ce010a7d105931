"""All addresses of the service, and what is answered there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from .. import __version__
from ._answers import write_answer
from ._asgi import JSON, Receive, Scope, Send, respond
from ._bodies import Bodies
from ._front import Gate
from ._gathering import Gatherer
from ._http_exchange import EXCHANGE, Exchange
from ._limits import Limits
from ._metrics import CONTENT_TYPE, Metrics
from ._openapi import document
from ._page import page
from ._reading import read_call
from ._refusals import Refused
from ._served import VERSION, Served

# Of the protocol.
EXTENSIONS = ["binary_tensor_data", "model_configuration", "model_repository", "parameters", "statistics"]
HEADER_LENGTH = b"inference-header-content-length"


class Models:
    """The models of a process by name: none before they are loaded and each has been called once."""

    def __init__(self) -> None:
        self.infers: dict[str, Infer] = {}
        self.loaded = False
        # Why they could not be loaded.
        self.failure: Exception | None = None

    def take(self, infers: Mapping[str, Infer]) -> None:
        """Have models that are loaded."""
        self.infers.update(infers)
        self.loaded = True

    def find(self, scope: Scope) -> Infer:
        """The model that an address names.

        Raises:
            Refused: there is no such model or version, or models are still being loaded.
        """
        parameters = scope["path_params"]
        name, version = parameters["model"], parameters.get("version", VERSION)
        exchange: Exchange = scope[EXCHANGE]
        found = self.infers.get(name)
        if found is None:
            if not self.loaded:
                raise Refused(503, "the models are being loaded.", retry_after=1)
            raise Refused(404, f"there is no model {name!r}; there are: {', '.join(self.infers)}.")
        if version != VERSION:
            raise Refused(404, f"model {name!r} has no version {version!r}; it has {VERSION!r}.")
        exchange.model = name
        return found


class Infer:
    """Evaluations of one model, as an ASGI application.

    Args:
        gatherer: of the model.
        bodies: of all requests.
        limits: of the service.
    """

    def __init__(self, gatherer: Gatherer, bodies: Bodies, limits: Limits) -> None:
        self.gatherer, self._bodies, self._limits = gatherer, bodies, limits

    @property
    def served(self) -> Served:
        """The model."""
        return self.gatherer.served

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["method"] != "POST":
            raise Refused(405, f"{scope['method']} does nothing here; POST a request.", allow="POST")
        exchange: Exchange = scope[EXCHANGE]
        served, bodies = self.served, self._bodies
        exchange.model = served.name
        try:
            body = await bodies.read(exchange)
            call = read_call(served, body, exchange.headers.get(HEADER_LENGTH), self._limits)
            exchange.operation, exchange.rows = call.operation.name, call.rows
            arrays = await self.gatherer.submit(call, exchange)
            headers, answer = write_answer(served.name, call, arrays)
        finally:
            bodies.release(exchange)
        await respond(send, 200, headers, answer)


def routes(models: Models, metrics: Metrics, gate: Gate, limits: Limits) -> list[BaseRoute]:
    """All routes.

    Args:
        models: by name.
        metrics: of the process.
        gate: who comes in.
        limits: of the service.
    """

    async def server(request: Request) -> Response:
        return _json(
            request,
            "server",
            {"name": "neml2-aoti", "version": __version__, "extensions": EXTENSIONS},
        )

    async def live(request: Request) -> Response:
        return _json(request, "health", {"live": True})

    async def ready(request: Request) -> Response:
        if not models.loaded or not gate.open:
            reason = "the models are being loaded." if gate.open else "the service is stopping."
            raise Refused(503, reason, retry_after=1)
        return _json(request, "health", {"ready": True})

    async def listed(request: Request) -> Response:
        return _json(request, "metadata", {"models": list(models.infers)})

    async def model(request: Request) -> Response:
        return _json(request, "metadata", models.find(request.scope).served.metadata)

    async def model_ready(request: Request) -> Response:
        found = models.find(request.scope)
        return _json(request, "health", {"name": found.served.name, "ready": models.loaded and gate.open})

    async def config(request: Request) -> Response:
        return _json(request, "metadata", models.find(request.scope).served.config(limits.request_rows))

    async def stats(request: Request) -> Response:
        chosen = [models.find(request.scope)] if "model" in request.path_params else list(models.infers.values())
        return _json(request, "metadata", {"model_stats": [metrics.statistics(found.served) for found in chosen]})

    async def index(request: Request) -> Response:
        entries = [{"name": name, "version": VERSION, "state": "READY"} for name in models.infers]
        return _json(request, "metadata", entries)

    async def openapi(request: Request) -> Response:
        return _json(request, "metadata", document([found.served for found in models.infers.values()]))

    async def home(request: Request) -> Response:
        _exchange(request).operation = "page"
        return page()

    async def measured(request: Request) -> Response:
        _exchange(request).operation = "metrics"
        return Response(metrics.page(), headers={"content-type": CONTENT_TYPE.decode()})

    class Find:
        """Evaluations of the model that the address names; a class, as Starlette takes applications."""

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            await models.find(scope)(scope, receive, send)

    one = "/v2/models/{model}"
    both = (one, one + "/versions/{version}")
    return [
        *(Route(path + "/infer", Find()) for path in both),
        Route("/v2/health/live", live),
        Route("/v2/health/ready", ready),
        Route("/v2", server),
        Route("/v2/models", listed),
        Route("/v2/repository/index", index, methods=["POST"]),
        Route("/v2/models/stats", stats),
        *(Route(path, model) for path in both),
        *(Route(path + "/ready", model_ready) for path in both),
        *(Route(path + "/config", config) for path in both),
        *(Route(path + "/stats", stats) for path in both),
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
