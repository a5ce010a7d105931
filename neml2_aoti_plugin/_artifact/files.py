"""Open the files of an artifact. All are opened here: metadata of any schema, packages, seals.

A file is a regular one, of a sensible size, and lies in the folder of its artifact, or where `NEML2_AOTI_PLUGIN_ROOTS`
allows. It is opened without waiting for anybody, and read once. Stubs are the exception: neml2 opens those.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .._files import chunks, open_plain
from ..errors import ArtifactError
from .roots import ROOTS, allowed_roots, within
from .telling import reason


@dataclass(frozen=True)
class Kind:
    """What a file is read as.

    Args:
        name: for messages.
        limit: the largest size, in bytes.
    """

    name: str
    limit: int


METADATA = Kind("metadata file", 1 << 28)
PACKAGE = Kind("package", 1 << 31)
SEAL = Kind("seal", 1 << 24)
ANY = Kind("file of an artifact", 1 << 31)

AGAIN = "Copy it again, or compile the model again."

_FOLDER = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_DIRECTORY", 0)
_INSIDE = _FOLDER | getattr(os, "O_NOFOLLOW", 0)
_CHUNK = 1 << 20


def read_file(path: Path, kind: Kind, base: Path | None) -> bytes:
    """Read a file.

    Args:
        path: of the file.
        kind: what it is read as.
        base: the real folder of its artifact; None for a file that may lie anywhere.

    Returns:
        Its bytes.

    Raises:
        FileNotFoundError: there is no such file.
        ArtifactError: it lies elsewhere, is no regular file, is too large, or cannot be read.
    """
    with _opened(path, kind, base) as (handle, size):
        parts = list(chunks(handle, size, size))
    return parts[0] if len(parts) == 1 else b"".join(parts)


def digest_file(path: Path, kind: Kind, base: Path | None) -> str:
    """The SHA-256 of a file; the arguments and errors are those of `read_file`."""
    digest = hashlib.sha256()
    with _opened(path, kind, base) as (handle, size):
        for chunk in chunks(handle, size, _CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def is_there(path: Path) -> bool:
    """Whether there is something at a path that is not a folder; what it is, `read_file` finds out."""
    try:
        return not stat.S_ISDIR(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


@contextmanager
def _opened(path: Path, kind: Kind, base: Path | None) -> Iterator[tuple[int, int]]:
    """Open a file; give its handle and its size."""
    handle = -1
    try:
        handle = _open(path, base)
        status = os.fstat(handle)
        if status.st_size > kind.limit:
            raise ArtifactError(f"{path}: larger than {kind.limit} bytes, which no {kind.name} is. {AGAIN}")
        yield handle, status.st_size
    except (FileNotFoundError, ArtifactError):
        raise
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: cannot be read ({reason(error)}). {_cure(error)}") from error
    finally:
        if handle >= 0:
            os.close(handle)


def _cure(error: BaseException) -> str:
    if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):
        return "Close files that are open, or allow this process more of them (ulimit -n), and try again."
    return AGAIN


def _open(path: Path, base: Path | None) -> int:
    """Open a file folder by folder, so that no link that comes up meanwhile leads anywhere else."""
    real = os.path.realpath(path)
    folder = os.path.dirname(real) if base is None else _folder_of(path, real, base)
    if os.open not in os.supports_dir_fd or os.stat not in os.supports_dir_fd:
        return open_plain(real)
    *between, name = os.path.relpath(real, folder).split(os.sep)
    handle = os.open(folder, _FOLDER)
    try:
        for part in between:
            below = os.open(part, _INSIDE, dir_fd=handle)
            os.close(handle)
            handle = below
        return open_plain(name, handle)
    finally:
        os.close(handle)


def _folder_of(path: Path, real: str, base: Path) -> str:
    """The folder in which a file must lie and does."""
    roots = allowed_roots()
    if roots is None:
        if within(real, str(base)):
            return str(base)
        raise ArtifactError(
            f"{path}: leads to {os.path.dirname(real)}, out of the artifact's folder {base}. Copy the file itself to "
            f"its place, or allow folders that hold both: {ROOTS}={os.path.commonpath([real, base])}"
        )
    for root in roots:
        if within(real, root):
            return root
    raise ArtifactError(
        f"{path}: lies in {os.path.dirname(real)}, outside of the folders that {ROOTS} allows: {', '.join(roots)}. "
        f"Move the artifact there, or add its folder to {ROOTS}."
    )
