"""Parts of a request's JSON: each of the kind that it must be, or refused by name."""

from __future__ import annotations

import json
from typing import Any

import orjson

from .refusals import Refused, shown

NOTHING: dict[str, Any] = {}


def read_json(text: bytes) -> Any:
    """Parse JSON, with the bare NaN and Infinity that Python's own module writes.

    Raises:
        Refused: it is no JSON, or nested too deeply.
    """
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        first = error
    if b"NaN" in text or b"Infinity" in text:
        try:
            return json.loads(text)
        except RecursionError:
            raise Refused(400, "the request is nested too deeply.") from None
        except (ValueError, UnicodeDecodeError) as error:
            raise Refused(400, f"the request is no JSON: {error}.") from None
    raise Refused(400, f"the request is no JSON: {first}.")


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
