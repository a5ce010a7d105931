"""`neml2-aoti serve`: compiled models behind a service."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..errors import AOTIError
from .options import MOST_THREADS, command, device_options, named
from .output import Report, first_line, waits_for
from .process import say

if TYPE_CHECKING:
    from ..serve._listening import Address
    from ..serve._served import DriverValues, Source
    from .target import Target

TOKEN = "NEML2_AOTI_SERVE_TOKEN"
TOKEN_BYTES = 1 << 16

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_Function = TypeVar("_Function", bound=Callable[..., Any])

# Each limit with its kind, what it bounds, and what holds where it is not given.
LIMITS: tuple[tuple[str, click.ParamType[Any], str], ...] = (
    ("--gather-rows", click.IntRange(1), "Rows that a compiled call gathers; 1 gathers none. [2048]"),
    ("--wait-ms", click.FloatRange(0), "How long a request may wait for others to gather. [0]"),
    ("--queue-rows", click.IntRange(1), "Rows that may wait for each model. [65536]"),
    ("--request-rows", click.IntRange(1), "Rows of one request. [65536]"),
    ("--body-bytes", click.IntRange(1), "Size of the body of a request. [16777216]"),
    ("--bodies-bytes", click.IntRange(1), "Size of the bodies of all unanswered requests. [268435456]"),
    ("--header-bytes", click.IntRange(256), "Size of the headers of a request. [32768]"),
    ("--receive-seconds", click.FloatRange(0.01), "In which the body must arrive. [10]"),
    ("--answer-seconds", click.FloatRange(0.01), "In which a waiting request must be answered. [30]"),
    ("--idle-seconds", click.FloatRange(0.01), "That a connection may be open without another request. [75]"),
    ("--stop-seconds", click.FloatRange(1), "In which accepted requests are finished at the end. [20]"),
    ("--connections", click.IntRange(1), "Open connections of each process. [1024]"),
)


@dataclass(frozen=True)
class ServedModel:
    """A model that was loaded and called."""

    name: str  # under which it is served
    artifact: str  # path of the artifact
    sealed: bool  # whether it has a seal
    digest: str  # SHA-256 of its files
    operations: tuple[str, ...]  # that can be asked for


@dataclass(frozen=True)
class ServeReport(Report):
    """What would be served."""

    address: str  # where
    local: bool  # whether only programs of this machine can connect there
    token: bool  # whether requests must have a token
    models: tuple[ServedModel, ...]  # each loaded, and each of its operations called once

    def render(self) -> Iterator[str]:
        """The models."""
        guarded = "with a token" if self.token else "without a token"
        yield f"{self.address}, {'this machine only' if self.local else 'any machine'}, {guarded}"
        for model in self.models:
            sealed = "sealed" if model.sealed else "no seal"
            yield f"{model.name}: {', '.join(model.operations)} ({model.artifact}, {sealed})"


def limit_options(function: _Function) -> _Function:
    """The options of all limits."""
    for name, kind, text in reversed(LIMITS):
        function = click.option(name, type=kind, help=text)(function)
    return function


@command("""\
  neml2-aoti serve aoti/elasticity
  neml2-aoti serve aoti/viscoplasticity_aoti.i --name soft=aoti/promoted --check
  neml2-aoti serve aoti/elasticity --host 0.0.0.0 --token-file /run/secrets/token --workers 4
""")
@click.argument("paths", metavar="[ARTIFACT|STUB]...", nargs=-1)
@click.option("--name", "others", metavar="NAME=PATH", multiple=True, help="Serve this artifact or stub under NAME.")
@click.option(
    "--parameters", metavar="NAME=FILE", multiple=True, help="Take values of promoted parameters from a file."
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 for any free one.")
@click.option("--uds", type=click.Path(path_type=Path), help="Listen on this Unix socket instead.")
@click.option("--workers", type=click.IntRange(1, 1024), default=1, show_default=True, help="Number of processes.")
@click.option(
    "--threads", type=click.IntRange(1, MOST_THREADS), default=1, show_default=True, help="Threads of torch in each."
)
@click.option("--token-file", type=FILE, help=f"Holds the token; else the environment variable {TOKEN} does.")
@click.option("--no-token", is_flag=True, help="Listen beyond this machine without a token.")
@click.option("--allow-unsealed", is_flag=True, help="Listen beyond this machine with artifacts without a seal.")
@click.option("--quiet", is_flag=True, help="Log no requests but those that fail in the service.")
@click.option("--check", is_flag=True, help="Load and call the models, tell of them, and end.")
@limit_options
@device_options
def serve(
    paths: tuple[str, ...],
    others: tuple[str, ...],
    parameters: tuple[str, ...],
    host: str,
    port: int,
    uds: Path | None,
    workers: int,
    threads: int,
    token_file: Path | None,
    no_token: bool,
    allow_unsealed: bool,
    quiet: bool,
    check: bool,
    device: str | None,
    dtype: str | None,
    **limits: Any,
) -> ServeReport | None:
    """Serve compiled models over HTTP, by the Open Inference Protocol (V2).

    What waits is evaluated together: one compiled call takes all requests that came during the last one. SIGTERM or
    Ctrl-C stops the service once what it has accepted is answered. The log is one JSON object a line, on the standard
    output; --json is for --check. docs/service.md tells more.
    """
    if click.get_current_context().params["as_json"] and not check:
        raise click.UsageError("--json goes with --check; the log of a service is JSON in any case.")

    from ..serve._limits import Limits
    from ..serve._listening import Address
    from ..serve._server import Setup, run, run_many

    bounds = Limits(**{name: value for name, value in limits.items() if value is not None})
    token = _token(token_file)
    address = Address(host, port, uds)
    # A stub is under no seal: beyond this machine, nothing in it is evaluated.
    sources = _sources(paths, others, device, dtype, drivers=address.is_local)
    sources = _with_parameters(sources, parameters)
    if not address.is_local:
        _require_safe(address, sources, token, no_token=no_token, allow_unsealed=allow_unsealed)
    if check:
        return _checked(address, sources, token)
    # The log has the terminal from here on.
    waits_for("")
    setup = Setup(tuple(sources), bounds, token, threads, not quiet)
    bound = address.bind()
    try:
        event_log = setup.event_log()
        event_log.write("starting", address=bound.address, workers=workers, process=os.getpid())
        event_log.flush()
        if workers == 1:
            run(setup, bound)
        else:
            run_many(setup, bound, workers)
    finally:
        bound.release()
    return None


def _sources(
    paths: Sequence[str], others: Sequence[str], device: str | None, dtype: str | None, *, drivers: bool
) -> list[Source]:
    """The models, each found before one is loaded; `drivers` says whether to read what those of stubs prescribe."""
    from ..serve._served import Source, require_names
    from .target import find_target

    def source(target: Target, name: str) -> Source:
        driver = _driver_of(target) if drivers else None
        return Source(name, target.artifact, device, dtype, target.solver, driver=driver)

    found = [source(target, target.model) for target in (find_target(p, None, device, dtype) for p in paths)]
    for text in others:
        name, path = named(text, "NAME=PATH", "--name")
        found.append(source(find_target(path, None, device, dtype), name))
    if not found:
        raise click.UsageError("give an artifact or a stub, or NAME=PATH by --name.")
    require_names([source.name for source in found])
    return found


def _driver_of(target: Target) -> DriverValues | None:
    """What the first driver of a model in its stub prescribes at its first point; it is read, and not run."""
    from .._artifact.stub import drivers_of
    from ..serve._served import DriverValues
    from .points import defaults, load_driver

    names = drivers_of(target.stub, target.model) if target.stub is not None else []
    if target.stub is None or not names:
        return None
    try:
        with defaults(target.device, target.dtype or "float64"):
            built = load_driver(target.stub, names[0], device=target.device, dtype=target.dtype)
    except AOTIError as error:
        say(f"the page at / begins without values of the driver: {first_line(error)}")
        return None
    if not hasattr(built, "prescribed"):
        return None

    def entries(value: Any, step: int | None = None) -> list[float]:
        """Of a tensor of neml2 at the first point."""
        own = value.data.shape[len(value.batch_shape) :]
        data = value.data if step is None else value.data[step]
        found: list[float] = data.reshape(-1, *own)[0].flatten().tolist()
        return found

    first, last = ({n: entries(value, step) for n, value in built.prescribed.items()} for step in (0, -1))
    initial = {n: entries(value) for n, value in built.ics.items()}
    (start,), (end,) = (entries(built.prescribed_time, step) for step in (0, -1))
    return DriverValues(names[0], end - start, first, last, initial)


def _with_parameters(sources: list[Source], given: Sequence[str]) -> list[Source]:
    """The models with files of parameters."""
    known = {source.name: source for source in sources}
    for text in given:
        name, path = named(text, "NAME=FILE", "--parameters")
        if name not in known:
            raise click.BadParameter(
                f"there is no model {name!r}; there are {', '.join(known)}.", param_hint="--parameters"
            )
        known[name] = replace(known[name], parameters=Path(path).absolute())
    return list(known.values())


def _token(file: Path | None) -> str | None:
    """The token out of a file or the environment; never from the command line, which others on the machine can read."""
    from .._files import read_plain

    given = os.environ.get(TOKEN)
    if file is not None:
        given = read_plain(file, "a file that holds the token", TOKEN_BYTES).decode("utf-8", "replace").strip()
    if given is None:
        return None
    if not given or not given.isascii() or not given.isprintable() or " " in given:
        where = str(file) if file is not None else f"the environment variable {TOKEN}"
        raise click.UsageError(f"{where} holds no token: expected one word of printable ASCII characters.")
    return given


def _require_safe(
    address: Address, sources: Sequence[Source], token: str | None, *, no_token: bool, allow_unsealed: bool
) -> None:
    """Refuse what should not be reached from other machines."""
    from .._artifact.trust import is_sealed

    if token is None and not no_token:
        raise click.UsageError(
            f"{address.host} is reached from other machines, and there is no token. Give one by --token-file or "
            f"{TOKEN}, or, where something else guards the service, --no-token."
        )
    unsealed = [str(source.artifact) for source in sources if not is_sealed(source.artifact)]
    if unsealed and not allow_unsealed:
        raise click.UsageError(
            f"{address.host} is reached from other machines, and there is no seal of {', '.join(unsealed)}. Seal what "
            f"you trust: neml2-aoti seal {unsealed[0]}; or give --allow-unsealed."
        )


def _checked(address: Address, sources: Sequence[Source], token: str | None) -> ServeReport:
    """Load and call the models as a service does."""
    from .._artifact.trust import is_sealed
    from ..serve._gathering import call_first

    models = []
    for source in sources:
        served = source.load()
        call_first(served)
        sealed, digest = is_sealed(source.artifact), served.model.digest
        models.append(ServedModel(source.name, str(source.artifact), sealed, digest, tuple(served.signatures)))
    where = f"unix:{address.uds}" if address.uds is not None else f"{address.host}:{address.port}"
    return ServeReport(where, address.is_local, token is not None, tuple(models))
