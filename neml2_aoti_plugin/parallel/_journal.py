"""The journal of a long run: what it is a run of, and which rows are done; a run that was killed goes on from it."""

from __future__ import annotations

import json
import os
import stat
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import AOTIError, InputError
from ._sources import Chunk

if sys.platform != "win32":
    import fcntl

FORM = 3
# A link is not followed, and a pipe not waited for; not every system has all of them.
EXTRA = ("O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK", "O_BINARY")
FLAGS = os.O_RDWR | os.O_CREAT | sum(getattr(os, name, 0) for name in EXTRA)
# How often what is done is written to disk and to the journal, in seconds.
SYNC = 5.0
# Of a line, in bytes; what is longer is none of ours.
LONGEST = 1 << 20


class Journal:
    """A file of JSON lines: what the run is, and then the rows that are done.

    The first line is written when the sink is ready for rows, and each other one after `sync` has brought the results
    that it is about to disk. So what the journal says is there; one without a whole first line is that of no run yet.
    """

    def __init__(self, file: Path, run: Mapping[str, Any], sync: Callable[[], None], *, resume: bool) -> None:
        self.file, self._sync = file, sync
        self.header = json.dumps({"form": FORM, **run}, sort_keys=True).encode() + b"\n"
        # Digests of the rows of the source, by the first row and one behind the last.
        self.done: dict[tuple[int, int], str | None] = {}
        self.resumed = False
        # Lines for rows whose results may not be on disk yet; and when the last ones were written.
        self._waiting: list[bytes] = []
        self._flushed = time.monotonic()
        try:
            handle = os.open(file, FLAGS, 0o666)
        except OSError as error:
            raise InputError(f"sink {file}: cannot be written ({error.strerror}). Give another sink.") from error
        self._file = open(handle, "r+b", buffering=0)  # noqa: SIM115
        try:
            self._require_own()
            self._read(resume=resume)
        except BaseException:
            self.close()
            raise

    def begin(self) -> None:
        """Write what the run is: its sink is ready to take rows."""
        self._append(self.header)

    def has(self, chunk: Chunk) -> bool:
        """Whether rows are done."""
        return (chunk.start, chunk.stop) in self.done

    def require_same(self, chunk: Chunk, digest: str) -> None:
        """Refuse rows that are done, and are not those of the source now."""
        if self.done[chunk.start, chunk.stop] != digest:
            raise InputError(
                f"rows {chunk.start} to {chunk.stop - 1} of the source are not those of the run in {self.file}. Give "
                "the same source, or resume=False to start from the beginning."
            )

    def note(self, chunk: Chunk, digest: str) -> None:
        """Note rows that are done, with the digest of the rows of the source; it is written from time to time."""
        line = json.dumps({"start": chunk.start, "stop": chunk.stop, "digest": digest})
        self._waiting.append(line.encode() + b"\n")
        if time.monotonic() - self._flushed > SYNC:
            self.flush()

    def flush(self) -> None:
        """Have on disk, and then in the journal, what was noted."""
        if self._waiting:
            self._sync()
            lines, self._waiting = b"".join(self._waiting), []
            self._append(lines)
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Close the file, and with it let others have it."""
        self._file.close()

    def _require_own(self) -> None:
        """Refuse what is no file, or one that another process has."""
        if not stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
            raise InputError(f"sink {self.file}: is no plain file. Give another sink.")
        if sys.platform == "win32":
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"sink {self.file.parent}: another process is writing to it. Wait, or give another."
            ) from None
        except OSError:
            # Some network file systems have no locks.
            return

    def _read(self, *, resume: bool) -> None:
        """Find what is done, and cut off what is not; a file that is no journal is not ours to write over."""
        whole = 0
        with open(os.dup(self._file.fileno()), "rb") as lines:
            first = lines.readline(LONGEST)
            begun = first and (first.endswith(b"\n") or not self.header.startswith(first))
            if begun and "form" not in _document(first):
                raise InputError(f"{self.file} is no journal of map_rows. Give another sink.")
            if begun and resume:
                self._require_same_run(first)
                self.resumed, whole = True, lines.tell()
            # Up to the last line, cut off when the process was killed, or one that is damaged.
            while self.resumed and (line := lines.readline(LONGEST)).endswith(b"\n"):
                record = _document(line)
                if not all(type(record.get(name)) is int for name in ("start", "stop")):
                    break
                self.done[record["start"], record["stop"]] = record.get("digest")
                whole = lines.tell()
        self._file.truncate(whole)

    def _require_same_run(self, line: bytes) -> None:
        there, here = _document(line), json.loads(self.header)
        differing = [name for name in sorted({*here, *there}) if here.get(name) != there.get(name)]
        if line != self.header:
            raise InputError(
                f"{self.file} is the journal of another run: {', '.join(differing)} differ. Give another sink, or "
                "resume=False to start anew there."
            )

    def _append(self, text: bytes) -> None:
        rest = memoryview(text)
        try:
            self._file.seek(0, os.SEEK_END)
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
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
