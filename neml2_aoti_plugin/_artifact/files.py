"""Read the files of an artifact. All are opened here: metadata of any schema, packages, seals.

A file is a regular one, of a sensible size, and lies in the folder of its artifact, or where `NEML2_AOTI_PLUGIN_ROOTS`
allows. It is opened without waiting for anybody, and read once. Stubs are the exception: neml2 opens those.

Errors show numbers and proper names of what was read, of all else only the type: a file may be another one than it
claims to be, and messages end up in logs that others read.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from .._files import open_plain
from ..errors import ArtifactError

ROOTS = "NEML2_AOTI_PLUGIN_ROOTS"
AGAIN = "Copy it again, or compile the model again."

# What a name may be made of, be it of a variable, of a file, or of an entry of an archive.
NAME = re.compile(r"[\w~.:/+\-]{1,128}")
_KEY = re.compile(r"[a-z][a-z_0-9]{0,39}")
_FEW = 12

_FOLDER = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_DIRECTORY", 0)
_INSIDE = _FOLDER | getattr(os, "O_NOFOLLOW", 0)


class Kind(NamedTuple):
    """What a file is read as: the name is for messages, the limit is the largest size in bytes."""

    name: str
    limit: int


METADATA = Kind("metadata file", 1 << 28)
PACKAGE = Kind("package", 1 << 31)
SEAL = Kind("seal", 1 << 24)
ANY = Kind("file of an artifact", 1 << 31)


# -- what an error may show --------------------------------------------------------------------------------------------


def shown(value: Any) -> str:
    """A value as an error may show it: a short number, true, false or null; of anything else the type."""
    # A number of many digits takes long to print, and Python refuses more than 4,300 of them.
    if value is None or isinstance(value, (bool, float)) or (isinstance(value, int) and value.bit_length() < 64):
        return repr(value)
    return f"a{'n' if isinstance(value, int) else ''} {type(value).__name__}"


def named(text: str) -> str:
    """A name in quotes; what cannot be a name is redacted to its length."""
    return repr(text) if NAME.fullmatch(text) else f"<{len(text)} characters that are no name>"


def keys(found: Iterable[Any]) -> str:
    """The keys of an object, as far as they look like those of a metadata file."""
    known = [str(key) for key in found if isinstance(key, str) and _KEY.fullmatch(key)]
    return ", ".join(known[:_FEW]) + (", ..." if len(known) > _FEW else "") if known else "none that could be meant"


def reason(error: BaseException) -> str:
    """Why something could not be read or decoded, without what was read."""
    if isinstance(error, OSError) and error.strerror:
        return str(error.strerror)
    place = getattr(error, "lineno", None), getattr(error, "colno", None)
    where = f" at line {place[0]}, column {place[1]}" if None not in place else ""
    return f"{type(error).__name__}{where}"


# -- opening and reading -----------------------------------------------------------------------------------------------


class Contents(NamedTuple):
    """The bytes of a file and their SHA-256, by which it is known from then on."""

    data: bytes
    digest: str


def is_there(path: Path) -> bool:
    """Whether there is something at a path that is not a folder; what it is, `read_file` finds out."""
    try:
        return not stat.S_ISDIR(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def allowed_root(path: Path, real: str) -> str | None:
    """The folder of those that `NEML2_AOTI_PLUGIN_ROOTS` names in which a path lies; None where it names none."""
    value = os.environ.get(ROOTS, "")
    if not value.strip():
        return None
    roots = [os.path.realpath(os.path.expanduser(part)) for part in value.split(os.pathsep) if part.strip()]
    for root in roots:
        if _within(real, root):
            return root
    raise ArtifactError(
        f"{path}: lies in {os.path.dirname(real)}, outside of the folders that {ROOTS} allows: {', '.join(roots)}. "
        f"Move the artifact there, or add its folder to {ROOTS}."
    )


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def read_file(path: Path, kind: Kind, base: Path | None) -> Contents:
    """Read a file that lies below `base`, the real folder of its artifact, or anywhere if that is None."""
    # A FileNotFoundError where there is none, an ArtifactError for anything else.
    try:
        with os.fdopen(_open(path, base), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > kind.limit:
                raise ArtifactError(f"{path}: larger than {kind.limit} bytes, which no {kind.name} is. {AGAIN}")
            # No more than that: what the system makes up as it is read may have no end.
            data = file.read(size)
        if len(data) < size:
            raise ValueError("the file became shorter while it was read")
    except (FileNotFoundError, ArtifactError):
        raise
    except (OSError, ValueError) as error:
        cure = AGAIN
        if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):
            cure = "Close files that are open, or allow this process more of them (ulimit -n), and try again."
        raise ArtifactError(f"{path}: cannot be read ({reason(error)}). {cure}") from error
    return Contents(data, hashlib.sha256(data).hexdigest())


def _open(path: Path, base: Path | None) -> int:
    """Open a file folder by folder, so that no link that comes up meanwhile leads anywhere else."""
    real = os.path.realpath(path)
    folder = os.path.dirname(real)
    if base is not None:
        folder = allowed_root(path, real) or str(base)
        if not _within(real, folder):
            raise ArtifactError(
                f"{path}: leads to {os.path.dirname(real)}, out of the artifact's folder {base}. Copy the file itself "
                f"to its place, or allow folders that hold both: {ROOTS}={os.path.commonpath([real, base])}"
            )
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


@dataclass(frozen=True)
class Folder:
    """The folder of an artifact that may be loaded, through which its files are read, each as it was sealed."""

    root: Path  # all links resolved
    # SHA-256 of each file by absolute path, where the artifact has a seal.
    sealed: Mapping[str, str] | None = field(default=None, repr=False)

    def read(self, file: Path, kind: Kind) -> Contents:
        """Read a file of the artifact; see `read_file` for errors."""
        found = read_file(file, kind, self.root)
        path = os.path.join(os.path.realpath(file.parent), file.name)
        if self.sealed is not None and self.sealed.get(path) != found.digest:
            raise ArtifactError(
                f"{file}: was changed after the sealed artifact was verified. Copy the artifact again from where it "
                "came, and load the model anew."
            )
        return found
