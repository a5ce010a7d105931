"""How many worker processes: what was asked for, and what there is."""

from __future__ import annotations

import os
from importlib.util import find_spec

from ..errors import AOTIError, InputError, InputTypeError

WORKERS = "NEML2_AOTI_PLUGIN_WORKERS"
# More processes than cores take memory and gain nothing; tests and small machines may have a few more.
MOST_PER_CORE, ALWAYS = 4, 4


def cores() -> int:
    """Cores that this process may use, as far as the system tells."""
    if find_spec("joblib") is not None:
        # It knows of limits of containers, too.
        from joblib import cpu_count

        return int(cpu_count())
    return os.cpu_count() or 1


def require_workers(given: object, source: str = "workers") -> int:
    """Check a number of worker processes.

    Args:
        given: the number; None for one per core.
        source: where it comes from, for messages.

    Returns:
        The number.

    Raises:
        InputTypeError: it is no whole number.
        InputError: it is zero, negative, or much more than there are cores.
    """
    if given is None:
        return cores()
    if isinstance(given, bool) or not isinstance(given, int):
        raise InputTypeError(f"{source} is {given!r}, expected a whole number of processes, at least 1.")
    most = max(ALWAYS, MOST_PER_CORE * cores())
    if not 1 <= given <= most:
        raise InputError(
            f"{source} is {given}, expected 1 to {most}: this process may use {cores()} core(s). Give one worker per "
            "core, or leave it out."
        )
    return given


def from_environment() -> int | None:
    """The number of workers that the environment asks for; None where it asks for nothing.

    Raises:
        InputError: the variable holds no such number.
    """
    given = os.environ.get(WORKERS, "").strip()
    if not given:
        return None
    source = f"the environment variable {WORKERS}"
    if not given.isdecimal():
        raise InputError(f"{source} is {given!r}, expected a whole number of processes, at least 1.")
    return require_workers(int(given), source)


def require_joblib() -> None:
    """Refuse to start where the extra is not installed.

    Raises:
        AOTIError: joblib is not there.
    """
    if find_spec("joblib") is None:
        raise AOTIError(
            "worker processes need joblib, which is not installed: pip install 'neml2-aoti-plugin[parallel]'."
        )
