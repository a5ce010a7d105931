"""The file of machine code that comes with the package, for no processor in particular, and what it was made of."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
PATH = HERE / "machine_code.bc"
# What it is compiled from; what is not needed to run stands beside the package, in a checkout alone.
SOURCES = {
    **{name: HERE / name for name in ("criteria.py", "tables.py")},
    **{
        f"machine/{name}.py": HERE.parents[1] / "machine" / f"{name}.py"
        for name in ("calls", "elimination", "emit", "newton", "space")
    },
}
REBUILD = (
    "In a checkout: make machine-code. Else install the package again: pip install --force-reinstall neml2-aoti-plugin"
)


class Unusable(Exception):
    """The machine code cannot be used; the text says why, and what mends it."""


@dataclass(frozen=True)
class Code:
    """Machine code as LLVM's bitcode, with the SHA-256 of the whole file."""

    bitcode: bytes
    digest: str
    # The version of the LLVM that wrote it, which an older one may not be able to read.
    llvm: tuple[int, ...]


def sources() -> dict[str, str]:
    """SHA-256 of each source that is there, whichever way its lines end."""
    return {
        name: hashlib.sha256(path.read_bytes().replace(b"\r\n", b"\n")).hexdigest()
        for name, path in SOURCES.items()
        if path.is_file()
    }


def read() -> Code:
    """Read the file."""
    try:
        content = PATH.read_bytes()
        head, _, bitcode = content.partition(b"\n")
        told = json.loads(head)
        made_of, llvm = dict(told["sources"]), tuple(int(number) for number in told["llvm"])
    except FileNotFoundError:
        raise Unusable(f"{PATH.name} is not there. {REBUILD}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Unusable(f"{PATH.name} is damaged ({type(error).__name__}). {REBUILD}") from None
    if not sources().items() <= made_of.items():
        raise Unusable(f"{PATH.name} is older than its sources. {REBUILD}")
    return Code(bitcode, hashlib.sha256(content).hexdigest(), llvm)
