"""Findings about an environment: its packages, its compiler, its threads, its folders."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

from .._program.native_graph import means
from .._solve import choice, machine_code
from ..errors import AOTIError
from . import machine

Level = Literal["fine", "advice", "problem"]
# The largest packages seen have a few megabytes; below this there is no room for several processes.
LEAST_ROOM = 1 << 28


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        subject: what.
        level: `fine`, `advice` (works, but could be better), or `problem`.
        says: what was found.
        cure: the command or change that mends it; empty where all is well.
    """

    subject: str
    level: Level
    says: str
    cure: str = ""


@dataclass(frozen=True)
class KernelsReport:
    """What the Newton loop runs on.

    Args:
        implementation: `native` or `torch`; empty where the environment variable holds another word.
        reason: why.
        folder: where machine code is kept; empty where there is no such place.
        files: how many files of machine code are kept there.
    """

    implementation: str
    reason: str
    folder: str
    files: int


def import_neml2() -> str:
    """Import neml2, after which the plugin's status is what it is in a program; say what went wrong."""
    try:
        import neml2  # noqa: F401
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0]}"
    return ""


def of_neml2(version: str | None, trouble: str) -> Finding:
    """Is neml2 there, and can it be imported?"""
    if version is None:
        return Finding("neml2", "problem", "is not installed", "pip install neml2")
    if trouble:
        cure = "Mend what the message names; if it is NEML2_LOGS, correct it or unset it. Else: pip install -U neml2"
        return Finding("neml2", "problem", f"cannot be imported ({trouble})", cure)
    return Finding("neml2", "fine", f"neml2 {version} can be imported")


def of_plugin(active: bool, reason: str) -> Finding:
    """Is the plugin active?"""
    if active:
        return Finding("plugin", "fine", f"active: {reason}")
    cure = "Import neml2_aoti_plugin before neml2, or reinstall it: pip install --force-reinstall neml2-aoti-plugin"
    if "switched off" in reason:
        cure = "unset NEML2_AOTI_PLUGIN"
    return Finding("plugin", "problem", f"not active: {reason}", cure)


def of_torch(version: str) -> Finding:
    """Does torch put the plugin in place?"""
    if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0":
        says = f"torch {version}; it loads no entry points (TORCH_DEVICE_BACKEND_AUTOLOAD=0), so programs that import "
        cure = "Add `import neml2_aoti_plugin` to your program, or unset TORCH_DEVICE_BACKEND_AUTOLOAD."
        return Finding("torch", "advice", f"{says}neml2 alone do not get the plugin", cure)
    if not metadata.entry_points(group="torch.backends", name="neml2_aoti_plugin"):
        says = f"torch {version}; this plugin has no entry point here, so programs must import neml2_aoti_plugin first"
        return Finding("torch", "advice", says, "pip install --force-reinstall neml2-aoti-plugin")
    return Finding("torch", "fine", f"torch {version}; it puts the plugin in place in every program that imports it")


def newton_loop() -> KernelsReport:
    """What the Newton loop runs on here."""
    try:
        # It imports llvmlite, which may be there and not work.
        found, reason = means()
    except AOTIError as error:
        return KernelsReport("", str(error), "", 0)
    if found is None:
        return KernelsReport(choice.TORCH, reason, "", 0)
    kept = found.code.kept
    return KernelsReport(choice.NATIVE, reason, str(kept.parent) if kept else "", len(machine_code.files()))


def of_kernels(kernels: KernelsReport) -> Finding:
    """Are solves done by machine code, and is it kept?"""
    if not kernels.implementation:
        return Finding("Newton loop", "problem", kernels.reason, f"unset {choice.VARIABLE}")
    if kernels.implementation == choice.TORCH:
        asked_for = kernels.reason == f"{choice.VARIABLE}={choice.TORCH}"
        cure = f"unset {choice.VARIABLE}" if asked_for else "pip install -U llvmlite neml2-aoti-plugin"
        says = (
            f"by torch's operations, and graphs by torch's runner ({kernels.reason}); machine code is faster on a CPU"
        )
        return Finding("Newton loop", "advice", says, cure)
    if not kernels.folder:
        says = "by machine code, which cannot be kept: each process makes it anew, which takes a second"
        cure = f"Name a folder that only you can write to: {machine_code.VARIABLE}=FOLDER"
        return Finding("Newton loop", "advice", says, cure)
    return Finding("Newton loop", "fine", f"by machine code, which is kept in {kernels.folder}")


def of_compiler(compiler: machine.CompilerReport) -> Finding:
    """Is there a compiler?"""
    if compiler.path is None:
        says = f"{compiler.command} is not on the PATH; compiled models run without it, neml2-compile does not"
        return Finding("compiler", "advice", says, "Install one (for example the package g++), or name it in CXX.")
    return Finding("compiler", "fine", compiler.version or compiler.path)


def of_threads(threads: machine.ThreadsReport, cores: int) -> Finding:
    """Are there more threads than cores, or more than several processes should have?"""
    says = f"torch uses {threads.torch} of the {cores} core(s) that this process may use"
    if threads.torch > cores:
        cure = f"export {machine.THREADS}={cores}"
        return Finding("threads", "problem", f"{says}: they wait for each other", cure)
    if threads.variable is None and threads.torch > 1:
        cure = f"export {machine.THREADS}=1; `neml2-aoti bench STUB --threads 1,{threads.torch}` tells what yours gains"
        return Finding("threads", "advice", f"{says}; where several processes run side by side, one each is best", cure)
    return Finding("threads", "fine", says)


def of_scratch(scratch: machine.ScratchReport) -> Finding:
    """Can packages be unpacked?"""
    cure = "Name a folder in TMPDIR that has room and is not mounted noexec."
    if not scratch.folder:
        return Finding("temporary folder", "problem", "there is none that can be written to", cure)
    if not scratch.executable:
        return Finding("temporary folder", "problem", f"{scratch.folder} is mounted noexec", cure)
    if scratch.free < LEAST_ROOM:
        return Finding("temporary folder", "problem", f"{scratch.folder} has {scratch.free >> 20} MiB left", cure)
    return Finding("temporary folder", "fine", f"{scratch.folder}, {scratch.free >> 30} GiB left")
