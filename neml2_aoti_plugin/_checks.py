"""Checks of what callers give that are made in many places, so that their messages are alike; words of messages."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from operator import index
from typing import Any

from .errors import InputError, InputTypeError, UnknownNameError

_NO_HINTS: Mapping[str, str] = {}


def require_names(
    given: Collection[object],
    known: Iterable[str],
    what: str,
    kind: str,
    *,
    needed: Iterable[str] = (),
    hints: Mapping[str, str] = _NO_HINTS,
    more: str = "",
) -> None:
    """Refuse names that are not known, and the lack of needed ones: "`what`: missing ...; unknown ... The `kind` are".

    `hints` says of some unknown names what a caller may have meant; of the others, the known name that is most alike.
    """
    names = list(known)
    absent = [name for name in needed if name not in given]
    unknown = [str(name) for name in given if name not in names]
    if not absent and not unknown:
        return
    parts = [f"missing {', '.join(map(repr, absent))}"] if absent else []
    parts += [f"unknown {', '.join(map(repr, unknown))}"] if unknown else []
    said = [hints[name] for name in unknown if name in hints]
    for name in unknown:
        alike = get_close_matches(name, names, 1) if name not in hints else []
        said += [f"Did you mean {alike[0]!r} instead of {name!r}?"] if alike else []
    said += [f"The {kind} are: {', '.join(names) or '(none)'}.", more]
    raise UnknownNameError(" ".join([f"{what}: {'; '.join(parts)}.", *said]).rstrip())


def whole_number(value: Any, name: str, least: int = 0, most: int | None = None) -> int:
    """A whole number as an int, also one of NumPy; an `InputTypeError` or `InputError` that names it otherwise."""
    wanted = f"a whole number, at least {least}" + (f" and at most {most}" if most is not None else "")
    try:
        found = index(value)
    except TypeError:
        found = None
    if found is None or isinstance(value, bool):
        raise InputTypeError(f"{name} is {shown_value(value)}, expected {wanted}.")
    if found < least or (most is not None and found > most):
        raise InputError(f"{name} is {shown_value(value)}, expected {wanted}.")
    return found


def shown_value(value: Any) -> str:
    """A value for a message; Python does not write out ints of thousands of digits."""
    huge = isinstance(value, int) and value.bit_length() > 256
    return f"an int of {value.bit_length()} bits" if huge else repr(value)


def first_line(error: BaseException) -> str:
    """What an error that is not ours says in its first line, or what it is if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
