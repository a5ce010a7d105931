"""Which implementation of the Newton loop's operations is used: numba kernels or tensors, and why."""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from ..errors import InputError
from .undisturbed import undisturbed

# The environment variable that chooses.
VARIABLE = "NEML2_AOTI_PLUGIN_KERNELS"
NUMBA, TORCH = "numba", "torch"

# Why numba could not be imported, once that has been tried.
_failures: list[str] = []


def chosen() -> tuple[str, str]:
    """The implementation that new models get, and the reason; numba is looked for, but not imported.

    Raises:
        InputError: the environment variable holds another word.
    """
    word = os.environ.get(VARIABLE, "").strip().lower()
    if word not in ("", NUMBA, TORCH):
        raise InputError(f"the environment variable {VARIABLE} is {word!r}, expected {NUMBA} or {TORCH}.")
    asked = f"{VARIABLE}={word}"
    if word == TORCH:
        return TORCH, asked
    missing = _failures[0] if _failures else "" if _is_there() else "numba is not installed (pip install numba)"
    if missing:
        return TORCH, f"{asked}, but {missing}" if word else missing
    return NUMBA, asked if word else "numba is installed"


def machine() -> tuple[ModuleType | None, str]:
    """The module that solves blocks by machine code, and the reason for it; None where tensors are used.

    Raises:
        InputError: the environment variable holds another word.
    """
    if chosen()[0] == TORCH:
        return None, chosen()[1]
    module = _imported()
    return module, chosen()[1]


def _is_there() -> bool:
    try:
        return find_spec("numba") is not None
    except ValueError:
        # It has been imported in another way than from a file; the import will tell.
        return True


@cache
def _imported() -> ModuleType | None:
    # Half of numba, which a signal handler would leave behind, could not be imported again.
    module, failure = undisturbed(_import)
    if failure:
        _failures.append(f"numba cannot be imported ({failure})")
    return module


def _import() -> tuple[ModuleType | None, str]:
    try:
        return import_module(".block", __package__), ""
    except Exception as error:
        # An installation of numba that does not go with this numpy or this Python must not take the plugin down.
        return None, f"{type(error).__name__}: {error}"
