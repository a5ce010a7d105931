"""Parts of a request's JSON: each of the kind that it must be, or refused by name."""

from __future__ import annotations

import difflib
import json
import math
from typing import Any

import orjson

from ._refusals import Refused, shown

NOTHING: dict[str, Any] = {}
# How parameters begin that change what is asked for, and so cannot be passed over.
EXTENSIONS = ("shared_memory_", "classification")


def read_json(text: bytes) -> Any:
    """Parse JSON, with the bare NaN and Infinity that Python's own module writes.

    Raises:
        Refused: it is no JSON or nested too deeply, a number in it is too large, or an object has a name twice.
    """
    try:
        try:
            found = orjson.loads(text)
        except orjson.JSONDecodeError:
            return _read_slowly(text)
        # What has more colons than what was read may have a name twice, of which orjson takes the last.
        if text.count(b":") != orjson.dumps(found).count(b":"):
            _read_slowly(text)
    except (RecursionError, orjson.JSONEncodeError):
        raise Refused(400, "the request is nested too deeply.") from None
    return found


def _read_slowly(text: bytes) -> Any:
    try:
        return json.loads(text.decode(), object_pairs_hook=_object, parse_float=_number, parse_int=_number)
    except ValueError as error:
        raise Refused(400, f"the request is no JSON: {error}.") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise Refused(400, f"{shown(twice)} is there twice in one object.")
    return found


def _number(text: str) -> float:
    found = float(text)
    if math.isinf(found):
        raise Refused(400, f"the number {shown(text)} is too large.")
    return found if "." in text or "e" in text or "E" in text else int(text)


def object_of(document: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    """An object in a document; an empty one where there is none."""
    found = document.get(key)
    if found is None:
        return NOTHING
    if type(found) is not dict:
        raise Refused(400, f"{where}: {key} is {shown(found)}, expected an object.")
    return found


def flag_of(options: dict[str, Any], key: str, where: str) -> bool:
    """A flag among options; false where there is none."""
    found = options.get(key, False)
    if type(found) is not bool:
        raise Refused(400, f"{where}: {key} is {shown(found)}, expected true or false.")
    return found


def require_known(document: dict[str, Any], known: frozenset[str], where: str) -> None:
    """Refuse what would be passed over: a mistyped name must not go unnoticed."""
    if not known.issuperset(document):
        listed = ", ".join(map(shown, [name for name in document if name not in known][:5]))
        raise Refused(400, f"{where}: unknown {listed}; known are {', '.join(sorted(known))}.")


def pass_over(parameters: dict[str, Any], known: frozenset[str], where: str) -> None:
    """Pass over custom parameters, such as a `content_type` or a `priority`, which the protocol lets clients send.

    Raises:
        Refused: what is asked for by an extension of the protocol that is not here, or what looks like a mistyped name.
    """
    for name in parameters:
        if name in known:
            continue
        if name.startswith(EXTENSIONS):
            raise Refused(400, f"{where}: {shown(name)} is of an extension of the protocol that this service lacks.")
        meant = difflib.get_close_matches(name[:40], known, 1, 0.8)
        if meant:
            raise Refused(400, f"{where}: unknown {shown(name)}; did you mean {meant[0]!r}?")


def id_of(document: dict[str, Any]) -> str | None:
    """The id that a client gave its request."""
    found = document.get("id")
    if found is None or (type(found) is str and _is_text(found)):
        return found
    raise Refused(400, f"id is {shown(found)}, expected a string.")


def _is_text(found: str) -> bool:
    """Whether a string can be sent back: half a surrogate pair, which JSON may hold, cannot."""
    try:
        found.encode()
    except UnicodeEncodeError:
        return False
    return True
