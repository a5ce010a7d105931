"""Decode a JSON file and take typed values out of it, with the path of the key in every complaint."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from math import isfinite, prod
from pathlib import Path
from typing import Any, TypeVar

from ..errors import ArtifactError, ArtifactNotFoundError
from . import files
from .folder import Folder, folder_at
from .telling import NAME, keys, named, reason, shown

T = TypeVar("T")

# A tensor of a material point is small; a larger extent is damage, and would only fail later and less clearly.
MAX_ENTRIES = 1 << 40


def read_json(file: Path, folder: Folder | None = None) -> tuple[dict[str, Any], str]:
    """Decode a metadata file.

    Args:
        file: the file.
        folder: of its artifact; the one that the file is in, if not given.

    Returns:
        The top-level object, and the digest of the file.

    Raises:
        ArtifactNotFoundError: there is no such file.
        ArtifactError: it is not JSON, or not an object.
    """
    try:
        data, digest = (folder or folder_at(file.parent)).read(file, files.METADATA)
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


class Node:
    """One JSON value and where it stands in the file.

    Args:
        value: the decoded value.
        path: of the key, such as `segments[0].inputs`.
        file: the file, for messages.
    """

    def __init__(self, value: Any, path: str, file: str) -> None:
        self.value = value
        self.path = path
        self.file = file

    def fail(self, expected: str) -> ArtifactError:
        """The error to raise when the value is not what it must be."""
        return ArtifactError(
            f"{self.file}: {self.path or 'the file'} is {shown(self.value)}, expected {expected}. The metadata is "
            "damaged or was edited; compile the model again with neml2-compile."
        )

    def __contains__(self, key: str) -> bool:
        return isinstance(self.value, dict) and self.value.get(key) is not None

    def at(self, key: str) -> Node:
        """The value under a key that must be there."""
        if not isinstance(self.value, dict):
            raise self.fail("an object")
        if key not in self.value:
            raise ArtifactError(
                f"{self.file}: {self.path or 'the file'} has no key {key!r}; it has {keys(self.value)}. "
                "The metadata is damaged or was edited; compile the model again with neml2-compile."
            )
        return Node(self.value[key], f"{self.path}.{key}" if self.path else key, self.file)

    def get(self, key: str, read: Callable[[Node], T], default: T) -> T:
        """The value under a key that may be absent or null."""
        return read(self.at(key)) if key in self else default

    def items(self) -> list[Node]:
        """The entries of a list."""
        if not isinstance(self.value, list):
            raise self.fail("a list")
        return [Node(item, f"{self.path}[{i}]", self.file) for i, item in enumerate(self.value)]

    def entries(self) -> Iterator[tuple[str, Node]]:
        """The keys and values of an object."""
        if not isinstance(self.value, dict):
            raise self.fail("an object")
        for key, value in self.value.items():
            yield key, Node(value, f"{self.path}.{key if NAME.fullmatch(key) else named(key)}", self.file)


def entry(node: Node) -> dict[str, Any]:
    """An object, whatever it holds."""
    if not isinstance(node.value, dict):
        raise node.fail("an object")
    return node.value


def text(node: Node) -> str:
    """A name, without the spaces and odd characters that would make a riddle of each error that quotes it."""
    if isinstance(node.value, str) and node.value[:1] == "@" and NAME.fullmatch(node.value[1:]):
        raise ArtifactError(
            f"{node.file}: {node.path} is {node.value!r}. Names that begin with @ are those that this plugin puts "
            "beside the variables, in files and answers. Give it another name in the input file, and compile the model "
            "again with neml2-compile."
        )
    if not isinstance(node.value, str) or not NAME.fullmatch(node.value):
        raise node.fail("a name")
    return node.value


def choice(*allowed: str) -> Callable[[Node], str]:
    """A reader of one of a few words."""

    def read(node: Node) -> str:
        if node.value not in allowed:
            raise node.fail(f"one of {', '.join(allowed)}")
        return str(node.value)

    return read


def whole(node: Node) -> int:
    """A whole number, zero or more."""
    if isinstance(node.value, bool) or not isinstance(node.value, int) or not 0 <= node.value <= MAX_ENTRIES:
        raise node.fail("a whole number, zero or more")
    return node.value


def at_most(limit: int) -> Callable[[Node], int]:
    """A reader of how often something may be repeated; a damaged number would keep a solve busy for years."""

    def read(node: Node) -> int:
        if whole(node) > limit:
            raise node.fail(f"a whole number, {limit} at most")
        return int(node.value)

    return read


def flag(node: Node) -> bool:
    """True or false."""
    if not isinstance(node.value, bool):
        raise node.fail("true or false")
    return node.value


def number(node: Node) -> float:
    """A finite number."""
    if isinstance(node.value, bool) or not isinstance(node.value, (int, float)):
        raise node.fail("a number")
    try:
        value = float(node.value)
    except OverflowError:
        raise node.fail("a number that a double holds") from None
    if not isfinite(value):
        raise node.fail("a finite number")
    return value


def any_number(node: Node) -> float:
    """A number; NaN and the infinities are numbers here."""
    if isinstance(node.value, (bool, int, float)):
        try:
            return float(node.value)
        except OverflowError:
            pass
    raise node.fail("a number that a double holds")


def shape(node: Node) -> tuple[int, ...]:
    """A list of extents."""
    sizes = tuple(whole(item) for item in node.items())
    if prod(sizes) > MAX_ENTRIES:
        raise node.fail("a shape of a sensible size")
    return sizes


def names(node: Node) -> tuple[str, ...]:
    """A list of names, each a string or an object with a `name`, no name twice."""
    found = tuple(text(item) if isinstance(item.value, str) else text(item.at("name")) for item in node.items())
    if len(set(found)) != len(found):
        raise node.fail("names that are all different")
    return found


def file_name(node: Node) -> str:
    """The bare name of a file in the leaf folder."""
    name = text(node)
    if name in {".", ".."} or any(c in name for c in "/\\\0:") or not name.endswith(".pt2"):
        raise node.fail("the bare name of a .pt2 file in the artifact's own folder")
    return name
