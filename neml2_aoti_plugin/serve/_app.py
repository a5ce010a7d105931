"""`app`: the service as an ASGI application."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from time import perf_counter

from starlette.routing import Router

from ..errors import InputError
from ..model import Model, name_at
from ._asgi import App
from ._bodies import Bodies
from ._event_log import EventLog
from ._first_calls import call_first
from ._front import Front, Gate
from ._gathering import Gatherer
from ._limits import Limits
from ._metrics import Metrics
from ._routes import Infer, Models, routes
from ._served import Served, Source, require_names

Path_ = str | os.PathLike[str]
# How often requests that have waited for too long are looked for, in seconds.
SWEEP = 0.25


def app(
    models: Mapping[str, Path_ | Model] | Iterable[Path_ | Source], *, token: str | None = None, **limits: float
) -> App:
    """The service as an ASGI application, for a server of one's own.

    Models are loaded and called once when the server starts the application (ASGI's lifespan), so that each of its
    processes has its own.

    Args:
        models: paths of artifacts or stubs, or loaded models, by name; or paths alone, whose models keep their names.
        token: that requests must have, but for those that ask whether the service is there.
        limits: fields of `neml2_aoti_plugin.serve._limits.Limits`.

    Returns:
        The application.

    Raises:
        InputError: a limit has no such value, or two models have the same name, or one a name that no address can have.
    """
    gate = Gate(token.encode() if token is not None else None)
    return build(models, Limits(**limits), EventLog(), gate)[0]  # type: ignore[arg-type]


def build(
    given: Mapping[str, Path_ | Model] | Iterable[Path_ | Source], limits: Limits, event_log: EventLog, gate: Gate
) -> tuple[App, Models]:
    """The application, and the models that it will have loaded once it is started.

    Args:
        given: see `app`.
        limits: of the service.
        event_log: what happens is told there.
        gate: who comes in.

    Raises:
        InputError: see `app`.
    """
    sources, metrics, models = _sources(given), Metrics(), Models()

    @asynccontextmanager
    async def lifespan(_: object) -> AsyncIterator[None]:
        pool = ThreadPoolExecutor(1, "neml2-aoti-serve")
        try:
            models.take(_load(sources, limits, metrics, pool, event_log))
        except Exception as error:
            models.failure = error
            event_log.error("not loaded", error)
            raise
        sweep = asyncio.create_task(_sweep(models))
        try:
            yield
        finally:
            sweep.cancel()
            pool.shutdown(wait=False, cancel_futures=True)
            event_log.write("stopped", process=os.getpid())

    # Starlette's router alone: what its application wraps around it is the business of Front.
    router = Router(routes(models, metrics, gate, limits), lifespan=lifespan)
    return Front(router, gate, event_log, metrics), models


def _load(
    sources: Mapping[str, Callable[[], Model]],
    limits: Limits,
    metrics: Metrics,
    pool: Executor,
    event_log: EventLog,
) -> dict[str, Infer]:
    """Load all models, and call each once."""
    found, bodies = {}, Bodies(limits)
    for name, load in sources.items():
        start = perf_counter()
        served = Served(name, load())
        call_first(served)
        found[name] = Infer(Gatherer(served, limits, metrics, pool), bodies, limits)
        event_log.write("loaded", model=name, digest=served.model.digest, seconds=round(perf_counter() - start, 3))
    return found


async def _sweep(models: Models) -> None:
    while True:
        await asyncio.sleep(SWEEP)
        for infer in models.infers.values():
            infer.gatherer.sweep()


def _sources(models: Mapping[str, Path_ | Model] | Iterable[Path_ | Source]) -> dict[str, Callable[[], Model]]:
    """How each model is loaded, by name."""
    found: list[tuple[str, Callable[[], Model]]] = []
    if isinstance(models, Mapping):
        for name, given in models.items():
            found.append((name, _itself(given) if isinstance(given, Model) else Source(name, Path(given)).load))
    else:
        for one in models:
            source = one if isinstance(one, Source) else Source(name_at(one), Path(one))
            found.append((source.name, source.load))
    if not found:
        raise InputError("there is no model to serve. Give one artifact or more.")
    require_names([name for name, _ in found])
    return dict(found)


def _itself(model: Model) -> Callable[[], Model]:
    return lambda: model
