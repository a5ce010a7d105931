"""Files of named tensors: safetensors with a note of what they are, NumPy's npz, and torch's pt.

What a file claims of its tensors is looked at before any of them is read.
"""

from __future__ import annotations

import json
import math
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._files import draft, opened
from .errors import AOTIError, InputError, InputTypeError

if TYPE_CHECKING:
    from torch import Tensor

# The note that tells what a safetensors file is.
KIND = "neml2-aoti"
# Of a file; and of the tensors in one that are more than it is itself, since an npz file may be compressed.
MOST_BYTES, MOST_COMPRESSED_BYTES = 1 << 36, 1 << 30
# Of what describes the tensors, and of all texts and numbers beside them.
_HEADER_BYTES, _NOTE_BYTES = 1 << 24, 1 << 20
_NUMBERS = {"F64": "float64", "F32": "float32"}


@dataclass(frozen=True)
class Claim:
    """What a file says of a tensor.

    Args:
        dtype: `float64`, `float32`, or what the file calls it.
        shape: its shape.
    """

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """What a file says it holds.

    Args:
        path: of the file.
        claims: what it says of each tensor, by name.
        notes: text by key; of an npz file, its entries that are one text or one whole number.
    """

    path: str
    claims: dict[str, Claim]
    notes: dict[str, str]

    def require_kind(self, kind: str, what: str) -> None:
        """Refuse a file that does not say that it is of a kind.

        Args:
            kind: what its note must be.
            what: that in words.
        """
        if self.notes.get(KIND) != kind:
            held = f"{self.notes[KIND]!r}" if KIND in self.notes else "no such note"
            raise InputError(
                f"{self.path}: is not {what} (its note {KIND!r} should be {kind!r}; there is {held}). Give another."
            )


@dataclass(frozen=True)
class TensorFile:
    """What was read from a file.

    Args:
        tensors: by name, on the CPU.
        notes: as in `Header`.
    """

    tensors: dict[str, Tensor]
    notes: dict[str, str]


def write_tensors(path: Path, kind: str, tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> None:
    """Write tensors to a safetensors file, whole or not at all.

    Args:
        path: of the file; a plain one that was there is replaced.
        kind: what the file is, such as `parameters 1`.
        tensors: by name.
        notes: text by key.

    Raises:
        InputError: the file cannot be written, or a tensor is not finite, which could not be read again.
    """
    from safetensors.torch import save

    lost = [name for name, value in tensors.items() if not bool(value.isfinite().all())]
    if lost:
        raise InputError(f"{path}: is not written, since {', '.join(lost)} would hold NaN or infinite numbers.")
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    with draft(path) as scratch:
        scratch.write_bytes(save(plain, {KIND: kind, **notes}))


def read_tensors(
    path: str | os.PathLike[str], what: str, check: Callable[[Header], Iterable[str]], *, finite: bool = True
) -> TensorFile:
    """Read tensors of numbers from a file.

    Args:
        path: of the file; safetensors or npz, as its first bytes tell, or torch's where it ends with `.pt`.
        what: what it should be, for messages.
        check: is given the header before anything else is read, raises if it is not what was expected, and returns the
            names of the tensors to read.
        finite: whether all numbers must be finite.

    Returns:
        The tensors, float64 or float32.

    Raises:
        InputError: there is no such plain file, it is another one or damaged, or a tensor does not hold such numbers.
    """
    import numpy as np
    import torch

    with opened(path, what, MOST_BYTES) as file, _damage_told(path, what):
        reader = _reader(file, Path(path).suffix)
        header = Header(str(path), reader.claims, reader.notes)
        names = list(check(header))
        for name in names:
            _require_numbers(header, name)
        claimed = sum(_bytes(header.claims[name]) for name in names)
        if claimed > max(MOST_COMPRESSED_BYTES, os.fstat(file.fileno()).st_size):
            raise InputError(f"{path}: claims tensors of {claimed} bytes, much more than it has itself. Give {what}.")
        tensors = {}
        for name in names:
            array = reader.read(name)
            if finite and not np.isfinite(array).all():
                raise InputError(f"{path}: {name!r} holds NaN or infinite numbers. Give a file of finite ones.")
            tensors[name] = torch.from_numpy(array)
    return TensorFile(tensors, header.notes)


class _DamagedError(Exception):
    """A file does not hold what its form says."""


@contextmanager
def _damage_told(path: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Tell all that may be raised for a file of another kind as what it means."""
    try:
        yield
    except AOTIError:
        raise
    except MemoryError:
        raise InputError(f"{path}: does not fit into memory. Give {what} that does.") from None
    except Exception as error:
        # zipfile, NumPy and JSON raise errors of a dozen types, some of which show what was read.
        why = str(error) if isinstance(error, _DamagedError) else type(error).__name__
        raise InputError(f"{path}: is not {what} ({why}). Give another file.") from None


def _require_numbers(header: Header, name: str) -> None:
    dtype = header.claims[name].dtype
    if dtype not in _NUMBERS.values():
        raise InputTypeError(
            f"{header.path}: {name!r} has dtype {dtype}, expected float64 or float32. Give a file of such numbers."
        )


# -- the forms ---------------------------------------------------------------------------------------------------------


def _reader(file: BufferedReader, suffix: str) -> _Safetensors | _Npz | _Pt:
    if suffix == ".pt":
        return _Pt(file)
    start = file.read(2)
    file.seek(0)
    return _Npz(file) if start == b"PK" else _Safetensors(file)


class _Safetensors:
    """A length, JSON with dtype, shape and place of each tensor, and their bytes."""

    def __init__(self, file: BufferedReader) -> None:
        self._file, size = file, os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, _HEADER_BYTES):
            raise _DamagedError("no safetensors file, or cut off")
        document = json.loads(file.read(length))
        self.notes = {str(key): str(value) for key, value in document.pop("__metadata__", {}).items()}
        self.claims: dict[str, Claim] = {}
        self._places: dict[str, int] = {}
        for name, entry in document.items():
            (start, stop), shape = entry["data_offsets"], tuple(entry["shape"])
            claim = Claim(_NUMBERS.get(entry["dtype"], str(entry["dtype"])), shape)
            if not all(type(count) is int and count >= 0 for count in (start, stop, *shape)):
                raise _DamagedError(f"{name!r} has no place in it")
            if stop > size - 8 - length or (claim.dtype in _NUMBERS.values() and stop - start != _bytes(claim)):
                raise _DamagedError(f"{name!r} is cut off, or of another size than it says")
            self.claims[name], self._places[name] = claim, 8 + length + start

    def read(self, name: str) -> Any:
        """The tensor as an array."""
        import numpy as np

        claim = self.claims[name]
        found = bytearray(_bytes(claim))
        self._file.seek(self._places[name])
        if self._file.readinto(found) != len(found):
            raise _DamagedError(f"{name!r} is cut off")
        little = np.frombuffer(found, np.dtype(claim.dtype).newbyteorder("<"))
        return little.astype(claim.dtype, copy=False).reshape(claim.shape)


class _Npz:
    """A zip archive of arrays, each with a header of its own."""

    def __init__(self, file: BufferedReader) -> None:
        self._archive = zipfile.ZipFile(file)
        self.claims: dict[str, Claim] = {}
        self.notes: dict[str, str] = {}
        self._members: dict[str, zipfile.ZipInfo] = {}
        room = _NOTE_BYTES
        for member in self._archive.infolist():
            name = member.filename.removesuffix(".npy")
            if name in self.claims:
                raise _DamagedError(f"{name!r} is there twice")
            shape, dtype = self._header(member)
            self.claims[name], self._members[name] = Claim(dtype.name, shape), member
            if not shape and dtype.kind in "Uiu" and dtype.itemsize <= room:
                room -= dtype.itemsize
                self.notes[name] = str(self.read(name))

    def _header(self, member: zipfile.ZipInfo) -> tuple[tuple[int, ...], Any]:
        """Shape and dtype of an array, from no more bytes than a header has."""
        from numpy.lib import format as npy

        with self._archive.open(member) as stream:
            start = BytesIO(stream.read(1 << 16))
        version = npy.read_magic(start)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = read(start)
        if not dtype.hasobject and member.file_size != start.tell() + math.prod(shape) * dtype.itemsize:
            raise _DamagedError(f"{member.filename} is of another size than it says")
        return shape, dtype

    def read(self, name: str) -> Any:
        """The tensor as an array."""
        import numpy as np

        with self._archive.open(self._members[name]) as stream:
            found = np.lib.format.read_array(stream, allow_pickle=False)
        return np.asarray(found, found.dtype.newbyteorder("="), order="C")


class _Pt:
    """What torch saves; it has no header, and takes no more room than it has on disk."""

    def __init__(self, file: BufferedReader) -> None:
        import torch

        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                    raise _DamagedError("compressed, which torch does not do")
        file.seek(0)
        try:
            self._tensors = torch.load(file, weights_only=True, map_location="cpu")
        except Exception as error:
            # What torch says of another file is how to run what is in it.
            raise _DamagedError(type(error).__name__) from None
        if not isinstance(self._tensors, dict) or not all(isinstance(x, torch.Tensor) for x in self._tensors.values()):
            raise _DamagedError("it holds no dict of tensors")
        self.notes: dict[str, str] = {}
        self.claims: dict[str, Claim] = {}
        for name, value in self._tensors.items():
            form = value.dtype if value.layout == torch.strided else value.layout
            self.claims[str(name)] = Claim(str(form).removeprefix("torch."), tuple(value.shape))

    def read(self, name: str) -> Any:
        """The tensor as an array."""
        return self._tensors[name].detach().contiguous().numpy()


def _bytes(claim: Claim) -> int:
    return math.prod(claim.shape) * (8 if claim.dtype == "float64" else 4)
