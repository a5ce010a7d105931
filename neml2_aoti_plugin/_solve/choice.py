"""What solves are done by: machine code or torch's operations, and why."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

from .. import _log as log
from ..errors import InputError
from . import code_file, machine_code

# The environment variable that chooses.
VARIABLE = "NEML2_AOTI_PLUGIN_KERNELS"
NATIVE, TORCH = "native", "torch"

# Why machine code is given up in this process, once something else that it needs was found missing.
_given_up: str = ""


def give_up(reason: str) -> None:
    """Use torch's operations from now on.

    Args:
        reason: what is missing.
    """
    global _given_up
    _given_up = reason


def chosen() -> tuple[str, str]:
    """What new models are solved by, and the reason; nothing is imported for that.

    Raises:
        InputError: the environment variable holds another word.
    """
    word = os.environ.get(VARIABLE, "").strip().lower()
    if word not in ("", NATIVE, TORCH):
        raise InputError(f"the environment variable {VARIABLE} is {word!r}, expected {NATIVE} or {TORCH}.")
    asked = f"{VARIABLE}={word}"
    if word == TORCH:
        return TORCH, asked
    missing = _trouble()
    if missing:
        return TORCH, f"{asked}, but {missing}" if word else missing
    return NATIVE, asked if word else "llvmlite is installed"


def machine() -> tuple[machine_code.MachineCode | None, str]:
    """The machine code, and the reason for it; None where torch's operations are used.

    Raises:
        InputError: the environment variable holds another word.
    """
    if chosen()[0] == TORCH:
        return None, chosen()[1]
    code = _loaded()
    return (code if isinstance(code, machine_code.MachineCode) else None), chosen()[1]


def _trouble() -> str:
    """Why there is no machine code, as far as is known; nothing where none is known."""
    if _given_up:
        return _given_up
    if _tried():
        code = _loaded()
        return "" if isinstance(code, machine_code.MachineCode) else code
    try:
        if find_spec("llvmlite") is None:
            return "llvmlite is not installed (pip install llvmlite)"
        code_file.read()
    except ValueError:
        # It has been imported in another way than from a file; the import will tell.
        return ""
    except code_file.Unusable as error:
        return str(error)
    return ""


def _tried() -> bool:
    return _loaded.cache_info().currsize > 0


@cache
def _loaded() -> machine_code.MachineCode | str:
    """The machine code, or why there is none."""
    try:
        return machine_code.load()
    except code_file.Unusable as error:
        log.emit("model", "warning", f"solves are done by torch's operations, which are slower: {error}")
        return str(error)
