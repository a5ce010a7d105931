"""A service started by its console script, and what it costs."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PATIENCE = 120.0


@dataclass(frozen=True)
class Server:
    """A running service by its first process, which has started the others."""

    pid: int
    port: int

    @property
    def cpu_seconds(self) -> float:
        """Processor time that its processes have taken."""
        ticks = 0
        for pid in self._pids:
            fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    @property
    def memory(self) -> int:
        """Bytes of memory that they have now; what they share is counted for each."""
        pages = sum(int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) for pid in self._pids)
        return pages * os.sysconf("SC_PAGE_SIZE")

    @property
    def _pids(self) -> list[int]:
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text(encoding="ascii").split()
        return [self.pid, *map(int, children)]


@contextlib.contextmanager
def started(artifact: Path, folder: Path, *options: str, workers: int = 1) -> Iterator[Server]:
    """Serve an artifact on a free port; stopped by SIGTERM at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.jsonl"
    command = [str(Path(sys.executable).with_name("neml2-aoti")), "serve", str(artifact), "--port", "0", "--quiet"]
    command += ["--workers", str(workers)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("wb") as out, subprocess.Popen([*command, *options], stdout=out, env=environment) as process:
        try:
            told = _wait_until_ready(process, log, workers)
            yield Server(process.pid, int(told["address"].rpartition(":")[2]))
        finally:
            process.terminate()
            if process.wait(PATIENCE) != 0:
                raise RuntimeError(f"the service ended with {process.returncode}; see {log}")


def _wait_until_ready(process: subprocess.Popen[bytes], log: Path, workers: int) -> dict[str, str]:
    """The line of the log that tells where it listens."""
    end = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < end:
        lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
        events = [json.loads(line) for line in lines if line.endswith("\n")]
        listening: list[dict[str, str]] = [told for told in events if told["event"] == "listening"]
        if len(listening) == workers:
            return listening[0]
        time.sleep(0.05)
    raise RuntimeError(f"the service does not start; see {log}")
