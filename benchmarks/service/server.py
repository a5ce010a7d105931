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
    """A running service of one process.

    Args:
        pid: its process.
        port: where it listens on this machine.
    """

    pid: int
    port: int

    @property
    def cpu_seconds(self) -> float:
        """Processor time that it has taken."""
        fields = Path(f"/proc/{self.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def memory(self) -> int:
        """Bytes of memory that it has now."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def started(artifact: Path, folder: Path, *options: str) -> Iterator[Server]:
    """Serve an artifact on a free port; stopped by SIGTERM at the end.

    Args:
        artifact: what is served.
        folder: for the log.
        options: of `neml2-aoti serve`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.jsonl"
    command = [str(Path(sys.executable).with_name("neml2-aoti")), "serve", str(artifact), "--port", "0", "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("wb") as out, subprocess.Popen([*command, *options], stdout=out, env=environment) as process:
        try:
            told = _wait_until_ready(process, log)
            yield Server(process.pid, int(told["address"].rpartition(":")[2]))
        finally:
            process.terminate()
            if process.wait(PATIENCE) != 0:
                raise RuntimeError(f"the service ended with {process.returncode}; see {log}")


def _wait_until_ready(process: subprocess.Popen[bytes], log: Path) -> dict[str, str]:
    """The line of the log that tells where it listens."""
    end = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < end:
        lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
        events = {told["event"]: told for told in (json.loads(line) for line in lines if line.endswith("\n"))}
        if "ready" in events:
            found: dict[str, str] = events["listening"]
            return found
        time.sleep(0.05)
    raise RuntimeError(f"the service does not start; see {log}")
