"""Does this environment run compiled models, and this artifact? Facts, and findings with a cure for each."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

import torch

from .._status import Status, status
from ..artifact.compatibility import check
from ..artifact.parse import read_metadata
from ..errors import AOTIError
from ..solve import choice
from . import machine, native
from .describe import name_of, release_of
from .target import Target

Level = Literal["fine", "advice", "problem"]

# What an environment may hold that changes how models load or run.
VARIABLES = (
    *("NEML2_AOTI_PLUGIN", "NEML2_AOTI_PLUGIN_MODE", "NEML2_AOTI_PLUGIN_REQUIRE_SEAL", "NEML2_AOTI_PLUGIN_ROOTS"),
    *("NEML2_AOTI_PLUGIN_BLOCK_ROWS", "NEML2_AOTI_PLUGIN_KERNELS", "TORCH_DEVICE_BACKEND_AUTOLOAD", "NEML2_LOGS"),
    *("NEML2_CAPTURE_SOLVE_FAILURE", "NUMBA_CACHE_DIR", "TMPDIR", machine.THREADS),
)
PACKAGES = ("neml2", "torch", "numba", "numpy", "safetensors", "matplotlib")
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
        implementation: `numba` or `torch`; empty where the environment variable holds another word.
        reason: why.
        folders: where machine code of kernels is looked for.
        files: how many files of machine code there are.
    """

    implementation: str
    reason: str
    folders: tuple[str, ...]
    files: int


@dataclass(frozen=True)
class ArtifactSummary:
    """What was looked over, and whether it is sealed.

    Args:
        artifact: its path.
        model: name of the model.
        schema: version of its metadata.
        release: the neml2 releases that write this schema.
        leaf: that was looked over, as `device/dtype`.
        sealed: whether it has a seal; it is as it was sealed then.
        runs: whether nothing speaks against running it here.
    """

    artifact: str
    model: str
    schema: int
    release: str
    leaf: str
    sealed: bool
    runs: bool


@dataclass(frozen=True)
class Diagnosis:
    """What `doctor` found.

    Args:
        versions: of packages by name, with Python's; null for those that are not installed.
        plugin: whether the plugin is active, how, and over what; as `neml2_aoti_plugin.status()` tells it.
        binding: what neml2's own binding does with this torch: as measured by us, or as tried just now.
        kernels: what the Newton loop runs on.
        compiler: for `neml2-compile`.
        processor: of this machine.
        threads: of torch.
        devices: that torch sees.
        scratch: where packages are unpacked.
        variables: environment variables that are set and matter here.
        artifact: what was looked over; null if none was given, or its metadata cannot be read.
        findings: everything that was looked at, with a cure where one is needed.
    """

    versions: dict[str, str | None]
    plugin: Status
    binding: str
    kernels: KernelsReport
    compiler: machine.CompilerReport
    processor: machine.ProcessorReport
    threads: machine.ThreadsReport
    devices: tuple[machine.DeviceReport, ...]
    scratch: machine.ScratchReport
    variables: dict[str, str]
    artifact: ArtifactSummary | None
    findings: tuple[Finding, ...]

    @property
    def healthy(self) -> bool:
        """Whether there is no problem among the findings."""
        return all(finding.level != "problem" for finding in self.findings)


def diagnose(
    target: Target | None = None, device: str | None = None, dtype: str | None = None, *, try_binding: bool = False
) -> Diagnosis:
    """Look this environment over, and an artifact if one is given.

    Args:
        target: the artifact.
        device: of its leaf.
        dtype: of its leaf.
        try_binding: whether to try neml2's own binding in a process of its own, which takes some seconds.

    Returns:
        What was found.
    """
    trouble = _import_neml2()
    now = status()
    kernels = _kernels()
    looked_at = (
        _of_neml2(now.neml2, trouble),
        _of_plugin(now.active, now.reason),
        _of_torch(now.torch or ""),
        _of_kernels(kernels),
        _of_compiler(compiler := machine.compiler()),
        _of_threads(threads := machine.threads(), machine.cores()),
        _of_scratch(scratch := machine.scratch()),
    )
    artifact, found = (None, ()) if target is None else _of_artifact(target, device, dtype)
    runs = artifact is not None and artifact.runs
    binding = native.try_binding(target if runs else None) if try_binding else now.native_binding
    return Diagnosis(
        versions={name: _version(name) for name in PACKAGES} | {"neml2-aoti-plugin": now.plugin, "Python": now.python},
        plugin=now,
        binding=binding,
        kernels=kernels,
        compiler=compiler,
        processor=machine.processor(),
        threads=threads,
        devices=machine.devices(),
        scratch=scratch,
        variables={name: os.environ[name] for name in VARIABLES if name in os.environ},
        artifact=artifact,
        findings=(*looked_at, *found),
    )


def _import_neml2() -> str:
    """Import neml2, after which the plugin's status is what it is in a program; say what went wrong."""
    try:
        import neml2  # noqa: F401
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0]}"
    return ""


def _of_neml2(version: str | None, trouble: str) -> Finding:
    if version is None:
        return Finding("neml2", "problem", "is not installed", "pip install neml2")
    if trouble:
        cure = "Mend what the message names; if it is NEML2_LOGS, correct it or unset it. Else: pip install -U neml2"
        return Finding("neml2", "problem", f"cannot be imported ({trouble})", cure)
    return Finding("neml2", "fine", f"neml2 {version} can be imported")


def _of_plugin(active: bool, reason: str) -> Finding:
    if active:
        return Finding("plugin", "fine", f"active: {reason}")
    cure = "Import neml2_aoti_plugin before neml2, or reinstall it: pip install --force-reinstall neml2-aoti-plugin"
    if "switched off" in reason:
        cure = "unset NEML2_AOTI_PLUGIN"
    return Finding("plugin", "problem", f"not active: {reason}", cure)


def _of_torch(version: str) -> Finding:
    if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0":
        says = f"torch {version}; it loads no entry points (TORCH_DEVICE_BACKEND_AUTOLOAD=0), so programs that import "
        cure = "Add `import neml2_aoti_plugin` to your program, or unset TORCH_DEVICE_BACKEND_AUTOLOAD."
        return Finding("torch", "advice", f"{says}neml2 alone do not get the plugin", cure)
    if not metadata.entry_points(group="torch.backends", name="neml2_aoti_plugin"):
        says = f"torch {version}; this plugin has no entry point here, so programs must import neml2_aoti_plugin first"
        return Finding("torch", "advice", says, "pip install --force-reinstall neml2-aoti-plugin")
    return Finding("torch", "fine", f"torch {version}; it puts the plugin in place in every program that imports it")


def _kernels() -> KernelsReport:
    try:
        implementation, reason = choice.chosen()
    except AOTIError as error:
        return KernelsReport("", str(error), (), 0)
    if implementation != choice.NUMBA:
        return KernelsReport(implementation, reason, (), 0)
    from ..solve import machine_code, warm

    return KernelsReport(implementation, reason, tuple(map(str, machine_code.folders())), len(warm.files()))


def _of_kernels(kernels: KernelsReport) -> Finding:
    if not kernels.implementation:
        return Finding("Newton loop", "problem", kernels.reason, f"unset {choice.VARIABLE}")
    if kernels.implementation == choice.TORCH:
        cure = "pip install numba" if "not installed" in kernels.reason else f"unset {choice.VARIABLE}"
        says = f"on torch's operations ({kernels.reason}); kernels are faster for models of one dense group on a CPU"
        return Finding("Newton loop", "advice", says, cure)
    if not kernels.files:
        says = "on numba's kernels, none of which is compiled yet: the first solve waits for that"
        return Finding("Newton loop", "advice", says, "neml2-aoti warm")
    return Finding("Newton loop", "fine", f"on numba's kernels; {kernels.files} files of machine code are there")


def _of_compiler(compiler: machine.CompilerReport) -> Finding:
    if compiler.path is None:
        says = f"{compiler.command} is not on the PATH; compiled models run without it, neml2-compile does not"
        return Finding("compiler", "advice", says, "Install one (for example the package g++), or name it in CXX.")
    return Finding("compiler", "fine", compiler.version or compiler.path)


def _of_threads(threads: machine.ThreadsReport, cores: int) -> Finding:
    says = f"torch uses {threads.torch} of the {cores} core(s) that this process may use"
    if threads.torch > cores:
        cure = f"export {machine.THREADS}={cores}"
        return Finding("threads", "problem", f"{says}: they wait for each other", cure)
    if threads.variable is None and threads.torch > 1:
        cure = f"export {machine.THREADS}=1; `neml2-aoti bench STUB --threads 1,{threads.torch}` tells what yours gains"
        return Finding("threads", "advice", f"{says}; where several processes run side by side, one each is best", cure)
    return Finding("threads", "fine", says)


def _of_scratch(scratch: machine.ScratchReport) -> Finding:
    cure = "Name a folder in TMPDIR that has room and is not mounted noexec."
    if not scratch.folder:
        return Finding("temporary folder", "problem", "there is none that can be written to", cure)
    if not scratch.executable:
        return Finding("temporary folder", "problem", f"{scratch.folder} is mounted noexec", cure)
    if scratch.free < LEAST_ROOM:
        return Finding("temporary folder", "problem", f"{scratch.folder} has {scratch.free >> 20} MiB left", cure)
    return Finding("temporary folder", "fine", f"{scratch.folder}, {scratch.free >> 30} GiB left")


def _of_artifact(
    target: Target, device: str | None, dtype: str | None
) -> tuple[ArtifactSummary | None, tuple[Finding, ...]]:
    """Look an artifact over as a load does; nothing of it is run."""
    try:
        place = target.place(device, dtype)
        found = read_metadata(place.metadata, place.folder, solver=target.solver)
    except AOTIError as error:
        return None, (_problem(str(error)),)
    sealed = place.folder.sealed is not None
    leaf = f"{place.device.type}/{name_of(place)}"
    findings = []
    try:
        check(found, place)
    except AOTIError as error:
        lines = str(error).splitlines()
        listed = [line.removeprefix("- ") for line in lines[1:]] if len(lines) > 1 else lines
        findings = [_problem(line) for line in listed]
    runs = not findings
    if runs:
        findings.append(Finding("artifact", "fine", f"{target.model} ({leaf}, schema {found.schema}) can run here"))
    if sealed:
        findings.append(Finding("seal", "fine", "sealed, and as it was sealed"))
    else:
        findings.append(Finding("seal", "fine", f"none; `neml2-aoti seal {target.artifact}` would write one"))
    report = ArtifactSummary(
        str(target.artifact), target.model, found.schema, release_of(found.schema), leaf, sealed, runs
    )
    return report, tuple(findings)


def _problem(message: str) -> Finding:
    """What is wrong with an artifact; the last sentence of our errors says what mends it."""
    says, _, cure = message.strip().rstrip(".").rpartition(". ")
    return Finding(
        "artifact", "problem", says or cure, cure if says else "Copy the artifact again, or compile it again"
    )


def _version(name: str) -> str | None:
    if name == "torch":
        return str(torch.__version__)
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
