"""Look over the shared library of a graph without loading it: what speaks against it, and the constants in it."""

from __future__ import annotations

import struct
import sys

from .processor import machine

# Processors by the number that an ELF file gives them.
ELF_MACHINES = {3: "i686", 21: "ppc64le", 22: "s390x", 40: "armv7l", 62: "x86_64", 183: "aarch64", 243: "riscv64"}

_SHARED, _LOAD = 3, 1
# Where torch puts a graph's constants: those that are only read, and those that the graph may change.
_CONSTANTS = (b".lrodata", b".ldata")
_AGAIN = "Copy the package again, or compile the model again."


def library_fault(data: bytes | memoryview) -> str:
    """Tell what speaks against loading a shared library here.

    Args:
        data: its bytes.

    Returns:
        What is wrong and the cure; empty for nothing. Only ELF files are looked into, elsewhere than on Linux nothing
        is found.
    """
    if not data:
        return f"its shared library is empty. {_AGAIN}"
    if not sys.platform.startswith("linux"):
        return ""
    if bytes(data[:4]) != b"\x7fELF":
        return f"its shared library is not an ELF file. {_AGAIN}"
    try:
        return _elf_fault(data)
    except struct.error:
        return f"its shared library is cut off within its header. {_AGAIN}"


def constants_in(data: bytes | memoryview) -> bytes:
    """The tensors that torch put into a shared library, as bytes one after the other.

    Args:
        data: the library's bytes.

    Returns:
        The bytes of its sections of constants; none where there are none, or where it is no ELF file.
    """
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


def _elf_fault(data: bytes | memoryview) -> str:
    bits, order = data[4], data[5]
    if (bits, order) != (2, 1 if sys.byteorder == "little" else 2):
        return f"its shared library is of another kind of machine. {_compile_here()}"
    end = "<" if order == 1 else ">"
    kind, number = struct.unpack_from(end + "HH", data, 16)
    built_for = ELF_MACHINES.get(number, f"machine {number}")
    if built_for != machine() and machine() in ELF_MACHINES.values():
        return f"its shared library is for {built_for} processors, this is {machine()}. {_compile_here()}"
    start = struct.unpack_from(end + "Q", data, 32)[0]
    size, count = struct.unpack_from(end + "HH", data, 54)
    if kind != _SHARED or size != 56 or count == 0:
        return f"its shared library has a damaged header. {_AGAIN}"
    for i in range(count):
        of_type = struct.unpack_from(end + "I", data, start + i * size)[0]
        offset = struct.unpack_from(end + "Q", data, start + i * size + 8)[0]
        filled = struct.unpack_from(end + "Q", data, start + i * size + 32)[0]
        # The system maps such a part and kills the process when it is read.
        if of_type == _LOAD and offset + filled > len(data):
            return f"its shared library is cut off: {len(data)} bytes, expected {offset + filled} or more. {_AGAIN}"
    return ""


def _compile_here() -> str:
    return "Compile the model here with neml2-compile."
