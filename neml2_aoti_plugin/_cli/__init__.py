"""The command `neml2-aoti`: its options in `app`, a module for each command, or for small ones that go together.

Here is which exit status an error means.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from io import StringIO

from ..errors import AOTIError, ArtifactError, DerivativeNotCompiledError
from .process import FINE, SHORT, WRONG_USE, guarded, say

# In what torch says, of a CPU and of a GPU; it has no class for the former.
NO_MEMORY = ("can't allocate memory", "out of memory")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with these arguments, or those of the process, and give its exit status."""
    return guarded(lambda: _run(list(sys.argv[1:] if arguments is None else arguments)))


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
