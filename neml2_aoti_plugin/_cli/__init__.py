"""The command `neml2-aoti`: a module for each command, or for small ones that go together."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with these arguments, or those of the process, and give its exit status."""
    from .process import guarded

    return guarded(lambda: _run(sys.argv[1:] if arguments is None else arguments))


def _run(arguments: Sequence[str]) -> int:
    from .process import WRONG_USE, say

    try:
        from .app import run
    except ModuleNotFoundError as error:
        if error.name != "click":
            raise
        say(f"neml2-aoti needs the package {error.name}, which is not installed: pip install click")
        return WRONG_USE
    return run(arguments)
