"""Machine code for the processor at hand, made from the code that comes with the package by llvmlite alone.

What llvmlite has made is kept as an object file, so that the next process need not: in a folder that is this user's
alone, under the digest of all that it depends on, and behind a digest of its own. A file is written whole or not at
all; one whose digest is wrong is made anew. Where there is no such folder, each process makes it for itself.

Where there can be no machine code, or an environment variable says so, solves are done by torch's operations.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import stat
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .. import _log as log
from .._checks import first_line
from .._files import draft, read_plain
from ..errors import InputError
from . import code_file
from .code_file import Unusable

# The environment variable that chooses what solves are done by.
CHOICE = "NEML2_AOTI_PLUGIN_KERNELS"
NATIVE, TORCH = "native", "torch"
# A folder to keep object files in, in place of the user's cache folder.
VARIABLE = "NEML2_AOTI_PLUGIN_CACHE"
_DIGEST = hashlib.sha256().digest_size
_MOST_BYTES = 1 << 26
# When a user is told what the first call waits for, in seconds.
_PATIENCE = 0.5
# numba's way to call: status = function(result, exception, argument).
_Function = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


@dataclass(frozen=True)
class MachineCode:
    """The functions, each of which takes the address of a table and gives an integer, without the interpreter."""

    solve_block: Callable[[int], int]
    call_graph: Callable[[int], int]
    # Address of the method of a proxy executor, with the convention of C; see `machine/emit.py`.
    power: int
    # The object file that the code was read from or written to; None where none could be.
    kept: Path | None
    # What holds the code.
    engine: Any


_lock = threading.Lock()
# The machine code of this process, or why there is none; None until it is first asked for.
_found: MachineCode | str | None = None


def give_up(reason: str) -> None:
    """Use torch's operations from now on, for want of something else that machine code needs."""
    global _found
    _found = reason


def chosen() -> tuple[str, str]:
    """What new models are solved by, `NATIVE` or `TORCH`, and the reason; nothing is imported for that."""
    word = os.environ.get(CHOICE, "").strip().lower()
    if word not in ("", NATIVE, TORCH):
        raise InputError(f"the environment variable {CHOICE} is {word!r}, expected {NATIVE} or {TORCH}.")
    asked = f"{CHOICE}={word}"
    if word == TORCH:
        return TORCH, asked
    missing = _found if isinstance(_found, str) else ""
    if _found is None:
        try:
            if find_spec("llvmlite") is None:
                missing = "llvmlite is not installed (pip install llvmlite)"
            else:
                code_file.read()
        except Unusable as error:
            missing = str(error)
        except ValueError:
            # It has been imported in another way than from a file; the import will tell.
            pass
    if missing:
        return TORCH, f"{asked}, but {missing}" if word else missing
    return NATIVE, asked if word else "llvmlite is installed"


def machine_code() -> tuple[MachineCode | None, str]:
    """The machine code, None where torch's operations are used, and the reason for it."""
    if chosen()[0] == NATIVE:
        try:
            return load(), chosen()[1]
        except Unusable as error:
            log.emit("model", "warning", f"solves are done by torch's operations, which are slower: {error}")
    return None, chosen()[1]


def load() -> MachineCode:
    """The machine code of this process, made or read when it is first asked for."""
    global _found
    if _found is None:
        with _lock:
            if _found is None:
                try:
                    _found = _load()
                except Unusable as error:
                    _found = str(error)
    if isinstance(_found, str):
        raise Unusable(_found)
    return _found


def folder() -> Path | None:
    """Where object files are kept, whether or not it is there; None where that would be nowhere safe."""
    given = os.environ.get(VARIABLE, "").strip()
    home = os.path.expanduser("~") if os.environ.get("HOME", "~") else ""
    if given:
        path = Path(given)
    elif sys.platform == "win32":
        path = Path(os.environ.get("LOCALAPPDATA", "")) / "neml2-aoti-plugin"
    elif sys.platform == "darwin":
        path = Path(home, "Library/Caches/neml2-aoti-plugin")
    else:
        path = Path(os.environ.get("XDG_CACHE_HOME") or Path(home, ".cache")) / "neml2-aoti-plugin"
    # For a user without a home it would lie in the current folder, where anybody may have put anything.
    return path / "machine-code" if path.is_absolute() else None


def _load() -> MachineCode:
    """Take the object file that is kept, or make it; load it."""
    begun = time.perf_counter()
    code = code_file.read()
    try:
        import llvmlite
        from llvmlite import binding
    except Exception as error:
        raise Unusable(
            f"llvmlite cannot be imported ({type(error).__name__}: {error}). pip install -U llvmlite"
        ) from None
    version, llvm = llvmlite.__version__, tuple(binding.llvm_version_info)
    if llvm < code.llvm:
        raise Unusable(
            f"llvmlite {version} has LLVM {llvm[0]}, which does not read the code of LLVM {code.llvm[0]}. "
            "pip install -U llvmlite"
        )
    try:
        binding.initialize_native_target()
        binding.initialize_native_asmprinter()
        triple, cpu = binding.get_process_triple(), binding.get_host_cpu_name()
        features = binding.get_host_cpu_features().flatten()
        machine = target_machine(binding, triple, cpu, features)
        key = hashlib.sha256(repr((code.digest, version, llvm, triple, cpu, features)).encode()).hexdigest()
        place = _place(key)
        object_file = None if place is None else _read_kept(key, place)
        if object_file is None:
            object_file = emit(binding, code.bitcode, machine)
            place = _keep(key, object_file, place)
            took = time.perf_counter() - begun
            if took > _PATIENCE:
                where = f"kept in {place.parent}" if place else f"kept nowhere; {VARIABLE} names a folder"
                said = f"neml2-aoti-plugin: made machine code for this processor in {took:.1f} s ({where})"
                print(said, file=sys.stderr)
        return loaded(binding, object_file, machine, place)
    except (RuntimeError, ValueError) as error:
        raise Unusable(f"LLVM makes no code for this processor ({first_line(error)})") from error


def loaded(binding: Any, object_file: bytes, machine: Any, kept: Path | None) -> MachineCode:
    """Load an object file that was made for a processor."""
    empty = binding.parse_assembly("")
    empty.triple = machine.triple
    # All sections side by side: they refer to each other over at most 2 GiB, and where a process has mapped gigabytes
    # of libraries, as with torch for CUDA, LLVM's own manager of memory puts them farther apart and aborts the process.
    engine = binding.create_mcjit_compiler(empty, machine, use_lmm=True)
    engine.add_object_file(binding.ObjectFileRef.from_data(object_file))
    engine.finalize_object()
    return MachineCode(
        solve_block=_function(engine, "solve_block"),
        call_graph=_function(engine, "call_graph"),
        power=_address(engine, "power"),
        kept=kept,
        engine=engine,
    )


def target_machine(binding: Any, triple: str, cpu: str, features: str) -> Any:
    """LLVM's description of a processor."""
    target = binding.Target.from_triple(triple)
    return target.create_target_machine(cpu=cpu, features=features, opt=2, reloc="pic", codemodel="small", jit=True)


def emit(binding: Any, bitcode: bytes, machine: Any) -> bytes:
    """Make an object file of bitcode for a processor; a RuntimeError says that the code is not valid for it."""
    module = binding.parse_bitcode(bitcode)
    module.triple, module.data_layout = machine.triple, str(machine.target_data)
    module.verify()
    made: bytes = machine.emit_object(module)
    return made


def _address(engine: Any, name: str) -> int:
    at = int(engine.get_function_address(name))
    if not at:
        raise RuntimeError(f"the machine code has no function {name}")
    return at


def _function(engine: Any, name: str) -> Callable[[int], int]:
    """A function of the machine code; ctypes lets go of the interpreter while it runs."""
    function = _Function(_address(engine, name))

    def call(table: int) -> int:
        result, exception = ctypes.c_int64(), ctypes.c_void_p()
        function(ctypes.byref(result), ctypes.byref(exception), table)
        return result.value

    return call


def _place(key: str) -> Path | None:
    """Where the object file for a key is kept; None where no folder can be trusted."""
    where = folder()
    if where is None:
        return None
    with suppress(OSError):
        where.parent.mkdir(parents=True, exist_ok=True)
        where.mkdir(mode=0o700, exist_ok=True)
    return where / f"{key}.o" if _is_safe(where) else None


def _is_safe(where: Path) -> bool:
    """Whether a folder is this user's alone, and lies where only this user and root can put another in its place."""
    if sys.platform == "win32":
        return where.is_dir()
    with suppress(OSError):
        status, user = os.lstat(where), os.getuid()
        if stat.S_ISDIR(status.st_mode) and status.st_uid == user and not status.st_mode & 0o077:
            above = [os.stat(parent) for parent in where.resolve().parents]
            # In one with the sticky bit, as /tmp, others cannot exchange what is not theirs.
            return all(
                s.st_uid in (0, user) and (not s.st_mode & 0o022 or bool(s.st_mode & stat.S_ISVTX)) for s in above
            )
    return False


def _read_kept(key: str, place: Path) -> bytes | None:
    """The object file for a key; None where none is kept that is whole."""
    with suppress(InputError, OSError):
        content = read_plain(place, "an object file", _MOST_BYTES)
        if content[:_DIGEST] == _digest(key, content[_DIGEST:]):
            return content[_DIGEST:]
    return None


def _keep(key: str, made: bytes, place: Path | None) -> Path | None:
    """Keep an object file for other processes, if that can be done; give its path."""
    if place is not None:
        with suppress(OSError, InputError):
            with draft(place) as scratch:
                scratch.write_bytes(_digest(key, made) + made)
            return place
    log.emit("model", "info", "machine code cannot be kept, and is made in each process")
    return None


def _digest(key: str, made: bytes) -> bytes:
    return hashlib.sha256(key.encode() + made).digest()


def _in_child() -> None:
    """A thread that held the lock is not there in a forked process."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
