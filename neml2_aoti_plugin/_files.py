"""Files that users name: written whole or not at all, read within bounds, and variables in the names of files.

Only plain files are read and written over. A pipe, a device or a link in the place of one is refused.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from urllib.parse import quote

from .errors import AOTIError, InputError

_READ = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
# Without links, without waiting for a writer, and without a terminal that becomes this process's own.
_PLAIN = _READ | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFLNK: "a link",
}
# What stands for itself in a file's name, besides letters, digits and `_.-~`.
_IN_NAMES = "+@"


# -- reading -----------------------------------------------------------------------------------------------------------


def open_plain(path: str | os.PathLike[str], folder: int | None = None) -> int:
    """Open a plain file, no link, without waiting for anybody; `folder` is a handle from which the path starts."""
    # To open a device may do something already.
    _require_plain(os.stat(path, dir_fd=folder, follow_symlinks=False))
    handle = os.open(path, _PLAIN, dir_fd=folder)
    try:
        _require_plain(os.fstat(handle))
    except OSError:
        os.close(handle)
        raise
    return handle


def _require_plain(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, f"not a file but {_kind(status)}")


def _kind(status: os.stat_result) -> str:
    return _KINDS.get(stat.S_IFMT(status.st_mode), "something else than a file")


@contextmanager
def opened(path: str | os.PathLike[str], what: str, limit: int) -> Iterator[BufferedReader]:
    """Open a plain file that a user names, of at most `limit` bytes; links are followed. In messages it is `what`."""
    try:
        handle = open_plain(os.path.realpath(path))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({_why(error)}). Give {what}.") from None
    with os.fdopen(handle, "rb") as file:
        if os.fstat(handle).st_size > limit:
            raise InputError(f"{path}: larger than {limit} bytes. Give {what}.")
        yield file


def read_plain(path: str | os.PathLike[str], what: str, limit: int) -> bytes:
    """Read a plain file that a user names; see `opened`."""
    with opened(path, what, limit) as file:
        try:
            # Of the file's own size: room for the limit itself may not be there.
            return file.read(os.fstat(file.fileno()).st_size)
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({_why(error)}). Give {what}.") from None


def require_plain(path: str | os.PathLike[str], what: str) -> None:
    """Refuse what is no plain file before somebody else opens it; see `opened`."""
    with opened(path, what, 1 << 62):
        pass


def _why(error: OSError | ValueError) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


# -- writing -----------------------------------------------------------------------------------------------------------


class _OnlyTriedError(Exception):
    """A draft was made to see whether it can be."""


def require_writable(target: Path, inputs: Iterable[Path] = ()) -> None:
    """Refuse a file that cannot be written, ahead of long work; nothing is left. See `draft`."""
    with suppress(_OnlyTriedError), draft(target, inputs):
        raise _OnlyTriedError


@contextmanager
def draft(target: Path, inputs: Iterable[Path] = ()) -> Iterator[Path]:
    """Give a path beside a file to write to; it takes the file's place when the block ends without an error.

    Entered before long work, it also finds ahead that the file cannot be written. A plain file that was there is
    replaced and hands on its mode; a new one has that of the umask. Nothing else is written over, nor a file that the
    same command reads (`inputs`), nor anything in an artifact.
    """
    mode = _mode_of(target, inputs)
    # A name that nobody can foresee, with the same ending, from which matplotlib and NumPy take the format.
    scratch = target.with_name(f".{target.stem[:100]}-{secrets.token_hex(8)}{target.suffix}")
    try:
        with os.fdopen(os.open(scratch, _NEW, 0o666), "wb") as file:
            made = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        yield scratch
        scratch.chmod(made if mode is None else mode)
        with scratch.open("rb+") as file:
            os.fsync(file.fileno())
        scratch.replace(target)
    except AOTIError:
        raise
    except OSError as error:
        raise _unwritable(target, error) from error
    finally:
        with suppress(FileNotFoundError):
            scratch.unlink()


def _mode_of(target: Path, inputs: Iterable[Path]) -> int | None:
    """The mode of the file that is written over, if one is; what must not be written is refused."""
    require_outside_artifacts(target)
    try:
        present = os.lstat(target)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise _unwritable(target, error) from None
    if not stat.S_ISREG(present.st_mode):
        raise InputError(f"{target}: is {_kind(present)}, expected the name of a file to write. Give another name.")
    for other in inputs:
        with suppress(OSError):
            if os.path.samestat(present, os.stat(other)):
                raise InputError(f"{target}: is read by the same command ({other}). Give another file to write.")
    return stat.S_IMODE(present.st_mode) & 0o777


def require_outside_artifacts(target: Path) -> None:
    """Refuse to write a file or folder into the folder of an artifact, of any release that has a folder per device."""
    folder = Path(os.path.realpath(target.parent))
    for above in (folder, *folder.parents[:2]):
        for device in (above / "cpu", above / "cuda"):
            if device.is_dir() and ((above / "metadata.json").is_file() or any(device.glob("*_meta.json"))):
                raise InputError(
                    f"{target}: lies in the artifact {above}, which is never changed. Give another folder."
                )


def _unwritable(target: Path, error: OSError | ValueError) -> InputError:
    return InputError(
        f"{target}: cannot be written ({_why(error)}). Give a file in a folder that is there and can be written to."
    )


# -- names -------------------------------------------------------------------------------------------------------------


def file_name(variable: str) -> str:
    """The name of a file, without its ending, for a variable; none leads out of a folder, or begins with a dot."""
    found = quote(variable, _IN_NAMES, errors="surrogatepass")
    return f"%2E{found[1:]}" if found.startswith(".") else found
