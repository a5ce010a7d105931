"""Files of artifacts that hold what no error may show: a secret in the place of each text."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

from .documents import at, paths

# With what no name has, so that nobody can take it for one: spaces, a colon with more behind, a line's end.
SECRET = "root:x:0 hunter2 BEGIN PRIVATE KEY\nhunter2"
SIGN = "hunter2"


def documents(original: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """A document again and again, with a secret in the place of one value or one key, or without it; and which one."""
    for path in paths(original):
        for what, change in CHANGES.items():
            document = copy.deepcopy(original)
            change(at(document, path[:-1]), path[-1])
            yield f"{what} at {'.'.join(map(str, path))}", document


def _value(parent: Any, key: Any) -> None:
    parent[key] = SECRET


def _values(parent: Any, key: Any) -> None:
    parent[key] = [SECRET, {SECRET: SECRET}]


def _key(parent: Any, key: Any) -> None:
    if isinstance(parent, dict):
        parent[SECRET] = parent.pop(key)
    else:
        parent[key] = {SECRET: parent[key]}


def _nothing(parent: Any, key: Any) -> None:
    del parent[key]


CHANGES: dict[str, Callable[[Any, Any], None]] = {"value": _value, "values": _values, "key": _key, "nothing": _nothing}
