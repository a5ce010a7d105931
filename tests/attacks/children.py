"""Run programs in processes of their own, which may crash or hang without harm.

Most are forked from a process that has imported torch and neml2 and nothing else, which takes milliseconds where a
fresh interpreter takes seconds; what a fork changes has not happened there yet.
"""

from __future__ import annotations

import faulthandler
import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
import weakref
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest.mock import patch

REPOSITORY = Path(__file__).resolve().parents[2]


def environment(**variables: str) -> dict[str, str]:
    """The environment of a fresh interpreter."""
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    return {**os.environ, "PYTHONPATH": path, "PYTHONFAULTHANDLER": "1", **variables}


@functools.cache
def _context() -> Any:
    """The process to fork from, started when it is first needed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["attacks.prelude"])
    with patch.dict(os.environ, environment()):
        forkserver.ensure_running()
    return context


def _live(source: str, arguments: list[str], variables: dict[str, str], output: str) -> None:
    """Be the child: run the program with its output in a file."""
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(handle, stream)
    faulthandler.enable()
    os.environ.update(variables)
    tempfile.tempdir = None
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["-c", *arguments]
    # Python's own since 3.12, at each fork of a process with threads; the tests look at what we print.
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    exec(compile(source, "<program>", "exec"), {"__name__": "__main__"})
    sys.stdout.flush()


class Child:
    """A program that runs in a process of its own, its arguments as text in `sys.argv[1:]`."""

    def __init__(self, source: str, *arguments: object, **variables: str) -> None:
        handle, self._output = tempfile.mkstemp(prefix="child-", suffix=".out")
        os.close(handle)
        weakref.finalize(self, Path(self._output).unlink, missing_ok=True)
        given = (textwrap.dedent(source), list(map(str, arguments)), variables, self._output)
        self._process: Any = _context().Process(target=_live, args=given)
        self._process.start()

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return Path(self._output).read_text(errors="replace")

    def line(self, limit: float = 60) -> str:
        """Wait for the first line that it prints."""
        end = time.monotonic() + limit
        while "\n" not in self.output:
            assert self._process.is_alive() and time.monotonic() < end, self.output
            time.sleep(0.002)
        return self.output.partition("\n")[0]

    def send(self, number: int, limit: float = 20) -> int:
        """Send a signal that ends it; give its status."""
        os.kill(self._process.pid, number)
        self._process.join(limit)
        return int(self._process.exitcode)

    def finish(self, limit: float) -> str:
        """Wait for its end, which must be a good one; give what it printed."""
        self._process.join(limit)
        if self._process.exitcode is None:
            self.send(signal.SIGABRT)
            raise AssertionError(f"hung for {limit} s:\n{self.output[-6000:]}")
        found = self.output
        assert self._process.exitcode == 0, f"status {self._process.exitcode}:\n{found[-6000:]}"
        return found


start = Child


def run(source: str, *arguments: object, limit: float = 60, **variables: str) -> str:
    """Run a program to its end, which must be a good one; give what it printed."""
    return Child(source, *arguments, **variables).finish(limit)


def run_fresh(
    source: str,
    *arguments: object,
    limit: float = 100,
    before: tuple[str, ...] = (),
    status: int = 0,
    **variables: str,
) -> str:
    """Run a program in a fresh interpreter, by a command that goes before it if there is one.

    It must end with this status; gives what it printed, to stderr where the status is not 0.
    """
    command = [*before, sys.executable, "-c", textwrap.dedent(source), *map(str, arguments)]
    done = subprocess.run(command, env=environment(**variables), capture_output=True, text=True, timeout=limit)
    assert done.returncode == status, f"status {done.returncode}:\n{done.stdout}\n{done.stderr[-4000:]}"
    return done.stderr if status else done.stdout
