"""From which folders artifacts may be loaded in this process."""

from __future__ import annotations

import os
from pathlib import Path

ROOTS = "NEML2_AOTI_PLUGIN_ROOTS"


def allowed_roots() -> list[str] | None:
    """The folders that `NEML2_AOTI_PLUGIN_ROOTS` names, all links resolved; None where it is not set."""
    value = os.environ.get(ROOTS, "")
    if not value.strip():
        return None
    return [os.path.realpath(os.path.expanduser(part)) for part in value.split(os.pathsep) if part.strip()]


def within(path: str, folder: str) -> bool:
    """Whether a real path is that of a folder or of something inside it."""
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def beyond(path: Path) -> str:
    """Tell whether a path leads out of the folders that may be loaded from.

    Args:
        path: of a file or folder that is there.

    Returns:
        What is wrong and the cure; empty where the path is allowed.
    """
    roots = allowed_roots()
    if roots is None:
        return ""
    real = os.path.realpath(path)
    if any(within(real, root) for root in roots):
        return ""
    return (
        f"lies in {os.path.dirname(real)}, outside of the folders that {ROOTS} allows: {', '.join(roots)}. Move the "
        f"artifact there, or add its folder to {ROOTS}."
    )
