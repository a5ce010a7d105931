"""Running the service: starting and stopping, the log, several processes, what is refused, one's own application."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from neml2_aoti_plugin import InputError, Model, seal
from neml2_aoti_plugin import _cli as cli
from neml2_aoti_plugin.serve import app
from serving import (
    PATIENCE,
    SCRIPT,
    Service,
    artifact,
    asking,
    close,
    encode,
    raw,
    read_all,
    running,
    started,
    step,
    strain,
)

TOKEN = "of-the-test-9d1f"
INFER = "/v2/models/elasticity/infer"

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(os.name == "nt", reason="signals and Unix sockets are others there"),
]


def eventually(holds: Callable[[], bool], patience: float = 30.0) -> None:
    """Wait until something holds."""
    end = time.monotonic() + patience
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


# -- starting and stopping -------------------------------------------------------------------------------------------


def test_it_starts_and_stops_under_load(tmp_path: Path) -> None:
    """Nothing answers before the models are loaded; after SIGTERM all that was accepted is answered, and right."""
    path = tmp_path / "socket"
    arguments = [artifact("viscoplasticity"), "--uds", path, "--quiet"]
    with started(tmp_path, arguments, ready=0) as service:
        while True:
            listening = service.lines("listening")
            try:
                service.connect().close()
                break
            except (ConnectionRefusedError, FileNotFoundError):
                assert not listening
                time.sleep(0.1)
        assert service.wait_for("listening")[0]["models"] == ["viscoplasticity"] and service.lines("loaded")
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        assert service.get("/v2/health/ready") == {"ready": True}
        assert service.metric("neml2_rows_total") == 0
        wanted = [service.infer("viscoplasticity", step(2, seed)).arrays["stress"] for seed in range(4)]
        answered, broken = [0] * 8, []

        def load(place: int) -> None:
            while True:
                try:
                    answer = service.infer("viscoplasticity", step(2, place % 4))
                except (ConnectionRefusedError, FileNotFoundError):
                    # Not accepted.
                    return
                except OSError as error:
                    # Accepted by the system, closed before a byte was read.
                    broken.append(error)
                    return
                if answer.status == 503:
                    assert answer.headers["retry-after"] == "1"
                    return
                close(answer.arrays["stress"], wanted[place % 4])
                answered[place] += 1

        text = raw("/v2/models/viscoplasticity/infer", *encode(step(30000), True, {"operation": "solve"}))
        with ThreadPoolExecutor(8) as pool, service.connect() as connection:
            threads = [pool.submit(load, place) for place in range(8)]
            time.sleep(0.5)
            connection.sendall(text)
            time.sleep(0.1)
            begin = time.monotonic()
            service.process.send_signal(signal.SIGTERM)
            for thread in threads:
                thread.result(timeout=60)
            assert read_all(connection).startswith(b"HTTP/1.1 200 ")
        assert service.process.wait(30) == 0 and time.monotonic() - begin < 25
        assert all(answered) and all(isinstance(error, ConnectionError) for error in broken), broken
        assert service.lines("stopped") and not service.lines("failed")
        assert not path.exists()


def test_a_client_that_never_ends_does_not_keep_it(tmp_path: Path) -> None:
    arguments = [artifact("elasticity"), "--stop-seconds", 2, "--receive-seconds", 60]
    with started(tmp_path, arguments) as service, service.connect() as connection:
        connection.sendall(raw(INFER, b"x" * 1000)[:-10])
        time.sleep(0.3)
        begin = time.monotonic()
        assert service.stop(30) == 0
        assert time.monotonic() - begin < 8


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
        held.sendall(raw(INFER, b"x" * 1000)[:-10])
        time.sleep(0.2)
        old.process.send_signal(signal.SIGTERM)
        while True:
            try:
                old.connect().close()
            except ConnectionRefusedError:
                break
            except BlockingIOError:
                # It does not accept any more, and as many wait as may.
                time.sleep(0.01)
        with started(tmp_path / "new", arguments) as new:
            held.close()
            assert old.process.wait(30) == 0
            assert new.infer("elasticity", strain(1)).status == 200
            assert new.stop() == 0
            assert not path.exists()


# -- the log ---------------------------------------------------------------------------------------------------------


def test_a_log_that_nobody_reads_keeps_nobody(tmp_path: Path) -> None:
    """Requests are answered all the same; what found no room is counted, and told once somebody reads again."""
    arguments = [str(SCRIPT), "serve", str(artifact("elasticity")), "--port", "0"]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        first = json.loads(process.stdout.readline())
        while json.loads(process.stdout.readline())["event"] != "listening":
            pass
        host, port = first["address"].removeprefix("http://").split(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=30)
        # Lines of 20 kB: the pipe and the memory for lines are soon full.
        asked = 150
        for place in range(asked):
            connection.request("GET", f"/{place}-{'x' * 20000}")
            answer = connection.getresponse()
            assert answer.status == 404 and answer.read()
        lines: list[dict[str, Any]] = []
        while sum(line["count"] if line["event"] == "lines lost" else 1 for line in lines) < asked:
            lines.append(json.loads(process.stdout.readline()))
        lost = [line["count"] for line in lines if line["event"] == "lines lost"]
        assert 0 < sum(lost) < asked
        places = [int(line["path"][1:].partition("-")[0]) for line in lines if line["event"] == "request"]
        assert places == sorted(places) and len(places) == asked - sum(lost)
        connection.request("GET", "/v2")
        assert connection.getresponse().read()
        assert json.loads(process.stdout.readline())["path"] == "/v2"
        connection.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.communicate()


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
@pytest.mark.parametrize("where", ["/dev/full", None], ids=["full", "closed"])
def test_without_a_log_it_serves(where: str | None, tmp_path: Path) -> None:
    path, errors = tmp_path / "socket", tmp_path / "errors.txt"
    command = f"exec {SCRIPT} serve {artifact('elasticity')} --uds {path} {'>' + where if where else '>&-'} 2> {errors}"
    process = subprocess.Popen(["sh", "-c", command])
    service = Service(process, tmp_path, path=str(path))

    def answers() -> bool:
        assert process.poll() is None
        with contextlib.suppress(OSError):
            return service.infer("elasticity", strain(1)).status == 200
        return False

    try:
        eventually(answers, PATIENCE)
        assert service.stop() == 0
        assert errors.read_text(encoding="utf-8") == ""
    finally:
        process.kill()
        process.wait()


# -- several processes -----------------------------------------------------------------------------------------------


def counted(service: Service, requests: int) -> None:
    """Wait until so many are counted: a process counts a request after its answer, which another may tell of before."""
    labels = {"operation": "forward", "status": "200"}
    eventually(lambda: service.metric("neml2_requests_total", **labels) == requests)


def test_several_processes(tmp_path: Path) -> None:
    """One that is killed comes back; what is counted is counted over all; all end together."""
    with started(tmp_path, [artifact("elasticity"), "--workers", "2"], ready=2) as service:
        processes = {line["process"] for line in service.lines("listening")}
        assert len(processes) == 2 and service.process.pid not in processes
        given = strain(3)
        wanted = service.infer("elasticity", given).arrays["stress"]
        for _ in range(20):
            assert service.infer("elasticity", given).status == 200
        counted(service, 21)
        killed = min(processes)
        os.kill(killed, signal.SIGKILL)
        (died,) = service.wait_for("process died")
        assert (died["process"], died["exitcode"]) == (killed, -signal.SIGKILL)
        # The other one goes on meanwhile.
        close(service.infer("elasticity", given).arrays["stress"], wanted)
        new = service.wait_for("listening", 3)[-1]["process"]
        assert new not in processes
        # Neither what the dead one had counted is lost, nor is its queue there for ever.
        counted(service, 22)
        assert service.metric("neml2_queue_rows") == 0
        assert service.stop() == 0
        for process in (processes | {new}) - {killed}:
            with pytest.raises(ProcessLookupError):
                os.kill(process, 0)


@pytest.mark.long
def test_processes_end_with_the_one_that_has_started_them(tmp_path: Path) -> None:
    arguments = [artifact("elasticity"), "--workers", "2"]
    with started(tmp_path, arguments, ready=2, variables={"TMPDIR": str(tmp_path)}) as service:
        processes = [line["process"] for line in service.lines("listening")]
        service.process.kill()
        service.process.wait(10)
        eventually(lambda: not any(_runs(process) for process in processes))
        assert not list(tmp_path.glob("neml2-aoti-serve-*"))


def _runs(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    # One that nobody waits for is a zombie here.
    return state != "Z"


# -- what is refused at the start ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give an artifact or a stub"),
        (["gone"], "there is no such folder"),
        (["ARTIFACT", "--name", "x"], "'x' is not NAME=PATH"),
        (["ARTIFACT", "--name", "elasticity=ARTIFACT"], "two models have the name 'elasticity'"),
        (["ARTIFACT", "--parameters", "steel=FILE"], "there is no model 'steel'; there are elasticity"),
        (["--name", "a/b=ARTIFACT"], "'a/b', which no address can have"),
        (["ARTIFACT", "--request-rows", "100000"], "Raise queue_rows, or lower request_rows"),
        (["ARTIFACT", "--body-bytes", "300000000"], "bodies_bytes (--bodies-bytes) is 268435456"),
        (["ARTIFACT", "--json"], "--json goes with --check"),
        (["ARTIFACT", "--host", "0.0.0.0"], "0.0.0.0 is reached from other machines, and there is no token"),
        (["ARTIFACT", "--host", "0.0.0.0", "--no-token"], "there is no seal of"),
        (["ARTIFACT", "--host", "no.such.host.invalid"], "is no address of this machine"),
        (["ARTIFACT", "--host", "203.0.113.7", "--no-token", "--allow-unsealed"], "cannot listen on 203.0.113.7:8080"),
    ],
)
def test_wrong_use(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    place = str(artifact("elasticity"))
    assert cli.main(["serve", *(word.replace("ARTIFACT", place) for word in arguments)]) == 2
    assert said in capsys.readouterr().err


def test_beyond_loopback_a_token_and_a_seal_are_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = tmp_path / "elasticity"
    shutil.copytree(artifact("elasticity"), copied)
    arguments = ["serve", str(copied), "--host", "0.0.0.0", "--check", "--json"]
    monkeypatch.setenv("NEML2_AOTI_SERVE_TOKEN", TOKEN)
    assert cli.main(arguments) == 2
    capsys.readouterr()
    seal(copied)
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    report = json.loads(printed)["result"]
    assert (report["local"], report["token"]) == (False, True) and TOKEN not in printed
    (model,) = report["models"]
    assert (model["name"], model["sealed"]) == ("elasticity", True)
    assert model["operations"] == ["forward", "solve", "jacobian", "jvp"]
    monkeypatch.setenv("NEML2_AOTI_SERVE_TOKEN", "two words")
    assert cli.main(arguments) == 2
    assert "holds no token" in capsys.readouterr().err


@pytest.mark.parametrize(("host", "evaluated"), [("127.0.0.1", True), ("0.0.0.0", False)])
def test_the_driver_of_a_stub_is_read_for_this_machine_alone(
    host: str, evaluated: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(artifact("elasticity"), tmp_path / "elasticity")
    text = artifact("elasticity").with_name("elasticity_aoti.i").read_text(encoding="utf-8")
    changed = re.sub(r"(\[times\]\s*type = Python\s*expr =) '.*'", r"\1 'what_is_not_there'", text)
    assert changed != text
    stub = tmp_path / "elasticity_aoti.i"
    stub.write_text(changed, encoding="utf-8")
    assert cli.main(["serve", str(stub), "--host", host, "--no-token", "--allow-unsealed", "--check"]) == 0
    assert ("name 'what_is_not_there' is not defined" in capsys.readouterr().err) == evaluated


def test_a_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    """The process ends with an error, and several do not start again for ever."""
    copied = tmp_path / "elasticity"
    shutil.copytree(artifact("elasticity"), copied)
    for file in copied.rglob("*.pt2"):
        file.write_bytes(file.read_bytes()[:1000])
    done = subprocess.run(
        [str(SCRIPT), "serve", str(copied), "--port", "0"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1 and str(copied) in done.stderr and "Traceback" not in done.stderr
    assert [json.loads(line)["event"] for line in done.stdout.splitlines()][1] == "not loaded"


@pytest.mark.wide
def test_a_variable_with_the_name_of_a_derivative_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = (Path(__file__).parent.parent / "stubs" / "elasticity.i").read_text(encoding="utf-8")
    assert "stress = 'stress'" in source
    (tmp_path / "model.i").write_text(
        source.replace("stress = 'stress'", "stress = 'tangent:strain'"), encoding="utf-8"
    )
    command = [str(SCRIPT.with_name("neml2-compile")), "model.i", "--driver", "driver", "--output-dir", "out"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert cli.main(["serve", str(tmp_path / "out" / "elasticity"), "--check"]) == 2
    assert "a variable is called 'tangent:strain'" in capsys.readouterr().err


def test_two_on_one_address(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with started(tmp_path, [artifact("elasticity")]) as service:
        assert cli.main(["serve", str(artifact("elasticity")), "--port", str(service.port)]) == 2
        assert f"cannot listen on 127.0.0.1:{service.port}: Address already in use" in capsys.readouterr().err


# -- an application of one's own -------------------------------------------------------------------------------------


def test_an_application_for_another_server() -> None:
    models = {"steel": Model(artifact("elasticity")), "other": artifact("elasticity")}
    application = app(models, token=TOKEN, request_rows=10)
    body, _ = encode(strain(2), binary=False)
    token, path = {"Authorization": f"Bearer {TOKEN}"}, "/v2/models/steel/infer"

    async def use() -> None:
        # Before the server has started it.
        ask = asking(application)
        assert (await ask("GET", "/v2/health/ready")).status == 503
        assert (await ask("POST", path, body, token)).status == 503
        async with running(application):
            assert (await ask("GET", "/v2/health/ready")).status == 200
            assert (await ask("POST", path, body)).status == 401
            other = path.replace("steel", "other")
            found = await asyncio.gather(*(ask("POST", one, body, token) for one in (path, other)))
            assert found[0].document["outputs"] == found[1].document["outputs"]
            assert (await ask("POST", path, encode(strain(11), binary=False)[0], token)).status == 413

    asyncio.run(use())


def test_an_application_takes_stubs_by_the_names_of_their_models() -> None:
    async def use() -> None:
        async with running(app([artifact("elasticity").with_name("elasticity_aoti.i")])) as ask:
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
