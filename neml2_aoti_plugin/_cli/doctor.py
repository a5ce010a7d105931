"""`neml2-aoti doctor`: does this environment run compiled models, and this artifact?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .._status import Status, installed, status
from ..errors import AOTIError, InputError
from . import environment
from .environment import Finding, Level
from .options import device_options, json_option
from .output import show
from .process import FINE, SHORT

if TYPE_CHECKING:
    from rich.table import Table

    from .._program.program import Program
    from .target import Target

EPILOG = """\b
Examples:
  neml2-aoti doctor
  neml2-aoti doctor aoti/elasticity
  neml2-aoti doctor aoti/elasticity_aoti.i --try-binding
"""

COLOURS = {"fine": "green", "advice": "yellow", "problem": "bold red"}
PACKAGES = ("neml2", "torch", "llvmlite", "numpy", "safetensors", "matplotlib", "neml2-aoti-plugin")
# What an environment may hold that changes how models load or run.
VARIABLES = (
    *("NEML2_AOTI_PLUGIN", "NEML2_AOTI_PLUGIN_MODE", "NEML2_AOTI_PLUGIN_REQUIRE_SEAL", "NEML2_AOTI_PLUGIN_ROOTS"),
    *("NEML2_AOTI_PLUGIN_BLOCK_ROWS", "NEML2_AOTI_PLUGIN_KERNELS", "TORCH_DEVICE_BACKEND_AUTOLOAD", "NEML2_LOGS"),
    *("NEML2_CAPTURE_SOLVE_FAILURE", "TMPDIR", "OMP_NUM_THREADS"),
)
# What mends a graph that torch's runner runs.
SLOWER = (
    "Results are the same, but slower on a CPU. Graphs that are compiled for float64, with OMP_NUM_THREADS=1, for one "
    "batch axis of any length, and that call no operator but the power by name, need no runner."
)


@dataclass(frozen=True)
class ArtifactSummary:
    """What was looked over, and whether it is sealed."""

    artifact: str  # its path
    model: str  # name of the model
    schema: int  # version of its metadata
    release: str  # the neml2 releases that write this schema
    leaf: str  # that was looked over, as `device/dtype`
    sealed: bool  # whether it has a seal; it is as it was sealed then
    runs: bool  # whether nothing speaks against running it here


@dataclass(frozen=True)
class Diagnosis:
    """What `doctor` found."""

    versions: dict[str, str | None]  # of packages by name, with Python's; null for those that are not installed
    plugin: Status  # whether the plugin is active, how, and over what; as `neml2_aoti_plugin.status()` gives it
    binding: str  # what neml2's own binding does with this torch: as measured by us, or as tried just now
    kernels: environment.KernelsReport  # what the Newton loop runs on
    compiler: environment.CompilerReport  # for `neml2-compile`
    processor: environment.ProcessorReport  # of this machine
    threads: environment.ThreadsReport  # of torch
    devices: tuple[environment.DeviceReport, ...]  # that torch sees
    scratch: environment.ScratchReport  # where packages are unpacked
    variables: dict[str, str]  # environment variables that are set and matter here
    artifact: ArtifactSummary | None  # what was looked over; null if none was given, or its metadata cannot be read
    findings: tuple[Finding, ...]  # everything that was looked at, with a cure where one is needed

    @property
    def healthy(self) -> bool:
        """Whether there is no problem among the findings."""
        return all(finding.level != "problem" for finding in self.findings)


@click.command(epilog=EPILOG)
@click.argument("path", metavar="[ARTIFACT|STUB]", required=False)
@click.argument("model", required=False)
@click.option(
    "--try-binding",
    is_flag=True,
    help="Try neml2's own binding in a process of its own, with the artifact if one is given, instead of reporting "
    "what we measured.",
)
@device_options
@json_option
def command(
    path: str | None, model: str | None, try_binding: bool, device: str | None, dtype: str | None, as_json: bool
) -> int:
    """Show what is installed, what is active, what is wrong, and what mends it.

    Exit status 1 if something is wrong.
    """
    from .target import find_target

    target = None if path is None else find_target(path, model, device, dtype)
    report = diagnose(target, try_binding=try_binding)
    return show("doctor", report, as_json, render, FINE if report.healthy else SHORT)


def render(report: Diagnosis) -> Iterator[Table | str]:
    """What no finding says, then the findings."""
    from rich.table import Column, Table
    from rich.text import Text

    sets = " ".join(report.processor.instruction_sets) or "no instruction sets known"
    facts = {
        "versions": ", ".join(f"{name} {version or '-'}" for name, version in report.versions.items()),
        "graphs": report.plugin.graphs,
        "neml2's binding": report.binding,
        "processor": f"{report.processor.machine}, {report.processor.cores} core(s), {sets}",
        "devices": ", ".join(f"{device.name} ({device.kind})" for device in report.devices),
        "variables": ", ".join(f"{name}={value}" for name, value in report.variables.items()) or "none set",
    }
    if report.artifact is not None:
        known = report.artifact
        facts["artifact"] = f"{known.model} ({known.leaf}), schema {known.schema}, neml2 {known.release}"
    above = Table.grid(Column(no_wrap=True), Column(overflow="fold"), padding=(0, 2))
    for name, value in facts.items():
        above.add_row(Text(name, "bold"), value)
    yield above
    yield ""
    below = Table.grid(Column(no_wrap=True), Column(no_wrap=True), Column(overflow="fold"), padding=(0, 2))
    for finding in report.findings:
        cure = Text(f"\n-> {finding.cure}", "bold") if finding.cure else ""
        level = Text(finding.level, COLOURS[finding.level])
        below.add_row(level, finding.subject, Text.assemble(finding.says, cure))
    yield below


# -- what was found ----------------------------------------------------------------------------------------------------


def diagnose(target: Target | None = None, *, try_binding: bool = False) -> Diagnosis:
    """Look this environment over, and an artifact if one is given; to try neml2's own binding takes some seconds."""
    trouble = environment.import_neml2()
    # Whether machine code can be used is known once it has been tried.
    kernels, of_kernels = environment.newton_loop()
    now, processor = status(), environment.processor()
    compiler, of_compiler = environment.compiler()
    threads, of_threads = environment.threads(processor.cores)
    scratch, of_scratch = environment.scratch()
    plugin, torch = environment.plugin_finding(now), environment.torch_finding()
    looked_at = (environment.neml2_finding(now.neml2, trouble), plugin, torch)
    artifact, found = (None, ()) if target is None else _of_artifact(target)
    if try_binding:
        binding = tried_binding(target if artifact is not None and artifact.runs else None)
    else:
        binding = now.native_binding
    return Diagnosis(
        versions={name: installed(name) for name in PACKAGES} | {"Python": now.python},
        plugin=now,
        binding=binding,
        kernels=kernels,
        compiler=compiler,
        processor=processor,
        threads=threads,
        devices=environment.devices(),
        scratch=scratch,
        variables={name: os.environ[name] for name in VARIABLES if name in os.environ},
        artifact=artifact,
        findings=(*looked_at, of_kernels, of_compiler, of_threads, of_scratch, *found),
    )


def _of_artifact(target: Target) -> tuple[ArtifactSummary | None, tuple[Finding, ...]]:
    """Look an artifact over as a load does; nothing of it is run."""
    from .._artifact.compatibility import look_over
    from .._artifact.decode import read_metadata
    from .._artifact.kinship import kinship
    from .._program.program import Program
    from .target import leaf_name, release_of

    try:
        place = target.place()
        found = read_metadata(place, solver=target.solver)
    except InputError:
        # Another leaf was asked for than there is, which is no fault of the artifact.
        raise
    except AOTIError as error:
        return None, (_problem(str(error)),)
    sealed = place.folder.sealed is not None
    leaf = leaf_name(place)
    checked = look_over(found, place)
    runs = not checked.faults and not kinship(found, place).fault
    findings = [*map(_problem, checked.faults), *_of_leaves(target)]
    if runs:
        findings.append(Finding("artifact", "fine", f"{target.model} ({leaf}, schema {found.schema}) can run here"))
        # A variable that holds a wrong word has a finding of its own.
        with suppress(InputError):
            findings += _of_graphs(Program(checked.metadata, checked.packages, place.device, lockstep=False))
    says = "sealed, and as it was sealed" if sealed else f"none; `neml2-aoti seal {target.artifact}` would write one"
    findings.append(Finding("seal", "fine", says))
    release = release_of(found.schema)
    summary = ArtifactSummary(str(target.artifact), target.model, found.schema, release, leaf, sealed, runs)
    return summary, tuple(findings)


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
    from .._artifact.decode import read_metadata
    from .._artifact.kinship import kinship

    findings = []
    try:
        there = [(place, kinship(read_metadata(place), place)) for place in target.places()]
    except AOTIError:
        # A leaf that cannot be looked at is reported when it is the one that is asked for.
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


# -- neml2's own binding -----------------------------------------------------------------------------------------------

# Prints the word of what was reached last, what went wrong, and the largest difference to our outputs.
_CODE = """
import json, sys
step, trouble, apart = "import", "", 0.0
try:
    import neml2, torch
    from neml2.aoti._aoti import Model
    step = "load"
    if len(sys.argv) > 1:
        inputs, wanted = torch.load(sys.argv[2], weights_only=True)
        model = Model(sys.argv[1])
        step = "call"
        found = model.forward(inputs)
        wrong = [name for name, value in wanted.items() if found[name].shape != value.shape]
        if wrong:
            raise ValueError(f"outputs of a wrong shape: {', '.join(wrong)}")
        for name, value in wanted.items():
            apart = max(apart, float((found[name] - value).abs().max() / (value.abs().max() or 1.0)))
        step = "done"
except BaseException as error:
    lines = str(error).strip().splitlines() or [""]
    trouble = f"{type(error).__name__}: {lines[0]}"
print("\\n" + json.dumps([step, trouble, apart]))
"""

TIMEOUT = 300
ROWS = 2
# Above this the binding does not give what we give; both solve to their tolerances.
CLOSE = 1e-6


def tried_binding(target: Target | None) -> str:
    """Import neml2's own binding in a process without the plugin, which it may crash, and call a model through it.

    The model is called at points of its driver and random ones; with no target the binding is imported only.
    """
    if target is None:
        return _tried([])
    import torch

    from .points import Where, choose_points, evaluate

    model = target.load()
    try:
        found, _ = evaluate(model, choose_points(target, model, Where(rows=ROWS)))
    except AOTIError as error:
        return f"{_tried([])}; the artifact was not called ({error})"
    with tempfile.TemporaryDirectory(prefix="neml2-aoti-doctor-") as folder:
        points = Path(folder) / "points.pt"
        torch.save((found.points.inputs, found.outputs), points)
        # From 3.0.7 on this is the artifact's folder, which is all that the binding loads.
        return _tried([str(model.artifact), str(points)])


def _tried(arguments: list[str]) -> str:
    command = [sys.executable, "-c", _CODE, *arguments]
    environment = {**os.environ, "NEML2_AOTI_PLUGIN": "0"}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False, errors="replace"
        )
    except subprocess.TimeoutExpired:
        return f"did not end within {TIMEOUT} s"
    if done.returncode != 0:
        return f"crashes the interpreter (exit status {done.returncode})"
    step, trouble, apart = json.loads(done.stdout.splitlines()[-1])
    if trouble:
        return f"fails at the {step} ({trouble})"
    if step != "done":
        return "imports; give an artifact to see whether it can be called"
    verdict = "works" if apart <= CLOSE else "loads the artifact, and gives other numbers"
    return f"{verdict}: called, its outputs are within {apart:.0e} of ours"
