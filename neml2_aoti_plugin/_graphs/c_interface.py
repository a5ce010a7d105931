"""A compiled graph behind its C interface, which takes memory and needs no interpreter.

The library in a package exports C functions (torch/csrc/inductor/aoti_runtime/interface.h); a tensor is a handle,
with C functions of libtorch (torch/csrc/inductor/aoti_torch/c/shim.h). Both are what compiled graphs are built on, and
torch keeps them as they are. torch's runner holds the interpreter while a graph runs; these do not.
"""

from __future__ import annotations

import ctypes
import sys
import weakref
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import AOTIError

# Functions for tensors, in the order in which machine code takes their addresses.
TENSOR_FUNCTIONS = (
    "aoti_torch_create_tensor_from_blob",
    "aoti_torch_delete_tensor_object",
    "aoti_torch_get_data_ptr",
    "aoti_torch_get_dim",
    "aoti_torch_get_sizes",
    "aoti_torch_get_strides",
    "aoti_torch_get_dtype",
)
_FLOAT64 = "aoti_torch_dtype_float64"
# With these a library has kernels on several threads: calls to begin a region of GNU's and of LLVM's OpenMP.
_FORKS = (b"GOMP_parallel", b"__kmpc_fork_call")
_PREFIX = "AOTInductorModelContainer"
# What a library must export, behind that prefix.
_RUN, _CREATE, _DELETE = "RunSingleThreaded", "CreateWithDevice", "Delete"
_INPUTS, _OUTPUTS = "GetNumInputs", "GetNumOutputs"
_LIBRARIES = {"darwin": "libtorch_cpu.dylib", "win32": "torch_cpu.dll"}


class Unavailable(Exception):
    """A graph cannot be called by its C interface; the text says why."""


def obstacle(library: bytes) -> str:
    """Why the library of a package cannot be called, as far as its bytes tell; empty where nothing is in the way."""
    if any(name in library for name in _FORKS):
        return "it has kernels on several threads"
    for name in (_RUN, _CREATE, _DELETE, _INPUTS, _OUTPUTS):
        if f"{_PREFIX}{name}\0".encode() not in library:
            return _missing(_PREFIX + name)
    return ""


def _missing(name: str) -> str:
    return f"there is no function {name}"


@cache
def libtorch() -> ctypes.CDLL:
    """The library of torch that exports the functions for tensors; it is loaded already."""
    path = Path(torch.__file__).parent / "lib" / _LIBRARIES.get(sys.platform, "libtorch_cpu.so")
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise Unavailable(f"{path.name} cannot be opened ({error})") from None


def function(library: ctypes.CDLL, name: str) -> Any:
    """A C function that returns 32 bits; its address is `address(function)`."""
    try:
        found = getattr(library, name)
    except AttributeError:
        raise Unavailable(_missing(name)) from None
    found.restype = ctypes.c_int32
    return found


def address(function: Any) -> int:
    """Where a C function is."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0


@cache
def tensor_functions() -> np.ndarray:
    """Addresses of `TENSOR_FUNCTIONS`, and behind them torch's number for float64, int64."""
    found = [address(function(libtorch(), name)) for name in TENSOR_FUNCTIONS]
    return np.array([*found, function(libtorch(), _FLOAT64)()], np.int64)


@dataclass(eq=False)
class Container:
    """A graph with its constants, for one thread at a time, and the address of the function that runs it."""

    handle: int
    run: int


class Library:
    """The loaded library of a package."""

    def __init__(self, path: Path, file: Path) -> None:
        self.file = file
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            raise Unavailable(f"its library cannot be opened ({error})") from None
        # Without the lock under which a container gives its models to several threads.
        self._run = address(function(library, _PREFIX + _RUN))
        self._create, self._delete = function(library, _PREFIX + _CREATE), function(library, _PREFIX + _DELETE)
        # Not in all older libraries.
        self._last_error: Any = getattr(library, "AOTInductorGetLastError", None)
        self._spare: list[Container] = []
        first, counts = self.container(), []
        for of in (_INPUTS, _OUTPUTS):
            number = ctypes.c_size_t()
            if function(library, _PREFIX + of)(ctypes.c_void_p(first.handle), ctypes.byref(number)):
                raise Unavailable("its library does not tell how many tensors it takes")
            counts.append(number.value)
        self.inputs, self.outputs = counts
        self._spare.append(first)

    def container(self) -> Container:
        """A container that nobody else has."""
        with suppress(IndexError):
            return self._spare.pop()
        handle = ctypes.c_void_p()
        if self._create(ctypes.byref(handle), ctypes.c_size_t(1), b"cpu", None) or not handle.value:
            raise AOTIError(f"{self.file}: the compiled graph cannot be made ready: {self.last_error()}")
        made = Container(handle.value, self._run)
        # When the process ends, the system takes the memory; other threads may still be in a call.
        weakref.finalize(made, self._delete, handle).atexit = False
        return made

    def last_error(self) -> str:
        """What the last call in this thread that failed says of itself."""
        text = ctypes.c_char_p()
        if self._last_error is None or self._last_error(ctypes.byref(text)) or not text.value:
            return "the graph says no more; see what it printed on stderr"
        return text.value.decode(errors="replace").strip().splitlines()[0]
