"""`app`: the service as an ASGI application."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from time import perf_counter

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response

from ..errors import InputError
from ..model import Model
from .event_log import EventLog
from .first_calls import call_first
from .front import EXCHANGE, Front, Gate
from .gathering import Gatherer
from .limits import Limits
from .metrics import Metrics
from .routes import Models, routes
from .served import Served, Source, require_names

Path_ = str | os.PathLike[str]
# How often requests that have waited for too long are looked for, in seconds.
SWEEP = 0.25


def app(
    models: Mapping[str, Path_ | Model] | Iterable[Path_ | Source],
    *,
    token: str | None = None,
    event_log: EventLog | None = None,
    gate: Gate | None = None,
    **limits: float,
) -> Starlette:
    """The service as an ASGI application, for a server of one's own.

    Models are loaded and called once when the server starts the application (ASGI's lifespan), so that each of its
    processes has its own.

    Args:
        models: artifacts, or loaded models, by name; or artifacts alone, which take the names of their folders.
        token: that requests must have, but for those that ask whether the service is there.
        event_log: the log; nothing is logged if not given.
        gate: who comes in, for a server that tells when it stops.
        limits: fields of `neml2_aoti_plugin.serve.limits.Limits`.

    Returns:
        The application.

    Raises:
        InputError: a limit has no such value, or two models have the same name, or one a name that no address can have.
    """
    sources = _sources(models)
    bounds = Limits(**limits)  # type: ignore[arg-type]
    event_log, gate = event_log or EventLog(), gate or Gate()
    if token is not None:
        gate.token = token.encode()
    metrics, held = Metrics(), Models()

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        pool = ThreadPoolExecutor(1, "neml2-aoti-serve")
        try:
            held.gatherers = _load(sources, bounds, metrics, pool, event_log)
        except Exception as error:
            held.failure = error
            event_log.error("not loaded", error)
            raise
        held.loaded = True
        event_log.write("ready", models=list(held.gatherers), process=os.getpid())
        sweep = asyncio.create_task(_sweep(held))
        try:
            yield
        finally:
            sweep.cancel()
            pool.shutdown(wait=False, cancel_futures=True)
            event_log.write("stopped", process=os.getpid())

    application = Starlette(
        routes=routes(held, bounds, metrics, gate),
        middleware=[Middleware(Front, gate=gate, event_log=event_log, metrics=metrics)],
        exception_handlers={HTTPException: _told},
        lifespan=lifespan,
    )
    application.state.models = held
    return application


def _load(
    sources: Mapping[str, Callable[[], Model]],
    limits: Limits,
    metrics: Metrics,
    pool: Executor,
    event_log: EventLog,
) -> dict[str, Gatherer]:
    """Load all models, and call each once."""
    found = {}
    for name, load in sources.items():
        start = perf_counter()
        served = Served(name, load())
        call_first(served)
        found[name] = Gatherer(served, limits, metrics, pool)
        event_log.write("loaded", model=name, digest=served.model.digest, seconds=round(perf_counter() - start, 3))
    return found


async def _sweep(models: Models) -> None:
    while True:
        await asyncio.sleep(SWEEP)
        for gatherer in models.gatherers.values():
            gatherer.sweep()


async def _told(request: Request, error: Exception) -> Response:
    """What Starlette refuses, such as an address that there is not, in the protocol's form."""
    assert isinstance(error, HTTPException)
    path = request.scope["path"]
    texts = {404: f"there is nothing at {path!r}.", 405: f"{request.method} does nothing at {path!r}."}
    text = texts.get(error.status_code, error.detail)
    request.scope[EXCHANGE].error = text
    headers = {**(error.headers or {}), "content-type": "application/json"}
    return Response(orjson.dumps({"error": text}), error.status_code, headers)


def _sources(models: Mapping[str, Path_ | Model] | Iterable[Path_ | Source]) -> dict[str, Callable[[], Model]]:
    """How each model is loaded, by name."""
    found: list[tuple[str, Callable[[], Model]]] = []
    if isinstance(models, Mapping):
        for name, given in models.items():
            found.append((name, _itself(given) if isinstance(given, Model) else Source(name, Path(given)).load))
    else:
        for one in models:
            source = one if isinstance(one, Source) else Source(Path(one).name, Path(one))
            found.append((source.name, source.load))
    if not found:
        raise InputError("there is no model to serve. Give one artifact or more.")
    require_names([name for name, _ in found])
    return dict(found)


def _itself(model: Model) -> Callable[[], Model]:
    return lambda: model
