"""Lead a metadata document of any released schema to the newest form, one step per schema."""

from __future__ import annotations

from typing import Any

from ..errors import ArtifactError

NEWEST = 14


def upgrade(document: dict[str, Any], file: str, solver: dict[str, Any] | None = None) -> dict[str, Any]:
    """Bring a document to the newest form.

    Args:
        document: the decoded metadata.
        file: its path, for messages.
        solver: Newton settings of the stub.

    Returns:
        The document in the form that `parse` reads.

    Raises:
        ArtifactError: the schema is not known.
    """
    written = document.get("schema_version")
    if not isinstance(written, int) or isinstance(written, bool):
        raise ArtifactError(f"{file}: schema_version is {written!r}, expected a whole number. Is this neml2-compile's file?")
    if written > NEWEST:
        raise ArtifactError(
            f"{file}: written in schema {written}; this plugin reads schemas up to {NEWEST}. "
            "Update it: pip install -U neml2-aoti-plugin."
        )
    if written < NEWEST:
        raise ArtifactError(f"{file}: written in schema {written}, which is not read yet; regenerate with neml2-compile.")
    return document
