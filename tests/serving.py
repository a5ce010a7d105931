"""A service started by its console script, and a client for it that has no code in common with the service."""

from __future__ import annotations

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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

SCRIPT = Path(sys.executable).with_name("neml2-aoti")
PATIENCE = 120.0
DTYPES = {"FP64": np.float64, "FP32": np.float32, "INT64": np.int64, "BOOL": np.bool_}
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Answer:
    """What a request was answered with."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def document(self) -> dict[str, Any]:
        """The JSON in it."""
        cut = int(self.headers.get("inference-header-content-length", len(self.body)))
        found: dict[str, Any] = json.loads(self.body[:cut])
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
        rest = self.body[int(self.headers.get("inference-header-content-length", len(self.body))) :]
        found = {}
        for output in self.document["outputs"]:
            dtype, shape = DTYPES[output["datatype"]], output["shape"]
            if "data" in output:
                numbers = [np.nan if x is None else x for x in output["data"]]
                found[output["name"]] = np.array(numbers, dtype).reshape(shape)
                continue
            size = output["parameters"]["binary_data_size"]
            found[output["name"]] = np.frombuffer(rest[:size], dtype).reshape(shape)
            rest = rest[size:]
        assert not rest
        return found


@dataclass
class Service:
    """A running service."""

    process: subprocess.Popen[bytes]
    log: Path
    address: str
    host: str = ""
    port: int = 0
    path: str = ""
    headers: dict[str, str] = field(default_factory=dict)

    def connect(self, timeout: float = 60.0) -> socket.socket:
        """A connection."""
        if self.path:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.settimeout(timeout)
            try:
                connection.connect(self.path)
            except OSError:
                connection.close()
                raise
            return connection
        return socket.create_connection((self.host, self.port), timeout)

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

    def infer(self, model: str, inputs: Mapping[str, Array], binary: bool = True, **parameters: Any) -> Answer:
        """Ask for an evaluation."""
        body, headers = encode(inputs, binary, parameters)
        return self.request("POST", f"/v2/models/{model}/infer", body, headers)

    def lines(self, event: str = "") -> list[dict[str, Any]]:
        """The lines of the log, of one kind or all."""
        text = self.log.read_text(encoding="utf-8")
        # Not by splitlines, which also splits at characters that JSON holds as they are.
        found = [json.loads(line) for line in text.split("\n")[:-1]]
        return [line for line in found if not event or line["event"] == event]

    def wait_for(self, event: str, count: int = 1) -> list[dict[str, Any]]:
        """Wait for lines of a kind."""
        end = time.monotonic() + PATIENCE
        while len(found := self.lines(event)) < count:
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text(encoding="utf-8")
            time.sleep(0.05)
        return found

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric over what has these labels."""
        total = 0.0
        for line in self.request("GET", "/metrics").body.decode().splitlines():
            match = re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line)
            if match and match[1] == name:
                own = dict(re.findall(r'(\w+)="([^"]*)"', match[2] or ""))
                if all(own.get(key) == value for key, value in labels.items()):
                    total += float(match[3])
        return total

    def stop(self, patience: float = 60.0) -> int:
        """Stop it by SIGTERM; its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(patience)


def encode(
    inputs: Mapping[str, Array], binary: bool, parameters: Mapping[str, Any] = {}
) -> tuple[bytes, dict[str, str]]:
    """The body of a request, and its headers."""
    tensors: list[dict[str, Any]] = []
    data = b""
    for name, array in inputs.items():
        tensor: dict[str, Any] = {"name": name, "shape": list(array.shape), "datatype": NAMES[array.dtype]}
        if binary:
            tensor["parameters"] = {"binary_data_size": array.nbytes}
            data += array.tobytes()
        else:
            tensor["data"] = array.reshape(-1).tolist()
        tensors.append(tensor)
    options = {"binary_data_output": True} if binary else {}
    head = json.dumps({"inputs": tensors, "parameters": {**options, **parameters}}).encode()
    return head + data, ({"Inference-Header-Content-Length": str(len(head))} if binary else {})


@contextlib.contextmanager
def started(
    folder: Path, arguments: Sequence[object], *, ready: int = 1, variables: Mapping[str, str] = {}, **options: Any
) -> Iterator[Service]:
    """Start a service on a free port; it is killed at the end if it still runs.

    Args:
        folder: for its log.
        arguments: of the command.
        ready: number of processes that must listen; 0 waits until it has an address only.
        variables: of its environment.
        options: of `subprocess.Popen`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.jsonl"
    where = [] if "--uds" in map(str, arguments) else ["--port", "0"]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, **variables}
    with log.open("wb") as out, (folder / "errors.txt").open("wb") as errors:
        process = subprocess.Popen(
            [str(SCRIPT), "serve", *map(str, arguments), *where], stdout=out, stderr=errors, env=environment, **options
        )
    service = Service(process, log, "")
    try:
        service.address = service.wait_for("starting")[0]["address"]
        kind, _, rest = service.address.partition(":")
        if kind == "unix":
            service.path = rest
        else:
            service.host, _, port = rest.removeprefix("//").partition(":")
            service.port = int(port)
        service.wait_for("listening", ready)
        yield service
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(30)
        told = (folder / "errors.txt").read_text(encoding="utf-8")
        assert told == "", told


def close(found: Array, wanted: Array) -> None:
    """Compare numbers to 1e-12 of the largest, NaN for NaN."""
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    scale = float(np.nanmax(np.abs(wanted), initial=0.0)) or 1.0
    np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-12 * scale, equal_nan=True)
