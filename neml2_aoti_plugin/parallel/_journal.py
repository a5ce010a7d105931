"""The journal of a long run: what it is a run of, and which rows are done; a run that was killed goes on from it."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import AOTIError, InputError

if sys.platform != "win32":
    import fcntl

FORM = 3
# A link is not followed, and a pipe not waited for; not every system has all of them.
EXTRA = ("O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK", "O_BINARY")
FLAGS = os.O_RDWR | os.O_CREAT | sum(getattr(os, name, 0) for name in EXTRA)
# Of a line, in bytes; what is longer is none of ours.
LONGEST = 1 << 20


class Journal:
    """A file of JSON lines: what the run is, and then the rows that are done.

    The first line is written when the sink is ready for rows, and each other one after the results that it is about are
    on disk. So what the journal says is there; a journal without a whole first line is that of no run yet.
    """

    def __init__(self, file: Path, run: Mapping[str, Any], *, resume: bool) -> None:
        self.file = file
        self.header = json.dumps({"form": FORM, **run}, sort_keys=True).encode() + b"\n"
        # Digests of the rows of the source, by the first row and one behind the last.
        self.done: dict[tuple[int, int], str | None] = {}
        self.resumed = False
        # Lines for rows whose results may not be on disk yet.
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
        except BaseException:
            self.close()
            raise

    def begin(self) -> None:
        """Write what the run is: its sink is ready to take rows."""
        self._append(self.header)

    def note(self, start: int, stop: int, digest: str) -> None:
        """Note rows that are done, with the digest of the rows of the source; the next `flush` writes it."""
        self.waiting.append(json.dumps({"start": start, "stop": stop, "digest": digest}).encode() + b"\n")

    def flush(self) -> None:
        """Write what was noted; the results must be on disk."""
        lines, self.waiting = b"".join(self.waiting), []
        self._append(lines)

    def require_same_rows(self, start: int, stop: int, digest: str) -> None:
        """Refuse rows of a source that are not those that were evaluated."""
        if self.done[start, stop] != digest:
            raise InputError(
                f"rows {start} to {stop - 1} of the source are not those of the run in {self.file}. Give the same "
                "source, or resume=False to start from the beginning."
            )

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
        """Find what is done; a file that is no journal is not ours to write over."""
        first = lines.readline(LONGEST)
        if not first or (self.header.startswith(first) and not first.endswith(b"\n")):
            return
        if "form" not in _document(first):
            raise InputError(f"{self.file} is no journal of map_rows. Give another sink.")
        if not resume:
            return
        self._require_same(first)
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


def require_seen(file: Path, header: bytes) -> None:
    """Refuse a process that does not see the journal of this run, and so not its sink."""
    try:
        with file.open("rb") as lines:
            seen = lines.readline(len(header)) == header
    except OSError:
        seen = False
    if not seen:
        raise AOTIError(
            f"a worker does not see the sink of this run: {file} is not there, or another one. The sink must lie on "
            "a file system that all workers share, under the same path."
        )


def _document(line: bytes) -> dict[str, Any]:
    """The JSON object of a line; empty where there is none, however it is damaged."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
