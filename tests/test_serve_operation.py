"""Running the service: starting and stopping, the log, several processes, what is refused, one's own application."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import references
from commands import answer, printed, refused
from neml2_aoti_plugin import InputError, Model, seal
from neml2_aoti_plugin.serve import app
from serving import (
    SCRIPT,
    Service,
    artifact,
    asking,
    close,
    encode,
    eventually,
    infer,
    raw,
    read_all,
    running,
    started,
    step,
    strain,
)

TOKEN = "of-the-test-9d1f"
INFER, VISCO = infer("elasticity"), infer("viscoplasticity")
# It never ends.
HALF = raw(INFER, b"x" * 1000)[:-10]

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(os.name == "nt", reason="signals and Unix sockets are others there"),
]


# -- starting and stopping -------------------------------------------------------------------------------------------


def test_it_starts_and_stops_under_load(tmp_path: Path) -> None:
    """Nothing answers before the models are loaded; after SIGTERM all that was accepted is answered, and right."""
    path = tmp_path / "socket"
    with started(tmp_path, [artifact("viscoplasticity"), "--uds", path, "--quiet"], ready=0) as service:
        while True:
            listening = service.lines("listening")
            with contextlib.suppress(ConnectionRefusedError, FileNotFoundError):
                service.connect().close()
                break
            assert not listening
            time.sleep(0.1)
        assert service.wait_for("listening")[0]["models"] == ["viscoplasticity"] and service.lines("loaded")
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        assert service.get("/v2/health/ready") == {"ready": True} and service.metric("neml2_rows_total") == 0
        wanted = [service.infer("viscoplasticity", step(2, seed)).arrays["stress"] for seed in range(4)]

        def load(place: int) -> int:
            """The number of right answers, until a request is not accepted, or closed before a byte was read."""
            answered = 0
            with contextlib.suppress(ConnectionError, FileNotFoundError):
                while (answer := service.infer("viscoplasticity", step(2, place % 4))).status != 503:
                    close(answer.arrays["stress"], wanted[place % 4])
                    answered += 1
                assert answer.headers["retry-after"] == "1"
            return answered

        with ThreadPoolExecutor(8) as pool, service.connect() as connection:
            threads = [pool.submit(load, place) for place in range(8)]
            time.sleep(0.5)
            connection.sendall(raw(VISCO, *encode(step(30000), True, {"operation": "solve"})))
            time.sleep(0.1)
            begin = time.monotonic()
            service.process.send_signal(signal.SIGTERM)
            assert all(thread.result(timeout=60) for thread in threads)
            assert read_all(connection).startswith(b"HTTP/1.1 200 ")
        assert service.process.wait(30) == 0 and time.monotonic() - begin < 25
        assert service.lines("stopped") and not service.lines("failed") and not path.exists()


def test_a_client_that_never_ends_does_not_keep_it(tmp_path: Path) -> None:
    arguments = [artifact("elasticity"), "--stop-seconds", 2, "--receive-seconds", 60]
    with started(tmp_path, arguments) as service, service.connect() as connection:
        connection.sendall(HALF)
        time.sleep(0.3)
        begin = time.monotonic()
        assert service.stop(30) == 0 and time.monotonic() - begin < 8


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.wide)])
def test_a_signal_before_it_listens_ends_it_at_once(workers: int, tmp_path: Path) -> None:
    """Without a traceback, which `started` would find; and the socket is removed."""
    path = tmp_path / "socket"
    arguments = [artifact("viscoplasticity"), "--uds", path, "--workers", workers]
    with started(tmp_path, arguments, ready=0) as service:
        begin = time.monotonic()
        assert service.stop() == 0 and time.monotonic() - begin < 20
        assert not service.lines("listening") and not service.lines("not loaded")
    assert not path.exists()


def test_a_service_leaves_the_socket_of_the_next_one(tmp_path: Path) -> None:
    """As on a restart: the old one still has a request to answer when the new one listens on the same path."""
    path = tmp_path / "socket"
    arguments = [artifact("elasticity"), "--uds", path, "--receive-seconds", 60]
    with started(tmp_path / "old", arguments) as old, old.connect() as held:
        held.sendall(HALF)
        time.sleep(0.2)
        old.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(ConnectionRefusedError):
            while True:
                # It does not accept any more where as many wait as may.
                with contextlib.suppress(BlockingIOError):
                    old.connect().close()
                time.sleep(0.01)
        with started(tmp_path / "new", arguments) as new:
            held.close()
            assert old.process.wait(30) == 0
            assert new.infer("elasticity", strain(1)).status == 200
            assert new.stop() == 0 and not path.exists()


# -- the log ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def killed(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is killed at the end if it still runs."""
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_log_that_nobody_reads_keeps_nobody(tmp_path: Path) -> None:
    """Requests are answered all the same; what found no room is counted, and told once somebody reads again."""
    command = [str(SCRIPT), "serve", str(artifact("elasticity")), "--port", "0"]
    with killed(subprocess.Popen(command, stdout=subprocess.PIPE)) as process:
        assert process.stdout is not None
        lines: Iterator[dict[str, Any]] = map(json.loads, process.stdout)
        address = next(lines)["address"].removeprefix("http://")
        assert any(line["event"] == "listening" for line in lines)
        with contextlib.closing(http.client.HTTPConnection(address, timeout=30)) as connection:

            def get(path: str) -> int:
                connection.request("GET", path)
                answer = connection.getresponse()
                assert answer.read()
                return answer.status

            # Lines of 20 kB: the pipe and the memory for lines are soon full.
            asked, places, lost = 150, list[int](), 0
            assert {get(f"/{place}-{'x' * 20000}") for place in range(asked)} == {404}
            while len(places) + lost < asked:
                line = next(lines)
                if line["event"] == "lines lost":
                    lost += line["count"]
                else:
                    places.append(int(line["path"][1:].partition("-")[0]))
            assert 0 < lost < asked and places == sorted(places)
            assert get("/v2") == 200 and next(lines)["path"] == "/v2"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


@pytest.mark.wide
@pytest.mark.skipif(sys.platform != "linux", reason="limits of another process are Linux's")
def test_the_log_goes_on_after_a_full_disk(tmp_path: Path) -> None:
    import resource

    with started(tmp_path, [artifact("elasticity")]) as service:
        # What comes beyond this size fails, as on a disk without room.
        unlimited = resource.prlimit(service.process.pid, resource.RLIMIT_FSIZE)
        size = service.log.stat().st_size + 1000
        resource.prlimit(service.process.pid, resource.RLIMIT_FSIZE, (size, unlimited[1]))
        for _ in range(50):
            assert service.get("/v2")
        time.sleep(0.3)
        assert service.log.stat().st_size == size
        resource.prlimit(service.process.pid, resource.RLIMIT_FSIZE, unlimited)
        service.request("GET", "/v2", headers={"X-Request-Id": "the-next"})
        time.sleep(0.3)
        whole, torn = [], 0
        for text in service.log.read_text(encoding="utf-8").splitlines():
            try:
                whole.append(json.loads(text))
            except ValueError:
                torn += 1
        assert torn == 1 and whole[-1]["id"] == "the-next"
        (lost,) = [line["count"] for line in whole if line["event"] == "lines lost"]
        assert len([line for line in whole if line["event"] == "request"]) + lost == 51
        assert service.stop() == 0


@pytest.mark.wide
@pytest.mark.parametrize("log", [">/dev/full", ">&-"], ids=["full", "closed"])
def test_without_a_log_it_serves(log: str, tmp_path: Path) -> None:
    path, errors = tmp_path / "socket", tmp_path / "errors.txt"
    command = f"exec {SCRIPT} serve {artifact('elasticity')} --uds {path} {log} 2> {errors}"
    with killed(subprocess.Popen(["sh", "-c", command])) as process:
        service = Service(process, tmp_path, str(path))

        def answers() -> bool:
            assert process.poll() is None
            with contextlib.suppress(OSError):
                return service.infer("elasticity", strain(1)).status == 200
            return False

        eventually(answers)
        assert service.stop() == 0 and errors.read_text(encoding="utf-8") == ""


# -- several processes -----------------------------------------------------------------------------------------------


def runs(process: int) -> bool:
    """Whether a process runs; one that nobody waits for is a zombie."""
    with contextlib.suppress(FileNotFoundError):
        state = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
        return state != "Z"
    return False


def test_several_processes(tmp_path: Path) -> None:
    """One that is killed comes back; what is counted is counted over all; all end together."""
    with started(tmp_path, [artifact("elasticity"), "--workers", "2"], ready=2) as service:

        def counted(requests: int) -> None:
            """A process counts a request after its answer, which another may tell of before."""
            labels = {"operation": "forward", "status": "200"}
            eventually(lambda: service.metric("neml2_requests_total", **labels) == requests)

        processes = {line["process"] for line in service.lines("listening")}
        assert len(processes) == 2 and service.process.pid not in processes
        *_, wanted = (service.infer("elasticity", strain(3)).arrays["stress"] for _ in range(21))
        counted(21)
        victim = min(processes)
        os.kill(victim, signal.SIGKILL)
        (died,) = service.wait_for("process died")
        assert (died["process"], died["exitcode"]) == (victim, -signal.SIGKILL)
        # The other one goes on meanwhile.
        close(service.infer("elasticity", strain(3)).arrays["stress"], wanted)
        new = service.wait_for("listening", 3)[-1]["process"]
        assert new not in processes
        # Neither what the dead one had counted is lost, nor is its queue there for ever.
        counted(22)
        assert service.metric("neml2_queue_rows") == 0
        assert service.stop() == 0 and not any(map(runs, processes | {new}))


@pytest.mark.long
def test_processes_end_with_the_one_that_has_started_them(tmp_path: Path) -> None:
    arguments = [artifact("elasticity"), "--workers", "2"]
    with started(tmp_path, arguments, ready=2, variables={"TMPDIR": str(tmp_path)}) as service:
        processes = [line["process"] for line in service.lines("listening")]
        service.process.kill()
        service.process.wait(10)
        eventually(lambda: not any(map(runs, processes)), 30)
        assert not list(tmp_path.glob("neml2-aoti-serve-*"))


# -- what is refused at the start ------------------------------------------------------------------------------------


def test_beyond_loopback_a_token_and_a_seal_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = references.copied("elasticity", tmp_path)
    words = ("serve", copied, "--host", "0.0.0.0", "--check")
    monkeypatch.setenv("NEML2_AOTI_SERVE_TOKEN", TOKEN)
    refused(*words)
    seal(copied)
    report = answer(*words)
    assert (report["local"], report["token"]) == (False, True) and TOKEN not in "".join(printed(*words))
    (model,) = report["models"]
    assert (model["name"], model["sealed"]) == ("elasticity", True)
    assert model["operations"] == ["forward", "solve", "jacobian", "jvp"]
    monkeypatch.setenv("NEML2_AOTI_SERVE_TOKEN", "two words")
    assert "holds no token" in refused(*words)


@pytest.mark.parametrize(("host", "evaluated"), [("127.0.0.1", True), ("0.0.0.0", False)])
def test_the_driver_of_a_stub_is_read_for_this_machine_alone(host: str, evaluated: bool, tmp_path: Path) -> None:
    stub = references.copied("elasticity", tmp_path).with_name("elasticity_aoti.i")
    text = stub.read_text(encoding="utf-8")
    changed = re.sub(r"(\[times\]\s*type = Python\s*expr =) '.*'", r"\1 'what_is_not_there'", text)
    assert changed != text
    stub.write_text(changed, encoding="utf-8")
    _, told = printed("serve", stub, "--host", host, "--no-token", "--allow-unsealed", "--check")
    assert ("name 'what_is_not_there' is not defined" in told) == evaluated


def test_a_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    """The process ends with an error, and several do not start again for ever."""
    copied = references.copied("elasticity", tmp_path)
    for file in copied.rglob("*.pt2"):
        file.write_bytes(file.read_bytes()[:1000])
    command = [str(SCRIPT), "serve", str(copied), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and str(copied) in done.stderr and "Traceback" not in done.stderr
    assert [json.loads(line)["event"] for line in done.stdout.splitlines()][1] == "not loaded"


@pytest.mark.wide
def test_a_variable_with_the_name_of_a_derivative_is_refused(tmp_path: Path) -> None:
    source = references.case("elasticity").stub.path.read_text(encoding="utf-8")
    assert "stress = 'stress'" in source
    (tmp_path / "model.i").write_text(source.replace("stress = 'stress'", "stress = 'tangent:strain'"))
    command = shlex.split(f"{SCRIPT.with_name('neml2-compile')} model.i --driver driver --output-dir out")
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert "a variable is called 'tangent:strain'" in refused("serve", tmp_path / "out" / "elasticity", "--check")


def test_two_on_one_address(tmp_path: Path) -> None:
    with started(tmp_path, [artifact("elasticity")]) as service:
        _, told = printed("serve", artifact("elasticity"), "--port", service.address[1], status=2)
        assert f"cannot listen on {service.place}: Address already in use" in told


# -- an application of one's own -------------------------------------------------------------------------------------


def test_an_application_for_another_server() -> None:
    models = {"steel": Model(artifact("elasticity")), "other": artifact("elasticity")}
    application = app(models, token=TOKEN, request_rows=10)
    body, _ = encode(strain(2), binary=False)
    token, path = {"Authorization": f"Bearer {TOKEN}"}, infer("steel")

    async def use() -> None:
        # Before the server has started it.
        ask = asking(application)
        assert (await ask("GET", "/v2/health/ready")).status == 503
        assert (await ask("POST", path, body, token)).status == 503
        async with running(application):
            assert (await ask("GET", "/v2/health/ready")).status == 200
            assert (await ask("POST", path, body)).status == 401
            found = await asyncio.gather(*(ask("POST", one, body, token) for one in (path, infer("other"))))
            assert found[0].document["outputs"] == found[1].document["outputs"]
            assert (await ask("POST", path, encode(strain(11), binary=False)[0], token)).status == 413
        # Stubs are served by the names of their models.
        async with running(app([references.case("elasticity").file])) as ask:
            assert (await ask("GET", "/v2/models/elasticity")).status == 200

    asyncio.run(use())


@pytest.mark.parametrize(
    ("models", "limits", "said"),
    [
        ([], {}, "there is no model to serve"),
        (["a", "b/a"], {}, "two models have the name 'a'"),
        (["a"], {"queue_rows": 0}, r"queue_rows \(--queue-rows\) is 0, expected a number, 1 or more"),
        (["a"], {"wait_ms": float("nan")}, r"wait_ms \(--wait-ms\) is nan"),
    ],
)
def test_an_application_that_cannot_be(models: list[str], limits: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        app(models, **limits)
