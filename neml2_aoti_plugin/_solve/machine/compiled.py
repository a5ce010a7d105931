"""How the sources of the machine code are compiled: without the interpreter, without numba's runtime, no exceptions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba

# For any processor of the family: the one at hand is known when the package runs.
numba.config.CPU_NAME, numba.config.CPU_FEATURES = "generic", ""


def entry(function: Callable[..., Any]) -> Any:
    """A function that Python calls, with the address of a table; it gives an integer."""
    return inner(function)


def inner(function: Callable[..., Any]) -> Any:
    """A function that only other such functions call."""
    return _compiled(function)


def inlined(function: Callable[..., Any]) -> Any:
    """A short function that is compiled as if its lines stood where it is called."""
    return _compiled(function, inline="always")


def _compiled(function: Callable[..., Any], **options: Any) -> Any:
    options |= {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "_nrt": False}
    return numba.njit(nogil=True, error_model="numpy", **options)(function)
