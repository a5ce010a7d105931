"""What an environment has that compiled models need, each with a finding: packages, compiler, threads, folders."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from .._solve import machine_code
from .._status import Status
from ..errors import AOTIError
from .output import first_line

Level = Literal["fine", "advice", "problem"]

THREADS = "OMP_NUM_THREADS"
# The largest packages seen have a few megabytes; below this there is no room for several processes.
LEAST_ROOM = 1 << 28
# The instruction sets that torch distinguishes on each kind of processor.
SETS = {"x86_64": ("AVX2", "AVX512", "AVX512_VNNI", "AMX_TILE"), "aarch64": ("ASIMD",), "s390x": ("ZVECTOR",)}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    subject: str  # what
    level: Level  # `fine`, `advice` (works, but could be better), or `problem`
    says: str  # what was found
    cure: str = ""  # the command or change that mends it; empty where all is well


@dataclass(frozen=True)
class KernelsReport:
    """What the Newton loop runs on."""

    implementation: str  # `native` or `torch`; empty where the environment variable holds another word
    reason: str  # why
    folder: str = ""  # where machine code is kept; empty where there is no such place
    files: int = 0  # how many files of machine code are kept there


@dataclass(frozen=True)
class CompilerReport:
    """The C++ compiler that `neml2-compile` calls; a compiled model runs without one."""

    command: str  # as it would be called
    path: str | None  # where it is; null if it is not there
    version: str  # the first line that it prints of itself; empty if it is not there


@dataclass(frozen=True)
class ProcessorReport:
    """The processor."""

    machine: str  # its kind, such as `x86_64`
    cores: int  # how many this process may use
    instruction_sets: tuple[str, ...]  # that graphs may be compiled for, in torch's names


@dataclass(frozen=True)
class ThreadsReport:
    """How many threads torch works with."""

    torch: int  # threads of torch's operations and of the graphs
    variable: str | None  # the value of `OMP_NUM_THREADS`; null if it is not set


@dataclass(frozen=True)
class DeviceReport:
    """A device that torch sees."""

    name: str  # as `device=` takes it, such as `cuda:0`
    kind: str  # what it is


@dataclass(frozen=True)
class ScratchReport:
    """The folder in which packages are unpacked for the moment in which they are loaded."""

    folder: str  # its path; empty where Python finds none that can be written to
    free: int  # free bytes in it
    executable: bool  # whether libraries may be loaded from it


def import_neml2() -> str:
    """Import neml2, after which the plugin's status is what it is in a program; say what went wrong."""
    try:
        import neml2  # noqa: F401
    except Exception as error:
        return first_line(error)
    return ""


def neml2_finding(version: str | None, trouble: str) -> Finding:
    """Is neml2 there, and can it be imported?"""
    if version is None:
        return Finding("neml2", "problem", "is not installed", "pip install neml2")
    if trouble:
        cure = "Mend what the message names; if it is NEML2_LOGS, correct it or unset it. Else: pip install -U neml2"
        return Finding("neml2", "problem", f"cannot be imported ({trouble})", cure)
    return Finding("neml2", "fine", f"neml2 {version} can be imported")


def plugin_finding(status: Status) -> Finding:
    """Is the plugin active?"""
    if status.active:
        return Finding("plugin", "fine", f"active: {status.reason}")
    cure = "Import neml2_aoti_plugin before neml2, or reinstall it: pip install --force-reinstall neml2-aoti-plugin"
    if status.armed is None and "NEML2_AOTI_PLUGIN" in os.environ:
        cure = "unset NEML2_AOTI_PLUGIN"
    return Finding("plugin", "problem", f"not active: {status.reason}", cure)


def torch_finding() -> Finding:
    """Does torch put the plugin in place?"""
    import torch

    here = f"torch {torch.__version__}"
    if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0":
        says = f"{here} loads no entry points (TORCH_DEVICE_BACKEND_AUTOLOAD=0), so programs that import "
        cure = "Add `import neml2_aoti_plugin` to your program, or unset TORCH_DEVICE_BACKEND_AUTOLOAD."
        return Finding("torch", "advice", f"{says}neml2 alone do not get the plugin", cure)
    if not metadata.entry_points(group="torch.backends", name="neml2_aoti_plugin"):
        says = f"{here}; this plugin has no entry point here, so programs must import neml2_aoti_plugin first"
        return Finding("torch", "advice", says, "pip install --force-reinstall neml2-aoti-plugin")
    return Finding("torch", "fine", f"{here} puts the plugin in place in every program that imports it")


def newton_loop() -> tuple[KernelsReport, Finding]:
    """Are solves done by machine code, and is it kept?"""
    from .._graphs.graph import means

    subject = "Newton loop"
    try:
        # It imports llvmlite, which may be there and not work.
        found, reason = means()
    except AOTIError as error:
        return KernelsReport("", str(error)), Finding(subject, "problem", str(error), f"unset {machine_code.CHOICE}")
    if found is None:
        asked_for = reason == f"{machine_code.CHOICE}={machine_code.TORCH}"
        cure = f"unset {machine_code.CHOICE}" if asked_for else "pip install -U llvmlite neml2-aoti-plugin"
        says = f"by torch's operations, and graphs by torch's runner ({reason}); machine code is faster on a CPU"
        return KernelsReport(machine_code.TORCH, reason), Finding(subject, "advice", says, cure)
    files, kept = len(machine_code.files()), found.code.kept
    if not kept:
        says = "by machine code, which cannot be kept: each process makes it anew, which takes a second"
        cure = f"Name a folder that only you can write to: {machine_code.VARIABLE}=FOLDER"
        return KernelsReport(machine_code.NATIVE, reason, files=files), Finding(subject, "advice", says, cure)
    report = KernelsReport(machine_code.NATIVE, reason, str(kept.parent), files)
    return report, Finding(subject, "fine", f"by machine code, which is kept in {kept.parent}")


def compiler() -> tuple[CompilerReport, Finding]:
    """Is there the compiler that torch would call?"""
    command = os.environ.get("CXX") or {"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++")
    path = shutil.which(command)
    if path is None:
        says = f"{command} is not on the PATH; compiled models run without it, neml2-compile does not"
        cure = "Install one (for example the package g++), or name it in CXX."
        return CompilerReport(command, None, ""), Finding("compiler", "advice", says, cure)
    version = ""
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=False)
        version = next(iter((done.stdout or done.stderr).strip().splitlines()), "")
    except (OSError, subprocess.TimeoutExpired):
        pass
    return CompilerReport(command, path, version), Finding("compiler", "fine", version or path)


def processor() -> ProcessorReport:
    """The processor of this machine."""
    from .._artifact.compatibility import lacking, machine

    kind, affinity = machine(), getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    return ProcessorReport(kind, cores, tuple(name for name in SETS.get(kind, ()) if not lacking(name)))


def threads(cores: int) -> tuple[ThreadsReport, Finding]:
    """Are there more threads than cores, or more than several processes should have?"""
    import torch

    report = ThreadsReport(torch.get_num_threads(), os.environ.get(THREADS))
    says = f"torch uses {report.torch} of the {cores} core(s) that this process may use"
    if report.torch > cores:
        cure = f"export {THREADS}={cores}"
        return report, Finding("threads", "problem", f"{says}: they wait for each other", cure)
    if report.variable is None and report.torch > 1:
        cure = f"export {THREADS}=1; `neml2-aoti bench STUB --threads 1,{report.torch}` shows what yours gains"
        says = f"{says}; where several processes run side by side, one each is best"
        return report, Finding("threads", "advice", says, cure)
    return report, Finding("threads", "fine", says)


def devices() -> tuple[DeviceReport, ...]:
    """The devices that torch sees."""
    import torch

    from .._artifact.compatibility import machine

    found = [DeviceReport("cpu", platform.processor() or machine())]
    for name in ("cuda", "xpu"):
        family = getattr(torch, name, None)
        if family is not None and family.is_available():
            count = range(family.device_count())
            found += [DeviceReport(f"{name}:{index}", family.get_device_name(index)) for index in count]
    if torch.backends.mps.is_available():
        found.append(DeviceReport("mps", "Apple GPU"))
    return tuple(found)


def scratch() -> tuple[ScratchReport, Finding]:
    """Can packages be unpacked?"""
    subject, cure = "temporary folder", "Name a folder in TMPDIR that has room and is not mounted noexec."
    try:
        folder = Path(tempfile.gettempdir())
        free = shutil.disk_usage(folder).free
    except OSError:
        says = "there is none that can be written to"
        return ScratchReport("", 0, False), Finding(subject, "problem", says, cure)
    flags = os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0) if hasattr(os, "statvfs") else 0
    report = ScratchReport(str(folder), free, not flags)
    if flags:
        return report, Finding(subject, "problem", f"{folder} is mounted noexec", cure)
    if free < LEAST_ROOM:
        return report, Finding(subject, "problem", f"{folder} has {free >> 20} MiB left", cure)
    return report, Finding(subject, "fine", f"{folder}, {free >> 30} GiB left")
