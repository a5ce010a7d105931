"""What compiled models need of an environment: packages, machine code, compiler, threads, a temporary folder."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

import torch

from .._artifact.compatibility import lacking, machine
from .._graphs.graph import means
from .._solve import machine_code
from .._status import Status, installed
from ..errors import AOTIError
from .output import in_one_line

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
    cure: str = ""  # the command or change that mends it; empty where all is well, or `says` ends with it


def neml2_finding() -> Finding:
    """Is neml2 there, and can it be imported? It is, after which the plugin's status is what it is in a program."""
    version = installed("neml2")
    if version is None:
        return Finding("neml2", "problem", "is not installed", "pip install neml2")
    try:
        import neml2  # noqa: F401
    except Exception as error:
        cure = "Mend what the message names; if it is NEML2_LOGS, correct it or unset it. Else: pip install -U neml2"
        return Finding("neml2", "problem", f"cannot be imported ({in_one_line(error)})", cure)
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
    here = f"torch {torch.__version__}"
    if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0":
        says = f"{here} loads no entry points (TORCH_DEVICE_BACKEND_AUTOLOAD=0), so programs that import "
        cure = "Add `import neml2_aoti_plugin` to your program, or unset TORCH_DEVICE_BACKEND_AUTOLOAD."
        return Finding("torch", "advice", f"{says}neml2 alone do not get the plugin", cure)
    if not metadata.entry_points(group="torch.backends", name="neml2_aoti_plugin"):
        says = f"{here}; this plugin has no entry point here, so programs must import neml2_aoti_plugin first"
        return Finding("torch", "advice", says, "pip install --force-reinstall neml2-aoti-plugin")
    return Finding("torch", "fine", f"{here} loads the plugin in every program that imports torch or neml2")


def solves() -> tuple[str, Finding]:
    """Are solves done by machine code, and where is it kept?"""
    try:
        # It imports llvmlite, which may be there and not work.
        found, reason = means()
    except AOTIError as error:
        return "", Finding("solves", "problem", str(error), f"unset {machine_code.CHOICE}")
    if found is None:
        asked_for = reason == f"{machine_code.CHOICE}={machine_code.TORCH}"
        cure = f"unset {machine_code.CHOICE}" if asked_for else "pip install -U llvmlite neml2-aoti-plugin"
        says = f"done by torch's operations, and graphs by torch's runner ({reason}); machine code is faster on a CPU"
        return "", Finding("solves", "advice", says, cure)
    if not found.code.kept:
        says = "done by machine code, which cannot be kept: each process makes it anew, which takes a second"
        cure = f"Name a folder that only you can write to: {machine_code.VARIABLE}=FOLDER"
        return "", Finding("solves", "advice", says, cure)
    folder = str(found.code.kept.parent)
    return folder, Finding("solves", "fine", f"done by machine code, which is kept in {folder}")


def compiler() -> tuple[str | None, Finding]:
    """Is there the compiler that torch would call?"""
    command = os.environ.get("CXX") or {"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++")
    path = shutil.which(command)
    if path is None:
        says = f"{command} is not on the PATH; compiled models run without it, neml2-compile does not"
        cure = "Install one (for example the package g++), or name it in CXX."
        return None, Finding("compiler", "advice", says, cure)
    version = ""
    with suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=False)
        version = (done.stdout or done.stderr).strip().partition("\n")[0]
    return path, Finding("compiler", "fine", f"neml2-compile finds {version or path}")


def cores() -> int:
    """How many cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def instruction_sets(machine: str) -> tuple[str, ...]:
    """The instruction sets of this processor that graphs may be compiled for, in torch's names."""
    return tuple(name for name in SETS.get(machine, ()) if not lacking(name))


def threads(number: int, available: int) -> Finding:
    """Are there more threads than cores?"""
    says = f"torch uses {number} on the {available} core(s) that this process may use"
    if number > available:
        return Finding("threads", "problem", f"{says}: they wait for each other", f"export {THREADS}={available}")
    if number > 1:
        says += f"; `neml2-aoti bench STUB --threads 1,{number}` shows what a model gains by them"
    return Finding("threads", "fine", says)


def devices() -> dict[str, str]:
    """The devices that torch sees, as `device=` takes them, and what each is."""
    found = {"cpu": platform.processor() or machine()}
    for name in ("cuda", "xpu"):
        family = getattr(torch, name, None)
        if family is not None and family.is_available():
            found |= {f"{name}:{index}": family.get_device_name(index) for index in range(family.device_count())}
    if torch.backends.mps.is_available():
        found["mps"] = "Apple GPU"
    return found


def scratch() -> tuple[str, Finding]:
    """Where can packages be unpacked?"""
    level: Level = "problem"
    try:
        folder = tempfile.gettempdir()
        free = shutil.disk_usage(folder).free
    except OSError:
        folder, says = "", "there is none that can be written to"
    else:
        if hasattr(os, "statvfs") and os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0):
            says = f"{folder} is mounted noexec, so that no library loads there"
        elif free < LEAST_ROOM:
            says = f"{folder} has {free >> 20} MiB left"
        else:
            level, says = "fine", f"compiled graphs are unpacked in {folder}, which has {free >> 30} GiB left"
    cure = "Name a folder in TMPDIR that has room and is not mounted noexec." if level == "problem" else ""
    return folder, Finding("temporary folder", level, says, cure)
