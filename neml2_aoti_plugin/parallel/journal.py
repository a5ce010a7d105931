"""The journal of a long run: what it is a run of, and which rows are done; a run that was killed goes on from it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError

if sys.platform != "win32":
    import fcntl

FORM = 1
READY = json.dumps({"ready": True}) + "\n"


class Journal:
    """A file of JSON lines: what the run is, that its sink is ready, and then the rows that are done.

    A line for rows is written after their results are on disk, so what it tells is there.

    Args:
        file: of the journal.
        run: what the run is.
        resume: whether to go on from a journal that is there.

    Raises:
        InputError: the journal is that of another run, is in use by another process, or cannot be written.
    """

    def __init__(self, file: Path, run: Mapping[str, Any], *, resume: bool) -> None:
        self.file = file
        self.header = json.dumps({"form": FORM, **run}, sort_keys=True) + "\n"
        self.done: dict[tuple[int, int], dict[str, Any]] = {}
        self.resumed = False
        self._waiting: list[str] = []
        try:
            self._handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise InputError(f"sink {file}: cannot be written ({error.strerror}). Give another sink.") from error
        try:
            self._lock()
            lines = self._lines()
            if resume and lines:
                self._read(lines)
            if not self.resumed:
                os.ftruncate(self._handle, 0)
                self._append(self.header)
        except BaseException:
            self.close()
            raise

    def begin(self) -> None:
        """Note that the sink is ready to take rows."""
        self._append(READY)

    def note(self, start: int, stop: int, **more: Any) -> None:
        """Note rows that are done; they are written by the next `flush`."""
        self.done[start, stop] = more
        self._waiting.append(json.dumps({"start": start, "stop": stop, **more}, sort_keys=True) + "\n")

    @property
    def is_behind(self) -> bool:
        """Whether rows are noted that are not written yet."""
        return bool(self._waiting)

    def flush(self) -> None:
        """Write what was noted."""
        lines, self._waiting = "".join(self._waiting), []
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

    def _lines(self) -> list[str]:
        """The lines that are there; none where a process was killed before the first one was whole.

        Raises:
            InputError: the file is no journal, and so is not ours to write over.
        """
        with open(self.file, encoding="utf-8", errors="replace") as file:
            lines = file.read().splitlines(keepends=True)
        if not lines or (self.header.startswith(lines[0]) and not lines[0].endswith("\n")):
            return []
        if _header(lines[0]) is None:
            raise InputError(f"{self.file} is no journal of map_rows. Give another sink.")
        return lines

    def _read(self, lines: list[str]) -> None:
        self._require_same(lines[0])
        if lines[1:2] != [READY]:
            return
        whole = len(lines[0].encode()) + len(READY)
        for line in lines[2:]:
            record = _record(line)
            if record is None:
                # The last line, cut off when the process was killed.
                break
            start, stop = record.pop("start"), record.pop("stop")
            self.done[start, stop] = record
            whole += len(line.encode())
        os.ftruncate(self._handle, whole)
        self.resumed = True

    def _require_same(self, line: str) -> None:
        if line == self.header:
            return
        there, here = _header(line) or {}, json.loads(self.header)
        differing = [name for name in sorted({*here, *there}) if here.get(name) != there.get(name)]
        raise InputError(
            f"{self.file} is the journal of another run: {', '.join(differing)} differ. Give another sink, or "
            "resume=False to start anew there."
        )

    def _append(self, text: str) -> None:
        rest = memoryview(text.encode())
        try:
            os.lseek(self._handle, 0, os.SEEK_END)
            while rest:
                rest = rest[os.write(self._handle, rest) :]
            os.fsync(self._handle)
        except OSError as error:
            raise InputError(
                f"sink {self.file}: cannot be written ({error.strerror}). Make room, and call again."
            ) from error


def _header(line: str) -> dict[str, Any] | None:
    """What a run is, out of the first line of its journal; None where it is none."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and "form" in found else None


def _record(line: str) -> dict[str, Any] | None:
    """A line that tells rows that are done; None where it is none."""
    if not line.endswith("\n"):
        return None
    try:
        found = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(found, dict) and all(isinstance(found.get(name), int) for name in ("start", "stop"))
    return found if whole else None
