"""Files of named tensors: safetensors with a note of what they are, NumPy's npz, and torch's pt.

What a file claims of its tensors is looked at before any of them is read.
"""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ._files import draft, opened
from .errors import AOTIError, InputError, InputTypeError

# The note that says what a safetensors file is.
KIND = "neml2-aoti"
# Of a file; and of the tensors in one that are more than it is itself, since an npz file may be compressed.
MOST_BYTES, MOST_COMPRESSED_BYTES = 1 << 36, 1 << 30
# Of all texts and numbers beside the tensors.
_NOTE_BYTES = 1 << 20
_NUMBERS = {"F64": "float64", "F32": "float32"}


@dataclass(frozen=True)
class Claim:
    """What a file says of a tensor."""

    dtype: str  # `float64`, `float32`, or what the file calls it
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """What a file says it holds: tensors by name, and notes."""

    path: str
    claims: dict[str, Claim]
    notes: dict[str, str]  # text by key; of an npz file, its entries that are one text or one whole number

    def require_kind(self, kind: str, what: str) -> None:
        """Refuse a file whose note of what it is does not say `kind`, which is `what` in words."""
        if self.notes.get(KIND) != kind:
            held = f"{self.notes[KIND]!r}" if KIND in self.notes else "no such note"
            raise InputError(
                f"{self.path}: is not {what} (its note {KIND!r} should be {kind!r}; there is {held}). Give another."
            )


FileForm = tuple[Header, Callable[[str], Any]]


def write_tensors(path: Path, kind: str, tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> None:
    """Write tensors to a safetensors file that says what it is, such as `parameters 1`; whole or not at all."""
    # It could not be read again.
    lost = [name for name, value in tensors.items() if not bool(value.isfinite().all())]
    if lost:
        raise InputError(f"{path}: is not written, since {', '.join(lost)} would hold NaN or infinite numbers.")
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    with draft(path) as scratch:
        scratch.write_bytes(save(plain, {KIND: kind, **notes}))


def read_tensors(
    path: str | os.PathLike[str], what: str, check: Callable[[Header], Iterable[str]], *, finite: bool = True
) -> dict[str, Tensor]:
    """Read tensors of float64 or float32 from a file that is safetensors or npz by its first bytes, or `.pt` by name.

    `check` is given the header before anything else is read, raises if it is not what was expected, and returns the
    names of the tensors to read. In messages the file is `what`.
    """
    try:
        with opened(path, what, MOST_BYTES) as file:
            if str(path).lower().endswith(".pt"):
                header, read = _pt(file, str(path))
            elif file.peek(2)[:2] == b"PK":
                header, read = _npz(file, str(path))
            else:
                header, read = _safetensors(str(path))
            names, claimed = list(check(header)), 0
            for name in names:
                dtype, shape = header.claims[name].dtype, header.claims[name].shape
                if dtype not in _NUMBERS.values():
                    expected = "float64 or float32. Give a file of such numbers"
                    raise InputTypeError(f"{path}: {name!r} has dtype {dtype}, expected {expected}.")
                claimed += math.prod(shape) * (8 if dtype == "float64" else 4)
            if claimed > max(MOST_COMPRESSED_BYTES, os.fstat(file.fileno()).st_size):
                much = f"claims tensors of {claimed} bytes, much more than it has itself"
                raise InputError(f"{path}: {much}. Give {what}.")
            tensors = {}
            for name in names:
                array = read(name)
                if finite and not np.isfinite(array).all():
                    raise InputError(f"{path}: {name!r} holds NaN or infinite numbers. Give a file of finite ones.")
                tensors[name] = torch.from_numpy(array)
            return tensors
    except AOTIError:
        raise
    except MemoryError:
        raise InputError(f"{path}: does not fit into memory. Give {what} that does.") from None
    except Exception as error:
        # zipfile, NumPy and JSON raise errors of a dozen types, some of which show what was read.
        why = str(error) if isinstance(error, _DamagedError) else type(error).__name__
        raise InputError(f"{path}: is not {what} ({why}). Give another file.") from None


class _DamagedError(Exception):
    """A file does not hold what its form says."""


# -- the forms: each gives what a file says it holds, and what reads a tensor of it as an array ------------------------


def _safetensors(path: str) -> FileForm:
    """What safetensors opens: it finds a header that does not fit the file, and reads a tensor when it is asked for."""
    # Its methods have no types.
    file: Any = safe_open(path, "np")
    claims: dict[str, Claim] = {}
    for name in file.keys():  # noqa: SIM118
        entry = file.get_slice(name)
        dtype = entry.get_dtype()
        claims[name] = Claim(_NUMBERS.get(dtype, dtype), tuple(entry.get_shape()))
    return Header(path, claims, dict(file.metadata() or {})), file.get_tensor


def _npz(file: BufferedReader, path: str) -> FileForm:
    """A zip archive of arrays, each with a header of its own."""
    archive = zipfile.ZipFile(file)
    members: dict[str, zipfile.ZipInfo] = {}
    found, room = Header(path, {}, {}), _NOTE_BYTES

    def read(name: str) -> Any:
        with archive.open(members[name]) as stream:
            array = npy.read_array(stream, allow_pickle=False)
        return np.asarray(array, array.dtype.newbyteorder("="), order="C")

    for member in archive.infolist():
        name = member.filename.removesuffix(".npy")
        if name in members:
            raise _DamagedError(f"{name!r} is there twice")
        # No more bytes than a header has.
        with archive.open(member) as stream:
            start = BytesIO(stream.read(1 << 16))
        version = npy.read_magic(start)
        shape, _, dtype = (npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0)(start)
        if not dtype.hasobject and member.file_size != start.tell() + math.prod(shape) * dtype.itemsize:
            raise _DamagedError(f"{member.filename} is of another size than it says")
        members[name], found.claims[name] = member, Claim(dtype.name, shape)
        if not shape and dtype.kind in "Uiu" and dtype.itemsize <= room:
            room -= dtype.itemsize
            found.notes[name] = str(read(name))
    return found, read


def _pt(file: BufferedReader, path: str) -> FileForm:
    """What torch saves; it has no header, and takes no more room than it has on disk."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise _DamagedError("compressed, which torch does not do")
    file.seek(0)
    try:
        tensors = torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:
        # What torch says of another file is how to run what is in it.
        raise _DamagedError(type(error).__name__) from None
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise _DamagedError("it holds no dict of tensors")
    claims: dict[str, Claim] = {}
    for name, value in tensors.items():
        form = value.dtype if value.layout == torch.strided else value.layout
        claims[str(name)] = Claim(str(form).removeprefix("torch."), tuple(value.shape))
    return Header(path, claims, {}), lambda name: tensors[name].detach().contiguous().numpy()
