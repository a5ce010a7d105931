"""The command as a process: its exit status, and what errors, signals and streams that are closed or full make of it.

Each ends the command with a line at most: no traceback, and nothing half-written.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import StringIO
from types import FrameType
from typing import Any, TextIO

from ..errors import AOTIError, ArtifactError, DerivativeNotCompiledError

# Exit statuses, for scripts: all is well; the artifact or model falls short; the command was used wrongly; Ctrl-C;
# nobody reads on, as of a program that SIGPIPE ends.
FINE, SHORT, WRONG_USE, INTERRUPTED, CLOSED = 0, 1, 2, 130, 141

# What writing to stdout may raise. Files that a command writes have errors of their own, see `_files.draft`.
LOST = (errno.EPIPE, errno.ENOSPC, errno.EIO, errno.EBADF, errno.EFBIG, errno.EDQUOT)


# In what torch says, of a CPU and of a GPU; it has no class for the former.
NO_MEMORY = ("can't allocate memory", "out of memory")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with these arguments, or those of the process, and give its exit status."""
    _open_closed()
    stdout = sys.stdout
    try:
        status = _run(list(sys.argv[1:] if arguments is None else arguments))
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


def _run(arguments: list[str]) -> int:
    """Run a command; an error that a user can mend becomes a line, and with --json a document."""
    try:
        import click

        from .app import app
    except ModuleNotFoundError as error:
        if error.name != "click":
            raise
        say("neml2-aoti needs the package click, which is not installed: pip install click")
        return WRONG_USE
    from . import output

    try:
        status = app.main(arguments, prog_name="neml2-aoti", standalone_mode=False)
        return status if isinstance(status, int) else FINE
    except click.Abort:
        raise KeyboardInterrupt from None
    except click.ClickException as error:
        kind, message, status = "UsageError", error.format_message(), WRONG_USE
        shown = StringIO()
        error.show(shown)
        say(shown.getvalue().rstrip())
    except (AOTIError, ModuleNotFoundError, MemoryError, RuntimeError) as error:
        kind, message, status = _meaning(error)
        say(f"neml2-aoti: {message}")
    if "--json" in arguments:
        command = next((word for word in arguments if word in app.commands), "")
        output.write_json(command, status, error={"kind": kind, "message": message})
    return status


def _meaning(error: Exception) -> tuple[str, str, int]:
    """The kind of an error, what is said of it, and the exit status; raised again if it is none that a user mends."""
    from .output import missing

    kind, message = type(error).__name__, str(error)
    # neml2's own class where neml2 came first, ours else.
    if kind == "ConvergenceError":
        return kind, message, SHORT
    if isinstance(error, AOTIError):
        of_artifact = isinstance(error, (ArtifactError, DerivativeNotCompiledError))
        return kind, message, SHORT if of_artifact else WRONG_USE
    package = missing(error.name) if isinstance(error, ModuleNotFoundError) else None
    if package is not None:
        return "MissingPackage", package, WRONG_USE
    if isinstance(error, MemoryError) or any(text in message for text in NO_MEMORY):
        shown = message[:200] or "MemoryError"
        return "MemoryError", f"this takes more memory than there is ({shown}). Take fewer rows.", WRONG_USE
    raise error


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
