"""Hostile `.pt2` archives, each made from a real package."""

from __future__ import annotations

import io
import json
import random
import stat
import struct
import warnings
import zipfile
from collections.abc import Callable

Entries = list[tuple[zipfile.ZipInfo, bytes]]
Make = Callable[[bytes], bytes]


def entries_of(data: bytes) -> Entries:
    """The entries of an archive with their bytes."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [(info, archive.read(info)) for info in archive.infolist()]


def archive_of(entries: Entries) -> bytes:
    """An archive of entries, with names and attributes as they are."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive, warnings.catch_warnings():
        # An entry that is there twice is one of the attacks.
        warnings.filterwarnings("ignore", "Duplicate name", UserWarning)
        for info, data in entries:
            archive.writestr(_renamed(info, info.filename), data)
    return out.getvalue()


def _renamed(info: zipfile.ZipInfo, name: str) -> zipfile.ZipInfo:
    fresh = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
    fresh.external_attr, fresh.compress_type, fresh.create_system = info.external_attr, info.compress_type, 3
    return fresh


def graph_folder(entries: Entries) -> str:
    """The folder of the archive in which the graph is, with a slash behind."""
    library = next(info.filename for info, _ in entries if info.filename.endswith(".so"))
    return library.rpartition("/")[0] + "/"


def changed(change: Callable[[Entries, str], Entries | None]) -> Make:
    """An attack that changes the list of entries; it gets the graph's folder as well."""

    def attack(data: bytes) -> bytes:
        entries = entries_of(data)
        found = change(entries, graph_folder(entries))
        return archive_of(entries if found is None else found)

    return attack


def extra(name: str, data: bytes = b"x", attributes: int = 0, compress: int = zipfile.ZIP_STORED) -> Make:
    """An attack that adds an entry; `{graph}` in its name stands for the graph's folder."""

    def change(entries: Entries, graph: str) -> None:
        info = zipfile.ZipInfo(name.replace("{graph}", graph))
        info.external_attr, info.compress_type = attributes, compress
        entries.append((info, data))

    return changed(change)


def edited(suffix: str, change: Make) -> Make:
    """An attack that changes the bytes of the entry whose name ends so, with a right checksum."""
    return changed(lambda entries, _: [(i, change(d) if i.filename.endswith(suffix) else d) for i, d in entries])


def of_stem(stem: str) -> Make:
    """Another graph's package, as if it were that of `stem`."""
    return changed(lambda e, _: [(_renamed(i, f"{stem}/" + i.filename.partition("/")[2]), d) for i, d in e])


def without(suffix: str) -> Make:
    """An attack that removes the entries whose names end so."""
    return changed(lambda entries, _: [(i, d) for i, d in entries if not i.filename.endswith(suffix)])


def recorded(**facts: str) -> Make:
    """An attack that changes what the package says it was built for."""
    return edited("_metadata.json", lambda d: json.dumps({**json.loads(d), **facts}).encode())


def calling(target: str) -> Make:
    """An attack that has the graph's list of operators name another one."""
    return extra("{graph}evil.wrapper.json", json.dumps({"nodes": [{"node": {"target": target}}]}).encode())


def twice(entries: Entries, name: Callable[[str], str] = str) -> Entries:
    """Add another library of a name that is the same in some way: which one is checked, and which one runs?"""
    info, data = next((i, d) for i, d in entries if i.filename.endswith(".so"))
    return [*entries, (zipfile.ZipInfo(name(info.filename)), data[:-1] + b"\1")]


def overlapping(data: bytes) -> bytes:
    """Have two entries of the directory lie over the same bytes."""
    end = data.rfind(b"PK\5\6")
    first = struct.unpack_from("<I", data, end + 16)[0]
    second = data.index(b"PK\1\2", first + 4)
    out = bytearray(data)
    out[second + 42 : second + 46] = data[first + 42 : first + 46]
    return bytes(out)


def claimed_size(data: bytes) -> bytes:
    """Have the directory claim that the library has 3 GB."""
    name = next(i.filename for i, _ in entries_of(data) if i.filename.endswith(".so")).encode()
    at = data.rfind(name) - 46
    return data[: at + 24] + struct.pack("<I", 3 << 30) + data[at + 28 :]


def encrypted(data: bytes) -> bytes:
    """Flag every entry as encrypted."""
    out, at = bytearray(data), data.find(b"PK\1\2")
    while at >= 0:
        out[at + 8] |= 1
        at = data.find(b"PK\1\2", at + 4)
    return bytes(out)


LINK = (stat.S_IFLNK | 0o777) << 16
OUT = "leads out of the folder"

# Ways to make a package hostile or broken, and what the refusal must say.
ATTACKS: dict[str, tuple[Make, list[str]]] = {
    "parent": (extra("{graph}../../../../../escape.so"), [OUT, "escape.so"]),
    "parent at the end": (extra("{graph}.."), [OUT]),
    "absolute": (extra("/tmp/escape.so"), [OUT, "/tmp/escape.so"]),
    "drive": (extra("C:/escape.so"), [OUT]),
    "backslash": (extra("{graph}..\\..\\escape.so"), [OUT]),
    "symbolic link": (extra("{graph}link", b"/etc/passwd", LINK), ["symbolic link"]),
    "device": (extra("{graph}device", b"", (stat.S_IFCHR | 0o666) << 16), ["neither a file nor a folder"]),
    "twice": (changed(lambda e, g: twice(e)), ["is there twice"]),
    "twice but for case": (changed(lambda e, g: twice(e, str.upper)), ["is there twice"]),
    "overlapping": (overlapping, ["lie over each other"]),
    "bomb": (extra("{graph}a", bytes(1 << 27), compress=zipfile.ZIP_DEFLATED), ["unpacks from"]),
    "claims a size": (claimed_size, ["claims two sizes"]),
    "encrypted": (encrypted, ["encrypted"]),
    "another method": (extra("{graph}a", b"x" * 99, compress=zipfile.ZIP_LZMA), ["compressed by method 14"]),
    "many entries": (
        changed(lambda e, g: e + [(zipfile.ZipInfo(f"{g}{i}"), b"") for i in range(10_001)]),
        ["entries", "10000"],
    ),
    "no library": (without(".so"), ["0 compiled libraries", "neml2-compile"]),
    "two libraries": (extra("{graph}other.so", b"\x7fELF"), ["2 compiled libraries"]),
    "library below": (extra("{graph}below/other.so", b"\x7fELF"), ["2 compiled libraries"]),
    "empty library": (edited(".so", lambda d: b""), ["library is empty"]),
    "text as library": (edited(".so", lambda d: b"#!/bin/sh\necho owned\n"), ["not an ELF file"]),
    "library cut off": (edited(".so", lambda d: d[: len(d) // 2]), ["cut off"]),
    "library's header cut off": (edited(".so", lambda d: d[:40]), ["cut off"]),
    "library of a big machine": (edited(".so", lambda d: d[:5] + b"\2" + d[6:]), ["another kind of machine"]),
    "library of another machine": (
        edited(".so", lambda d: d[:18] + struct.pack("<H", 183 if d[18] == 62 else 62) + d[20:]),
        ["processors, this"],
    ),
    "empty": (lambda d: b"", ["not a readable package"]),
    "empty archive": (lambda d: archive_of([]), ["holds nothing"]),
    "truncated": (lambda d: d[: len(d) // 2], ["not a readable package"]),
    "without its first half": (lambda d: d[len(d) // 2 :], []),
    "zeros in the middle": (lambda d: d[: len(d) // 2] + bytes(4096) + d[len(d) // 2 + 4096 :], ["is damaged"]),
    "another package's": (of_stem("other"), ["other", "the package of another graph"]),
    "other platform": (recorded(AOTI_PLATFORM="win32"), ["platform win32", "neml2-compile"]),
    "other machine": (recorded(AOTI_MACHINE="riscv64"), ["riscv64", "neml2-compile"]),
    "other processor": (recorded(AOTI_CPU_ISA="AVX512 AVX512_VNNI AMX_TILE ZVECTOR ASIMD"), ["lacks", "neml2-compile"]),
    "other device": (recorded(AOTI_DEVICE_KEY="cuda"), ["device cuda", "device='cuda'"]),
    "record that is no object": (edited("_metadata.json", lambda d: b"[]"), ["build record"]),
    "record that is nested": (edited("_metadata.json", lambda d: b"[" * 100_000), ["build record"]),
    "record that is no text": (edited("_metadata.json", lambda d: b"\xff\xfe"), ["damaged"]),
    "unknown operator": (calling("evil::run"), ["evil::run", "Import the Python package"]),
    "unknown neml2 operator": (calling("neml2::gone"), ["neml2::gone", "neml2"]),
    "unknown torch operator": (calling("aten::gone"), ["aten::gone", "torch"]),
    "operator with an odd name": (calling("os::system('x')"), ["no operator's name"]),
    "operators that are no list": (extra("{graph}evil.wrapper.json", b"{}"), ["list of operators"]),
}


def mutated(data: bytes, random_: random.Random) -> bytes:
    """An archive with random damage: bits, cuts, holes, repeats, foreign ends; mostly in its directory and headers."""
    out = bytearray(data)
    kind = random_.choice(["bits", "bits", "directory", "directory", "directory", "cut", "hole", "repeat", "tail"])
    if kind == "bits":
        for _ in range(random_.randint(1, 20)):
            out[random_.randrange(len(out))] ^= 1 << random_.randrange(8)
    elif kind == "directory":
        start = max(0, data.find(b"PK\1\2"))
        for _ in range(random_.randint(1, 6)):
            at = random_.randrange(start, len(out))
            out[at] = random_.choice([0, 1, 0x2F, 0x2E, 0x7F, 0xFF, random_.randrange(256)])
    elif kind == "cut":
        del out[random_.randrange(len(out)) :]
    elif kind == "hole":
        at = random_.randrange(len(out))
        del out[at : at + random_.randint(1, 5000)]
    elif kind == "repeat":
        at = random_.randrange(len(out))
        out[at:at] = out[at : at + random_.randint(1, 5000)]
    else:
        out += random_.randbytes(random_.randint(1, 5000))
    return bytes(out)


# Twice the shear modulus of the elasticity stub, as its library holds it.
TWICE_SHEAR = 158914.72868217053


def with_shear(value: float, tag: str = "") -> Make:
    """Give the elasticity graph another value of twice its shear modulus, without changing any size.

    The tag, of one length for all that are exchanged, makes bytes that no other test has.
    """
    old, new = (struct.pack("<d", number) for number in (TWICE_SHEAR, value))

    def change(library: bytes) -> bytes:
        assert library.count(old) == 1
        return library.replace(old, new)

    return lambda data: recorded(tag=tag)(edited(".so", change)(data))
