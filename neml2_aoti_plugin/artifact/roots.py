"""Whether an artifact may be loaded in this process at all: from which folders, and sealed or not."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ..errors import ArtifactError
from . import seal

ROOTS = "NEML2_AOTI_PLUGIN_ROOTS"
REQUIRE_SEAL = "NEML2_AOTI_PLUGIN_REQUIRE_SEAL"
_OFF = ("", "0", "false", "no", "off")


def admit(root: Path, metadata: Iterable[Path]) -> None:
    """Refuse an artifact that may not be loaded; nothing in it is opened before.

    Args:
        root: its folder.
        metadata: its metadata files.

    Raises:
        ArtifactError: it lies outside of the folders that `NEML2_AOTI_PLUGIN_ROOTS` names, is not sealed although
            `NEML2_AOTI_PLUGIN_REQUIRE_SEAL` is set, or is not as it was sealed.
    """
    for path in (root, *metadata):
        outside = beyond(path)
        if outside:
            raise ArtifactError(f"{path}: {outside}")
    if not seal.verify(root) and os.environ.get(REQUIRE_SEAL, "").strip().lower() not in _OFF:
        raise ArtifactError(
            f"{root}: this artifact has no seal {seal.seal_file(root)}, and {REQUIRE_SEAL} asks for one. If you trust "
            f"the artifact as it is, write the seal: neml2-aoti seal {root}"
        )


def beyond(path: Path) -> str:
    """Tell whether a path leads out of the folders that may be loaded from.

    Args:
        path: of a file or folder that is there.

    Returns:
        What is wrong and the cure; empty where the path is allowed.
    """
    value = os.environ.get(ROOTS, "")
    if not value.strip():
        return ""
    roots = [os.path.realpath(os.path.expanduser(part)) for part in value.split(os.pathsep) if part.strip()]
    real = os.path.realpath(path)
    if any(real == root or real.startswith(root.rstrip(os.sep) + os.sep) for root in roots):
        return ""
    return (
        f"lies in {os.path.dirname(real)}, outside of the folders that {ROOTS} allows: {', '.join(roots)}. Move the "
        f"artifact there, or add its folder to {ROOTS}."
    )
