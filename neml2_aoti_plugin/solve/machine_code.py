"""Compile kernels with numba, and keep their machine code on disk where that can be done.

The folders are those of numba's own cache: the one that `NUMBA_CACHE_DIR` names, and no other; else `__pycache__`
beside this module and the user's cache folder. A file is read from the first of them that has it, also where the
folder cannot be written, and is written to the first that takes it. Where none does, each process compiles.

A file holds one kernel for one form of its arguments and one processor. It begins with a digest of what it is, what it
was compiled from, and its content; unless that is right, nothing in it is unpickled. So a file that is damaged, old or
another's is compiled anew and written over. There is no index, which processes that write at once could spoil.
"""

from __future__ import annotations

import hashlib
import marshal
import os
import pickle
import pkgutil
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core import caching, compiler, serialize
from numba.core.compiler_lock import global_compiler_lock

from .. import log
from ..errors import InputError
from ..files import draft, read_plain
from .undisturbed import undisturbed

# Of one kernel; they have some 100 kB.
_MOST_BYTES = 1 << 28
_DIGEST = hashlib.sha256().digest_size
# Kernels whose machine code no folder took.
not_kept: list[str] = []


def kernel(function: Callable[..., Any]) -> Any:
    """A function as machine code, compiled at its first call for each form of its arguments.

    Args:
        function: arithmetic and loops over arrays, of a module in this package.
    """
    compiled: Any = _compiled(function)
    if numba.config.DISABLE_JIT:
        return compiled
    # With a numba of another make it compiles in each process.
    with suppress(Exception):
        compiled._cache = _Files(function.__name__)
    # A compile that a signal handler ends may leave numba unable to compile anything; see also `choice`.
    compile_now = compiled.compile
    compiled.compile = lambda sig: undisturbed(lambda: compile_now(sig))
    return compiled


def inner(function: Callable[..., Any]) -> Any:
    """A function that only kernels call, whose machine code is kept with theirs."""
    return _compiled(function, no_cpython_wrapper=True)


def inlined(function: Callable[..., Any]) -> Any:
    """A short function that only kernels call, compiled as if its lines stood there."""
    return _compiled(function, no_cpython_wrapper=True, inline="always")


def _compiled(function: Callable[..., Any], **options: Any) -> Any:
    return numba.njit(nogil=True, error_model="numpy", no_cfunc_wrapper=True, **options)(function)


@cache
def folders() -> tuple[Path, ...]:
    """Where machine code is looked for, in this order."""
    here = os.path.abspath(__file__)
    kinds = [caching.UserProvidedCacheLocator]
    if not numba.config.CACHE_DIR:
        kinds = [caching.InTreeCacheLocator, caching.UserWideCacheLocator]
    paths = [Path(kind(_write, here).get_cache_path()) for kind in kinds]
    # For a user without a home, numba's folder is `~` in the current one, where anybody may have put anything.
    return tuple(path for path in paths if path.is_absolute())


@cache
def _origin() -> bytes:
    """What machine code is made of: the compiler, and the code of this package.

    It is the code as Python runs it. A source that has changed while its size and time have not is not run either.
    """
    found = hashlib.sha256(repr((sys.version, numba.__version__, llvmlite.__version__)).encode())
    for module in pkgutil.iter_modules([os.path.dirname(os.path.abspath(__file__))]):
        loader: Any = module.module_finder.find_spec(module.name, None).loader  # type: ignore[union-attr]
        # In version 2 of the format the bytes do not depend on which objects happen to be shared.
        found.update(marshal.dumps(loader.get_code(module.name), 2))
    return found.digest()


class _Files(caching.NullCache):
    """The files of one kernel, as numba asks for them.

    Args:
        name: of the kernel.
    """

    def __init__(self, name: str) -> None:
        self._name, self._folders, self._from = name, folders(), _origin()

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The code for these argument types; None where none is whole and current."""
        target_context.refresh()
        file, key = self._file(sig, target_context.codegen())
        for folder in self._folders:
            with suppress(Exception):
                kept = read_plain(folder / file, "machine code", _MOST_BYTES)
                data = memoryview(kept)[_DIGEST:]
                if kept[:_DIGEST] == self._digest(key, data):
                    return compiler.CompileResult._rebuild(target_context, *pickle.loads(data))
        return None

    def save_overload(self, sig: Any, result: Any) -> None:
        """Keep machine code, if it can be kept."""
        with suppress(Exception):
            file, key = self._file(sig, result.codegen)
            data = serialize.dumps(result._reduce())
            for folder in self._folders:
                with suppress(OSError, InputError):
                    _write(folder / file, self._digest(key, data) + data)
                    return
        not_kept.append(self._name)
        log.emit("model", "info", f"machine code of {self._name} cannot be kept and is compiled in each process")

    def _file(self, sig: Any, codegen: Any) -> tuple[str, bytes]:
        """The name of a file, and all that its content depends on besides `_origin`."""
        key = repr((self._name, sig, codegen.magic_tuple())).encode()
        return f"{self._name}.{sys.implementation.cache_tag}.{hashlib.sha256(key).hexdigest()[:16]}.nbc", key

    def _digest(self, key: bytes, data: bytes | memoryview) -> bytes:
        return hashlib.sha256(b"".join([self._from, hashlib.sha256(key).digest(), data])).digest()


def _write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with draft(path) as scratch:
        scratch.write_bytes(content)


if hasattr(os, "register_at_fork"):
    # A fork waits until another thread has compiled: the new process could not, with that thread's lock and its half of
    # the work.
    os.register_at_fork(
        before=global_compiler_lock.acquire,
        after_in_parent=global_compiler_lock.release,
        after_in_child=global_compiler_lock.release,
    )
