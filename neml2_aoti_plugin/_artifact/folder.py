"""The folder of an artifact that may be loaded: its files, each as it was sealed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ..errors import ArtifactError
from .files import Kind, read_file


class Contents(NamedTuple):
    """The bytes of a file and their SHA-256, by which it is known from then on."""

    data: bytes
    digest: str


@dataclass(frozen=True)
class Folder:
    """An artifact's folder.

    Args:
        root: its path, all links resolved.
        sealed: SHA-256 of each file by absolute path, where the artifact has a seal.
    """

    root: Path
    sealed: Mapping[str, str] | None = field(default=None, repr=False)

    def read(self, file: Path, kind: Kind) -> Contents:
        """Read a file of the artifact.

        Args:
            file: its path.
            kind: what it is read as.

        Returns:
            Its bytes and their digest.

        Raises:
            FileNotFoundError: there is no such file.
            ArtifactError: it lies elsewhere, is not a file, or is not the one that was sealed.
        """
        data = read_file(file, kind, self.root)
        digest = hashlib.sha256(data).hexdigest()
        if self.sealed is not None:
            path = os.path.join(os.path.realpath(file.parent), file.name)
            if self.sealed.get(path) != digest:
                raise ArtifactError(
                    f"{file}: was changed after the sealed artifact was verified. Copy the artifact again from where "
                    "it came, and load the model anew."
                )
        return Contents(data, digest)


def folder_at(path: Path) -> Folder:
    """A folder by any path to it, without a seal."""
    return Folder(Path(os.path.realpath(path)))
