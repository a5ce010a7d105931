"""A program in a process of its own, which tests interrupt and kill."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

from attacks.children import environment


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
        if self.process.poll() is None:
            os.killpg(self.pid, 9)
        self.process.wait(20)
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
