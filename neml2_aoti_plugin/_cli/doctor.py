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

import torch
from rich.table import Column, Table
from rich.text import Text

from .._artifact.compatibility import look_over, machine
from .._artifact.decode import read_metadata
from .._artifact.kinship import kinship
from .._program.program import Program
from .._status import Status, installed, status
from ..errors import AOTIError, InputError
from . import environment
from .environment import Finding, Level
from .output import Report
from .points import choose_points, evaluate
from .target import Target, leaf_name, release_of

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
class Diagnosis(Report):
    """What `doctor` found."""

    versions: dict[str, str | None]  # of packages by name, with Python's; null for those that are not installed
    plugin: Status  # whether the plugin is active, how, and over what; as `neml2_aoti_plugin.status()` gives it
    binding: str  # what neml2's own binding does with this torch: as measured by us, or as tried just now
    code_folder: str  # where machine code of solves is kept; empty where it is not
    compiler: str | None  # path of the C++ compiler that neml2-compile calls; null if there is none
    machine: str  # the kind of processor, such as `x86_64`
    instruction_sets: tuple[str, ...]  # of the processor that graphs may be compiled for, in torch's names
    cores: int  # how many this process may use
    threads: int  # of torch's operations and of the graphs
    devices: dict[str, str]  # that torch sees, as `device=` takes them, and what each is
    scratch: str  # folder in which packages are unpacked to be loaded; empty where none can be written to
    variables: dict[str, str]  # environment variables that are set and matter here
    artifact: ArtifactSummary | None  # what was looked over; null if none was given, or its metadata cannot be read
    findings: tuple[Finding, ...]  # everything that was looked at, with a cure where one is needed

    @property
    def fine(self) -> bool:
        return not self.count("problem")

    def count(self, level: Level) -> int:
        """How many findings are of a level."""
        return sum(finding.level == level for finding in self.findings)

    def render(self) -> Iterator[Table | Text | str]:
        versions = {"Python": self.versions["Python"], **self.versions}
        facts = {
            "versions": ", ".join(f"{name} {version or '-'}" for name, version in versions.items()),
            "processor": f"{self.machine}, {self.cores} core(s), {' '.join(self.instruction_sets)}".rstrip(", "),
            "devices": ", ".join(f"{name} ({kind})" for name, kind in self.devices.items()),
            "compiled graphs": f"called {self.plugin.graphs}",
            "without this plugin": f"neml2's own binding {self.binding}",
            "environment": ", ".join(f"{name}={value}" for name, value in self.variables.items()) or "nothing set",
        }
        if self.artifact is not None:
            known = self.artifact
            facts["artifact"] = f"{known.model} ({known.leaf}), schema {known.schema}, neml2 {known.release}"
        above = Table.grid(Column(no_wrap=True), Column(overflow="fold"), padding=(0, 2))
        for name, value in facts.items():
            above.add_row(Text(name, "bold"), value)
        yield above
        yield ""
        below = Table.grid(Column(no_wrap=True), Column(no_wrap=True), Column(overflow="fold"), padding=(0, 2))
        for finding in self.findings:
            cure = Text(f"\n-> {finding.cure}", "bold") if finding.cure else ""
            level = Text(finding.level, COLOURS[finding.level])
            below.add_row(level, finding.subject, Text.assemble(finding.says, cure))
        yield below
        yield ""
        advice = self.count("advice")
        hint = f"; {advice} thing(s) could be better, see above" if advice else ""
        if self.fine:
            yield Text(f"Compiled models run here{hint}.", COLOURS["fine"])
        else:
            yield Text(f"{self.count('problem')} problem(s), see above{hint}.", COLOURS["problem"])


def doctor(target: Target | None = None, try_binding: bool = False) -> Diagnosis:
    """Look this environment over, and an artifact if one is given; to try neml2's own binding takes some seconds."""
    of_neml2 = environment.neml2_finding()
    # Whether machine code can be used is known once it has been tried.
    code_folder, of_solves = environment.solves()
    now, cores, threads = status(), environment.cores(), torch.get_num_threads()
    compiler, of_compiler = environment.compiler()
    scratch, of_scratch = environment.scratch()
    artifact, found = (None, []) if target is None else _of_artifact(target)
    binding = now.native_binding
    if try_binding:
        binding = _tried(target if artifact is not None and artifact.runs else None)
    findings = (of_neml2, environment.plugin_finding(now), environment.torch_finding(), of_solves, of_compiler)
    return Diagnosis(
        versions={name: installed(name) for name in PACKAGES} | {"Python": now.python},
        plugin=now,
        binding=binding,
        code_folder=code_folder,
        compiler=compiler,
        machine=machine(),
        instruction_sets=environment.instruction_sets(machine()),
        cores=cores,
        threads=threads,
        devices=environment.devices(),
        scratch=scratch,
        variables={name: os.environ[name] for name in VARIABLES if name in os.environ},
        artifact=artifact,
        findings=(*findings, environment.threads(threads, cores), of_scratch, *found),
    )


def _of_artifact(target: Target) -> tuple[ArtifactSummary | None, list[Finding]]:
    """Look an artifact over as a load does; nothing of it is run."""
    try:
        place = target.place()
        found = read_metadata(place, solver=target.solver)
    except InputError:
        # Another leaf was asked for than there is, which is no fault of the artifact.
        raise
    except AOTIError as error:
        return None, [Finding("artifact", "problem", str(error))]
    sealed, leaf, release = place.folder.sealed is not None, leaf_name(place), release_of(found.schema)
    checked = look_over(found, place)
    runs = not checked.faults and not kinship(found, place).fault
    findings = [Finding("artifact", "problem", fault) for fault in checked.faults] + _of_leaves(target)
    if runs:
        findings.append(Finding("artifact", "fine", f"{target.model} ({leaf}, schema {found.schema}) can run here"))
        by_reason: dict[str, list[str]] = {}
        # A variable that holds a wrong word has a finding of its own.
        with suppress(InputError):
            program = Program(checked.metadata, checked.packages, place.device, lockstep=False)
            for file, reason in program.by_runner().items():
                by_reason.setdefault(reason, []).append(file)
        for reason, files in by_reason.items():
            says = f"{', '.join(files)}: run by torch's runner, since {reason}"
            findings.append(Finding("graphs", "advice", says, SLOWER))
    says = "sealed, and as it was sealed" if sealed else f"none; `neml2-aoti seal {target.artifact}` would write one"
    findings.append(Finding("seal", "fine", says))
    return ArtifactSummary(str(target.artifact), target.model, found.schema, release, leaf, sealed, runs), findings


def _of_leaves(target: Target) -> list[Finding]:
    """Whether all leaves of an artifact are of one compile; files that nobody reads."""
    findings = []
    try:
        there = [(place, kinship(read_metadata(place), place)) for place in target.places()]
    except AOTIError:
        # A leaf that cannot be looked at is reported when it is the one that is asked for.
        return []
    for place, kin in there:
        findings += [Finding("artifact", "problem", text) for text in (kin.fault,) if text]
        findings += [Finding("artifact", "advice", text) for text in (kin.doubt,) if text]
        if kin.left:
            says = f"{place.leaf}: holds {', '.join(kin.left)}, which the metadata does not name: of an earlier compile"
            findings.append(Finding("artifact", "advice", says, "Nobody reads them; remove them"))
    return findings


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


def _tried(target: Target | None) -> str:
    """Import neml2's own binding in a process without the plugin, which it may crash, and call a model through it.

    The model is called at points of its driver and random ones; with no target the binding is imported only.
    """
    arguments, more = [], ""
    with tempfile.TemporaryDirectory(prefix="neml2-aoti-doctor-") as folder:
        if target is not None:
            model, points = target.load(), Path(folder) / "points.pt"
            try:
                found = evaluate(model, choose_points(target, model, rows=ROWS))
                torch.save((found.points.inputs, found.outputs), points)
                # From 3.0.7 on this is the artifact's folder, which is all that the binding loads.
                arguments = [str(model.artifact), str(points)]
            except AOTIError as error:
                more = f"; the artifact was not called ({error})"
        command = [sys.executable, "-c", _CODE, *arguments]
        variables = {**os.environ, "NEML2_AOTI_PLUGIN": "0"}
        try:
            done = subprocess.run(
                command, env=variables, capture_output=True, text=True, timeout=TIMEOUT, check=False, errors="replace"
            )
        except subprocess.TimeoutExpired:
            return f"did not end within {TIMEOUT} s{more}"
    if done.returncode != 0:
        return f"crashes the interpreter (exit status {done.returncode}){more}"
    step, trouble, apart = json.loads(done.stdout.splitlines()[-1])
    if trouble:
        return f"fails at the {step} ({trouble}){more}"
    if step != "done":
        return "imports" + (more or "; give an artifact to see whether it can be called")
    verdict = "works" if apart <= CLOSE else "loads the artifact, and gives other numbers"
    return f"{verdict}: called, its outputs are within {apart:.0e} of ours"
