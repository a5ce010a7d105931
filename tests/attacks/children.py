"""Run Python in a process of its own, which may crash or hang without harm."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def environment(**variables: str) -> dict[str, str]:
    """The environment of a child process."""
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    return {**os.environ, "PYTHONPATH": path, "PYTHONFAULTHANDLER": "1", **variables}


def start(source: str, *arguments: object, **variables: str) -> subprocess.Popen[str]:
    """Start Python with a program; its arguments are in `sys.argv[1:]`."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(source), *map(str, arguments)],
        env=environment(**variables),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(child: subprocess.Popen[str], limit: float) -> str:
    """Wait for a child that must end well; give what it printed."""
    try:
        out, errors = child.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGABRT)
        out, errors = child.communicate()
        raise AssertionError(f"hung for {limit} s:\n{out}\n{errors[-4000:]}") from None
    assert child.returncode == 0, f"status {child.returncode}:\n{out}\n{errors[-4000:]}"
    return out


def run(source: str, *arguments: object, limit: float = 60, **variables: str) -> str:
    """Run a program to its end, which must be a good one."""
    return finish(start(source, *arguments, **variables), limit)
