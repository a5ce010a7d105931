"""`seal`: write down what an artifact's files are, so that a later change is refused."""

from __future__ import annotations

import os
from pathlib import Path

from ._artifact.locate import root_of
from ._artifact.seal import seal_file, write_seal


def seal(artifact: str | os.PathLike[str]) -> Path:
    """Seal an artifact as it is now: from then on it loads only as long as no byte of it changes.

    Args:
        artifact: the artifact's folder, its metadata file, or a folder inside it.

    Returns:
        The file of the seal, beside the artifact's folder: a list that `sha256sum -c` checks.

    Raises:
        ArtifactNotFoundError: there is no artifact at the path.
        ArtifactError: it holds what cannot be sealed, or the seal cannot be written.
    """
    return write_seal(root_of(Path(artifact)))


def is_sealed(artifact: str | os.PathLike[str]) -> bool:
    """Whether an artifact has a seal; a load compares it with that.

    Args:
        artifact: as for `seal`.

    Raises:
        ArtifactNotFoundError: there is no artifact at the path.
    """
    return os.path.lexists(seal_file(root_of(Path(artifact))))
