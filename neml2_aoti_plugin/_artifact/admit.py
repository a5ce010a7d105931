"""Whether an artifact may be loaded in this process at all: where it lies, and sealed or not."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ..errors import ArtifactError
from . import seal
from .folder import Folder
from .roots import beyond

REQUIRE_SEAL = "NEML2_AOTI_PLUGIN_REQUIRE_SEAL"
_OFF = ("", "0", "false", "no", "off")


def admit(root: Path, metadata: Iterable[Path]) -> Folder:
    """Refuse an artifact that may not be loaded; nothing in it is opened before.

    Args:
        root: its folder.
        metadata: its metadata files.

    Returns:
        The folder, through which all its files are read.

    Raises:
        ArtifactError: it lies outside of the folders that `NEML2_AOTI_PLUGIN_ROOTS` names, is not sealed although
            `NEML2_AOTI_PLUGIN_REQUIRE_SEAL` is set, or is not as it was sealed.
    """
    for path in (root, *metadata):
        outside = beyond(path)
        if outside:
            raise ArtifactError(f"{path}: {outside}")
    sealed = seal.verify(root)
    if sealed is None and os.environ.get(REQUIRE_SEAL, "").strip().lower() not in _OFF:
        raise ArtifactError(
            f"{root}: this artifact has no seal {seal.seal_file(root)}, and {REQUIRE_SEAL} asks for one. If you trust "
            f"the artifact as it is, write the seal: neml2-aoti seal {root}"
        )
    return Folder(Path(os.path.realpath(root)), sealed)
