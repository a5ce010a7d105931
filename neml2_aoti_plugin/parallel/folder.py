"""The private folder through which rows pass between processes: in memory where there is room."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from contextlib import suppress
from itertools import count
from pathlib import Path

from ..errors import AOTIError
from ..graphs import scratch

# In memory on Linux; containers often have little of it.
SHARED = "/dev/shm"
# What the chunks on their way to and from a worker may take.
BYTES_PER_WORKER = 64 << 20
# Files that have served are kept, so many for each worker and up to this size: to find and clear the memory of a new
# one takes longer than to copy the rows. Two chunks are on their way for each worker, with a file out and one back.
SPARE_PER_WORKER, SPARE_BYTES = 4, 8 << 20


class RowsFolder:
    """A new folder of this user alone; it is swept up by a later process where this one cannot remove it.

    Args:
        workers: number of processes that the rows are for.

    Raises:
        AOTIError: no folder can be made.
    """

    def __init__(self, workers: int) -> None:
        temporary = _place(workers)
        try:
            self._scratch, self._lock = scratch.make(temporary, scratch.ROWS)
        except OSError as error:
            raise AOTIError(
                f"cannot make a folder in {temporary} for rows on their way between processes: {error}. Make room "
                "there, or set TMPDIR to a folder that can be written to."
            ) from error
        self.path = Path(self._scratch.path)
        self._owner = os.getpid()
        self._numbers = count()
        self._spare: list[Path] = []
        self._most = SPARE_PER_WORKER * workers

    def take(self) -> Path:
        """A file for some rows: one that has served and may be written over, or the name of a new one."""
        try:
            return self._spare.pop()
        except IndexError:
            return self.path / f"rows-{next(self._numbers)}"

    def give_back(self, file: Path) -> None:
        """Keep a file that has served, or remove it where there are enough or it is large."""
        with suppress(OSError):
            if len(self._spare) < self._most and file.stat().st_size <= SPARE_BYTES:
                self._spare.append(file)
                return
        with suppress(OSError):
            file.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the folder with all that is in it; a second call does nothing."""
        if os.getpid() != self._owner:
            return
        shutil.rmtree(self.path, ignore_errors=True)
        remove_parent(self.path)
        if self._lock is not None:
            with suppress(OSError):
                os.close(self._lock)
            self._lock = None


def remove_parent(folder: Path) -> None:
    """Remove the folder that such folders lie in, once the last of them is gone; whoever needs it makes it again."""
    if folder.parent.name.startswith(scratch.PARENT):
        with suppress(OSError):
            folder.parent.rmdir()


def no_room(folder: Path, error: OSError) -> AOTIError:
    """What is wrong where rows cannot be written to a folder, or read from it."""
    if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
        return AOTIError(
            f"there is no room in {folder.parent.parent} for rows on their way between processes ({error.strerror}). "
            "Make room there, use smaller chunks (chunk=) or fewer workers."
        )
    return AOTIError(f"rows cannot pass between processes through {folder}: {error}.")


def _place(workers: int) -> str:
    with suppress(OSError):
        if shutil.disk_usage(SHARED).free > workers * BYTES_PER_WORKER and os.access(SHARED, os.W_OK):
            return SHARED
    return tempfile.gettempdir()
