"""`neml2-aoti serve`: compiled models behind a service."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import FINE
from .output import device_options

if TYPE_CHECKING:
    from ..serve.listening import Address
    from ..serve.served import Source
    from ..workbench.target import Target

TOKEN = "NEML2_AOTI_SERVE_TOKEN"

EPILOG = """\b
Examples:
  neml2-aoti serve aoti/elasticity
  neml2-aoti serve aoti/viscoplasticity_aoti.i --name steel=aoti/steel --port 9000
  neml2-aoti serve aoti/elasticity --host 0.0.0.0 --token-file /run/secrets/token --workers 4
"""


@click.command(epilog=EPILOG, short_help="Serve models over HTTP (Open Inference Protocol).")
@click.argument("paths", metavar="[ARTIFACT|STUB]...", nargs=-1)
@click.option("--name", "named", metavar="NAME=PATH", multiple=True, help="Serve this artifact or stub under NAME.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 for any free one.")
@click.option("--uds", type=click.Path(path_type=Path), help="Listen on this Unix socket instead.")
@click.option("--workers", type=click.IntRange(1, 1024), default=1, show_default=True, help="Number of processes.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads of torch in each.")
@click.option(
    "--token-file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help=f"Has the token. [{TOKEN}]"
)
@click.option("--no-token", is_flag=True, help="Listen beyond this machine without a token.")
@click.option("--allow-unsealed", is_flag=True, help="Listen beyond this machine with artifacts without a seal.")
@click.option("--quiet", is_flag=True, help="Log no requests but those that fail in the service.")
@click.option("--gather-rows", type=click.IntRange(1), help="Rows that a compiled call gathers; 1 gathers none. [2048]")
@click.option("--wait-ms", type=click.FloatRange(0), help="How long a request may wait for others to gather. [0]")
@click.option("--queue-rows", type=click.IntRange(1), help="Rows that may wait for each model. [65536]")
@click.option("--request-rows", type=click.IntRange(1), help="Rows of one request. [65536]")
@click.option("--body-bytes", type=click.IntRange(1), help="Size of a request's body. [16 MiB]")
@click.option("--header-bytes", type=click.IntRange(256), help="Size of a request's headers. [32 KiB]")
@click.option("--receive-seconds", type=click.FloatRange(0.01), help="For headers and body to arrive. [10]")
@click.option("--answer-seconds", type=click.FloatRange(0.01), help="For a request to be answered. [30]")
@click.option("--stop-seconds", type=click.FloatRange(1), help="For accepted requests after a signal to stop. [20]")
@click.option("--connections", type=click.IntRange(1), help="Number of open connections. [1024]")
@device_options
def command(
    paths: tuple[str, ...],
    named: tuple[str, ...],
    host: str,
    port: int,
    uds: Path | None,
    workers: int,
    threads: int,
    token_file: Path | None,
    no_token: bool,
    allow_unsealed: bool,
    quiet: bool,
    device: str | None,
    dtype: str | None,
    **limits: Any,
) -> int:
    """Serve compiled models over HTTP, by the Open Inference Protocol (V2).

    What waits is evaluated together: one compiled call takes all requests that came during the last one. It stops on
    SIGTERM or Ctrl-C, when what it has accepted is answered. The log is one JSON object a line, on the standard output.
    docs/service.md tells more.
    """
    from ..serve.limits import Limits
    from ..serve.listening import Address
    from ..serve.server import Service, run
    from ..serve.workers import run_many

    bounds = Limits(**{name: value for name, value in limits.items() if value is not None})
    token = _token(token_file)
    address = Address(host, port, uds)
    sources = _sources(paths, named, device, dtype)
    if not address.is_local:
        _require_safe(address, sources, token, no_token=no_token, allow_unsealed=allow_unsealed)
    service = Service(tuple(sources), bounds, token, threads, not quiet)
    with address.bind() as bound:
        try:
            service.journal().write("listening", address=address.told(bound), workers=workers, process=os.getpid())
            if workers == 1:
                run(service, bound)
            else:
                run_many(service, bound, workers)
        finally:
            address.release()
    return FINE


def _sources(paths: Sequence[str], named: Sequence[str], device: str | None, dtype: str | None) -> list[Source]:
    """The models, each found before one is loaded."""
    from ..serve.served import Source
    from ..workbench.target import find_target

    def source(target: Target, name: str) -> Source:
        return Source(name, target.artifact, device, dtype, target.solver)

    found = [source(target, target.model) for target in map(find_target, paths)]
    for text in named:
        name, mark, path = text.partition("=")
        if not (name and mark and path):
            raise click.BadParameter(f"{text!r} is not NAME=PATH.", param_hint="--name")
        found.append(source(find_target(path), name))
    if not found:
        raise click.UsageError("give an artifact or a stub, or NAME=PATH by --name.")
    return found


def _token(file: Path | None) -> str | None:
    """The token out of a file or the environment; never from the command line, which others on the machine can read."""
    given = file.read_text(encoding="utf-8").strip() if file is not None else os.environ.get(TOKEN)
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
    if token is None and not no_token:
        raise click.UsageError(
            f"{address.host} is reached from other machines, and there is no token. Give one by --token-file or "
            f"{TOKEN}, or, where something else guards the service, --no-token."
        )
    from ..sealing import is_sealed

    unsealed = [str(source.artifact) for source in sources if not is_sealed(source.artifact)]
    if unsealed and not allow_unsealed:
        raise click.UsageError(
            f"{address.host} is reached from other machines, and there is no seal of {', '.join(unsealed)}. Seal what "
            f"you trust: neml2-aoti seal {unsealed[0]}; or give --allow-unsealed."
        )
