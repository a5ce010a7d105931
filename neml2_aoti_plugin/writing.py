"""Write a file whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import AOTIError, InputError

MODE = 0o644


def require_writable(target: Path) -> None:
    """Refuse a file that cannot be written, ahead of long work; nothing is left.

    Args:
        target: the file.

    Raises:
        InputError: it cannot be written.
    """
    _begun(target).unlink()


@contextmanager
def draft(target: Path) -> Iterator[Path]:
    """Give a path beside a file to write to; it takes the file's place when the block ends without an error.

    Entered before long work, it also tells ahead that the file cannot be written.

    Args:
        target: the file; one that was there is replaced.

    Raises:
        InputError: the file cannot be written.
    """
    scratch = _begun(target)
    try:
        yield scratch
        scratch.chmod(MODE)
        scratch.replace(target)
    except AOTIError:
        raise
    except OSError as error:
        raise _unwritable(target, error) from error
    finally:
        with suppress(FileNotFoundError):
            scratch.unlink()


def _begun(target: Path) -> Path:
    """An empty file beside the one that is to be written."""
    if target.is_dir():
        raise InputError(f"{target}: is a folder, expected the name of a file to write.")
    try:
        # With the same ending, by which matplotlib and numpy tell the format.
        handle, name = tempfile.mkstemp(prefix=f".{target.stem}-", suffix=target.suffix, dir=target.parent)
    except OSError as error:
        raise _unwritable(target, error) from None
    os.close(handle)
    return Path(name)


def _unwritable(target: Path, error: OSError) -> InputError:
    why = error.strerror or type(error).__name__
    return InputError(
        f"{target}: cannot be written ({why}). Give a file in a folder that is there and can be written to."
    )
