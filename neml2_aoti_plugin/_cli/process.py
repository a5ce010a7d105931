"""What a process may meet: standard streams that are closed or full, Ctrl-C, SIGTERM.

Each ends the command with an exit status and a line at most: no traceback, and nothing half-written.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TextIO

# Exit statuses, for scripts: all is well; the artifact or model falls short; the command was used wrongly; Ctrl-C;
# nobody reads on, as of a program that SIGPIPE ends.
FINE, SHORT, WRONG_USE, INTERRUPTED, CLOSED = 0, 1, 2, 130, 141

# What writing to stdout may raise. Files that a command writes have errors of their own, see `_files.draft`.
LOST = (errno.EPIPE, errno.ENOSPC, errno.EIO, errno.EBADF, errno.EFBIG, errno.EDQUOT)


def guarded(work: Callable[[], int]) -> int:
    """Run a command whose output may have nowhere to go; gives its exit status, or one that says so."""
    _open_closed()
    stdout = sys.stdout
    try:
        status = work()
        stdout.flush()
    except KeyboardInterrupt:
        say("Interrupted.")
        return INTERRUPTED
    except SystemExit as error:
        # rich and click end a program whose pipe is closed themselves; click puts another stream in its place.
        if not isinstance(error.__context__, BrokenPipeError) and sys.stdout is stdout:
            raise
        _let_go(stdout)
        return CLOSED
    except OSError as error:
        if error.errno not in LOST or error.filename is not None:
            raise
        _let_go(stdout)
        if isinstance(error, BrokenPipeError):
            return CLOSED
        say(f"neml2-aoti: the output cannot be written ({error.strerror}). Give another place for it.")
        return WRONG_USE
    return status


def say(text: str) -> None:
    """Print a line to stderr, as far as that can be written to."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        _let_go(sys.stderr)


@contextmanager
def heeded() -> Iterator[Callable[[], None]]:
    """Clean up where Ctrl-C or SIGTERM ends the block; gives a function to call now and then.

    Python raises `KeyboardInterrupt` wherever the program is. In a callback of a weak reference, of which imports make
    many, or in a bare `except` of some package, it is dropped and the program goes on: the function raises it again.
    Nothing changes where somebody else handles a signal, or where the program was started to ignore it.
    """
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        heed()

    def heed() -> None:
        if came:
            raise KeyboardInterrupt if came[-1] == signal.SIGINT else SystemExit(128 + came[-1])

    ours: dict[int, Any] = {}
    # Only the main thread may set handlers.
    if threading.current_thread() is threading.main_thread():
        usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
        ours = {number: handler for number, handler in usual.items() if signal.getsignal(number) is handler}
    for number in ours:
        signal.signal(number, note)
    try:
        yield heed
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)


def _open_closed() -> None:
    """Have something behind each standard stream: a file that is opened later would take the place of a closed one."""
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(handle)
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)
    with suppress(AttributeError):
        # A name that the terminal has no letters for is no reason to lose a result.
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def _let_go(stream: TextIO) -> None:
    """Let what is still to be written go nowhere; Python's own flush at the end would fail as well."""
    with suppress(OSError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
