"""Requests of one row each as fast as a number of clients can send them, by wrk."""

from __future__ import annotations

import json
import shutil
import subprocess
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from neml2_aoti_plugin.model import Model

from .server import started
from .states import States, call_seconds, encode

# Workers, whether gathered, whether binary, clients.
Case = tuple[int, bool, bool, int]

SCRIPT = Path(__file__).with_name("load.lua")
CLIENTS, WORKERS = (1, 8, 64, 256), (1, 2)
# Before each measurement, in seconds; wrk takes whole ones.
WARM = 1


@dataclass(frozen=True)
class Load:
    """What a number of clients saw in one round.

    Args:
        clients: how many, each on a connection of its own.
        binary: whether tensors are binary data, both ways; else JSON.
        gathered: whether requests are gathered.
        workers: processes of the service.
        requests: that were answered.
        failed: answered with an error, or not at all.
        per_second: answers per second.
        p50: latency in milliseconds that half of the requests have at most; p95 and p99 likewise.
        p95: see p50.
        p99: see p50.
        cpu: processor time of the service for each request, in microseconds.
        call: milliseconds of a call of one row in a process of its own, right before.
    """

    clients: int
    binary: bool
    gathered: bool
    workers: int
    requests: int
    failed: int
    per_second: float
    p50: float
    p95: float
    p99: float
    cpu: float
    call: float

    @property
    def case(self) -> Case:
        """What is the same in all rounds."""
        return self.workers, self.gathered, self.binary, self.clients


def measure(states: States, work: Path, seconds: int, rounds: int) -> list[Load]:
    """Measure all numbers of clients, with JSON and binary data, with and without gathering, in turn.

    They come one after the other in each round, so that all see the same machine.

    Args:
        states: what requests are made of.
        work: folder for bodies and logs.
        seconds: of each measurement, a whole number.
        rounds: how many.
    """
    if shutil.which("wrk") is None:
        raise RuntimeError("wrk is not installed: apt-get install wrk")
    heads = {binary: _write_bodies(states, work / f"bodies-{binary}", binary) for binary in (False, True)}
    model = Model(states.artifact)
    found = []
    with ExitStack() as stack:
        servers = {
            (workers, gathered): stack.enter_context(
                started(states.artifact, work / f"{workers}-{gathered}", *options, workers=workers)
            )
            for workers in WORKERS
            for gathered, options in ((True, ()), (False, ("--gather-rows", "1")))
        }
        for _ in range(rounds):
            for clients, ((workers, gathered), server), binary in product(CLIENTS, servers.items(), (False, True)):
                url = f"http://127.0.0.1:{server.port}/v2/models/{states.artifact.name}/infer"
                extra = [str(work / f"bodies-{binary}"), str(len(states.inputs)), str(heads[binary])]
                _wrk(clients, WARM, url, extra)
                call = call_seconds(model, states.inputs) * 1e3
                before = server.cpu_seconds
                told = _wrk(clients, seconds, url, extra)
                cpu = (server.cpu_seconds - before) / max(1, told["requests"]) * 1e6
                rate = told["requests"] / told["seconds"]
                times = (told["p50"], told["p95"], told["p99"])
                counts = int(told["requests"]), int(told["failed"])
                load = Load(clients, binary, gathered, workers, *counts, rate, *times, cpu, call)
                print(load, flush=True)
                found.append(load)
    return found


def _write_bodies(states: States, folder: Path, binary: bool) -> int:
    """A file for each row; gives the length of the JSON head, which all have in common."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    heads = set()
    for number, row in enumerate(states.inputs, 1):
        body, head = encode(row, binary)
        (folder / str(number)).write_bytes(body)
        heads.add(head)
    (head,) = heads
    return head


def _wrk(clients: int, seconds: int, url: str, extra: list[str]) -> dict[str, float]:
    command = ["wrk", "-t1", f"-c{clients}", f"-d{seconds}s", "--timeout", "10s", "--latency", "-s", str(SCRIPT), url]
    done = subprocess.run([*command, "--", *extra], capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found
