"""Files of named tensors: safetensors with a note of what they are, NumPy's npz, and torch's pt.

What a file claims of its tensors is looked at before any of them is read.
"""

from __future__ import annotations

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

    # `float64`, `float32`, or what the file calls it.
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """What a file says it holds: tensors by name, and notes."""

    path: str
    claims: dict[str, Claim]
    # Text by key; of an npz file, its entries that are one text or one whole number.
    notes: dict[str, str]

    def require_kind(self, kind: str, what: str) -> None:
        """Refuse a file whose note of what it is does not say `kind`, which is `what` in words."""
        if self.notes.get(KIND) != kind:
            held = f"{self.notes[KIND]!r}" if KIND in self.notes else "no such note"
            raise InputError(
                f"{self.path}: is not {what} (its note {KIND!r} should be {kind!r}; there is {held}). Give another."
            )


@dataclass(frozen=True)
class TensorFile:
    """What was read from a file: tensors on the CPU, and the notes of its header."""

    tensors: dict[str, Tensor]
    notes: dict[str, str]


def write_tensors(path: Path, kind: str, tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> None:
    """Write tensors to a safetensors file that says what it is, such as `parameters 1`; whole or not at all.

    A tensor that is not finite is refused, since it could not be read again.
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
    """Read tensors of float64 or float32 from a file that is safetensors or npz by its first bytes, or `.pt` by name.

    `check` is given the header before anything else is read, raises if it is not what was expected, and returns the
    names of the tensors to read. In messages the file is `what`.
    """
    import numpy as np
    import torch

    with opened(path, what, MOST_BYTES) as file, _damage_as_input_error(path, what):
        reader = _reader(file, str(path))
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
def _damage_as_input_error(path: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Raise an `InputError` for all that a file of another kind, or a damaged one, may raise."""
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


def _reader(file: BufferedReader, path: str) -> _Safetensors | _Npz | _Pt:
    if path.lower().endswith(".pt"):
        return _Pt(file)
    start = file.read(2)
    file.seek(0)
    return _Npz(file) if start == b"PK" else _Safetensors(path)


class _Safetensors:
    """What safetensors opens: it finds a header that does not fit the file, and reads a tensor when it is asked for."""

    def __init__(self, path: str) -> None:
        from safetensors import safe_open

        # Its methods have no types.
        file: Any = safe_open(path, "np")
        self._file = file
        self.notes: dict[str, str] = dict(file.metadata() or {})
        self.claims: dict[str, Claim] = {}
        for name in file.keys():  # noqa: SIM118
            entry = file.get_slice(name)
            dtype = entry.get_dtype()
            self.claims[name] = Claim(_NUMBERS.get(dtype, dtype), tuple(entry.get_shape()))

    def read(self, name: str) -> Any:
        """The tensor as an array."""
        return self._file.get_tensor(name)


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
