"""Processes and files that tests of pools look for: what a program has started, and what it has left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

from attacks.children import environment

SHARED = Path("/dev/shm")
FOLDER = f"neml2-aoti-plugin-{os.getuid()}"


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and those that these have, as far as they live."""
    try:
        children = [int(part) for part in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        children += [
            int(part)
            for task in Path(f"/proc/{pid}/task").iterdir()
            if task.name != str(pid)
            for part in (task / "children").read_text().split()
        ]
    except OSError:
        return []
    return [found for child in children for found in (child, *descendants(child))]


def is_alive(pid: int) -> bool:
    """Whether a process is there, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(true: Callable[[], bool], limit: float = 20.0) -> bool:
    """Wait for something; tells whether it came true."""
    end = time.monotonic() + limit
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def leftovers(pid: int) -> list[str]:
    """What a process has left in the folders for shared memory and for temporary files."""
    found = [str(path) for path in SHARED.glob(f"sem.loky-{pid}-*")]
    for parent in (SHARED, Path(os.environ.get("TMPDIR", "/tmp"))):
        found += [str(path) for path in (parent / FOLDER).glob(f"*-{pid}-*")]
    return found


class Program:
    """A program in a process and a process group of its own.

    Args:
        source: of the program; its arguments are in `sys.argv[1:]`.
        arguments: made into text.
        variables: of the environment.
    """

    def __init__(self, source: str, *arguments: object, **variables: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(source), *map(str, arguments)],
            env=environment(**variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        """Its identifier."""
        return self.process.pid

    def line(self) -> str:
        """The next line that it prints."""
        assert self.process.stdout is not None
        found = self.process.stdout.readline()
        if not found:
            raise AssertionError(f"it has ended: {self.finish(20)}")
        return found.strip()

    def signal_group(self, number: int) -> None:
        """Send a signal to it and all that it has started, as a terminal does."""
        os.killpg(self.pid, number)

    def finish(self, limit: float) -> tuple[int, str, str]:
        """Wait for its end; its status, and what it printed from here on."""
        try:
            out, err = self.process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(self.pid, 9)
            out, err = self.process.communicate()
            raise AssertionError(f"hung for {limit} s:\n{out}\n{err[-4000:]}") from None
        return self.process.returncode, out, err

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        started = [self.pid, *descendants(self.pid)]
        for pid in started:
            if is_alive(pid):
                os.kill(pid, 9)
        self.process.wait(20)
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
