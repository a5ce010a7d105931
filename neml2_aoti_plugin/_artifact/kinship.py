"""Is a leaf of the compile that its metadata is of? A leaf of an earlier compile may have been left beside newer ones.

neml2-compile writes one metadata file for all leaves of an artifact, each time it compiles one, and nothing in it says
which leaf is of which compile. So leaves are compared with each other, and the times of the files show which is the
latest. In a copy they may not; then nothing is refused.

What is compared is generated code and constants. The numbers of a source input that were not promoted are constants of
the graphs: literals in the generated code, and larger tensors in the library. Nothing else in an artifact holds them;
the metadata of two inputs that differ in a modulus is the same to the last byte.
"""

from __future__ import annotations

import os
import re
import struct
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import ArtifactError
from .files import Folder
from .locate import Place, dtype_name
from .package import archive_faults, libraries_in, open_archive, read_entry, read_package, read_text
from .schema import Metadata

# neml2-compile writes the metadata right behind the last package; some file systems and archives round times to two
# seconds. It takes longer than this to start again and compile a package, and a copy takes less.
_AT_ONCE = 2.0
_COMPILED = 3.0


@dataclass(frozen=True)
class Kinship:
    """How a leaf goes with the others of its artifact."""

    # Why it does not belong to the metadata, and why it may not, with the cure; empty where nothing speaks against it.
    fault: str = ""
    doubt: str = ""
    # Packages in the leaf that the metadata does not name; an earlier compile left them.
    left: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()  # packages that the metadata names and the leaf does not have


def kinship(metadata: Metadata, place: Place) -> Kinship:
    """Compare a leaf with the others of its artifact; one of a single leaf has nothing to compare it with."""
    leaf, names, shared = place.leaf, metadata.files, place.artifact.shared
    there = {file.name for file in leaf.glob("*.pt2")}
    compared = sorted(names & there)
    folders = place.artifact.folders()
    others = [folder for folder in folders if folder != leaf] if leaf in folders else []
    # Before neml2 3.0.7 each device has its own metadata, so that none of them is of another compile than that.
    latest = _latest(folders, compared, place.metadata) if shared and others else None
    if latest is not None:
        others = [latest] if latest != leaf else []
    verdicts = {other: _of_one_source(compared, place, other, shared) for other in others}
    strange = " and ".join(str(other) for other, same in verdicts.items() if same is False)
    unclear = " and ".join(str(other) for other, same in verdicts.items() if same is None)
    fault = doubt = ""
    if strange and latest is not None:
        options = f"--device {place.device.type} --dtype {dtype_name(place.dtype)}"
        fault = (
            f"{leaf}: is of an earlier compile, of another source than the metadata, which was written with {latest}: "
            "the constants of the graphs differ. It would give the numbers of the earlier model. Compile it again, by "
            f"the command of the latest compile with {options}, or remove the folder."
        )
    elif strange:
        doubt = (
            f"{leaf}: is of another source than {strange}: the constants of the graphs differ, and nothing tells which "
            "of them is of the latest compile. The earlier one gives the numbers of an earlier model. Remove it, or "
            "compile all leaves again from one source."
        )
    elif unclear and place.folder.sealed is None:
        doubt = (
            f"{leaf}: may be of another source than {unclear}: the graphs and their constants differ. Then the earlier "
            "one gives the numbers of an earlier model. Compile all leaves again from one source; or, if they are of "
            f"one, seal the artifact, which ends this warning: neml2-aoti seal {place.artifact.root}"
        )
    return Kinship(fault, doubt, tuple(sorted(there - names)), tuple(sorted(names - there)))


def _of_one_source(names: Iterable[str], place: Place, other: Path, shared: bool) -> bool | None:
    """Whether two leaves are of one source: False if a package shows that they are not, None if one leaves it open."""
    same_device = shared and other.parent.name == place.leaf.parent.name
    found: list[bool | None] = []
    for name in names:
        mine, theirs = (read_generated(folder / name, place.folder) for folder in (place.leaf, other))
        if mine is not None and theirs is not None:
            found.append(of_one_source(mine, theirs, same_device))
    return False if False in found else None if None in found else True


def _latest(folders: list[Path], names: Iterable[str], metadata: Path) -> Path | None:
    """The leaf that the metadata was written with, as far as the times of the files show."""
    try:
        spans = {}
        for folder in folders:
            times = [os.stat(folder / name).st_mtime for name in names if os.path.exists(folder / name)]
            if times:
                spans[folder] = (min(times), max(times))
        written = os.stat(metadata).st_mtime
    except OSError:
        return None
    latest = max(spans, key=lambda folder: spans[folder][1], default=None)
    if latest is None or abs(written - spans[latest][1]) > _AT_ONCE:
        return None
    before = max((end for folder, (_, end) in spans.items() if folder != latest), default=0.0)
    return latest if spans[latest][0] - before >= _COMPILED else None


# -- were two packages of one name compiled from one source? -----------------------------------------------------------

_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d*(?:[eE][+-]?\d+)?|[eE][+-]?\d+)")
_HEADERS = re.compile(r"^// .*/precompiled_headers/(\w+)\.h", re.MULTILINE)
# Where torch puts a graph's constants: those that are only read, and those that the graph may change.
_CONSTANTS = (b".lrodata", b".ldata")
# torch names files by a hash of what is in them.
_HASH = re.compile(r"\bc[a-z2-7]{51}\b")
# Devices, and releases of neml2 and torch, round derived constants differently; some pass through float32.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Generated:
    """What a package was made of."""

    # The generated code without its numbers, and without what differs from compile to compile.
    skeleton: str = field(repr=False)
    # The numbers in the code, in order, and behind them the tensors in the library.
    numbers: NDArray[np.float64] = field(repr=False)
    # What the code was compiled against: torch names its headers by what is in them, and by compiler and flags.
    compiler: frozenset[str]


def read_generated(file: Path, folder: Folder) -> Generated | None:
    """What a package was made of; None where it cannot be read, or holds no code."""
    try:
        data = read_package(file, folder).data
        with open_archive(file, data) as archive:
            libraries = libraries_in(archive)
            if archive_faults(archive) or not libraries:
                return None
            constants = _constants_in(read_entry(archive, libraries[0], data))
            source = "\n".join(read_text(archive, f"{part}.cpp") or "" for part in ("wrapper", "kernel"))
    except ArtifactError:
        return None
    # Without paths and commands, which stand in comments, and names of files.
    code = _HASH.sub("", "\n".join(line for line in source.splitlines() if line and not line.startswith("//")))
    numbers = [*map(float, _NUMBER.findall(code)), *struct.unpack_from(f"={len(constants) // 8}d", constants)]
    found = Generated(_NUMBER.sub("#", code), np.array(numbers), frozenset(_HEADERS.findall(source)))
    return found if source.strip() else None


def _constants_in(data: bytes | memoryview) -> bytes:
    """The tensors that torch put into a shared library, one after the other; nothing where it is no ELF file."""
    try:
        if bytes(data[:6]) != b"\x7fELF\2\1":
            return b""
        start = struct.unpack_from("<Q", data, 40)[0]
        size, count, names = struct.unpack_from("<HHH", data, 58)
        table = [struct.unpack_from("<II8xQQQ", data, start + i * size) for i in range(count)]
        texts = table[names][3]
        found = b""
        for name, _, _, offset, length in table:
            label = bytes(data[texts + name : texts + name + 16]).partition(b"\0")[0]
            found += bytes(data[offset : offset + length]) if label in _CONSTANTS else b""
        return found
    except (struct.error, IndexError):
        return b""


def of_one_source(one: Generated, other: Generated, same_device: bool) -> bool | None:
    """Whether two packages of one name were compiled from one source; None where another compiler may be the reason."""
    # For devices of one kind torch generates the same code. Whole numbers among the constants may look like NaN.
    if one.skeleton == other.skeleton and one.numbers.size == other.numbers.size:
        return bool(np.isclose(one.numbers, other.numbers, rtol=_ROUNDING, atol=0.0, equal_nan=True).all())
    mine, theirs = _distinctive(one.numbers), _distinctive(other.numbers)
    lacking = [not _are_among(mine, theirs), not _are_among(theirs, mine)]
    # Code for another kind of device may do without a number that this one has.
    if not (any(lacking) if same_device else all(lacking)):
        return True
    # One torch, one compiler and one machine write the same code for the same source.
    return False if same_device and all(lacking) and one.compiler and one.compiler == other.compiler else None


def _distinctive(numbers: NDArray[np.float64]) -> NDArray[np.float64]:
    """The numbers that are hardly in code by themselves, such as 1 and 0.5 are: their sizes, sorted."""
    sizes = np.abs(numbers[np.isfinite(numbers)])
    found: NDArray[np.float64] = np.unique(sizes[(sizes > sys.float_info.min) & ((sizes > 16) | (sizes % 0.5 != 0))])
    return found


def _are_among(numbers: NDArray[np.float64], others: NDArray[np.float64]) -> bool:
    """Whether all numbers are among others, which are sorted, but for rounding."""
    places = np.searchsorted(others, numbers * (1 - _ROUNDING))
    nearest = np.append(others, np.inf)[places]
    return bool(np.isclose(numbers, nearest, rtol=_ROUNDING, atol=0.0).all())
