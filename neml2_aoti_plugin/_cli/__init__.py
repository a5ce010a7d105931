"""The command `neml2-aoti`: each module here is one command and what it prints; `workbench` does the work."""

from __future__ import annotations

import sys
from collections.abc import Sequence

# For scripts: all is well; the artifact or model falls short; the command was used wrongly; Ctrl-C; nobody reads on, as
# of a program that SIGPIPE ends.
FINE, SHORT, WRONG_USE, INTERRUPTED, CLOSED = 0, 1, 2, 130, 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: in place of those of the process.

    Returns:
        The exit status: 0 if all is well, 1 if the artifact or the model falls short, 2 for wrong use.
    """
    from .streams import guarded

    return guarded(lambda: _run(sys.argv[1:] if arguments is None else arguments))


def _run(arguments: Sequence[str]) -> int:
    from .streams import say

    try:
        from .app import run
    except ModuleNotFoundError as error:
        if error.name != "click":
            raise
        say(f"neml2-aoti needs the package {error.name}, which is not installed: pip install click")
        return WRONG_USE
    return run(arguments)
