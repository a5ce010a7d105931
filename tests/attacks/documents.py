"""Mutated metadata: drawn by hypothesis from a real document, or with a secret in the place of each text."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import strategies as st

Path = tuple[str | int, ...]

HUGE = [2**31, 2**31 - 1, 2**40, 2**63, 2**64, 10**30, -1, -(2**63), 1e308, 1e-320, -0.0]
SPECIAL = [float("nan"), float("inf"), -float("inf")]
NAMES = ["", ".", "..", "../outside.pt2", "../../outside.pt2", "/etc/passwd", "sub/inside.pt2", "C:outside.pt2"]
NAMES += ["\0.pt2", "a" * 5000, "\u202e2tp.", "\ud800", "__class__", "metadata.json"]


def paths(value: Any, at: Path = ()) -> list[Path]:
    """The places of all values in a document, its root left out."""
    found: list[Path] = [at] if at else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += paths(item, (*at, key))
    return found


def at(document: Any, path: Path) -> Any:
    """The value at a place."""
    for key in path:
        document = document[key]
    return document


def nested(depth: int) -> list[Any]:
    """A list in a list in a list."""
    found: list[Any] = []
    for _ in range(depth):
        found = [found]
    return found


def junk() -> st.SearchStrategy[Any]:
    """Values that a metadata file should not hold where they are put."""
    scalars = (
        st.none()
        | st.booleans()
        | st.integers(-3, 20)
        | st.sampled_from(HUGE + SPECIAL)
        | st.floats()
        | st.sampled_from(NAMES)
        | st.text(max_size=8)
    )
    return scalars | st.lists(scalars, max_size=4) | st.dictionaries(st.text(max_size=4), scalars, max_size=3)


@st.composite
def mutations(draw: st.DrawFn, original: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A document with one to three changes, and what they are."""
    document = copy.deepcopy(original)
    changes = []
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        there = paths(document)
        path = draw(st.sampled_from(there))
        *above, key = path
        parent = at(document, tuple(above))
        kind = draw(st.sampled_from(["junk", "junk", "other", "number", "remove", "repeat", "swap", "name", "deep"]))
        if kind == "junk":
            parent[key] = draw(junk())
        elif kind == "other":
            parent[key] = copy.deepcopy(at(document, draw(st.sampled_from(there))))
        elif kind in ("number", "name"):
            alike = [p for p in there if type(at(document, p)) in ((str,) if kind == "name" else (int, float))]
            if not alike:
                continue
            path = draw(st.sampled_from(alike))
            names = st.sampled_from(NAMES + [at(document, p) for p in alike])
            numbers = st.integers(-2, 40) | st.sampled_from(HUGE + SPECIAL) | st.floats(width=32)
            at(document, path[:-1])[path[-1]] = draw(names if kind == "name" else numbers)
        elif kind == "remove":
            del parent[key]
        elif kind == "repeat":
            if isinstance(parent, list):
                parent.append(copy.deepcopy(parent[int(key)]))
            else:
                parent[f"{key}_"] = parent[key]
        elif kind == "swap":
            other = draw(st.sampled_from(there))
            if path[: len(other)] == other or other[: len(path)] == path:
                continue
            first, second = at(document, path), at(document, other)
            at(document, path[:-1])[path[-1]] = second
            at(document, other[:-1])[other[-1]] = first
        else:
            parent[key] = nested(draw(st.sampled_from([5, 500])))
        changes.append(f"{kind} {'.'.join(map(str, path))}")
    return document, changes


# With what no name has, so that nobody can take it for one: spaces, a colon with more behind, a line's end.
SECRET = "root:x:0 hunter2 BEGIN PRIVATE KEY\nhunter2"
SIGN = "hunter2"


def with_secrets(original: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
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
