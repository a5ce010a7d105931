"""Were two packages of one name compiled from one source? What their generated code and their constants tell.

The numbers of a source input that were not promoted are constants of the graphs: literals in the generated code, and
larger tensors in the library. Nothing else in an artifact holds them; the metadata of two inputs that differ in a
modulus is the same to the last byte.
"""

from __future__ import annotations

import math
import re
import struct
import sys
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from ..errors import ArtifactError
from . import archive as zipped
from .binary import constants_in
from .folder import Folder
from .package import read_package

_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d*(?:[eE][+-]?\d+)?|[eE][+-]?\d+)")
_HEADERS = re.compile(r"^// .*/precompiled_headers/(\w+)\.h", re.MULTILINE)
# torch names files by a hash of what is in them.
_HASH = re.compile(r"\bc[a-z2-7]{51}\b")
# Devices, and releases of neml2 and torch, round derived constants differently; some pass through float32.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Generated:
    """What a package was made of.

    Args:
        library: checksum and size of the compiled library.
        source: the generated code.
        constants: the tensors in the library, as bytes.
    """

    library: tuple[int, int]
    source: str = field(repr=False)
    constants: bytes = field(repr=False)

    @cached_property
    def compiler(self) -> frozenset[str]:
        """What the code was compiled against: torch names its headers by what is in them, and by compiler and flags."""
        return frozenset(_HEADERS.findall(self.source))

    @cached_property
    def code(self) -> str:
        """The code without what differs from compile to compile: paths and commands in comments, names of files."""
        lines = (line for line in self.source.splitlines() if line and not line.startswith("//"))
        return _HASH.sub("", "\n".join(lines))

    @cached_property
    def skeleton(self) -> str:
        """The code without its numbers."""
        return _NUMBER.sub("#", self.code)

    @cached_property
    def numbers(self) -> tuple[float, ...]:
        """The numbers in the code, in order, and behind them the constants."""
        count = len(self.constants) // 8
        return (*map(float, _NUMBER.findall(self.code)), *struct.unpack_from(f"={count}d", self.constants))


def read_generated(file: Path, folder: Folder) -> Generated | None:
    """Read what a package was made of.

    Args:
        file: the package.
        folder: of its artifact.

    Returns:
        What was found; None where it cannot be read, or holds no code.
    """
    try:
        data = read_package(file, folder).data
        with zipped.open_archive(file, data) as archive:
            if zipped.faults(archive):
                return None
            library = next(i for i in zipped.graph_entries(archive) if i.filename.endswith((".so", ".pyd", ".dylib")))
            constants = constants_in(zipped.read_entry(archive, library, data))
            parts = [zipped.read_text(archive, f"{part}.cpp") for part in ("wrapper", "kernel")]
    except (ArtifactError, StopIteration):
        return None
    source = "\n".join(part for part in parts if part)
    return Generated((library.CRC, library.file_size), source, constants) if source else None


def of_one_source(one: Generated, other: Generated, same_device: bool) -> bool | None:
    """Tell whether two packages of one name were compiled from one source.

    Args:
        one: a package.
        other: the package of another leaf.
        same_device: whether both leaves are for devices of one kind, for which torch generates the same code.

    Returns:
        Whether they were; None where the code differs as well as the numbers, and another compiler may be why.
    """
    if one.library == other.library:
        return True
    if one.skeleton == other.skeleton and len(one.numbers) == len(other.numbers):
        return all(_equal(a, b) for a, b in zip(one.numbers, other.numbers, strict=True))
    mine, theirs = _telling(one.numbers), _telling(other.numbers)
    lacking = [any(not _is_among(number, there) for number in here) for here, there in ((mine, theirs), (theirs, mine))]
    # Code for another kind of device may do without a number that this one has.
    if not (any(lacking) if same_device else all(lacking)):
        return True
    # One torch, one compiler and one machine write the same code for the same source.
    return False if same_device and all(lacking) and one.compiler and one.compiler == other.compiler else None


def _equal(a: float, b: float) -> bool:
    # Whole numbers among the constants may look like NaN.
    return math.isclose(a, b, rel_tol=_ROUNDING) or (math.isnan(a) and math.isnan(b))


def _telling(numbers: Iterable[float]) -> list[float]:
    """The numbers that are hardly in code by themselves, such as 1 and 0.5 are: their sizes, sorted."""
    found = {abs(number) for number in numbers if math.isfinite(number) and abs(number) > sys.float_info.min}
    return sorted(number for number in found if number > 16 or number * 2 != round(number * 2))


def _is_among(number: float, numbers: list[float]) -> bool:
    """Whether a number is among others, which are sorted, but for rounding."""
    place = bisect_left(numbers, number * (1 - _ROUNDING))
    return place < len(numbers) and _equal(numbers[place], number)
