"""Whether a decoded JSON value is what a dataclass says."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any


def mismatches(value: Any, hint: Any, path: str = "") -> list[str]:
    """A line for each part of decoded JSON that is not as a type says, or as a dataclass's fields do."""
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        names = [field.name for field in dataclasses.fields(hint)]
        if not isinstance(value, dict) or list(value) != names:
            return [f"{path}: has {list(value) if isinstance(value, dict) else value!r}, expected {names}"]
        return [line for name in names for line in mismatches(value[name], hints[name], f"{path}.{name}")]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        found = [mismatches(value, argument, path) for argument in arguments]
        return [] if any(not lines for lines in found) else found[0]
    if origin is typing.Literal:
        return [] if value in arguments else [f"{path}: {value!r} is none of {arguments}"]
    if origin is tuple:
        if not isinstance(value, list):
            return [f"{path}: {value!r} is no list"]
        if arguments[-1] is Ellipsis:
            return [line for i, item in enumerate(value) for line in mismatches(item, arguments[0], f"{path}[{i}]")]
        pairs = zip(value, arguments, strict=True)
        return [line for i, (item, kind) in enumerate(pairs) for line in mismatches(item, kind, f"{path}[{i}]")]
    if origin is dict:
        if not isinstance(value, dict):
            return [f"{path}: {value!r} is no object"]
        return [line for name, item in value.items() for line in mismatches(item, arguments[1], f"{path}.{name}")]
    if hint is float:
        # A number that is not finite is null.
        return [] if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)) else [path]
    fits = type(value) is hint
    return [] if fits else [f"{path}: {value!r}, expected {hint}"]
