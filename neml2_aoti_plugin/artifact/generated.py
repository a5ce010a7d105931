"""Were two packages of one name compiled from one source? What their generated code and their constants tell.

The numbers of a source input that were not promoted are constants of the graphs: literals in the generated code, and
larger tensors in the library. Nothing else in an artifact holds them; the metadata of two inputs that differ in a
modulus is the same to the last byte.
"""

from __future__ import annotations

import hashlib
import math
import re
import struct
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import ArtifactError
from . import archive as zipped
from .binary import constants_in
from .folder import Folder
from .package import read_package

_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d*(?:[eE][+-]?\d+)?|[eE][+-]?\d+)")
# torch names files by a hash of what is in them.
_HASH = re.compile(r"\bc[a-z2-7]{51}\b")
# Devices, and releases of neml2 and torch, round derived constants differently.
_ROUNDING = 1e-9
_DIGITS = 8


@dataclass(frozen=True)
class Generated:
    """What a package was made of.

    Args:
        library: SHA-256 of the compiled library.
        code: SHA-256 of the generated code without its numbers.
        numbers: those in the code, in order, and behind them the constants of the library.
    """

    library: str
    code: str
    numbers: tuple[float, ...] = field(repr=False)


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
            binary = zipped.read_entry(archive, library, data)
            code = "\n".join(filter(None, (zipped.read_text(archive, f"{part}.cpp") for part in ("wrapper", "kernel"))))
    except (ArtifactError, StopIteration):
        return None
    if not code:
        return None
    # Comments hold paths and the commands of the compile.
    lines = (line for line in code.splitlines() if line and not line.startswith("//"))
    code = _HASH.sub("", "\n".join(lines))
    constants = constants_in(binary)
    doubles = struct.unpack(f"={len(constants) // 8}d", constants[: len(constants) // 8 * 8])
    return Generated(
        hashlib.sha256(binary).hexdigest(),
        hashlib.sha256(_NUMBER.sub("#", code).encode()).hexdigest(),
        (*map(float, _NUMBER.findall(code)), *doubles),
    )


def of_one_source(one: Generated, other: Generated, same_device: bool) -> bool | None:
    """Tell whether two packages of one name were compiled from one source.

    Args:
        one: a package.
        other: the package of another leaf.
        same_device: whether both leaves are for devices of one kind, for which torch generates the same code.

    Returns:
        Whether they were; None where the code differs as well as the numbers, so that it cannot be told.
    """
    if one.library == other.library:
        return True
    if one.code == other.code and len(one.numbers) == len(other.numbers):
        return all(_equal(a, b) for a, b in zip(one.numbers, other.numbers, strict=True))
    mine, theirs = _telling(one.numbers), _telling(other.numbers)
    # Code for another kind of device may do without a number that this one has.
    differ = mine != theirs if same_device else bool(mine - theirs and theirs - mine)
    return None if differ else True


def _equal(a: float, b: float) -> bool:
    # Whole numbers among the constants may look like NaN.
    return math.isclose(a, b, rel_tol=_ROUNDING) or (math.isnan(a) and math.isnan(b))


def _telling(numbers: Iterable[float]) -> set[str]:
    """The numbers that are hardly in code by themselves, such as 1 and 0.5 are."""
    found = {abs(number) for number in numbers if math.isfinite(number) and abs(number) > sys.float_info.min}
    return {f"{number:.{_DIGITS}g}" for number in found if number > 16 or number * 2 != round(number * 2)}
