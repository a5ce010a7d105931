"""A service started by its console script, and a client for it that has no code in common with the service."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import references
from neml2_aoti_plugin import Model

Array = NDArray[Any]

SCRIPT = Path(sys.executable).with_name("neml2-aoti")
PATIENCE = 120.0
DTYPES = {"FP64": np.float64, "FP32": np.float32, "INT64": np.int64, "BOOL": np.bool_}
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


# -- what is asked ---------------------------------------------------------------------------------------------------


def artifact(stub: str) -> Path:
    """The artifact of a stub."""
    return references.case(stub).artifact


def step(rows: int, seed: int = 0, size: float = 3e-3) -> dict[str, Array]:
    """A time step of the viscoplastic model."""
    rng = np.random.default_rng(seed)
    return {
        "strain": size * rng.standard_normal((rows, 6)),
        "strain~1": np.zeros((rows, 6)),
        "t": rng.uniform(0.5, 2.0, rows),
        "t~1": np.zeros(rows),
        "equivalent_plastic_strain~1": np.zeros(rows),
        "stress~1": np.zeros((rows, 6)),
    }


def strain(rows: int, seed: int = 0) -> dict[str, Array]:
    """Inputs of an elastic model."""
    return {"strain": 1e-3 * np.random.default_rng(seed).standard_normal((rows, 6))}


def tensors(arrays: Mapping[str, Array]) -> dict[str, torch.Tensor]:
    """The same for a model in this process."""
    return {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}


def infer(model: str) -> str:
    """Where a model is asked for an evaluation."""
    return f"/v2/models/{model}/infer"


def encode(
    inputs: Mapping[str, Array], binary: bool = True, parameters: Mapping[str, Any] = {}, **more: Any
) -> tuple[bytes, dict[str, str]]:
    """The body of a request, which may have more keys, and its headers."""
    entries: list[dict[str, Any]] = []
    for name, array in inputs.items():
        data = {"parameters": {"binary_data_size": array.nbytes}} if binary else {"data": array.reshape(-1).tolist()}
        entries.append({"name": name, "shape": list(array.shape), "datatype": NAMES[array.dtype], **data})
    options = {"binary_data_output": True} if binary else {}
    head = json.dumps({"inputs": entries, "parameters": {**options, **parameters}, **more}).encode()
    if not binary:
        return head, {}
    body = b"".join([head, *(array.tobytes() for array in inputs.values())])
    return body, {"Inference-Header-Content-Length": str(len(head))}


def raw(path: str, body: bytes = b"", headers: Mapping[str, str] = {}, method: str = "POST") -> bytes:
    """A request as it goes over the wire."""
    lines = "".join(f"{name}: {value}\r\n" for name, value in {"Content-Length": len(body), **headers}.items())
    return f"{method} {path} HTTP/1.1\r\nHost: x\r\n{lines}\r\n".encode() + body


def read_all(connection: socket.socket) -> bytes:
    """What comes until the other side closes."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


# -- what is wanted --------------------------------------------------------------------------------------------------


def reference(
    model: Model, operation: str, given: Mapping[str, Array], overrides: Mapping[str, Array] = {}
) -> dict[str, Array]:
    """What a model gives in this process, by the names that the service has."""
    arguments = [tensors({name: value for name, value in given.items() if ":" not in name})]
    if operation in ("jvp", "param_vjp"):
        arguments.append(tensors({name.partition(":")[2]: value for name, value in given.items() if ":" in name}))
    expand = {"expand": True} if operation == "jacobian" else {}
    told = getattr(model, operation)(*arguments, tensors(overrides) or None, **expand)
    return {name: value.detach().numpy() for name, value in references.named(operation, told).items()}


def close(found: Array, wanted: Array) -> None:
    """Compare numbers to the rounding of the largest, NaN for NaN."""
    assert found.dtype == wanted.dtype and found.shape == wanted.shape, (found, wanted)
    scale = float(np.abs(np.nan_to_num(wanted)).max(initial=0.0))
    relative = 1e-6 if wanted.dtype == np.float32 else 1e-12
    np.testing.assert_allclose(found, wanted, rtol=relative, atol=relative * max(scale, 1e-6), equal_nan=True)


def same(found: Mapping[str, Array], wanted: Mapping[str, Array]) -> None:
    """Compare tensors by name."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        close(found[name], value)


@dataclass(frozen=True)
class Answer:
    """What a request was answered with."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def document(self) -> dict[str, Any]:
        """The JSON in it."""
        found: dict[str, Any] = json.loads(self.body[: self._cut])
        return found

    @property
    def error(self) -> str:
        """What was refused."""
        assert self.headers["content-type"] == "application/json"
        found: str = self.document["error"]
        return found

    @property
    def arrays(self) -> dict[str, Array]:
        """The tensors in it, from JSON or binary data."""
        assert self.status == 200, self.body
        rest, found = self.body[self._cut :], {}
        for output in self.document["outputs"]:
            dtype = DTYPES[output["datatype"]]
            if "data" in output:
                flat: Array = np.array([np.nan if x is None else x for x in output["data"]], dtype)
            else:
                size = output["parameters"]["binary_data_size"]
                flat = np.frombuffer(rest[:size], dtype)
                rest = rest[size:]
            found[output["name"]] = flat.reshape(output["shape"])
        assert not rest
        return found

    @property
    def _cut(self) -> int:
        return int(self.headers.get("inference-header-content-length", len(self.body)))


# -- the service -----------------------------------------------------------------------------------------------------


def eventually(holds: Callable[[], Any], patience: float = PATIENCE) -> Any:
    """Wait until something holds, and give it."""
    end = time.monotonic() + patience
    while not (found := holds()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


@dataclass
class Service:
    """A running service."""

    process: subprocess.Popen[bytes]
    log: Path
    # A path, or host and port.
    address: Any = ""
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def place(self) -> str:
        """Host and port."""
        return "{}:{}".format(*self.address)

    def connect(self, timeout: float = 60.0) -> socket.socket:
        """A connection."""
        family = socket.AF_UNIX if isinstance(self.address, str) else socket.AF_INET
        with contextlib.ExitStack() as stack:
            connection = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            connection.settimeout(timeout)
            connection.connect(self.address)
            stack.pop_all()
        return connection

    def request(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] = {}, timeout: float = 60.0
    ) -> Answer:
        """Send a request on a connection of its own, and wait for its answer."""
        connection = http.client.HTTPConnection("service")
        connection.sock = self.connect(timeout)
        with contextlib.closing(connection):
            # A body that is refused may not be read to its end; the answer is there all the same.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.request(method, path, body or None, {**self.headers, **headers})
            answer = connection.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())

    def get(self, path: str) -> Any:
        """The JSON at an address."""
        answer = self.request("GET", path)
        assert answer.status == 200, answer.body
        return answer.document

    def post(self, model: str, document: Any) -> Answer:
        """Ask for an evaluation by a document."""
        return self.request("POST", infer(model), json.dumps(document).encode())

    def infer(self, model: str, inputs: Mapping[str, Array], **parameters: Any) -> Answer:
        """Ask for an evaluation."""
        return self.request("POST", infer(model), *encode(inputs, True, parameters))

    def lines(self, event: str = "") -> list[dict[str, Any]]:
        """The lines of the log, of one kind or all."""
        text = self.log.read_text(encoding="utf-8")
        # Not by splitlines, which also splits at characters that JSON holds as they are.
        found = [json.loads(line) for line in text.split("\n")[:-1]]
        return [line for line in found if not event or line["event"] == event]

    def wait_for(self, event: str, count: int = 1) -> list[dict[str, Any]]:
        """Wait for lines of a kind."""

        def came() -> list[dict[str, Any]]:
            assert self.process.poll() is None, self.log.read_text(encoding="utf-8")
            found = self.lines(event)
            return found if len(found) >= count else []

        found: list[dict[str, Any]] = eventually(came) if count else []
        return found

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric over what has these labels."""
        total = 0.0
        for line in self.request("GET", "/metrics").body.decode().splitlines():
            match = re.fullmatch(rf"{name}(?:\{{(.*)\}})? (\S+)", line)
            if match and labels.items() <= dict(re.findall(r'(\w+)="([^"]*)"', match[1] or "")).items():
                total += float(match[2])
        return total

    def stop(self, patience: float = 60.0) -> int:
        """Stop it by SIGTERM; its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(patience)


@contextlib.contextmanager
def started(
    folder: Path, arguments: Sequence[object], *, ready: int = 1, variables: Mapping[str, str] = {}
) -> Iterator[Service]:
    """Start a service on a free port with its log in a folder; it is killed at the end if it still runs.

    It is there once `ready` processes listen, or with 0 of them once it has an address.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log, errors = folder / "log.jsonl", folder / "errors.txt"
    command = [str(SCRIPT), "serve", *map(str, arguments)]
    command += [] if "--uds" in command else ["--port", "0"]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, **variables}
    with log.open("wb") as out, errors.open("wb") as err:
        service = Service(subprocess.Popen(command, stdout=out, stderr=err, env=environment), log)
    try:
        kind, _, rest = service.wait_for("starting")[0]["address"].partition(":")
        host, _, port = rest.removeprefix("//").partition(":")
        service.address = rest if kind == "unix" else (host, int(port))
        service.wait_for("listening", ready)
        yield service
    finally:
        service.process.kill()
        service.process.wait(30)
        told = errors.read_text(encoding="utf-8")
        assert told == "", told


# -- the application alone -------------------------------------------------------------------------------------------

Ask = Callable[..., Coroutine[Any, Any, Answer]]


def asking(application: Any) -> Ask:
    """What asks an ASGI application as a server does: by method, path, body and headers."""

    async def ask(
        method: str, path: str, body: bytes = b"", headers: Mapping[str, str] = {}, *, leaves: bool = False
    ) -> Answer:
        received: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        sent: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        received.put_nowait({"type": "http.request", "body": body, "more_body": False})
        if leaves:
            received.put_nowait({"type": "http.disconnect"})
        lines = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": lines, "root_path": ""}
        await application(scope, received.get, sent.put)
        start, rest = sent.get_nowait(), sent.get_nowait()
        told = {name.decode(): value.decode() for name, value in start["headers"]}
        return Answer(start["status"], told, rest["body"])

    return ask


@contextlib.asynccontextmanager
async def running(application: Any) -> AsyncIterator[Ask]:
    """Start an ASGI application and stop it, as servers do."""
    told: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    said: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    task = asyncio.create_task(application({"type": "lifespan", "asgi": {"version": "3.0"}}, told.get, said.put))
    for event in ("startup", "shutdown"):
        await told.put({"type": f"lifespan.{event}"})
        assert (await said.get())["type"] == f"lifespan.{event}.complete"
        if event == "startup":
            yield asking(application)
    await task
