"""Which implementation of the Newton loop's operations is used: numba kernels or tensors, and why."""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from ..errors import InputError

# The environment variable that chooses.
VARIABLE = "NEML2_AOTI_PLUGIN_KERNELS"
NUMBA, TORCH = "numba", "torch"


def chosen() -> tuple[str, str]:
    """The implementation that new models get, and the reason; numba is looked for, but not imported.

    Raises:
        InputError: the environment variable holds another word.
    """
    word = os.environ.get(VARIABLE, "").strip().lower()
    if word not in ("", NUMBA, TORCH):
        raise InputError(f"the environment variable {VARIABLE} is {word!r}, expected {NUMBA} or {TORCH}.")
    if word == TORCH:
        return TORCH, f"{VARIABLE}={TORCH}"
    if find_spec("numba") is None:
        return TORCH, "numba is not installed (pip install numba)"
    return NUMBA, f"{VARIABLE}={NUMBA}" if word else "numba is installed"


def arrays() -> tuple[ModuleType | None, str]:
    """The module with the rows as arrays, and the reason for it; None where tensors are used."""
    name, reason = chosen()
    if name == TORCH:
        return None, reason
    module, failure = _imported()
    return module, failure or reason


@cache
def _imported() -> tuple[ModuleType | None, str]:
    try:
        return import_module(".arrays", __package__), ""
    except Exception as error:
        # An installation of numba that does not go with this numpy or this Python must not take the plugin down.
        return None, f"numba cannot be imported ({type(error).__name__}: {error})"
