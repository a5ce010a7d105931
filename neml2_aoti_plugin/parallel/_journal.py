"""The journal of a long run: what it is a run of, and which rows are done; a run that was killed goes on from it."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import InputError

if sys.platform != "win32":
    import fcntl

FORM = 2
READY = json.dumps({"ready": True}).encode() + b"\n"
# A link is not followed, and a pipe not waited for; not every system has all of them.
EXTRA = ("O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK", "O_BINARY")
FLAGS = os.O_RDWR | os.O_CREAT | sum(getattr(os, name, 0) for name in EXTRA)
# Of a line; what is longer is none of ours.
LONGEST = 1 << 20


class Journal:
    """A file of JSON lines: what the run is, that its sink is ready, and then the rows that are done.

    A line for rows is written after their results are on disk, so what it tells is there. Lines that are `waiting` are
    written by the next `flush`.

    Args:
        file: of the journal.
        run: what the run is.
        resume: whether to go on from a journal that is there.

    Raises:
        InputError: the journal is that of another run, is in use by another process, or cannot be written.
    """

    def __init__(self, file: Path, run: Mapping[str, Any], *, resume: bool) -> None:
        self.file = file
        self.header = json.dumps({"form": FORM, **run}, sort_keys=True).encode() + b"\n"
        self.done: dict[tuple[int, int], str | None] = {}
        self.resumed = False
        self.waiting: list[bytes] = []
        try:
            self._handle = os.open(file, FLAGS, 0o666)
        except OSError as error:
            raise InputError(f"sink {file}: cannot be written ({error.strerror}). Give another sink.") from error
        try:
            if not stat.S_ISREG(os.fstat(self._handle).st_mode):
                raise InputError(f"sink {file}: is no plain file. Give another sink.")
            self._lock()
            with open(os.dup(self._handle), "rb") as lines:
                self._read(lines, resume=resume)
            if not self.resumed:
                os.ftruncate(self._handle, 0)
                self._append(self.header)
        except BaseException:
            self.close()
            raise

    def begin(self) -> None:
        """Note that the sink is ready to take rows."""
        self._append(READY)

    def note(self, start: int, stop: int, digest: str) -> None:
        """Note rows that are done, and a digest of what they are."""
        self.done[start, stop] = digest
        self.waiting.append(json.dumps({"start": start, "stop": stop, "digest": digest}).encode() + b"\n")

    def require_same_rows(self, start: int, stop: int, digest: str) -> None:
        """Refuse rows of a source that are not those that were evaluated.

        Raises:
            InputError: they are others.
        """
        if self.done[start, stop] != digest:
            raise InputError(
                f"rows {start} to {stop - 1} of the source are not those of the run in {self.file}. Give the same "
                "source, or resume=False to start anew."
            )

    def flush(self) -> None:
        """Write what was noted."""
        lines, self.waiting = b"".join(self.waiting), []
        self._append(lines)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def _lock(self) -> None:
        if sys.platform == "win32":
            return
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"sink {self.file.parent}: another process is writing to it. Wait, or give another."
            ) from None
        except OSError:
            # Some network file systems have no locks.
            return

    def _read(self, lines: BinaryIO, *, resume: bool) -> None:
        """Find what is done; nothing where a process was killed before the sink was ready.

        Raises:
            InputError: the file is no journal, and so is not ours to write over; or that of another run.
        """
        first = lines.readline(LONGEST)
        if not first or (self.header.startswith(first) and not first.endswith(b"\n")):
            return
        if "form" not in _document(first):
            raise InputError(f"{self.file} is no journal of map_rows. Give another sink.")
        if not resume:
            return
        self._require_same(first)
        if lines.readline(LONGEST) != READY:
            return
        whole = lines.tell()
        # Up to the last line, cut off when the process was killed, or one that is damaged.
        while (line := lines.readline(LONGEST)).endswith(b"\n"):
            record = _document(line)
            if not all(type(record.get(name)) is int for name in ("start", "stop")):
                break
            self.done[record["start"], record["stop"]] = record.get("digest")
            whole = lines.tell()
        os.ftruncate(self._handle, whole)
        self.resumed = True

    def _require_same(self, line: bytes) -> None:
        if line == self.header:
            return
        there, here = _document(line), json.loads(self.header)
        differing = [name for name in sorted({*here, *there}) if here.get(name) != there.get(name)]
        raise InputError(
            f"{self.file} is the journal of another run: {', '.join(differing)} differ. Give another sink, or "
            "resume=False to start anew there."
        )

    def _append(self, text: bytes) -> None:
        rest = memoryview(text)
        try:
            os.lseek(self._handle, 0, os.SEEK_END)
            while rest:
                rest = rest[os.write(self._handle, rest) :]
            os.fsync(self._handle)
        except OSError as error:
            raise InputError(
                f"sink {self.file}: cannot be written ({error.strerror}). Make room, and call again."
            ) from error


def _document(line: bytes) -> dict[str, Any]:
    """The JSON object of a line; empty where there is none, however it is damaged."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
