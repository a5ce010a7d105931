"""Arrays in files: how rows pass between processes of one machine, without pickles."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# What an array is and its name, such as ("input", "strain") or ("block", "stress", "strain").
Key = tuple[str, ...]
Arrays = dict[Key, Tensor]

# What dtypes are called in torch and NumPy alike.
NAMES = {getattr(torch, name): name for name in ("float64", "float32", "int64", "int32", "uint8", "bool")}
# Of the place of an array in a file, in bytes.
ALIGNMENT = 64


@dataclass(frozen=True)
class Entry:
    """An array in a file.

    Args:
        key: what it is.
        dtype: its name in NumPy and torch.
        shape: of the array.
        offset: of its first byte.
    """

    key: Key
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        """Its size in bytes."""
        return prod(self.shape) * np.dtype(self.dtype).itemsize


def write(path: Path, arrays: Mapping[Key, Tensor]) -> tuple[Entry, ...]:
    """Write arrays to a file.

    Args:
        path: of the file. Where it is there already it is written over in place, and keeps its memory.
        arrays: by what they are.

    Returns:
        Where each lies.

    Raises:
        OSError: the file cannot be written; then it is not there.
    """
    entries: list[Entry] = []
    offset = 0
    try:
        with open(path, "wb", buffering=0, opener=_open_in_place) as file:
            for key, tensor in arrays.items():
                array = tensor.detach().contiguous().numpy()
                entries.append(Entry(key, NAMES[tensor.dtype], array.shape, offset))
                write_at(file.fileno(), array, offset)
                offset += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
            # The whole of what `mapped` asks for, also where the last array is empty.
            if os.fstat(file.fileno()).st_size < max(offset, 1):
                file.truncate(max(offset, 1))
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return tuple(entries)


def _open_in_place(path: str, flags: int) -> int:
    return os.open(path, (flags & ~os.O_TRUNC) | getattr(os, "O_BINARY", 0), 0o600)


def write_at(handle: int, array: np.ndarray, offset: int) -> None:
    """Write the bytes of a contiguous array at a place of a file that is open."""
    rest = _bytes(array)
    os.lseek(handle, offset, os.SEEK_SET)
    while rest:
        rest = rest[os.write(handle, rest) :]


def _bytes(array: Any) -> memoryview:
    return memoryview(array.reshape(-1).view(np.uint8))


def mapped(path: Path, entries: Iterable[Entry]) -> Arrays:
    """The arrays of a file as tensors over its memory map; what is written to them does not reach the file.

    Args:
        path: of the file.
        entries: what `write` gave.
    """
    memory = np.memmap(path, dtype=np.uint8, mode="c")
    found: Arrays = {}
    for entry in entries:
        part = memory[entry.offset : entry.offset + entry.size]
        found[entry.key] = torch.from_numpy(part.view(entry.dtype).reshape(entry.shape))
    return found


def read(path: Path, entries: Iterable[Entry], place: Callable[[Entry], Tensor]) -> None:
    """Read the arrays of a file into tensors that are there.

    Args:
        path: of the file.
        entries: what `write` gave.
        place: gives a contiguous tensor of the shape and the dtype of an entry.

    Raises:
        OSError: the file cannot be read, or is shorter than was written.
    """
    with path.open("rb", buffering=0) as file:
        for entry in entries:
            rest = _bytes(place(entry).numpy())
            file.seek(entry.offset)
            while rest:
                count = file.readinto(rest)
                if not count:
                    raise OSError(f"{path} is shorter than it was when it was written")
                rest = rest[count:]
