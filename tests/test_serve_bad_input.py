"""Requests that are wrong in every way: answered in the form of the protocol, in bounded time, and to nobody's harm."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from operator import getitem
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from neml2_aoti_plugin import Model
from serving import Answer, Array, Service, artifact, close, encode, infer, raw, read_all, reference, started, strain

PATH, LENGTH = infer("promoted"), "Inference-Header-Content-Length"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with started(tmp_path_factory.mktemp("service"), [artifact("promoted"), "--body-bytes", 4_000_000]) as running:
        statm = Path(f"/proc/{running.process.pid}/statm")
        before = int(statm.read_text().split()[1])
        yield running
        # All of it has left the service as it was.
        assert not running.lines("failed"), running.lines("failed")
        assert int(statm.read_text().split()[1]) - before < 50_000, "pages of 4 KiB more"
        assert running.stop(20) == 0


@pytest.fixture(scope="module")
def stress() -> Array:
    """What answers `strain(3)`."""
    return reference(Model(artifact("promoted")), "forward", strain(3))["stress"]


def ask(service: Service, document: Any, data: bytes = b"", length: str | None = None) -> Answer:
    """Send JSON, and perhaps binary data behind it."""
    head = document if isinstance(document, bytes) else json.dumps(document).encode()
    headers = {LENGTH: length or str(len(head))} if data or length else {}
    return service.request("POST", PATH, head + data, headers, timeout=20)


def request(**changes: Any) -> dict[str, Any]:
    """A right request of one row, with changes to its input."""
    tensor = {"name": "strain", "shape": [1, 6], "datatype": "FP64", "data": [0.0] * 6, **changes}
    return {"inputs": [{key: value for key, value in tensor.items() if value is not ...}]}


def binary(size: Any, **more: Any) -> dict[str, Any]:
    """One whose data are said to be binary."""
    return request(**{"data": ..., **more}, parameters={"binary_data_size": size})


def parameters(**given: Any) -> dict[str, Any]:
    """A right request but for its parameters."""
    return {**request(), "parameters": given}


def overrides(given: Any) -> dict[str, Any]:
    return parameters(parameter_overrides=given)


def output(**given: Any) -> dict[str, Any]:
    """A right request but for one output."""
    return {**request(), "outputs": [{"name": "stress", **given}]}


ONE = request()["inputs"][0]


@pytest.mark.parametrize(
    ("document", "said"),
    [
        # JSON
        (b"", "the request is no JSON"),
        (b"{", "the request is no JSON"),
        (b"\xff\xfe", "the request is no JSON"),
        (b"[NaN", "the request"),
        (b"[" * 100_000, "the request"),
        (b"[" * 100_000 + b"]" * 100_000, "the request"),
        (b'{"inputs":' * 99 + b"1" + b"}" * 99, "inputs is an object"),
        (b'{"parameters":{"a":' + b"[" * 100_000, "nested too deeply"),
        (b'{"parameters":{"a":[NaN,' + b"[" * 100_000, "nested too deeply"),
        (b'{"parameters":' + b'{"a":' * 50_000 + b"NaN", "nested too deeply"),
        (b'{"id": "a", "inputs": [], "id": "b"}', "'id' is there twice in one object"),
        (b'{"id": "a:b", "inputs": [], "parameters": {"x": 1, "\\u0078": 2}}', "'x' is there twice in one object"),
        ([], "the request is [], expected object"),
        ({}, "the request lacks 'inputs'"),
        ({"inputs": {}}, "inputs is {}"),
        ({"inputs": [7]}, "inputs[0] is 7, expected object"),
        ({"inputs": [ONE, ONE]}, "input 'strain' is there twice"),
        ({**request(), "parameter": {}}, "unknown field `parameter`"),
        ({**request(), "id": 7}, "id is 7"),
        ({**request(), "model_name": "steel"}, "model_name is 'steel', but the address is that of 'promoted'"),
        # names, shapes, dtypes
        (request(name="stress"), "inputs hold 'stress', which forward does not take. It needs strain"),
        (request(name=["strain"]), "inputs[0].name is ['strain'], expected str"),
        (request(name=...), "inputs[0] lacks 'name'"),
        (request(shape=[1, 7]), "input 'strain' has the shape [1, 7], expected [rows, 6]"),
        (request(shape=[6]), "has the shape [6]"),
        (request(shape=[0, 6]), "has the shape [0, 6], expected [rows, 6] with one row or more"),
        (request(shape=[-1, 6]), "has the shape [-1, 6]"),
        (request(shape=[True, 6]), "inputs[0].shape[0] is True, expected int"),
        (request(shape=[1, 6.0]), "inputs[0].shape[1] is 6.0, expected int"),
        (request(shape="16"), "inputs[0].shape is '16'"),
        (request(shape=[2, 6]), "data has 6 entries, but the shape [2, 6] takes 12"),
        (request(datatype="FP32"), "input 'strain' has the datatype 'FP32', expected 'FP64'"),
        (request(datatype=None), "inputs[0].datatype is None"),
        # data
        (request(data=...), "input 'strain': data is absent, expected a list of numbers"),
        (request(data="AAAA"), "inputs[0].data is 'AAAA'"),
        (request(data=[0.0] * 5), "data has 5 entries, but the shape [1, 6] takes 6"),
        (request(data=[0.0] * 5 + ["1"]), "input 'strain': data: [5] is '1', expected float"),
        (request(data=[0.0] * 5 + [True]), "data: [5] is True"),
        (request(data=[None] + [0.0] * 5), "data: [0] is None"),
        (json.dumps(request()).replace("[0.0,", "[1e999,").encode(), "inputs[0].data[0]: Number out of range"),
        (json.dumps(request()).replace("[0.0,", "[NaN, -1e999,").encode(), "the number '-1e999' is too large"),
        (request(data=[[0.0] * 3, [0.0] * 3]), "nested otherwise than the shape [1, 6]"),
        (request(data=[[0.0] * 6, [0.0] * 5]), "nested otherwise"),
        (request(data=[[[0.0] * 6]]), "data: [0][0] is [0.0"),
        (request(data=[[0.0] * 5 + [[1]]]), "data: [0][5] is [1], expected float"),
        (request(extra=1), "inputs[0]: Object contains unknown field `extra`"),
        (request(parameters=[]), "inputs[0].parameters is [], expected object"),
        (request(parameters={"shared_memory_region": "x"}), "'shared_memory_region' is of an extension"),
        # outputs
        ({**request(), "outputs": {}}, "outputs is {}"),
        ({**request(), "outputs": [{"name": "strain"}]}, "with a name out of stress."),
        ({**request(), "outputs": [{"name": "stress"}] * 2}, "expected each once"),
        (output(shape=[]), "outputs[0]: Object contains unknown field `shape`"),
        (
            output(parameters={"classification": 3}),
            "parameters of output 'stress': 'classification' is of an extension",
        ),
        (output(parameters={"binary_data": 1}), "parameters of output 'stress': binary_data is 1, expected bool"),
        # operations and overrides
        (parameters(operation="hessian"), "operation is 'hessian', expected one of forward"),
        (parameters(operation=["forward"]), "operation is ['forward']"),
        (parameters(operations="solve"), "unknown 'operations'; did you mean 'operation'?"),
        (parameters(operation="jvp"), "no tangent, which jvp needs one of: tangent:strain"),
        (parameters(operation="param_vjp"), "inputs lack 'cotangent:stress'"),
        (overrides(7), "parameter_overrides is 7"),
        (overrides("{"), "the request is no JSON"),
        (overrides("[]"), "parameter_overrides is []"),
        (overrides("[" * 100_000), "nested too deeply"),
        (overrides({"E": 1.0}), "holds 'E', which is no promoted parameter of model 'promoted'"),
        (overrides({"promoted.E": [1.0, 2.0]}), "E is [1.0, 2.0], expected a number, or lists of the shape [1]"),
        (overrides({"promoted.E": True}), "promoted.E is True"),
        (overrides({"promoted.E": None}), "promoted.E is None"),
    ],
)
def test_what_is_wrong_is_named(service: Service, document: Any, said: str) -> None:
    """With the path of its key, and what was found."""
    answer = ask(service, document)
    assert answer.status == 400 and said in answer.error, answer.body
    assert len(answer.body) < 2000


@pytest.mark.parametrize(
    ("document", "data", "said"),
    [
        (binary(48), b"", "binary_data_size is 48, but the body has only 0 bytes left"),
        (binary(48), b"x" * 47, "the body has only 47 bytes left"),
        (binary(48), b"x" * 49, "the body has 1 bytes more of binary data than its inputs tell"),
        (binary(47), b"x" * 47, "binary_data_size is 47, but FP64 of"),
        (binary(-48), b"x" * 48, "binary_data_size is -48"),
        (binary(48.0), b"x" * 48, "binary_data_size is 48.0"),
        (binary(True), b"x" * 48, "binary_data_size is True"),
        (binary(48, data=[0.0] * 6), b"x" * 48, "has both data and binary_data_size"),
    ],
)
def test_binary_data_that_are_not_those_that_are_told(service: Service, document: Any, data: bytes, said: str) -> None:
    answer = ask(service, document, data)
    assert answer.status == 400 and said in answer.error, answer.body


@pytest.mark.parametrize("length", ["-1", "x", "1e3", "99999", "9" * 5000, "", " ", "0x10"])
def test_lengths_of_the_json_part(service: Service, length: str) -> None:
    answer = service.request("POST", PATH, b"{}", {LENGTH: length})
    assert answer.status == 400 and (LENGTH in answer.error or "JSON" in answer.error)


def with_data(start: bytes, rest: bytes) -> bytes:
    return b'{"inputs":[{"name":"strain","shape":[1,6],"datatype":"FP64","data":[' + start + rest + b"]}]}"


@pytest.mark.parametrize(
    "document",
    [
        b'{"inputs":[' + b"[]," * 1_000_000 + b"[]]}",
        with_data(b"0," * 1_500_000, b"0"),
        with_data(b"NaN," * 900_000, b"0"),
        with_data(b"", b"9" * 3_000_000),
        with_data(b"NaN,", b"9" * 3_000_000),
        b"{" + b",".join(b'"%d":0' % i for i in range(300_000)) + b"}",
        b'{"inputs":"' + b"x" * 3_900_000 + b'"}',
        with_data(b"", b"").replace(b"[1,6]", b"[" + b"1," * 1_500_000 + b"6]"),
        b'{"id":"\\ud800","parameters":{"operation":NaN}}',
    ],
    ids=["lists", "entries", "nan", "digits", "digits and nan", "keys", "text", "extents", "half a character"],
)
def test_large_nonsense_is_answered_soon_and_briefly(service: Service, document: bytes) -> None:
    begin = time.monotonic()
    answer = ask(service, document)
    assert answer.status == 400 and len(answer.body) < 2000 and time.monotonic() - begin < 5


# -- mutations of what is right --------------------------------------------------------------------------------------

NAMES = ["strain", "stress", "stress:strain", "tangent:strain", "FP64", "solve", "jacobian", "promoted.E"]
KEYS = ["name", "shape", "data", "datatype", "parameters", "inputs", "id", "promoted.E", "x"]
NUMBERS = st.integers(-(2**70), 2**70) | st.floats()
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8) | st.sampled_from(NAMES),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)


def paths(part: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the parts of a document are."""
    yield path
    for key in part if isinstance(part, dict) else range(len(part)) if isinstance(part, list) else ():
        yield from paths(part[key], (*path, key))


@st.composite
def mutations(draw: st.DrawFn) -> tuple[bytes, bytes, str | None]:
    """A right request in which some parts were replaced or removed: JSON, binary data, told length."""
    binary = draw(st.booleans())
    options = {"operation": "jacobian", "parameter_overrides": {"promoted.E": 7e4}}
    outputs = [{"name": "stress", "parameters": {"binary_data": binary}}]
    body, headers = encode({"strain": np.zeros((2, 6))}, binary, options, id="seven", outputs=outputs)
    cut = int(headers.get(LENGTH, len(body)))
    whole, data = [json.loads(body[:cut])], body[cut:]
    for _ in range(draw(st.integers(1, 3))):
        *path, key = draw(st.sampled_from([*paths(whole)][1:]))
        within = functools.reduce(getitem, path, whole)
        if path and draw(st.booleans()):
            del within[key]
        else:
            within[key] = draw(JSON)
    head = json.dumps(whole[0]).encode()
    if draw(st.integers(0, 4)) == 0:
        place = draw(st.integers(0, len(head)))
        head = head[:place] + draw(st.binary(max_size=6)) + head[place + draw(st.integers(0, 6)) :]
    data = data[: draw(st.integers(0, len(data)))] if draw(st.integers(0, 3)) == 0 else data
    data += draw(st.binary(max_size=4)) if draw(st.integers(0, 3)) == 0 else b""
    length = str(draw(st.integers(-1, len(head) + 200))) if draw(st.integers(0, 4)) == 0 else None
    return head, data, length


CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
SETTINGS = settings(max_examples=100, deadline=5000, derandomize=True, suppress_health_check=CHECKS)


def require_an_answer(service: Service, mutation: tuple[bytes, bytes, str | None]) -> None:
    """An answer of the protocol: the tensors, or what is wrong."""
    answer = ask(service, *mutation)
    if answer.status == 200:
        assert answer.arrays
    else:
        assert answer.status in (400, 413, 422) and 10 < len(answer.error) < 1500, answer


@SETTINGS
@given(mutation=mutations())
def test_mutated_requests(service: Service, mutation: tuple[bytes, bytes, str | None]) -> None:
    require_an_answer(service, mutation)


@pytest.mark.long
@settings(SETTINGS, max_examples=5000, derandomize=False)
@given(mutation=mutations())
def test_many_mutated_requests(service: Service, mutation: tuple[bytes, bytes, str | None]) -> None:
    require_an_answer(service, mutation)


@SETTINGS
@given(body=st.binary(max_size=300), length=st.one_of(st.none(), st.text("0123456789 -x", max_size=5)))
def test_bodies_of_any_bytes(service: Service, body: bytes, length: str | None) -> None:
    headers = {} if length is None else {LENGTH: length}
    answer = service.request("POST", PATH, body, headers)
    assert answer.status == 400 and answer.error


@settings(SETTINGS, max_examples=60)
@given(start=st.sampled_from([b"", b"GET ", raw(PATH, b"12345")[:-7]]), rest=st.binary(max_size=200))
def test_what_is_no_http(service: Service, start: bytes, rest: bytes) -> None:
    """It is refused or waited for; a connection that was refused is closed."""
    with service.connect(0.05) as connection:
        connection.sendall(start + rest)
        with contextlib.suppress(TimeoutError):
            answer = b""
            answer = read_all(connection)
    assert re.match(rb"$|HTTP/1\.[01] (200|4\d\d) ", answer), answer


@SETTINGS
@given(path=st.text(min_size=1, max_size=20))
def test_addresses_of_any_text(service: Service, path: str) -> None:
    for address in (f"/v2/models/{quote(path, safe='')}", f"/{quote(path)}"):
        answer = service.request("GET", address)
        assert answer.status in (200, 307) or (answer.status in (400, 404) and answer.error)


def test_neighbours_are_right_and_it_is_still_there(service: Service, stress: Array) -> None:
    """Bad requests and good ones at the same time."""
    nan = {"strain": np.full((1, 6), np.nan)}

    def one(place: int) -> None:
        if place % 2:
            close(service.infer("promoted", strain(3)).arrays["stress"], stress)
        elif place % 3 == 0:
            assert service.infer("promoted", nan).status == 422
        else:
            assert ask(service, b"{" * 1000 if place % 3 == 1 else request(shape=[1, 7])).status == 400

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(200)))
    assert service.get("/v2/health/ready") == {"ready": True}


def test_bytes_of_a_right_request_in_any_parts(service: Service, stress: Array) -> None:
    """However the network cuts it, and several on one connection."""
    several = raw(PATH, *encode(strain(3))) * 5
    cuts = [0, *sorted(np.random.default_rng(0).integers(0, len(several), 40).tolist()), len(several)]
    with service.connect(10) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for begin, end in pairwise(cuts):
            connection.sendall(several[begin:end])
            time.sleep(0.002)
        received = b""
        while received.count(b"HTTP/1.1 200 ") < 5 or not received.endswith(stress.tobytes()):
            part = connection.recv(65536)
            assert part
            received += part
    assert received.count(stress.tobytes()) == 5
