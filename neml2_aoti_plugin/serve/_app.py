"""`app`: the service as an ASGI application, its addresses, and what each request passes on its way."""

from __future__ import annotations

import asyncio
import hmac
import os
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from secrets import token_hex
from time import perf_counter
from typing import Any

import anyio
import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .. import __version__
from ..errors import InputError
from ..model import Model, name_at
from ._documents import OPEN, document, page
from ._gathering import Gatherer, call_first
from ._limits import Limits, Refused
from ._requests import HEADER_LENGTH, JSON, read_call, write_answer
from ._served import VERSION, ModelSource, require_names
from ._telemetry import EventLog, Metrics

Path_ = str | os.PathLike[str]
GivenModels = Mapping[str, Path_ | Model] | Iterable[Path_ | ModelSource]

# Of the protocol.
EXTENSIONS = ["binary_tensor_data", "model_configuration", "model_repository", "parameters", "statistics"]
# Longest id of a request that is taken from the client.
LONGEST = 128


def app(models: GivenModels, *, token: str | None = None, **limits: float) -> Starlette:
    """The service as an ASGI application, for a server of one's own.

    Models are loaded and called once when the server starts the application (ASGI's lifespan), so that each of its
    processes has its own.

    Args:
        models: paths of artifacts or stubs, or loaded models, by name; or paths alone, whose models keep their names.
        token: that requests must have, but for those that ask whether the service is there.
        limits: fields of `neml2_aoti_plugin.serve.Limits`.

    Returns:
        The application.

    Raises:
        InputError: a limit has no such value, or two models have the same name, or one a name that no address can have.
    """
    return Service(models, Limits(**limits), token, EventLog()).application()  # type: ignore[arg-type]


@dataclass(eq=False)
class Record:
    """One request, and what log and metrics tell of it; it is at `request.state.record`."""

    # The last one where there are several of a name. Starlette's own look through all of them each time.
    headers: dict[bytes, bytes]
    id: str
    start: float = field(default_factory=perf_counter)
    status: int = 0
    model: str = ""
    operation: str = ""
    rows: int = 0
    error: str = ""
    # Whether its body has come, or there is none.
    received: bool = False


class Service:
    """The models of one process, none before they are loaded and each has been called once, and their addresses."""

    def __init__(self, given: GivenModels, limits: Limits, token: str | None, event_log: EventLog) -> None:
        self._sources, self._limits = _sources(given), limits
        self._token = token.encode() if token is not None else None
        self.event_log, self.metrics = event_log, Metrics()
        self._gatherers: dict[str, Gatherer] = {}
        # Bytes of the bodies of unanswered requests that have come: a length that a client claims keeps nobody out.
        self._held = 0
        # Whether new requests are taken; and why models could not be loaded.
        self.open = True
        self.failure: Exception | None = None

    @property
    def names(self) -> list[str]:
        """Of the models."""
        return list(self._gatherers)

    def application(self) -> Starlette:
        """The ASGI application; the name of a route says what it gives, in the OpenAPI document too."""
        find, metrics, rows = self._find, self.metrics, self._limits.request_rows
        itself = {"name": "neml2-aoti", "version": __version__, "extensions": EXTENSIONS}

        def told(path: str, kind: str, name: str, content: Callable[[Request], Any], method: str = "GET") -> Route:
            """The address of a document; `kind` is what log and metrics call it."""

            async def endpoint(request: Request) -> Response:
                request.state.record.operation = kind
                found = content(request)
                return found if isinstance(found, Response) else Response(msgspec.json.encode(found), media_type=JSON)

            return Route(path, endpoint, name=name, methods=[method], include_in_schema=bool(name))

        def of_model(at: str) -> list[Route]:
            return [
                told(at, "metadata", "Inputs, outputs and operations of a model.", lambda r: find(r).served.metadata),
                told(at + "/ready", "health", "Whether a model takes requests.", self._model_ready),
                told(at + "/config", "metadata", "Configuration of a model.", lambda r: find(r).served.config(rows)),
                told(at + "/stats", "metadata", "Statistics of a model.", self._stats),
            ]

        both = ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")
        routes = [
            *(Route(at + "/infer", self._infer, methods=["POST"]) for at in both),
            told("/v2/health/live", "health", "Whether the service is there.", lambda _: {"live": True}),
            told("/v2/health/ready", "health", "Whether it takes requests.", self._ready),
            told("/v2", "server", "Name, version and extensions of the service.", lambda _: itself),
            told("/v2/models", "metadata", "Names of the models.", lambda _: {"models": self.names}),
            told("/v2/repository/index", "metadata", "Names, versions and states of the models.", self._index, "POST"),
            told("/v2/models/stats", "metadata", "Statistics of all models.", self._stats),
            *(route for at in both for route in of_model(at)),
            told("/openapi.json", "metadata", "This document.", self._openapi),
            told("/metrics", "metrics", "Metrics for Prometheus.", lambda _: metrics.answer()),
            told("/", "page", "", lambda _: page()),
        ]
        return Starlette(
            routes=routes,
            middleware=[Middleware(Entrance, service=self)],
            exception_handlers={HTTPException: _refuse},
            lifespan=self._lifespan,
        )

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        worker = ThreadPoolExecutor(1, "neml2-aoti-serve")
        try:
            self._load(worker)
            yield
        finally:
            for gatherer in self._gatherers.values():
                gatherer.stop()
            worker.shutdown(wait=False, cancel_futures=True)
            self.event_log.write("stopped", process=os.getpid())

    def _load(self, worker: ThreadPoolExecutor) -> None:
        """Load all models, and call each once."""
        found = []
        try:
            for source in self._sources:
                start = perf_counter()
                served = source.load()
                call_first(served)
                found.append(served)
                seconds = round(perf_counter() - start, 3)
                self.event_log.write("loaded", model=served.name, digest=served.model.digest, seconds=seconds)
        except Exception as error:
            self.failure = error
            self.event_log.error("not loaded", error)
            raise
        self._gatherers = {one.name: Gatherer(one, self._limits, self.metrics, worker) for one in found}

    def check(self, path: str, headers: dict[bytes, bytes]) -> None:
        """Refuse a request that may not come in."""
        if path in OPEN:
            return
        if self._token is not None:
            kind, _, token = headers.get(b"authorization", b"").partition(b" ")
            # Compared in full either way, so that the time tells nothing.
            fits = hmac.compare_digest(token.strip(), self._token)
            if kind.lower() != b"bearer" or not fits:
                raise Refused(401, "a token is needed: the header 'Authorization: Bearer TOKEN' is absent or wrong.")
        self._require(loaded=False)

    def _require(self, *, loaded: bool) -> None:
        """Refuse a request that comes too late, or too early for one that needs loaded models."""
        if not self.open:
            raise Refused(503, "the service is stopping.")
        if loaded and not self._gatherers:
            raise Refused(503, "the models are being loaded.")

    def _find(self, request: Request) -> Gatherer:
        """The model that an address names."""
        name, version = request.path_params["model"], request.path_params.get("version", VERSION)
        self._require(loaded=True)
        found = self._gatherers.get(name)
        if found is None:
            raise Refused(404, f"there is no model {name!r}; there are: {', '.join(self._gatherers)}.")
        if version != VERSION:
            raise Refused(404, f"model {name!r} has no version {version!r}; it has {VERSION!r}.")
        request.state.record.model = name
        return found

    # -- evaluations -------------------------------------------------------------------------------------------------

    async def _infer(self, request: Request) -> Response:
        gatherer, record = self._find(request), request.state.record
        parts: list[bytes] = []
        try:
            await self._receive(request, record.headers, parts)
            record.received = True
            call = read_call(gatherer.served, b"".join(parts), record.headers.get(HEADER_LENGTH.encode()), self._limits)
            record.operation, record.rows = call.signature.name, call.rows
            arrays = await gatherer.evaluate(call, request.is_disconnected)
            headers, body = write_answer(gatherer.served.name, call, arrays)
        finally:
            self._held -= sum(map(len, parts))
        return Response(body, headers=headers)

    async def _receive(self, request: Request, headers: dict[bytes, bytes], parts: list[bytes]) -> None:
        """The body of a request into `parts`, within bounds of size, memory and time."""
        limits, size = self._limits, 0
        coding = headers.get(b"content-encoding", b"identity").decode("latin-1")
        if coding.lower() != "identity":
            raise Refused(415, f"the body is compressed by {coding!r}, which is not read here. Send it as it is.")
        claimed = headers.get(b"content-length", b"")
        if claimed.isdigit() and int(claimed) > limits.body_bytes:
            raise self._too_large(int(claimed))
        with anyio.move_on_after(limits.receive_seconds) as time:
            try:
                async for part in request.stream():
                    size += len(part)
                    if size > limits.body_bytes:
                        raise self._too_large(size)
                    if self._held + len(part) > limits.bodies_bytes:
                        raise Refused(
                            503,
                            f"bodies of {self._held} bytes have come with requests that are not answered yet; there is "
                            f"no room for {len(part)} more.",
                        )
                    self._held += len(part)
                    parts.append(part)
            except ClientDisconnect:
                raise Refused(400, "the client has closed the connection before the end of the body.") from None
        if time.cancelled_caught:
            raise Refused(408, f"the body did not arrive within {limits.receive_seconds:g} s; {size} bytes of it did.")

    def _too_large(self, size: int) -> Refused:
        return Refused(413, f"the body has {size} bytes or more; {self._limits.body_bytes} are the most here.")

    # -- what is told ------------------------------------------------------------------------------------------------

    def _ready(self, _: Request) -> dict[str, bool]:
        self._require(loaded=True)
        return {"ready": True}

    def _model_ready(self, request: Request) -> dict[str, Any]:
        return {"name": self._find(request).served.name, "ready": self.open}

    def _stats(self, request: Request) -> dict[str, Any]:
        chosen = [self._find(request)] if "model" in request.path_params else self._gatherers.values()
        return {"model_stats": [self.metrics.statistics(gatherer.served) for gatherer in chosen]}

    def _index(self, _: Request) -> list[dict[str, str]]:
        return [{"name": name, "version": VERSION, "state": "READY"} for name in self._gatherers]

    def _openapi(self, request: Request) -> dict[str, Any]:
        return document(self.names, request.app.routes)


class Entrance:
    """What each request passes first: an id, the token, whether the service is still open; then log and metrics."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service
        self._numbers, self._process = count(), token_hex(4)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        # The client's own id of the request, or a new one.
        name = headers.get(b"x-request-id", b"").decode("latin-1")
        if not (0 < len(name) <= LONGEST and name.isascii() and name.isprintable()):
            name = f"{self._process}-{next(self._numbers)}"
        record = scope.setdefault("state", {})["record"] = Record(headers, name)
        record.received = headers.get(b"content-length", b"0") == b"0" and b"transfer-encoding" not in headers

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", record.id.encode())]
            await send(message)

        async def refuse(refused: Refused) -> None:
            if not record.status:
                record.error = refused.message
                if not record.received:
                    # What is left of the body is not worth waiting for.
                    refused.headers["connection"] = "close"
                answer = Response(msgspec.json.encode(refused.document), refused.status, refused.headers, JSON)
                await answer(scope, receive, send_with_id)

        try:
            self._service.check(scope["path"], headers)
            await self._app(scope, receive, send_with_id)
        except Refused as refused:
            await refuse(refused)
        except asyncio.CancelledError:
            # The service has stopped, and waits no longer.
            if record.status:
                raise
            await refuse(Refused(503, "the service stops, and was not done in time."))
        except Exception as error:
            self._service.event_log.error("failed", error, id=record.id)
            await refuse(Refused(500, f"the service failed; its log says more of request {record.id}."))
        finally:
            self._account(scope, record)

    def _account(self, scope: Scope, record: Record) -> None:
        seconds, event_log = perf_counter() - record.start, self._service.event_log
        self._service.metrics.answered(record.model, record.operation, record.status, seconds)
        if event_log.requests or record.status == 500:
            fields = {"id": record.id, "method": scope["method"], "path": scope["path"], "status": record.status}
            fields["ms"] = round(seconds * 1e3, 3)
            if record.operation:
                fields.update(operation=record.operation, rows=record.rows)
            if record.error:
                fields["error"] = record.error[:500]
            event_log.write("request", **fields)


async def _refuse(request: Request, error: Exception) -> Response:
    """What Starlette refuses, such as an address that there is not, in the protocol's form."""
    assert isinstance(error, HTTPException)
    path, method, allow = request.scope["path"], request.method, (error.headers or {}).get("Allow")
    texts = {404: f"there is nothing at {path!r}.", 405: f"{method} does nothing at {path!r}, expected {allow}."}
    raise Refused(error.status_code, texts.get(error.status_code, error.detail), allow=allow)


def _sources(given: GivenModels) -> list[ModelSource]:
    """Where each model comes from."""
    if isinstance(given, Mapping):
        found = [
            ModelSource(name, one.artifact, loaded=one) if isinstance(one, Model) else ModelSource(name, Path(one))
            for name, one in given.items()
        ]
    else:
        found = [one if isinstance(one, ModelSource) else ModelSource(name_at(one), Path(one)) for one in given]
    if not found:
        raise InputError("there is no model to serve. Give one artifact or more.")
    require_names([source.name for source in found])
    return found
