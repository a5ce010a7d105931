"""Read a file of an artifact again, long after the artifact was looked over, and refuse it if it has changed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..errors import ArtifactError
from .compatibility import read_package
from .seal import expected, require


@dataclass(frozen=True)
class Fingerprint:
    """What tells whether a file is still the same.

    Args:
        facts: device, inode, size and time of the last change; empty for a file that is not there.
        digest: SHA-256 of the sealed file; None where the artifact is not sealed.
    """

    facts: tuple[int, ...]
    digest: str | None


def fingerprint(file: Path) -> Fingerprint:
    """Take the fingerprint of a file."""
    try:
        found = os.stat(file)
    except OSError:
        return Fingerprint((), None)
    return Fingerprint((found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns), expected(file))


def read_unchanged(file: Path, as_it_was: Fingerprint) -> bytes:
    """Read a file that must be the same as before.

    Args:
        file: the file.
        as_it_was: its fingerprint then.

    Returns:
        Its bytes.

    Raises:
        ArtifactError: it has changed.
        ArtifactNotFoundError: it is gone.
    """
    data = read_package(file)
    require(file, data, as_it_was.digest)
    if as_it_was.facts and fingerprint(file).facts != as_it_was.facts:
        raise ArtifactError(
            f"{file}: has changed since the model was loaded, so that it may not go with the rest any more. Load the "
            "model again."
        )
    return data
