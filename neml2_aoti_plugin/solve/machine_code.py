"""Compile kernels with numba, and keep their machine code on disk where that can be done.

numba keeps machine code beside the module, or else in the user's own cache folder; where neither can be written, a
kernel is compiled anew in each process. Nothing that goes wrong with the files on disk reaches a caller. What numba
would take for current by the time of the file's last change is told here by the content of the sources; and the code
itself carries a digest, for a damaged file must not run.
"""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numba
from numba.core import caching

_DIGEST = hashlib.sha256().digest_size


def kernel(function: Callable[..., Any]) -> Any:
    """A function as machine code, compiled at its first call for each form of its arguments.

    Args:
        function: arithmetic and loops over arrays.
    """
    compiled: Any = numba.njit(nogil=True, error_model="numpy")(function)
    # Where there is no folder that can be written, or with a numba of another make, it compiles in the process.
    with suppress(Exception):
        compiled._cache = _Cache(function)
    return compiled


def _stamp() -> tuple[str, int]:
    """What the sources are: numba compares this with what was kept."""
    found = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        found.update(file.read_bytes())
    return found.hexdigest(), 0


class _File(caching.IndexDataCacheFile):
    """Files of machine code that carry a digest."""

    def _save_data(self, name: str, data: Any) -> None:
        written: bytes = self._dump(data)
        with self._open_for_write(os.path.join(self._cache_path, name)) as target:
            target.write(hashlib.sha256(written).digest() + written)

    def _load_data(self, name: str) -> Any:
        with open(os.path.join(self._cache_path, name), "rb") as source:
            data = source.read()
        if hashlib.sha256(data[_DIGEST:]).digest() != data[:_DIGEST]:
            raise ValueError(f"{name} is damaged")
        return pickle.loads(data[_DIGEST:])


class _Cache(caching.FunctionCache):
    """numba's cache of a function, which never fails a call."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self._cache_file = _File(
            cache_path=self._cache_path, filename_base=self._impl.filename_base, source_stamp=_STAMP
        )

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """What is kept for these argument types; None where there is nothing, or nothing that is whole."""
        try:
            return super().load_overload(sig, target_context)
        except Exception:
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep machine code, if it can be kept."""
        try:
            super().save_overload(sig, data)
        except Exception:
            self._start_over(sig, data)

    def _start_over(self, sig: Any, data: Any) -> None:
        """A damaged index keeps numba from writing a new one."""
        with suppress(Exception):
            self.flush()
            super().save_overload(sig, data)


_STAMP = _stamp()
