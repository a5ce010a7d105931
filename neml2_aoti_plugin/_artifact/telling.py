"""What an error may show of what was read from a file: numbers and proper names, of all else only the type.

A file may be another one than it claims to be, and messages end up in logs that others read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

# What a name may be made of, be it of a variable, of a file, or of an entry of an archive.
NAME = re.compile(r"[\w~.:/+\-]{1,128}")
_KEY = re.compile(r"[a-z][a-z_0-9]{0,39}")
_FEW = 12


def shown(value: Any) -> str:
    """A value as an error may show it: a short number, true, false or null; of anything else the type."""
    if value is None or isinstance(value, (bool, float)):
        return repr(value)
    # A number of many digits takes long to print, and Python refuses more than 4,300 of them.
    if isinstance(value, int) and value.bit_length() < 64:
        return repr(value)
    return f"a{'n' if isinstance(value, int) else ''} {type(value).__name__}"


def named(text: str) -> str:
    """A name in quotes; what cannot be a name is told by its length."""
    return repr(text) if NAME.fullmatch(text) else f"<{len(text)} characters that are no name>"


def keys(found: Iterable[Any]) -> str:
    """The keys of an object, as far as they look like those of a metadata file."""
    known = [str(key) for key in found if isinstance(key, str) and _KEY.fullmatch(key)]
    return ", ".join(known[:_FEW]) + (", ..." if len(known) > _FEW else "") if known else "none that could be meant"


def reason(error: BaseException) -> str:
    """Why something could not be read or decoded, without what was read."""
    if isinstance(error, OSError) and error.strerror:
        return str(error.strerror)
    place = getattr(error, "lineno", None), getattr(error, "colno", None)
    where = f" at line {place[0]}, column {place[1]}" if None not in place else ""
    return f"{type(error).__name__}{where}"
