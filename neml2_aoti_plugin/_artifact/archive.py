"""Open a `.pt2` package as the zip archive that it is, and tell whether it can be unpacked without harm."""

from __future__ import annotations

import codecs
import io
import lzma
import re
import stat
import struct
import zipfile
import zlib
from collections import Counter
from itertools import pairwise
from pathlib import Path, PurePosixPath

from ..errors import ArtifactError
from .files import AGAIN
from .telling import named, reason

# `zipfile` needs it, and Python 3.13 cannot import it once the working directory is gone.
codecs.lookup("cp437")

# The entries that a graph is made of stand in this folder of the archive, below a folder named like the package.
GRAPH = "data/aotinductor/model/"

# torch writes ten entries for a graph on a CPU, and one more per kernel on a GPU, none of them compressed. A library
# that somebody compressed afterwards has a fourth of its size; sources have less, and are small.
MAX_ENTRIES = 10_000
MAX_SOURCE = 1 << 28
MAX_RATIO = 20
SMALL = 1 << 20

# What `zipfile` and the decoders behind it raise on damaged bytes.
DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    OSError,
    EOFError,
    ValueError,
    IndexError,
    OverflowError,
    RuntimeError,
    NotImplementedError,
)

_LINK = stat.S_IFLNK
_DRIVE = re.compile(r"^[A-Za-z]:")


def open_archive(file: Path, data: bytes) -> zipfile.ZipFile:
    """Open a package as the zip archive that it is.

    Args:
        file: the package, for messages.
        data: its bytes.

    Returns:
        The open archive.

    Raises:
        ArtifactError: it is not a zip archive.
    """
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
    except DAMAGE as error:
        raise ArtifactError(f"{file}: not a readable package ({reason(error)}). {AGAIN}") from None
    archive.filename = str(file)
    return archive


def read_entry(archive: zipfile.ZipFile, info: zipfile.ZipInfo, data: bytes | None = None) -> bytes | memoryview:
    """Read an entry, with its checksum verified.

    Args:
        archive: the package.
        info: the entry.
        data: the bytes of the package, to look at a large entry without copying it.

    Returns:
        Its bytes.

    Raises:
        ArtifactError: it is damaged.
    """
    try:
        if data is None or info.compress_type != zipfile.ZIP_STORED:
            return archive.read(info)
        # Compares the name before the entry's bytes with that in the archive's directory.
        archive.open(info).close()
        name, extra = struct.unpack_from("<HH", data, info.header_offset + 26)
        start = info.header_offset + 30 + name + extra
        view = memoryview(data)[start : start + info.file_size]
        if len(view) != info.file_size or zlib.crc32(view) != info.CRC:
            raise zipfile.BadZipFile(f"its checksum is not {info.CRC:08x}")
        return view
    except DAMAGE as error:
        raise ArtifactError(
            f"{archive.filename}: entry {named(info.filename)} is damaged ({_damage(error)}). {AGAIN}"
        ) from None


def read_text(archive: zipfile.ZipFile, suffix: str) -> str | None:
    """The text of the graph's first entry whose name ends so; None where there is none."""
    for info in archive.infolist():
        if info.filename.endswith(suffix) and f"/{GRAPH}" in info.filename:
            if info.file_size > MAX_SOURCE:
                raise ArtifactError(
                    f"{archive.filename}: entry {named(info.filename)} claims {info.file_size} bytes of text. {AGAIN}"
                )
            try:
                return bytes(read_entry(archive, info)).decode()
            except UnicodeDecodeError as error:
                raise ArtifactError(
                    f"{archive.filename}: entry {named(info.filename)} is damaged ({reason(error)}). {AGAIN}"
                ) from None
    return None


def graph_entries(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """The entries that a graph is made of, without its source."""
    return [
        info
        for info in archive.infolist()
        if info.filename.partition("/")[2].startswith(GRAPH) and not info.filename.endswith((".cpp", "/"))
    ]


def faults(archive: zipfile.ZipFile) -> list[str]:
    """List what speaks against unpacking an archive, each with its cure.

    Args:
        archive: the package.

    Returns:
        A sentence or two per fault; none for an archive as torch writes it.
    """
    entries = archive.infolist()
    if len(entries) > MAX_ENTRIES:
        return [f"holds {len(entries)} entries, expected at most {MAX_ENTRIES}. Do not use this file."]
    found = []
    for info in entries:
        fault = _fault(info)
        if fault:
            found.append(f"archive entry {named(info.filename)} {fault}. Do not use this file.")
    folded = Counter(info.filename.casefold() for info in entries)
    twice = [info.filename for info in entries if folded[info.filename.casefold()] > 1]
    if twice:
        found.append(f"archive entry {named(twice[0])} is there twice. Do not use this file.")
    total = sum(i.compress_size for i in entries), sum(i.file_size for i in entries)
    for packed, unpacked in (total, *((i.compress_size, i.file_size) for i in entries)):
        if unpacked > max(SMALL, MAX_RATIO * packed):
            found.append(f"unpacks from {packed} to {unpacked} bytes. Do not use this file.")
            break
    # Two entries over the same bytes are how a small archive unpacks to a large one without a large ratio anywhere.
    spans = sorted((i.header_offset, i.header_offset + i.compress_size) for i in entries)
    if any(end > start for (_, end), (start, _) in pairwise(spans)):
        found.append("has entries that lie over each other. Do not use this file.")
    return found


def _damage(error: BaseException) -> str:
    """What is wrong with an entry; `zipfile` quotes the bytes that it found in the place of a name."""
    return "its checksum is another" if "CRC" in str(error) or "checksum" in str(error) else reason(error)


def _fault(info: zipfile.ZipInfo) -> str:
    """What is wrong with an entry; empty for nothing."""
    # `zipfile` cuts a name at a null byte, torch's reader need not.
    name, written = info.filename, info.orig_filename
    if not name or "\0" in written:
        return "has no proper name"
    if name.startswith(("/", "\\")) or _DRIVE.match(name) or "\\" in name or ".." in PurePosixPath(name).parts:
        return "leads out of the folder it is unpacked to"
    kind = info.external_attr >> 16 & 0o170000
    if kind == _LINK:
        return "is a symbolic link"
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is neither a file nor a folder"
    if info.flag_bits & 0x1:
        return "is encrypted"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"is compressed by method {info.compress_type}"
    if info.compress_type == zipfile.ZIP_STORED and info.compress_size != info.file_size:
        return "claims two sizes"
    return ""
