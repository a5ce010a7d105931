"""What a connection carries beside single, whole requests: upgrades, pipelined requests, claims, clients that leave."""

from __future__ import annotations

import ast
import contextlib
import json
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from shutil import which

import numpy as np
import pytest
import torch

from neml2_aoti_plugin import Model, serve
from serving import Array, Service, close, encode, started
from test_serve import artifact, strain

INFER = "/v2/models/elasticity/infer"
JAVA = """
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.nio.file.Path;

public class Ask {
  public static void main(String[] arguments) throws Exception {
    HttpClient client = HttpClient.newHttpClient();
    for (int i = 0; i < 2; i++) {
      HttpRequest.BodyPublisher body = HttpRequest.BodyPublishers.ofFile(Path.of(arguments[1]));
      HttpRequest request = HttpRequest.newBuilder(URI.create(arguments[0])).POST(body).build();
      System.out.println(client.send(request, HttpResponse.BodyHandlers.ofString()).body());
    }
  }
}
"""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    limits = ["--bodies-bytes", 20_000_000, "--connections", 100]
    with started(tmp_path_factory.mktemp("service"), [artifact("elasticity"), *limits]) as running:
        yield running
        assert not running.lines("failed"), running.lines("failed")
        assert running.stop() == 0


@pytest.fixture(scope="module")
def wanted() -> Array:
    """The stress that answers `strain(2)`."""
    found: Array = (
        Model(artifact("elasticity")).forward({"strain": torch.from_numpy(strain(2)["strain"])})["stress"].numpy()
    )
    return found


def stresses(received: bytes) -> list[Array]:
    """The numbers in answers that came one behind the other, whatever their order."""
    found = []
    for answer in received.split(b"HTTP/1.1 ")[1:]:
        status, _, rest = answer.partition(b" ")
        if status == b"200":
            data = json.loads(rest.partition(b"\r\n\r\n")[2])["outputs"][0]["data"]
            found.append(np.array(data).reshape(-1, 6))
    return found


def read_answers(connection: socket.socket, count: int) -> bytes:
    """What comes, up to a number of answers in JSON, or the end."""
    received = b""
    while received.count(b"HTTP/1.1 ") < count or not received.endswith(b"}"):
        part = connection.recv(65536)
        if not part:
            break
        received += part
    return received


# -- upgrades --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("client", ["curl", "java"])
@pytest.mark.parametrize("rows", [2, pytest.param(20000, id="in several segments", marks=pytest.mark.wide)])
def test_clients_that_ask_for_http2(client: str, rows: int, service: Service, tmp_path: Path) -> None:
    """Java's HttpClient does so by itself. HTTP lets a server go on as before."""
    if which(client) is None:
        pytest.skip(f"there is no {client}")
    url, body = f"http://{service.host}:{service.port}{INFER}", tmp_path / "body.json"
    body.write_bytes(encode(strain(rows), binary=False)[0])
    if client == "curl":
        command = ["curl", "-sS", "--http2", "-d", f"@{body}", url]
    else:
        (tmp_path / "Ask.java").write_text(JAVA, encoding="utf-8")
        command = ["java", str(tmp_path / "Ask.java"), url, str(body)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    reference = service.infer("elasticity", strain(rows), binary=False).body.decode()
    assert lines == [reference] * (1 if client == "curl" else 2)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("size", [1, 37, 10**6], ids=["by bytes", "in parts", "at once"])
def test_the_body_of_an_upgrade_is_its_own(size: int, chunked: bool, service: Service, wanted: Array) -> None:
    """However it is cut, and whatever follows on the connection; the body itself looks like a request."""
    body = encode(strain(2), binary=False)[0]
    length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(body)}"
    head = (
        f"POST {INFER} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n{length}\r\n\r\n"
    )
    asked = head.encode() + (b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if chunked else body)
    hidden = b"GET /v2/models HTTP/1.1\r\nHost: x\r\n\r\n"
    bad = head.replace(length, f"Content-Length: {len(hidden)}").encode() + hidden
    with service.connect(20) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        whole = asked + asked + bad
        for begin in range(0, len(whole), size):
            connection.sendall(whole[begin : begin + size])
        received = read_answers(connection, 3)
    for found in (answers := stresses(received)):
        close(found, wanted)
    assert len(answers) == 2
    # The third was one request with a body that is no JSON.
    assert received.count(b"HTTP/1.1 400 ") == received.count(b"the request is no JSON") == 1


def test_it_is_no_proxy(service: Service) -> None:
    with service.connect(20) as connection:
        connection.sendall(b"CONNECT example.org:443 HTTP/1.1\r\nHost: example.org\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 400 ")


# -- pipelined requests ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rest", [b"\0garbage\r\n\r\n", b"POST /v2 HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"]
)
def test_what_comes_before_garbage_is_answered_in_its_order(rest: bytes, service: Service, wanted: Array) -> None:
    """Two requests and what is no HTTP, all in one segment: two answers, then the refusal, then the end."""
    body = encode(strain(2), binary=False)[0]
    asked = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    with service.connect(20) as connection:
        connection.sendall(asked + asked + rest)
        received = read_answers(connection, 4)
    statuses = [part[:3] for part in received.split(b"HTTP/1.1 ")[1:]]
    assert statuses == [b"200", b"200", b"400"], received
    for found in stresses(received):
        close(found, wanted)


def test_clients_that_leave_in_the_middle(service: Service) -> None:
    """Pipelined requests of clients that reset the connection leave no trace but lines for requests."""
    body, headers = encode(strain(500), binary=True)
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    asked = f"POST {INFER} HTTP/1.1\r\nHost: x\r\n{lines}Content-Length: {len(body)}\r\n\r\n".encode() + body
    before = len(service.lines("log"))
    for place in range(60):
        with service.connect(20) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            with contextlib.suppress(ConnectionError):
                connection.sendall(asked * 3 + b"garbage\r\n\r\n" * (place % 2))
            time.sleep(0.0005 * (place % 8))
    assert service.infer("elasticity", strain(1)).status == 200
    time.sleep(0.3)
    told = service.lines("log")[before:]
    assert all(line["message"] == "Invalid HTTP request received." for line in told), told
    assert not service.lines("failed")


# -- claims ----------------------------------------------------------------------------------------------------------


def test_what_is_claimed_and_does_not_come_keeps_nobody_out(service: Service, wanted: Array) -> None:
    """40 bodies of 16 MiB were announced; there is room for one. What counts is what has come."""
    head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: {16 * 2**20}\r\n\r\n".encode()
    with contextlib.ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(service.connect()).sendall(head + b" " * 1000)
        time.sleep(0.2)
        for _ in range(5):
            close(service.infer("elasticity", strain(2)).arrays["stress"], wanted)


def test_bodies_that_have_come_and_find_no_room(service: Service, wanted: Array) -> None:
    part = b" " * 15_000_000
    head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(part) + 1}\r\n\r\n".encode()
    with service.connect(20) as first, service.connect(20) as second:
        first.sendall(head + part)
        time.sleep(0.5)
        with contextlib.suppress(OSError):
            second.sendall(head + part)
        answer = read_answers(second, 1)
        assert answer.startswith(b"HTTP/1.1 503 ") and b"there is no room for" in answer and b"retry-after: 1" in answer
        # Small ones still find some, and once the first is answered there is room again.
        close(service.infer("elasticity", strain(2)).arrays["stress"], wanted)
        first.sendall(b" ")
        assert read_answers(first, 1).startswith(b"HTTP/1.1 400 ")
    assert service.request("POST", INFER, part).status == 400


# -- what it stands on -----------------------------------------------------------------------------------------------


def test_no_private_name_of_uvicorn_is_used() -> None:
    """What a release may take away without a word: neither called nor defined anew."""
    import uvicorn
    from uvicorn.protocols.http import httptools_impl

    bases = (uvicorn.Server, uvicorn.Config, httptools_impl.HttpToolsProtocol, httptools_impl.RequestResponseCycle)
    private = {name for base in bases for name in dir(base) if name.startswith("_") and not name.endswith("__")}
    assert "_start_asgi_task" in private or "_unset_keepalive_if_required" in private
    for file in Path(serve.__file__).parent.glob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        used |= {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}
        assert not used & private, (file.name, used & private)
