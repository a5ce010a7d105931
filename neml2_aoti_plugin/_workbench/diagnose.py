"""Does this environment run compiled models, and this artifact? Facts, and findings with a cure for each."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata

import torch

from .._artifact.compatibility import check
from .._artifact.decode import read_metadata
from .._artifact.kinship import kinship
from .._program.program import Program
from .._status import Status, status
from ..errors import AOTIError, InputError
from . import environment, machine, native
from .describe import name_of, release_of
from .environment import Finding, KernelsReport, Level
from .target import Target, places

# What an environment may hold that changes how models load or run.
VARIABLES = (
    *("NEML2_AOTI_PLUGIN", "NEML2_AOTI_PLUGIN_MODE", "NEML2_AOTI_PLUGIN_REQUIRE_SEAL", "NEML2_AOTI_PLUGIN_ROOTS"),
    *("NEML2_AOTI_PLUGIN_BLOCK_ROWS", "NEML2_AOTI_PLUGIN_KERNELS", "TORCH_DEVICE_BACKEND_AUTOLOAD", "NEML2_LOGS"),
    *("NEML2_CAPTURE_SOLVE_FAILURE", "TMPDIR", machine.THREADS),
)
# What mends a graph that torch's runner runs.
SLOWER = (
    "Results are the same, but slower on a CPU. Graphs that are compiled for float64, with OMP_NUM_THREADS=1, for one "
    "batch axis of any length, and that call no operator but the power by name, need no runner."
)
PACKAGES = ("neml2", "torch", "llvmlite", "numpy", "safetensors", "matplotlib")


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

    Raises:
        InputError: there is no such leaf, or no such device.
    """
    trouble = environment.import_neml2()
    kernels = environment.newton_loop()
    now = status()
    looked_at = (
        environment.of_neml2(now.neml2, trouble),
        environment.of_plugin(now.active, now.reason),
        environment.of_torch(now.torch or ""),
        environment.of_kernels(kernels),
        environment.of_compiler(compiler := machine.compiler()),
        environment.of_threads(threads := machine.threads(), machine.cores()),
        environment.of_scratch(scratch := machine.scratch()),
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


def _of_artifact(
    target: Target, device: str | None, dtype: str | None
) -> tuple[ArtifactSummary | None, tuple[Finding, ...]]:
    """Look an artifact over as a load does; nothing of it is run."""
    try:
        place = target.place(device, dtype)
        found = read_metadata(place.metadata, place.folder, solver=target.solver)
    except InputError:
        # Another leaf was asked for than there is, which is no fault of the artifact.
        raise
    except AOTIError as error:
        return None, (_problem(str(error)),)
    sealed = place.folder.sealed is not None
    leaf = f"{place.device.type}/{name_of(place)}"
    findings = []
    packages = {}
    try:
        packages = check(found, place)
    except AOTIError as error:
        lines = str(error).splitlines()
        listed = [line.removeprefix("- ") for line in lines[1:]] if len(lines) > 1 else lines
        findings = [_problem(line) for line in listed]
    runs = not findings and not kinship(found, place).fault
    findings += _of_leaves(target)
    if runs:
        findings.append(Finding("artifact", "fine", f"{target.model} ({leaf}, schema {found.schema}) can run here"))
        # A variable that holds a wrong word has a finding of its own.
        with suppress(InputError):
            findings += _of_graphs(Program(found, packages, place.device, lockstep=False))
    if sealed:
        findings.append(Finding("seal", "fine", "sealed, and as it was sealed"))
    else:
        findings.append(Finding("seal", "fine", f"none; `neml2-aoti seal {target.artifact}` would write one"))
    report = ArtifactSummary(
        str(target.artifact), target.model, found.schema, release_of(found.schema), leaf, sealed, runs
    )
    return report, tuple(findings)


def _of_graphs(program: Program) -> list[Finding]:
    """Which graphs are not called by their C interface for what they are, by the reason."""
    files: dict[str, list[str]] = {}
    for file, reason in program.by_runner().items():
        files.setdefault(reason, []).append(file)
    return [
        Finding("graphs", "advice", f"{', '.join(names)}: run by torch's runner, since {reason}", SLOWER)
        for reason, names in files.items()
    ]


def _of_leaves(target: Target) -> list[Finding]:
    """Whether all leaves of an artifact are of one compile; files that nobody reads."""
    findings = []
    try:
        there = [(place, kinship(read_metadata(place.metadata, place.folder), place)) for place in places(target)]
    except AOTIError:
        # A leaf that cannot be looked at is told when it is the one that is asked for.
        return []
    for place, kin in there:
        findings += [_problem(text) for text in (kin.fault,) if text]
        findings += [_problem(text, "advice") for text in (kin.doubt,) if text]
        if kin.left:
            says = f"{place.leaf}: holds {', '.join(kin.left)}, which the metadata does not name: of an earlier compile"
            findings.append(Finding("artifact", "advice", says, "Nobody reads them; remove them"))
    return findings


def _problem(message: str, level: Level = "problem") -> Finding:
    """What is wrong with an artifact; the end of our errors says what mends it."""
    # Of several lines the last one does.
    says, _, cure = message.strip().rstrip(".").rpartition("\n" if "\n" in message else ". ")
    return Finding("artifact", level, says or cure, cure if says else "Copy the artifact again, or compile it again")


def _version(name: str) -> str | None:
    if name == "torch":
        return str(torch.__version__)
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
