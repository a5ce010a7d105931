"""Lead a metadata document of any released schema to the newest form, one step per schema.

A step takes the form of one schema and gives that of the next; what the newest JSON has no keys for is left in those
that `parse` reads beside them. What an old file lacks is derived where it can be told, else it is an error by name.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

from ..errors import ArtifactError
from .reading import Node
from .telling import shown
from .typeonly import Document, from_2, from_3, segments_of

NEWEST = 14
RELEASES = {2: "3.0.0 to 3.0.2", 3: "3.0.3", 7: "3.0.4 to 3.0.6", 12: "3.0.7", 14: "3.1.0"}


def upgrade(document: Document, file: str) -> Document:
    """Bring a document to the newest form.

    Args:
        document: the decoded metadata; it is not changed.
        file: its path, for messages.

    Returns:
        The document in the form that `parse` reads.

    Raises:
        ArtifactError: the schema is not known, or the document does not fit it.
    """
    written = released_form(document, file)
    found = deepcopy(document)
    for schema, step in STEPS.items():
        if schema >= written:
            found = step(Node(found, "", file))
    return found


def released_form(document: Document, file: str) -> int:
    """The released schema in whose form a document is: its own, or the one below an unreleased one."""
    written = document.get("schema_version")
    if not isinstance(written, int) or isinstance(written, bool):
        raise ArtifactError(
            f"{file}: schema_version is {shown(written)}, expected a whole number. Is this neml2-compile's file?"
        )
    if written > NEWEST:
        raise ArtifactError(
            f"{file}: written in schema {written}; this plugin reads schemas up to {NEWEST}. "
            "Update it: pip install -U neml2-aoti-plugin."
        )
    if written < min(RELEASES):
        known = ", ".join(f"{schema} (neml2 {release})" for schema, release in RELEASES.items())
        raise ArtifactError(
            f"{file}: written in schema {written}, which no neml2 release wrote; this plugin reads {known}. Compile "
            "the model again with neml2-compile."
        )
    return max(schema for schema in RELEASES if schema <= written)


def from_7(document: Node) -> Document:
    """Schema 7 to 12: two words changed; Newton settings stay at their defaults where the stub gives none."""
    found = {
        **document.value,
        "segments": [_renamed(s.value, "rhs_package", "residual_package") for s in segments_of(document)],
    }
    for key in ("inputs", "outputs"):
        found[key] = [
            {**v.value, "var_type": "MRP"} if "var_type" in v and v.at("var_type").value == "Rot" else v.value
            for v in document.at(key).items()
        ]
    return found


def from_12(document: Node) -> Document:
    """Schema 12 to 14: nothing; the role `incremental`, which 14 writes no more, is one that the runtime has."""
    found: Document = document.value
    return found


STEPS: dict[int, Callable[[Node], Document]] = {2: from_2, 3: from_3, 7: from_7, 12: from_12}


def _renamed(entries: Document, old: str, new: str) -> Document:
    return {new if key == old else key: value for key, value in entries.items()}
