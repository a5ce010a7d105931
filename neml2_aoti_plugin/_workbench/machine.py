"""What this machine has: compiler, processor, threads, devices, and room to unpack packages."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from .._artifact.compatibility import lacking, machine

THREADS = "OMP_NUM_THREADS"
# The instruction sets that torch tells apart on each kind of processor.
SETS = {
    "x86_64": ("AVX2", "AVX512", "AVX512_VNNI", "AMX_TILE"),
    "aarch64": ("ASIMD",),
    "s390x": ("ZVECTOR",),
}


@dataclass(frozen=True)
class CompilerReport:
    """The C++ compiler that `neml2-compile` calls; a compiled model runs without one.

    Args:
        command: as it would be called.
        path: where it is; null if it is not there.
        version: the first line that it prints of itself; empty if it is not there.
    """

    command: str
    path: str | None
    version: str


@dataclass(frozen=True)
class ProcessorReport:
    """The processor.

    Args:
        machine: its kind, such as `x86_64`.
        cores: how many this process may use.
        instruction_sets: that graphs may be compiled for, in torch's names.
    """

    machine: str
    cores: int
    instruction_sets: tuple[str, ...]


@dataclass(frozen=True)
class ThreadsReport:
    """How many threads torch works with.

    Args:
        torch: threads of torch's operations and of the graphs.
        variable: the value of `OMP_NUM_THREADS`; null if it is not set.
    """

    torch: int
    variable: str | None


@dataclass(frozen=True)
class DeviceReport:
    """A device that torch sees.

    Args:
        name: as `device=` takes it, such as `cuda:0`.
        kind: what it is.
    """

    name: str
    kind: str


@dataclass(frozen=True)
class ScratchReport:
    """The folder in which packages are unpacked for the moment in which they are loaded.

    Args:
        folder: its path; empty where Python finds none that can be written to.
        free: free bytes in it.
        executable: whether libraries may be loaded from it.
    """

    folder: str
    free: int
    executable: bool


def compiler() -> CompilerReport:
    """Look for the compiler that torch would call."""
    default = {"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++")
    command = os.environ.get("CXX") or default
    path = shutil.which(command)
    return CompilerReport(command, path, "" if path is None else _version(path))


def processor() -> ProcessorReport:
    """Look at the processor."""
    kind = machine()
    return ProcessorReport(kind, cores(), tuple(name for name in SETS.get(kind, ()) if not lacking(name)))


def cores() -> int:
    """How many cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def threads() -> ThreadsReport:
    """How many threads torch works with."""
    return ThreadsReport(torch.get_num_threads(), os.environ.get(THREADS))


def devices() -> tuple[DeviceReport, ...]:
    """The devices that torch sees."""
    found = [DeviceReport("cpu", platform.processor() or machine())]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            found.append(DeviceReport(f"cuda:{index}", torch.cuda.get_device_name(index)))
    xpu = getattr(torch, "xpu", None)
    if xpu is not None and xpu.is_available():
        found += [DeviceReport(f"xpu:{index}", xpu.get_device_name(index)) for index in range(xpu.device_count())]
    if torch.backends.mps.is_available():
        found.append(DeviceReport("mps", "Apple GPU"))
    return tuple(found)


def scratch() -> ScratchReport:
    """Look at the folder in which packages are unpacked."""
    try:
        folder = Path(tempfile.gettempdir())
        free = shutil.disk_usage(folder).free
    except OSError:
        return ScratchReport("", 0, False)
    flags = os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0) if hasattr(os, "statvfs") else 0
    return ScratchReport(str(folder), free, not flags)


def _version(path: str) -> str:
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = (done.stdout or done.stderr).strip().splitlines()
    return lines[0] if lines else ""
