"""What connections carry beside single, whole requests: tokens, limits, slow clients, upgrades, pipelines, claims."""

from __future__ import annotations

import ast
import contextlib
import json
import re
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import which

import numpy as np
import pytest

from neml2_aoti_plugin import Model, serve
from serving import Array, Service, artifact, close, encode, infer, raw, read_all, reference, started, step, strain

pytestmark = pytest.mark.processes

TOKEN = "of-the-test-9d1f"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
INFER, VISCO = infer("elasticity"), infer("viscoplasticity")
# As it goes over the wire, without a token; answered by `wanted`.
ASKED = raw(INFER, encode(strain(2), binary=False)[0])


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    limits = ["--bodies-bytes", 20_000_000, "--connections", 100]
    with started(tmp_path_factory.mktemp("service"), [artifact("elasticity"), *limits]) as running:
        yield running
        assert not running.lines("failed"), running.lines("failed")
        assert running.stop() == 0


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with a token and narrow limits."""
    folder = tmp_path_factory.mktemp("strict")
    (folder / "token").write_text(TOKEN + "\n", encoding="utf-8")
    limits = "--body-bytes 2000000 --request-rows 20000 --queue-rows 20000 --header-bytes 2048 --connections 12"
    limits += " --receive-seconds 1 --stop-seconds 3 --answer-seconds 0.4"
    arguments = [*map(artifact, ("viscoplasticity", "elasticity")), "--token-file", folder / "token", *limits.split()]
    with started(folder, arguments) as running:
        running.headers = dict(BEARER)
        yield running
        # No connection of a test is left behind, and it stops at once.
        assert running.stop(20) == 0


@pytest.fixture(scope="module")
def wanted() -> Array:
    """The stress that answers `strain(2)`."""
    return reference(Model(artifact("elasticity")), "forward", strain(2))["stress"]


def parts(received: bytes) -> list[bytes]:
    """Answers that came one behind the other, each from its status on."""
    return received.split(b"HTTP/1.1 ")[1:]


def require_stresses(received: bytes, wanted: Array, count: int) -> None:
    """So many answers with these numbers in JSON."""
    good = [part for part in parts(received) if part.startswith(b"200")]
    assert len(good) == count
    for part in good:
        data = json.loads(part.partition(b"\r\n\r\n")[2])["outputs"][0]["data"]
        close(np.array(data).reshape(-1, 6), wanted)


def read_answers(connection: socket.socket, count: int) -> bytes:
    """What comes, up to a number of answers in JSON, or the end."""
    received = b""
    while len(parts(received)) < count or not received.endswith(b"}"):
        if not (part := connection.recv(65536)):
            break
        received += part
    return received


def exchange(service: Service, *sent: bytes, pause: float = 0.0) -> bytes:
    """Send parts, one after the other, on a connection of their own; what comes until the other side closes it."""
    with service.connect(10) as connection:
        # What is refused may be so before its end.
        with contextlib.suppress(OSError):
            for part in sent:
                connection.sendall(part)
                time.sleep(pause)
        return read_all(connection)


def reset(connection: socket.socket) -> None:
    """Let a connection be reset when it is closed."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def chunked(path: str = INFER, **headers: str) -> bytes:
    """The head of a request whose body has no length."""
    head = raw(path, headers={**BEARER, "Transfer-Encoding": "chunked", **headers})
    return head.replace(b"Content-Length: 0\r\n", b"")


# -- tokens and limits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["", "Bearer wrong", f"Basic {TOKEN}", "Bearer", f"Bearer {TOKEN}x", "Bearer \xe4"])
def test_a_token_is_needed(strict: Service, given: str) -> None:
    headers = {"Authorization": given}
    for path in ("/v2", "/v2/models/elasticity", "/metrics", "/openapi.json", "/nowhere"):
        answer = strict.request("GET", path, headers=headers)
        assert answer.status == 401 and answer.headers["www-authenticate"] == "Bearer", path
        assert TOKEN not in answer.error
    for path in ("/v2/health/live", "/v2/health/ready"):
        assert strict.request("GET", path, headers=headers).status == 200


def test_the_token_opens_and_is_in_no_log(strict: Service) -> None:
    assert strict.get("/v2")["name"] == "neml2-aoti"
    assert strict.infer("elasticity", strain(1)).status == 200
    time.sleep(0.2)
    assert TOKEN not in strict.log.read_text(encoding="utf-8")
    assert TOKEN.encode() not in Path(f"/proc/{strict.process.pid}/cmdline").read_bytes()


def test_bodies_that_are_too_large(strict: Service) -> None:
    answer = strict.request("POST", INFER, b" " * 2_000_001)
    assert answer.status == 413 and "2000001 bytes or more; 2000000 are the most here" in answer.error
    answer = strict.request("POST", INFER, b"x", {"Content-Encoding": "gzip"})
    assert answer.status == 415 and "compressed by 'gzip'" in answer.error


def test_rows_that_are_too_many(strict: Service) -> None:
    answer = strict.infer("elasticity", strain(20001))
    assert answer.status == 413 and "20001 rows, more than the 20000" in answer.error
    # Told before anything is allocated for them.
    tensor = {"name": "strain", "shape": [10**15, 6], "datatype": "FP64", "data": []}
    assert strict.post("elasticity", {"inputs": [tensor]}).status == 413


def test_more_connections_than_there_may_be(strict: Service) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(12):
            connection = stack.enter_context(strict.connect())
            connection.sendall(raw("/v2", headers=BEARER, method="GET"))
            assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
        assert strict.request("GET", "/v2").status == 503
    time.sleep(0.2)
    assert strict.request("GET", "/v2").status == 200


def test_a_full_queue(strict: Service) -> None:
    """What finds no room is refused at once; all others are answered, or told that it took too long."""
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: strict.infer("viscoplasticity", step(8000)), range(8)))
    statuses = sorted(answer.status for answer in answers)
    assert {200, 429} <= set(statuses) <= {200, 429, 504}, statuses
    for answer in answers:
        if answer.status == 429:
            assert answer.headers["retry-after"] == "1"
            assert "rows wait for model 'viscoplasticity', and there is room for 20000" in answer.error
    assert strict.metric("neml2_requests_total", status="429") >= statuses.count(429)
    time.sleep(0.5)
    assert strict.metric("neml2_queue_rows") == 0
    assert strict.infer("viscoplasticity", step(1)).status == 200


def test_a_request_that_waits_for_too_long(strict: Service) -> None:
    with ThreadPoolExecutor(2) as pool:
        large = pool.submit(lambda: strict.infer("viscoplasticity", step(11000, size=2e-2), operation="jacobian"))
        time.sleep(0.15)
        answer = strict.infer("viscoplasticity", step(1))
        assert large.result().status in (200, 422)
    # Where the machine is quick enough, it was answered in time.
    assert answer.status == 200 or (answer.status == 504 and "not answered within 0.4 s" in answer.error)


# -- slow and broken clients -----------------------------------------------------------------------------------------


HALF = raw(INFER, b"x" * 100, BEARER)[:-50]


@pytest.mark.parametrize(
    ("sent", "pause", "status"),
    [
        ([HALF], 0.0, "408"),
        ([chunked(), b"4\r\nabcd\r\n"], 0.0, "408"),
        ([HALF, *[b"x"] * 45], 0.1, "408|$"),
        # Answered before the body has come, which nobody waits for then.
        ([HALF.replace(INFER.encode(), b"/nowhere")], 0.0, "404"),
        ([raw(INFER, b"x" * 100)[:-50]], 0.0, "401"),
        # Without a length, as much as it may have is read, and no more.
        ([chunked(), *[b"10000\r\n" + b" " * 65536 + b"\r\n"] * 40], 0.0, "413"),
        ([b"GET /v2 HTTP/1.1\r\nX-Long: ", *[b"x" * 700] * 10], 0.02, "4"),
        # It is no proxy.
        ([raw("example.org:443", headers={**BEARER, "Connection": "close"}, method="CONNECT")], 0.0, "4"),
    ],
    ids=["half", "chunk", "byte by byte", "nobody needs it", "no token", "too large", "endless header", "proxy"],
)
def test_what_does_not_end_is_answered_soon(strict: Service, sent: list[bytes], pause: float, status: str) -> None:
    begin = time.monotonic()
    answer = exchange(strict, *sent, pause=pause).decode()
    assert re.match(rf"(HTTP/1\.1 )?{status}", answer) and ('"error"' in answer or status in ("4", "408|$")), answer
    assert time.monotonic() - begin < 4
    assert strict.request("GET", "/v2").status == 200


def test_half_closed_and_broken_connections(strict: Service) -> None:
    body, headers = encode(step(1))
    text = raw(VISCO, body, {**BEARER, **headers})
    for cut in (10, len(text) - len(body), len(text) - 1, len(text)):
        with strict.connect(10) as closed, strict.connect(10) as broken:
            reset(broken)
            for connection in (closed, broken):
                connection.sendall(text[:cut])
            closed.shutdown(socket.SHUT_WR)
            answer = read_all(closed)
            assert answer == b"" or answer.startswith((b"HTTP/1.1 200", b"HTTP/1.1 400")), answer
    assert strict.infer("viscoplasticity", step(1)).status == 200


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the system of Linux does that")
def test_a_client_that_does_not_read(strict: Service) -> None:
    """Its connection is cut off once it has not read for a while, and its answer with it."""
    body, headers = encode(strain(20000), True, {"operation": "jacobian"})
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(10)
        connection.connect(strict.address)
        connection.sendall(raw(INFER, body, {**BEARER, **headers}))
        time.sleep(5)
        # What is left in the buffers of the system comes, and then no more.
        received = len(read_all(connection))
    assert received < 20000 * 42 * 8
    assert strict.infer("elasticity", strain(1)).status == 200


def test_clients_that_leave_in_the_middle(service: Service) -> None:
    """Pipelined requests of clients that reset the connection leave no trace but lines for requests."""
    asked = raw(INFER, *encode(strain(500)))
    before = len(service.lines("log"))
    for place in range(60):
        with service.connect(20) as connection:
            reset(connection)
            with contextlib.suppress(ConnectionError):
                connection.sendall(asked * 3 + b"garbage\r\n\r\n" * (place % 2))
            time.sleep(0.0005 * (place % 8))
    assert service.infer("elasticity", strain(1)).status == 200
    time.sleep(0.3)
    told = service.lines("log")[before:]
    assert all(line["message"] == "Invalid HTTP request received." for line in told), told


# -- upgrades and pipelined requests ---------------------------------------------------------------------------------


@pytest.mark.skipif(which("curl") is None, reason="there is no curl")
@pytest.mark.parametrize("rows", [2, pytest.param(20000, id="in several segments", marks=pytest.mark.wide)])
def test_a_client_that_asks_for_http2(rows: int, service: Service, tmp_path: Path) -> None:
    """As Java's HttpClient does by itself. HTTP lets a server go on as before."""
    (tmp_path / "body.json").write_bytes(encode(strain(rows), binary=False)[0])
    command = ["curl", "-sS", "--http2", "-d", f"@{tmp_path / 'body.json'}", f"http://{service.place}{INFER}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["outputs"][0]["shape"] == [rows, 6]


@pytest.mark.parametrize("in_chunks", [False, True], ids=["with a length", "in chunks"])
@pytest.mark.parametrize("size", [10_000, 7], ids=["in one segment", "in many"])
def test_a_body_behind_an_upgrade_is_a_body(size: int, in_chunks: bool, service: Service, wanted: Array) -> None:
    """However it is cut, and whatever follows on the connection; the body itself looks like a request."""
    body = encode(strain(2), binary=False)[0]
    upgrade = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c"}
    asked = raw(INFER, body, upgrade)
    if in_chunks:
        asked = chunked(**upgrade) + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    whole = asked + asked + raw(INFER, raw("/v2/models", method="GET"), upgrade)
    with service.connect(20) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for begin in range(0, len(whole), size):
            connection.sendall(whole[begin : begin + size])
        received = read_answers(connection, 3)
    require_stresses(received, wanted, 2)
    # The third was one request with a body that is no JSON.
    assert received.count(b"HTTP/1.1 400 ") == received.count(b"the request is no JSON") == 1


@pytest.mark.parametrize(
    "rest", [b"\0garbage\r\n\r\n", b"POST /v2 HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"]
)
def test_what_comes_before_garbage_is_answered_in_its_order(rest: bytes, service: Service, wanted: Array) -> None:
    """Two requests and what is no HTTP, all in one segment: two answers, then the refusal, then the end."""
    received = exchange(service, ASKED + ASKED + rest)
    assert [part[:3] for part in parts(received)] == [b"200", b"200", b"400"], received
    require_stresses(received, wanted, 2)


# -- claims ----------------------------------------------------------------------------------------------------------


def test_what_is_claimed_and_does_not_come_keeps_nobody_out(service: Service, wanted: Array) -> None:
    """40 bodies of 16 MiB were announced; there is room for one. What counts is what has come."""
    head = raw(INFER, headers={"Content-Length": str(16 * 2**20)})
    with contextlib.ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(service.connect()).sendall(head + b" " * 1000)
        time.sleep(0.2)
        for _ in range(5):
            close(service.infer("elasticity", strain(2)).arrays["stress"], wanted)


def test_bodies_that_have_come_and_find_no_room(service: Service, wanted: Array) -> None:
    part = b" " * 15_000_000
    head = raw(INFER, headers={"Content-Length": str(len(part) + 1)})
    with service.connect(20) as first, service.connect(20) as second:
        first.sendall(head + part)
        time.sleep(0.5)
        with contextlib.suppress(OSError):
            second.sendall(head + part)
        answer = read_answers(second, 1)
        assert answer.startswith(b"HTTP/1.1 503 ") and b"no room for" in answer and b"retry-after: 1" in answer
        # Small ones still find some, and once the first is answered there is room again.
        close(service.infer("elasticity", strain(2)).arrays["stress"], wanted)
        first.sendall(b" ")
        assert read_answers(first, 1).startswith(b"HTTP/1.1 400 ")
    assert service.request("POST", INFER, part).status == 400


def test_no_private_name_of_uvicorn_is_used() -> None:
    """What a release may take away without a word: neither called nor defined anew."""
    import uvicorn

    names = {name for base in (uvicorn.Server, uvicorn.Config) for name in dir(base)}
    private = {name for name in names if name.startswith("_") and not name.endswith("__")}
    assert private
    for file in Path(serve.__file__).parent.glob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert "uvicorn.protocols" not in text
        nodes = list(ast.walk(ast.parse(text)))
        used = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        used |= {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}
        assert not used & private, (file.name, used & private)
