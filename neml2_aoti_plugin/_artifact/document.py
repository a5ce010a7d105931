"""Metadata documents in typed forms; what does not fit is an error with the key, what was found, and the cure."""

from __future__ import annotations

import json
import re
from functools import cache, cached_property
from math import prod
from pathlib import Path
from sys import float_info
from typing import Annotated, Any, Literal, TypeVar, get_args

import msgspec

from ..errors import ArtifactError, ArtifactNotFoundError
from ..settings import CacheStrategy, KrylovMethod, LineSearch
from .files import METADATA, NAME, Folder, keys, reason, shown

T = TypeVar("T")

AGAIN = "The metadata is damaged or was edited; compile the model again with neml2-compile."

# A tensor of a material point is small; a larger extent is damage, and would only fail later and less clearly.
MAX_ENTRIES = 1 << 40

Structure = Literal["dense", "block"]
Role = Literal["old_state", "old_force", "cur_force", "incremental", "static", "unknown"]
# The words that a key may have, which msgspec does not list where another one is found.
_WORDS: dict[str, Any] = {
    "structure": Structure,
    "role": Role,
    "ls_type": LineSearch,
    "method": KrylovMethod,
    "cache_strategy": CacheStrategy,
}

Whole = Annotated[int, msgspec.Meta(ge=0, le=MAX_ENTRIES)]
Shape = tuple[Whole, ...]
# Without spaces and odd characters, so that errors can quote it.
Name = Annotated[str, msgspec.Meta(pattern=rf"^{NAME.pattern}\Z")]
# The bare name of a file in the leaf folder.
PackageName = Annotated[str, msgspec.Meta(pattern=r"^[\w~.+\-]{1,124}\.pt2\Z")]


def one_of(*words: str) -> msgspec.Meta:
    """One of a few words. As a pattern, since msgspec would quote a wrong one of an enumeration."""
    return msgspec.Meta(pattern=rf"^({'|'.join(words)})\Z")


_UNKNOWN = object()


class Unfit(ValueError):
    """The value under a key of a form is not what it must be, or missing where nothing is expected."""

    def __init__(self, key: str, expected: str = "", value: object = _UNKNOWN) -> None:
        super().__init__(expected)
        self.key = key
        self.expected = expected
        self.value = value


class DocumentForm(msgspec.Struct, frozen=True, dict=True):
    """A JSON object of a known form; keys that are not known are ignored."""

    def __post_init__(self) -> None:
        for name, written in zip(self.__struct_fields__, self.__struct_encode_fields__, strict=True):
            if written.endswith("shape") and prod(getattr(self, name) or ()) > MAX_ENTRIES:
                raise Unfit(written, "a shape of a sensible size")
        # What follows from the keys follows now, so that complaints have the path.
        for name in _following(type(self)):
            getattr(self, name)

    def need(self, key: str) -> Any:
        """The value of a key that must be there beside another one."""
        value = getattr(self, key)
        if value is None:
            raise Unfit(key)
        return value


@cache
def _following(form: type[DocumentForm]) -> tuple[str, ...]:
    return tuple(n for kind in form.__mro__ for n, value in vars(kind).items() if isinstance(value, cached_property))


def read_document(file: Path, folder: Folder) -> tuple[dict[str, Any], str]:
    """The top-level object of a metadata file in the folder of its artifact, and the file's digest."""
    try:
        data, digest = folder.read(file, METADATA)
        # Not by msgspec: neml2 writes parameters that are not finite as NaN and Infinity, which are no JSON.
        document = json.loads(data.decode("utf-8"))
    except FileNotFoundError:
        raise ArtifactNotFoundError(f"{file}: no such metadata file.") from None
    except (ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{file}: cannot be read as JSON ({reason(error)}). Compile the model again with neml2-compile."
        ) from None
    if not isinstance(document, dict):
        raise ArtifactError(f"{file}: holds a {type(document).__name__}, expected a JSON object with 'schema_version'.")
    return document, digest


def convert(document: dict[str, Any], form: type[T], file: str) -> T:
    """A decoded document in its form; the file is for messages."""
    try:
        return msgspec.convert(document, form)
    except msgspec.ValidationError as error:
        raise ArtifactError(f"{file}: {_complaint(error, document)} {AGAIN}") from None
    except UnicodeEncodeError:
        # JSON can write half of a character, which msgspec takes for no text.
        raise ArtifactError(f"{file}: holds text with half a character (a lone surrogate). {AGAIN}") from None


# What msgspec calls a type, in plain words.
_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}


def _complaint(error: msgspec.ValidationError, document: dict[str, Any]) -> str:
    """What is wrong in a sentence; of what was found only what an error may show."""
    text, _, path = str(error).partition(" - at ")
    path = path.strip("`").removeprefix("$").removeprefix(".")
    cause = error.__cause__
    if isinstance(cause, Unfit) and cause.expected:
        path, expected = f"{path}.{cause.key}".removeprefix("."), cause.expected
        value = _value_at(document, path) if cause.value is _UNKNOWN else cause.value
    else:
        missing = cause.key if isinstance(cause, Unfit) else text.partition("missing required field `")[2].rstrip("`")
        expected, value = _expected(text, path.rpartition(".")[2]), _value_at(document, path)
        if missing:
            there = keys(value) if isinstance(value, dict) else "others"
            return f"{path or 'the file'} has no key {missing!r}; it has {there}."
    place = path or "the file"
    if isinstance(value, str) and value[:1] == "@" and NAME.fullmatch(value[1:]):
        return (
            f"{place} is {value!r}. Names that begin with @ are those that this plugin puts beside the variables, in "
            "files and answers. Give it another name in the source input."
        )
    found = "holds what it must not" if value is _UNKNOWN else f"is {shown(value)}"
    return f"{place} {found}, expected {expected}."


def _expected(text: str, key: str) -> str:
    """What a message of msgspec expects, in plain words and without the value."""
    if text.startswith("Invalid enum value"):
        return f"one of {', '.join(get_args(_WORDS[key]))}"
    if text.startswith("Invalid value"):
        # The only union of forms is that of segments, by their kind.
        return "one of forward, implicit"
    if text.startswith("Number out of range"):
        return "a number that a double holds"
    if "matching regex" in text:
        pattern = text.partition("regex ")[2]
        if pattern.startswith("'^("):
            return f"one of {pattern[3:].partition(')')[0].replace('|', ', ')}"
        return "the bare name of a .pt2 file in the artifact's own folder" if "pt2" in pattern else "a name"
    if str(float_info.max) in text:
        return "a finite number"
    words = text.removeprefix("Expected ").partition(", got ")[0]
    words = words.replace("of length >= 1", "of at least one entry")
    words = re.sub(r"`([^`]*)`", lambda m: " or ".join(_TYPES.get(t, t) for t in m[1].split(" | ")), words)
    return words.replace(" <= ", " of at most ").replace(" >= ", " of at least ").replace(" > ", " of more than ")


def _value_at(document: Any, path: str) -> Any:
    """The value at a path such as `segments[0].inputs`; nothing for one that leads through an object's own keys."""
    found = document
    for step in re.findall(r"[^.\[\]]+|\.\.\.", path):
        try:
            found = found[int(step)] if isinstance(found, list) else found[step]
        except (LookupError, TypeError, ValueError):
            return _UNKNOWN
    return found
