"""A `.pt2` package read without running it: is the archive sound, what was it built for, what does its graph take?

The generated wrapper source inside the package spells out dtype, rank and fixed extents of each argument. Nothing else
records them: the loader checks nothing, and the metadata file does not have the traced batch axes.
"""

from __future__ import annotations

import codecs
import io
import json
import lzma
import re
import stat
import struct
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path, PurePosixPath

import torch

from ..errors import ArtifactError, ArtifactNotFoundError
from . import files
from .files import AGAIN, Contents, Folder, named, reason

# `zipfile` needs it, and Python 3.13 cannot import it once the working directory is gone.
codecs.lookup("cp437")

# The entries that a graph is made of stand in this folder of the archive, below a folder named like the package.
GRAPH = "data/aotinductor/model/"
LIBRARIES = (".so", ".pyd", ".dylib")

# torch writes ten entries for a graph on a CPU, and one more per kernel on a GPU, none of them compressed. A library
# that somebody compressed afterwards has a fourth of its size; sources have less, and are small.
MAX_ENTRIES = 10_000
MAX_SOURCE = 1 << 28
MAX_RATIO = 20
SMALL = 1 << 20

# What `zipfile` and the decoders behind it raise on damaged bytes.
_OWN = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error)
DAMAGE = (*_OWN, OSError, EOFError, ValueError, IndexError, OverflowError, RuntimeError)

_DRIVE = re.compile(r"^[A-Za-z]:")

# What the generated wrapper says of argument and axis.
_CHECK = r'"input_handles\[(\d+)\]: '
_DTYPE = re.compile(_CHECK + r'unmatched dtype, "\s*<< "expected: " << \w+ << "\(at::k(\w+)\)')
_FIXED = re.compile(_CHECK + r'unmatched dim value at (\d+), "\s*<< "expected: (\d+), ')
_DYNAMIC = re.compile(_CHECK + r"dim value is too (?:small|large) at (\d+)")
_STRIDE = re.compile(_CHECK + r"unmatched stride value at (\d+)")
_ARITY = re.compile(r"AOTInductorModelBase\(\s*(\d{1,5}),\s*(\d{1,5}),")
_CALL = re.compile(r'in_spec_ = R"\((.*?)\)";', re.DOTALL)
_DTYPES = {name.title(): getattr(torch, name) for name in ("double", "float", "half", "long", "int", "short", "bool")}
_DTYPES |= {"BFloat16": torch.bfloat16, "Char": torch.int8, "Byte": torch.uint8}


@dataclass(frozen=True)
class Argument:
    """One input of a graph."""

    dtype: torch.dtype
    extents: tuple[int | None, ...]  # size of each axis; None for one that is free
    kind: str = ""  # name of the class in which the exporter handed it over; empty for a plain tensor


@dataclass(frozen=True)
class GraphSignature:
    """What a graph takes, and how many tensors it returns."""

    arguments: tuple[Argument, ...]
    outputs: int


@dataclass(frozen=True)
class Build:
    """What a package was built for, as inductor recorded it by these names; empty where it did not."""

    device_key: str = ""
    platform: str = ""
    machine: str = ""
    cpu_isa: str = ""
    compute_capability: str = ""


@dataclass(frozen=True)
class Package:
    """A package that was looked over, and may run."""

    file: Path  # where it was then
    folder: Folder
    digest: str  # SHA-256 of the bytes that were looked over; what has another one is another package
    signature: GraphSignature | None  # None where the package does not spell it out

    def read(self) -> bytes:
        """Read the bytes that were looked over once more; an ArtifactError if the file has others, or is gone."""
        data, digest = read_package(self.file, self.folder)
        if digest != self.digest:
            raise ArtifactError(
                f"{self.file}: has changed since the model was loaded, so that it may not go with the rest any more. "
                "Load the model again."
            )
        return data


def read_package(file: Path, folder: Folder) -> Contents:
    """The bytes of a package of an artifact, with their digest."""
    try:
        return folder.read(file, files.PACKAGE)
    except FileNotFoundError:
        raise ArtifactNotFoundError(
            f"{file}: no such file, although the metadata names it; a leaf of an earlier compile may have been left "
            "without it. Copy the whole artifact folder, or compile the model again."
        ) from None


# -- the archive -------------------------------------------------------------------------------------------------------


def open_archive(file: Path, data: bytes) -> zipfile.ZipFile:
    """Open the bytes of a package as the zip archive that they are; the file's name is for messages."""
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
    except DAMAGE as error:
        raise ArtifactError(f"{file}: not a readable package ({reason(error)}). {AGAIN}") from None
    archive.filename = str(file)
    return archive


def read_entry(archive: zipfile.ZipFile, info: zipfile.ZipInfo, data: bytes | None = None) -> bytes | memoryview:
    """Read an entry, with its checksum verified; `data`, the archive's bytes, spare a copy of a large entry."""
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
        # `zipfile` quotes the bytes that it found in the place of a name.
        checksum = "CRC" in str(error) or "checksum" in str(error)
        why = "its checksum is another" if checksum else reason(error)
        raise ArtifactError(f"{archive.filename}: entry {named(info.filename)} is damaged ({why}). {AGAIN}") from None


def read_text(archive: zipfile.ZipFile, suffix: str) -> str | None:
    """The text of the graph's first entry whose name ends so; None where there is none."""
    for info in archive.infolist():
        if not info.filename.endswith(suffix) or f"/{GRAPH}" not in info.filename:
            continue
        entry = f"{archive.filename}: entry {named(info.filename)}"
        if info.file_size > MAX_SOURCE:
            raise ArtifactError(f"{entry} claims {info.file_size} bytes of text. {AGAIN}")
        try:
            return bytes(read_entry(archive, info)).decode()
        except UnicodeDecodeError as error:
            raise ArtifactError(f"{entry} is damaged ({reason(error)}). {AGAIN}") from None
    return None


def graph_entries(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """The entries that a graph is made of, without its source."""
    return [
        info
        for info in archive.infolist()
        if info.filename.partition("/")[2].startswith(GRAPH) and not info.filename.endswith((".cpp", "/"))
    ]


def libraries_in(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """The compiled libraries of a graph; a sound package has one."""
    return [info for info in graph_entries(archive) if info.filename.endswith(LIBRARIES)]


def archive_faults(archive: zipfile.ZipFile) -> list[str]:
    """What speaks against unpacking an archive, each with its cure; nothing for an archive as torch writes it."""
    entries = archive.infolist()
    cure = "Do not use this file."
    if len(entries) > MAX_ENTRIES:
        return [f"holds {len(entries)} entries, expected at most {MAX_ENTRIES}. {cure}"]
    faults = ((info.filename, _entry_fault(info)) for info in entries)
    found = [f"archive entry {named(name)} {fault}. {cure}" for name, fault in faults if fault]
    folded = Counter(info.filename.casefold() for info in entries)
    twice = [info.filename for info in entries if folded[info.filename.casefold()] > 1]
    if twice:
        found.append(f"archive entry {named(twice[0])} is there twice. {cure}")
    total = sum(i.compress_size for i in entries), sum(i.file_size for i in entries)
    for packed, unpacked in (total, *((i.compress_size, i.file_size) for i in entries)):
        if unpacked > max(SMALL, MAX_RATIO * packed):
            found.append(f"unpacks from {packed} to {unpacked} bytes. {cure}")
            break
    # Two entries over the same bytes are how a small archive unpacks to a large one without a large ratio anywhere.
    spans = sorted((i.header_offset, i.header_offset + i.compress_size) for i in entries)
    if any(end > start for (_, end), (start, _) in pairwise(spans)):
        found.append(f"has entries that lie over each other. {cure}")
    return found


def _entry_fault(info: zipfile.ZipInfo) -> str:
    """What is wrong with an entry; empty for nothing."""
    # `zipfile` cuts a name at a null byte, torch's reader need not.
    name, written = info.filename, info.orig_filename
    if not name or "\0" in written:
        return "has no proper name"
    if name.startswith(("/", "\\")) or _DRIVE.match(name) or "\\" in name or ".." in PurePosixPath(name).parts:
        return "leads out of the folder it is unpacked to"
    kind = info.external_attr >> 16 & 0o170000
    if kind == stat.S_IFLNK:
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


# -- what it says of itself --------------------------------------------------------------------------------------------


def signature_in(archive: zipfile.ZipFile) -> GraphSignature | None:
    """A graph's signature from the generated wrapper's source; None where the package does not spell it out."""
    source = read_text(archive, "wrapper.cpp") or ""
    arity = _ARITY.search(source)
    if arity is None:
        return None
    count, outputs = int(arity[1]), int(arity[2])
    dtypes = {int(i): _DTYPES.get(kind) for i, kind in _DTYPE.findall(source)}
    extents: dict[int, dict[int, int | None]] = {i: {} for i in range(count)}
    # A free axis shows in its stride's check or in the check of its range, a fixed one in a check of its own.
    for i, axis in _STRIDE.findall(source) + _DYNAMIC.findall(source):
        extents.setdefault(int(i), {}).setdefault(int(axis), None)
    for i, axis, size in _FIXED.findall(source):
        extents.setdefault(int(i), {})[int(axis)] = int(size)
    arguments = []
    for i, kind in enumerate(parse_kinds(source, count)):
        dtype, axes = dtypes.get(i), extents[i]
        if dtype is None or sorted(axes) != list(range(len(axes))):
            return None
        arguments.append(Argument(dtype, tuple(axes[k] for k in range(len(axes))), kind))
    return GraphSignature(tuple(arguments), outputs)


def parse_kinds(source: str, count: int) -> list[str]:
    """In what class each of `count` arguments was handed over, by the wrapper's call spec; empty for a plain tensor."""
    found = _CALL.search(source)
    try:
        _, call = json.loads(found[1]) if found is not None else (0, {})
        handed = call["children_spec"][0]["children_spec"]
        kinds = [str(argument["type"] or "") for argument in handed]
        single = all(len(argument["children_spec"]) <= 1 for argument in handed)
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        return [""] * count
    return kinds if single and len(kinds) == count else [""] * count


def build_in(archive: zipfile.ZipFile) -> Build:
    """What an open package was built for."""
    found = read_text(archive, "wrapper_metadata.json") or read_text(archive, "_metadata.json")
    try:
        facts = json.loads(found) if found is not None else {}
        texts = {field.name: facts.get(f"AOTI_{field.name.upper()}") for field in fields(Build)}
    except (ValueError, AttributeError, RecursionError) as error:
        raise ArtifactError(
            f"{archive.filename}: its build record is damaged ({reason(error)}). Compile the model again."
        ) from None
    return Build(**{name: text for name, text in texts.items() if isinstance(text, str)})


def operators_in(archive: zipfile.ZipFile) -> tuple[str, ...]:
    """The operators that a graph calls by name, such as `neml2::opaque_pow`: without overloads, each once."""
    found = read_text(archive, "wrapper.json")
    if found is None:
        return ()
    try:
        targets = [str(entry["node"]["target"]).partition(".")[0] for entry in json.loads(found)["nodes"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(
            f"{archive.filename}: its list of operators is damaged ({reason(error)}). Compile the model again."
        ) from None
    return tuple(dict.fromkeys(targets))
