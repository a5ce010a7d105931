"""The command `neml2-aoti`: a module for each command, with its options, its work and its table."""

from __future__ import annotations

import sys
from collections.abc import Sequence

# Exit statuses, for scripts: all is well; the artifact or model falls short; the command was used wrongly; Ctrl-C;
# nobody reads on, as of a program that SIGPIPE ends.
FINE, SHORT, WRONG_USE, INTERRUPTED, CLOSED = 0, 1, 2, 130, 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with these arguments, or those of the process, and give its exit status."""
    from .process import guarded

    return guarded(lambda: _run(sys.argv[1:] if arguments is None else arguments))


def _run(arguments: Sequence[str]) -> int:
    from .process import say

    try:
        from .app import run
    except ModuleNotFoundError as error:
        if error.name != "click":
            raise
        say(f"neml2-aoti needs the package {error.name}, which is not installed: pip install click")
        return WRONG_USE
    return run(arguments)
