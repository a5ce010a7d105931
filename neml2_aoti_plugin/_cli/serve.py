"""`neml2-aoti serve`: compiled models behind a service."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from .._artifact.locate import is_sealed
from .._artifact.stub import drivers_of
from .._files import read_plain
from ..errors import AOTIError
from ..serve._gathering import call_first
from ..serve._limits import Limits
from ..serve._listening import Address
from ..serve._served import DriverValues, ModelSource, require_names
from ..serve._server import Setup, run, run_many
from .output import Report, in_one_line, waits_for
from .points import defaults, load_driver
from .process import say
from .target import Target, find_target

TOKEN = "NEML2_AOTI_SERVE_TOKEN"
TOKEN_BYTES = 1 << 16


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
        guarded = "with a token" if self.token else "without a token"
        yield f"{self.address}, {'this machine only' if self.local else 'any machine'}, {guarded}"
        for model in self.models:
            sealed = "sealed" if model.sealed else "no seal"
            yield f"{model.name}: {', '.join(model.operations)} ({model.artifact}, {sealed})"


def serve(
    paths: Sequence[str],
    others: Mapping[str, str],
    parameters: Mapping[str, str],
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
    """Serve the models of paths, and others by name, until a signal comes; or load and call them only."""
    if click.get_current_context().params["as_json"] and not check:
        raise click.UsageError("--json goes with --check; the log of a service is JSON in any case.")
    bounds = Limits(**{name: value for name, value in limits.items() if value is not None})
    token = _token(token_file)
    address = Address(host, port, uds)
    asked = [*((None, path) for path in paths), *others.items()]
    if not asked:
        raise click.UsageError("give an artifact or a stub, or NAME=PATH by --name.")
    # Each is found before one is loaded.
    targets = [(name, find_target(path, None, device, dtype)) for name, path in asked]
    models = {name or target.model: target for name, target in targets}
    require_names([name or target.model for name, target in targets])
    for name in parameters:
        if name not in models:
            raise click.BadParameter(
                f"there is no model {name!r}; there are {', '.join(models)}.", param_hint="--parameters"
            )
    files = {name: Path(file).absolute() for name, file in parameters.items()}
    # A stub is under no seal: beyond this machine, nothing in it is evaluated.
    drivers = {name: _driver_of(target) for name, target in models.items() if address.is_local}
    sources = [
        ModelSource(n, t.artifact, device, dtype, t.solver, files.get(n), drivers.get(n)) for n, t in models.items()
    ]
    if not address.is_local:
        _require_safe(address, sources, token, no_token=no_token, allow_unsealed=allow_unsealed)
    if check:
        return _checked(address, sources, token)
    # The log has the terminal from here on.
    waits_for("")
    setup = Setup(tuple(sources), bounds, token, threads, not quiet)
    bound = address.bind()
    try:
        if workers == 1:
            run(setup, bound)
        else:
            run_many(setup, bound, workers)
    finally:
        bound.release()
    return None


def _driver_of(target: Target) -> DriverValues | None:
    """What the first driver of a model in its stub prescribes at its first point; it is read, and not run."""
    names = drivers_of(target.stub, target.model) if target.stub is not None else []
    if target.stub is None or not names:
        return None
    try:
        with defaults(target.device, target.dtype or "float64"):
            built = load_driver(target.stub, names[0], device=target.device, dtype=target.dtype)
    except AOTIError as error:
        say(f"the page at / begins without values of the driver: {in_one_line(error)}")
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


def _token(file: Path | None) -> str | None:
    """The token out of a file or the environment; never from the command line, which others on the machine can read."""
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
    address: Address, sources: Sequence[ModelSource], token: str | None, *, no_token: bool, allow_unsealed: bool
) -> None:
    """Refuse what should not be reached from other machines."""
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


def _checked(address: Address, sources: Sequence[ModelSource], token: str | None) -> ServeReport:
    """Load and call the models as a service does."""
    models = []
    for source in sources:
        served = source.load()
        call_first(served)
        sealed, digest = is_sealed(source.artifact), served.model.digest
        models.append(ServedModel(source.name, str(source.artifact), sealed, digest, tuple(served.signatures)))
    where = f"unix:{address.uds}" if address.uds is not None else f"{address.host}:{address.port}"
    return ServeReport(where, address.is_local, token is not None, tuple(models))
