"""The store behind `neml2.log`: which channel speaks at which level, and where the lines go.

Channels and levels are neml2's. The level of a channel is taken from the first of: its entry in the environment
variable `NEML2_LOGS`, the entry `all` there, the default set for it by the program, the default set for `all`,
`warning`. The module itself has the functions that `neml2.log` expects of its backend.
"""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Callable

from .errors import InputError

LogSink = Callable[[str, str], None]

CHANNELS = ("newton", "linear", "substep", "model", "tensor", "driver")
LEVELS = ("silent", "warning", "info", "debug")

_ORDER = {level: order for order, level in enumerate(LEVELS)}
_TAGS = {"silent": "slnt", "warning": "warn", "info": "info", "debug": "dbg"}
_SHORT_LEVELS = {"off": "silent", "none": "silent", "warn": "warning"} | {
    str(order): level for level, order in _ORDER.items()
}

_lock = threading.RLock()
_defaults: dict[str, str] = {}
_environment: dict[str, str] = {}
# Channel -> order of its level in force; empty until the environment has been read.
_in_force: dict[str, int] = {}


def enabled(channel: str, level: str) -> bool:
    """Tell whether a line of this level on this channel would be shown; cheap enough for a hot loop."""
    try:
        return _in_force[channel] >= _ORDER[level]
    except KeyError:
        _check(channel, level)
        _read_environment_once()
        return _in_force[channel] >= _ORDER[level]


def effective_level(channel: str) -> str:
    """The level in force on a channel."""
    _check(channel)
    _read_environment_once()
    return LEVELS[_in_force[channel]]


def emit(channel: str, level: str, message: str) -> None:
    """Send a line to the sink if its channel is enabled at its level."""
    if enabled(channel, level):
        _sink(level, f"[neml2:{channel:<7}][{_TAGS[level]:<4}] {message}")


def set_default_level(channel: str, level: str) -> None:
    """Set the program's default level of a channel, or of `all`; `NEML2_LOGS` still takes precedence."""
    _check(channel if channel != "all" else None, level)
    with _lock:
        _defaults[channel] = level
        if _in_force:
            _resolve()


def reset_defaults() -> None:
    """Forget every default that the program has set."""
    with _lock:
        _defaults.clear()
        if _in_force:
            _resolve()


def apply_env() -> None:
    """Read `NEML2_LOGS` again; where an entry is wrong, the levels in force stay as they were, and it is an error."""
    entries, faults = _parse(os.environ.get("NEML2_LOGS", ""))
    if faults:
        raise InputError(f"NEML2_LOGS: {'; '.join(faults)}")
    _resolve(entries)


def set_sink(sink: LogSink | None) -> None:
    """Send every line to `sink(level, line)`; `None` restores the standard streams."""
    global _sink
    # neml2.log sets its sink and then parses NEML2_LOGS by itself, with an error that does not say where the
    # bad word came from: reading the variable here, first, puts our warning above it.
    _read_environment_once()
    _sink = sink if sink is not None else _to_standard_streams


def reset_sink() -> None:
    """Send `info` lines to the standard output and all others to the standard error."""
    set_sink(None)


def _to_standard_streams(level: str, line: str) -> None:
    print(line, file=sys.stdout if level == "info" else sys.stderr, flush=True)


_sink: LogSink = _to_standard_streams


def _check(channel: str | None = None, level: str | None = None) -> None:
    if channel is not None and channel not in CHANNELS:
        raise InputError(f"unknown log channel {channel!r} (known: {', '.join(CHANNELS)})")
    if level is not None and level not in _ORDER:
        raise InputError(f"unknown log level {level!r} (known: {', '.join(LEVELS)})")


def _parse(spec: str) -> tuple[dict[str, str], list[str]]:
    """Split `channel=level,...` into its good entries and a complaint about each bad one."""
    entries: dict[str, str] = {}
    faults: list[str] = []
    for entry in spec.split(","):
        channel, equals, level = (part.strip().lower() for part in entry.partition("="))
        level = _SHORT_LEVELS.get(level, level)
        if not equals:
            continue
        if channel != "all" and channel not in CHANNELS:
            faults.append(f"{entry.strip()!r} has an unknown channel (known: all, {', '.join(CHANNELS)})")
        elif level not in _ORDER:
            faults.append(f"{entry.strip()!r} has an unknown level (known: {', '.join(LEVELS)}, 0..{len(LEVELS) - 1})")
        else:
            entries[channel] = level
    return entries, faults


def _read_environment_once() -> None:
    """Read `NEML2_LOGS` at the first use; a bad entry is passed over with a warning."""
    with _lock:
        if _in_force:
            return
        entries, faults = _parse(os.environ.get("NEML2_LOGS", ""))
        _resolve(entries)
    if faults:
        warnings.warn(f"NEML2_LOGS: {'; '.join(faults)}", RuntimeWarning, stacklevel=3)


def _resolve(entries: dict[str, str] | None = None) -> None:
    """Work out the level in force on each channel, by other entries of the environment if they are given.

    Readers see the old level or the new one, never none.
    """
    with _lock:
        if entries is not None:
            _environment.clear()
            _environment.update(entries)
        for channel in CHANNELS:
            settings = (layer[key] for layer in (_environment, _defaults) for key in (channel, "all") if key in layer)
            _in_force[channel] = _ORDER[next(settings, "warning")]
