"""Very many requests, some of them bad: is each good one answered rightly, and does memory stay flat."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from .server import Server, started
from .states import Array, States, encode

CLIENTS = 64
# Every so many requests a bad one.
BAD = 20
# How often memory is looked at.
SAMPLES = 50
# What a served answer may differ by from the one alone, of the largest entry.
TOLERANCE = 1e-12


@dataclass(frozen=True)
class Bad:
    """A bad request.

    Args:
        what: is wrong.
        status: that it must be answered with.
        model: that it names.
        body: of the request.
        head: length of the JSON head.
    """

    what: str
    status: int
    model: str
    body: bytes
    head: int


@dataclass
class Soak:
    """What came of it.

    Args:
        requests: that were sent.
        seconds: that it took.
        good: good requests that were answered with the right numbers.
        bad: bad requests that were refused with the right status.
        wrong: what should not be, and how often.
        worst: the largest difference of an answer from the one alone, of the largest entry.
        memory: of the service, after equal numbers of requests.
    """

    requests: int
    seconds: float = 0.0
    good: int = 0
    bad: int = 0
    wrong: Counter[str] = field(default_factory=Counter)
    worst: float = 0.0
    memory: list[int] = field(default_factory=list)


def soak(states: States, work: Path, count: int) -> Soak:
    """Send requests and compare each answer.

    Args:
        states: what requests are made of.
        work: folder for the log.
        count: number of requests.
    """
    found = Soak(count)
    with started(states.artifact, work / "soak") as server:
        start = time.perf_counter()
        asyncio.run(_all(states, server, found))
        found.seconds = time.perf_counter() - start
    return found


async def _all(states: States, server: Server, found: Soak) -> None:
    numbers = iter(range(found.requests))
    good = [encode(row, True) for row in states.inputs]
    wanted = [np.concatenate([value.reshape(-1) for value in row.values()]) for row in states.outputs]
    scales = [_scales(row) for row in states.outputs]
    bad = _bad_requests(states)
    every = max(1, found.requests // SAMPLES)

    async def client() -> None:
        connection = _Connection(server.port)
        for number in numbers:
            if number % every == 0:
                found.memory.append(server.memory)
            if number % BAD == 0:
                one = bad[number // BAD % len(bad)]
                status, rest = await connection.ask(one.model, one.body, one.head)
                if status == one.status and "error" in json.loads(rest):
                    found.bad += 1
                else:
                    found.wrong[f"{one.what}: {status}"] += 1
                continue
            place = number % len(good)
            status, rest = await connection.ask(states.artifact.name, *good[place])
            if status != 200:
                found.wrong[f"good: {status}"] += 1
                continue
            values = np.frombuffer(rest, np.float64)
            if values.shape != wanted[place].shape:
                found.wrong["another size"] += 1
                continue
            off = float(np.max(np.abs(values - wanted[place]) / scales[place]))
            found.worst = max(found.worst, off)
            if off <= TOLERANCE:
                found.good += 1
            else:
                found.wrong["other numbers"] += 1
        connection.close()

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    found.memory.append(server.memory)


def _scales(row: dict[str, Array]) -> Array:
    """For each entry the largest one of its tensor."""
    return np.concatenate([np.full(value.size, max(np.abs(value).max(), 1e-300)) for value in row.values()])


def _bad_requests(states: States) -> list[Bad]:
    name, row = states.artifact.name, states.inputs[0]
    body, head = encode(row, True)
    first = next(iter(row))
    poisoned = encode({**row, first: torch.full_like(row[first], torch.nan)}, True)
    renamed = encode({("strange" if key == first else key): value for key, value in row.items()}, True)
    return [
        Bad("no JSON", 400, name, b"{" + body[:head], 0),
        Bad("too few bytes", 400, name, body[:-8], head),
        Bad("unknown input", 400, name, *renamed),
        Bad("NaN", 422, name, *poisoned),
        Bad("unknown model", 404, "strange", body, head),
    ]


class _Connection:
    """A connection of a client, opened again where the service has closed it."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, model: str, body: bytes, head: int) -> tuple[int, bytes]:
        """Send a request; gives the status, and what follows the JSON head of a binary answer, or the whole answer."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        length = f"Inference-Header-Content-Length: {head}\r\n" if head else ""
        head_lines = f"POST /v2/models/{model}/infer HTTP/1.1\r\nHost: service\r\nContent-Length: {len(body)}\r\n"
        writer.write(f"{head_lines}{length}\r\n".encode() + body)
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines[1:] if line)
        answer = await reader.readexactly(int(headers["content-length"]))
        if headers.get("connection") == "close":
            self.close()
        return int(lines[0].split()[1]), answer[int(headers.get("inference-header-content-length", 0)) :]

    def close(self) -> None:
        """Close it."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None
