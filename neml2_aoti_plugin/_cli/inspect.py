"""`neml2-aoti inspect` and `params`: what is in an artifact, and its promoted parameters, handed on in a file.

`inspect` reads metadata and files, and loads no graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from .._artifact import schema as s
from .._artifact.compatibility import look_over
from .._artifact.decode import read_metadata
from .._artifact.kinship import kinship
from .._artifact.locate import Place, dtype_name
from .._artifact.package import build_in, open_archive, read_package
from .._files import require_writable
from ..errors import ArtifactError, InputError
from ..model._parameters import is_parameter_file
from ..settings import NewtonSettings
from .output import Report, table, written
from .target import Target, lag, leaf_name, release_of

# More values of a parameter than this are cut.
VALUES = 6


@dataclass(frozen=True)
class VariableReport:
    """An input or an output."""

    name: str  # at the boundary of the model
    type: str  # neml2's name of its type; empty where the artifact does not record it
    base_shape: tuple[int, ...]  # axes that its type owns
    sub_batch_shape: tuple[int, ...]  # sizes of its site axes
    # `force`, `old force`, `old state`, `initial guess` or `input`; of an output `state` or `output`
    kind: str
    of: str | None  # of an `old force` or `old state`, the variable whose earlier value it is; else null
    steps_back: int  # of such a variable, by how many steps; else 0


@dataclass(frozen=True)
class ParameterReport:
    """A promoted parameter."""

    name: str  # at the boundary of the model
    base_shape: tuple[int, ...]  # axes of its type
    shape: tuple[int, ...]  # of the stored value, `(*batch, *base_shape)`
    values: tuple[float, ...]  # the stored value, row-major


@dataclass(frozen=True)
class FileReport:
    """A graph's package."""

    name: str  # of the file
    bytes: int | None  # its size; null where it is missing


@dataclass(frozen=True)
class SegmentReport:
    """A segment."""

    kind: str  # `explicit` or `implicit`
    inputs: tuple[str, ...]  # names of what it takes; of an implicit one the givens
    outputs: tuple[str, ...]  # names of what it gives; of an implicit one the unknowns
    parameters: tuple[str, ...]  # names of the promoted parameters that it takes
    files: tuple[FileReport, ...]  # its packages
    unknowns: int = 0  # number of unknown entries of a row; 0 for an explicit segment
    groups: tuple[str, ...] = ()  # structure of each group of unknowns, `dense` or `block`
    # `direct`, `gmres`, `bicgstab`, or `fused` where one graph does the whole step; null if explicit
    linear_solver: str | None = None
    preconditioned: bool = False  # whether an iterative linear solver has a preconditioner
    newton: NewtonSettings | None = None  # the settings of the Newton solve; null if explicit
    predicted: tuple[str, ...] = ()  # names of the unknowns that a predictor gives an initial guess
    max_substepping_level: int = 0  # how often an increment may be halved


@dataclass(frozen=True)
class LeafReport:
    """What was compiled for one device and dtype."""

    device: str  # such as `cpu` or `cuda`
    dtype: str  # `float64` or `float32`
    folder: str  # of the packages
    bytes: int  # of all its packages
    # platform, processor and instruction sets, as the packages record them; empty where they do not
    built_for: str
    fault: str  # why it does not belong to the metadata, with the cure; empty if it does, as far as is known
    doubt: str  # why it may not belong to it, with the cure; empty if there is no doubt
    left: tuple[str, ...]  # packages in it that the metadata does not name; an earlier compile left them
    absent: tuple[str, ...]  # packages that the metadata names and it does not have
    faults: tuple[str, ...]  # what else speaks against running it here, such as a damaged file, with the cure


@dataclass(frozen=True)
class ArtifactReport(Report):
    """What is in an artifact."""

    artifact: str  # its folder or metadata file
    model: str  # name of the model
    schema: int  # version of its metadata
    release: str  # the neml2 releases that write this schema
    sealed: bool  # whether it has a seal; it is as it was sealed then
    leaves: tuple[LeafReport, ...]  # what it was compiled for
    leaf: str  # the leaf whose segments and files are listed, as `device/dtype`
    inputs: tuple[VariableReport, ...]  # of the model
    outputs: tuple[VariableReport, ...]  # of the model
    parameters: tuple[ParameterReport, ...]  # promoted parameters with their stored values
    derivatives: tuple[tuple[str, str], ...]  # the compiled (output, input) pairs
    parameter_derivatives: tuple[tuple[str, str], ...]  # the compiled (output, parameter) pairs
    segments: tuple[SegmentReport, ...]  # in the order in which they are evaluated

    def render(self) -> Iterator[Tree]:
        tree = Tree(Text.assemble((self.model, "bold"), f"  {self.artifact}"))
        tree.add(f"schema {self.schema}, neml2 {self.release}; {'sealed' if self.sealed else 'no seal'}")
        leaves = tree.add("leaves")
        for leaf in self.leaves:
            name = f"{leaf.device}/{leaf.dtype}"
            mark = " (shown here)" if name == self.leaf and len(self.leaves) > 1 else ""
            branch = leaves.add(f"{name}  {decimal(leaf.bytes)}  {leaf.built_for}{mark}")
            for text in filter(None, (leaf.fault, *leaf.faults)):
                branch.add(Text(text, "red"))
            if leaf.doubt:
                branch.add(Text(leaf.doubt, "yellow"))
            if leaf.left:
                branch.add(Text(f"not named by the metadata: {', '.join(leaf.left)}", "dim"))
        for title, variables in (("inputs", self.inputs), ("outputs", self.outputs)):
            branch = tree.add(title)
            for variable in variables:
                branch.add(_variable_line(variable))
        parameters = tree.add(f"parameters{'' if self.parameters else ': none promoted'}")
        for parameter in self.parameters:
            shown = _shown_values(parameter, "g")
            value = f"[{shown}] shape {list(parameter.shape)}" if parameter.shape else shown
            parameters.add(Text.assemble((parameter.name, "bold"), f" = {value}"))
        pairs = [*self.derivatives, *self.parameter_derivatives]
        derivatives = tree.add(f"derivatives{'' if pairs else ': none compiled'}")
        for out in dict.fromkeys(out for out, _ in pairs):
            derivatives.add(f"{out} by {', '.join(by for o, by in pairs if o == out)}")
        segments = tree.add("segments")
        for number, segment in enumerate(self.segments):
            _add_segment(segments, number, segment)
        yield tree


# -- the tree ----------------------------------------------------------------------------------------------------------


def _shown_values(parameter: ParameterReport, form: str) -> str:
    """The first values of a parameter, each by this format."""
    shown = [format(value, form) for value in parameter.values[:VALUES]]
    return ", ".join([*shown, *(["..."] if len(parameter.values) > VALUES else [])])


def _variable_line(variable: VariableReport) -> Text:
    shape = f" {list(variable.base_shape)}" if variable.base_shape else ""
    sites = f", sub-batch {list(variable.sub_batch_shape)}" if variable.sub_batch_shape else ""
    meaning = variable.kind
    if variable.of is not None:
        steps = "one step" if variable.steps_back == 1 else f"{variable.steps_back} steps"
        meaning = f"{variable.kind}: {variable.of} {steps} before"
    kind = f"  {variable.type or 'tensor'}{shape}{sites}  "
    return Text.assemble((variable.name, "bold"), kind, (meaning, "dim"))


def _add_segment(tree: Tree, number: int, segment: SegmentReport) -> None:
    names = f"  {', '.join(segment.inputs)} -> {', '.join(segment.outputs)}"
    branch = tree.add(Text.assemble(f"{number}: ", (segment.kind, "bold"), names))
    if segment.parameters:
        branch.add(f"parameters: {', '.join(segment.parameters)}")
    if segment.newton is not None:
        preconditioner = ", preconditioned" if segment.preconditioned else ""
        branch.add(
            f"{segment.unknowns} unknowns in {len(segment.groups)} group(s) ({', '.join(segment.groups)}); linear "
            f"solver: {segment.linear_solver}{preconditioner}"
        )
        branch.add("Newton: " + ", ".join(f"{name}={value}" for name, value in asdict(segment.newton).items()))
        branch.add(f"initial guess from a predictor: {', '.join(segment.predicted) or 'no'}")
        if segment.max_substepping_level:
            branch.add(f"substepping: an increment is halved {segment.max_substepping_level} times at most")
    files = branch.add("files")
    for file in segment.files:
        size = Text("missing", "red") if file.bytes is None else decimal(file.bytes)
        files.add(Text.assemble(f"{file.name}  ", size))


# -- what the tree shows -----------------------------------------------------------------------------------------------


def inspect(target: Target) -> ArtifactReport:
    """What is in an artifact; if no leaf is asked for, the one that `Model` takes is shown, else the first."""
    there = target.places()
    usual = next((place for place in there if leaf_name(place) == "cpu/float64"), there[0])
    place = target.place() if target.device or target.dtype else usual
    metadata = read_metadata(place, solver=target.solver)
    outer = metadata.aliases

    def pairs(found: tuple[tuple[str, str], ...], by: dict[str, str]) -> tuple[tuple[str, str], ...]:
        return tuple((outer.outputs.get(o, o), by.get(b, b)) for o, b in found)

    return ArtifactReport(
        artifact=str(target.artifact),
        model=target.model,
        schema=metadata.schema,
        release=release_of(metadata.schema),
        sealed=place.folder.sealed is not None,
        leaves=tuple(map(_leaf, there)),
        leaf=leaf_name(place),
        inputs=tuple(_inputs(metadata)),
        outputs=tuple(_outputs(metadata)),
        parameters=tuple(
            ParameterReport(outer.parameters.get(p.name, p.name), p.base_shape, p.shape, p.values)
            for p in metadata.parameters
        ),
        derivatives=pairs(metadata.derivatives, outer.inputs),
        parameter_derivatives=pairs(metadata.parameter_derivatives, outer.parameters),
        segments=tuple(_segment(part, outer, place) for part in metadata.segments),
    )


def _inputs(metadata: s.Metadata) -> Iterator[VariableReport]:
    outer, inputs, outputs = metadata.aliases, *({v.name for v in side} for side in (metadata.inputs, metadata.outputs))
    implicit = [part for part in metadata.segments if isinstance(part, s.ImplicitInfo)]
    unknowns = {variable.name for part in implicit for variable in part.unknown_variables}
    for variable in metadata.inputs:
        base, steps = lag(variable.name)
        kind, of = "input", None
        if steps and base in outputs:
            kind, of = "old state", outer.outputs.get(base, base)
        elif steps and base in inputs:
            kind, of = "old force", outer.inputs.get(base, base)
        elif variable.name in unknowns:
            kind = "initial guess"
        elif f"{variable.name}~1" in inputs:
            kind = "force"
        yield _variable(variable, outer.inputs, kind, of, steps if of is not None else 0)


def _outputs(metadata: s.Metadata) -> Iterator[VariableReport]:
    states = {base for base, steps in (lag(variable.name) for variable in metadata.inputs) if steps}
    for variable in metadata.outputs:
        yield _variable(variable, metadata.aliases.outputs, "state" if variable.name in states else "output")


def _variable(
    variable: s.Variable, outer: dict[str, str], kind: str, of: str | None = None, steps: int = 0
) -> VariableReport:
    name = outer.get(variable.name, variable.name)
    return VariableReport(name, variable.type, variable.base_shape, variable.sub_batch_shape, kind, of, steps)


def _segment(part: s.Segment, outer: s.Aliases, place: Place) -> SegmentReport:
    names = {**outer.inputs, **outer.outputs}
    parameters = tuple(outer.parameters.get(name, name) for name in part.parameters)
    files = tuple(FileReport(name, _bytes(place.leaf / name)) for name in sorted(part.files))

    def shown(found: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(names.get(name, name) for name in found)

    if isinstance(part, s.ExplicitInfo):
        return SegmentReport("explicit", shown(part.inputs), shown(part.outputs), parameters, files)
    solver, preconditioned = "direct" if isinstance(part.step, s.DirectStep) else "fused", False
    if isinstance(part.step, s.KrylovStep):
        solver, preconditioned = part.step.settings.method, part.step.precond_setup is not None
    return SegmentReport(
        kind="implicit",
        inputs=shown(tuple(given.name for given in part.roles)),
        outputs=shown(tuple(v.name for v in part.unknown_variables)),
        parameters=parameters,
        files=files,
        unknowns=sum(v.size for v in part.unknown_variables),
        groups=tuple(group.structure for group in part.unknowns),
        linear_solver=solver,
        preconditioned=preconditioned,
        newton=part.newton,
        predicted=shown(part.predictor.outputs) if part.predictor else (),
        max_substepping_level=part.max_substepping_level,
    )


def _leaf(place: Place) -> LeafReport:
    # Before neml2 3.0.7 each has its own.
    metadata = read_metadata(place)
    files = [place.leaf / name for name in sorted(metadata.files)]
    kin = kinship(metadata, place)
    return LeafReport(
        device=place.device.type,
        dtype=dtype_name(place.dtype) or "",
        folder=str(place.leaf),
        bytes=sum(_bytes(file) or 0 for file in files),
        built_for=_built_for(place, files),
        fault=kin.fault,
        doubt=kin.doubt,
        left=kin.left,
        absent=kin.absent,
        faults=tuple(look_over(metadata, place).faults),
    )


def _built_for(place: Place, files: list[Path]) -> str:
    """What the first package that can be read records."""
    for file in files:
        try:
            with open_archive(file, read_package(file, place.folder).data) as archive:
                build = build_in(archive)
        except ArtifactError:
            continue
        words = (build.platform, build.machine, build.cpu_isa if place.device.type == "cpu" else "")
        capability = f"compute capability {build.compute_capability}" if build.compute_capability else ""
        return " ".join(word for word in (*words, capability) if word)
    return ""


def _bytes(file: Path) -> int | None:
    with suppress(OSError):
        return file.stat().st_size
    return None


# -- promoted parameters -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ParametersReport(Report):
    """The promoted parameters of an artifact."""

    artifact: str  # its path
    model: str  # name of the model
    parameters: tuple[ParameterReport, ...]  # with their values: the artifact's, those of a file, or those set
    changed: tuple[str, ...]  # names of those that differ from the artifact's
    written: str | None  # the file that was written; null if none was

    def render(self) -> Iterator[str | Table]:
        if not self.parameters:
            yield f"{self.model} has no promoted parameters. Promote some: neml2-compile ... -p NAME"
            return
        values = table("parameter", "shape", "value", "")
        for found in self.parameters:
            mark = "changed" if found.name in self.changed else ""
            values.add_row(found.name, str(list(found.shape)), _shown_values(found, ".10g"), Text(mark, "yellow"))
        yield values
        yield from written(self.written)


def params(
    target: Target, file: Path | None, values: Mapping[str, float], out: Path | None, force: bool
) -> ParametersReport:
    """The promoted parameters: the artifact's or those of a file, with other values for some; written to a file."""
    if values and out is None:
        raise click.UsageError("--set changes nothing by itself. Give a file to write as well: --out FILE.safetensors")
    if out is not None:
        require_writable(out, [*target.files(), *([file] if file is not None and not force else [])])
        if not force and out.exists() and not is_parameter_file(out):
            raise InputError(
                f"{out}: is there, and holds no parameters. Give another name, or --force to write over it."
            )
    model = target.load()
    before = {name: value.detach().clone() for name, value in model.named_parameters().items()}
    if file is not None:
        model.load_parameters(file, same_artifact=False)
    for name, value in values.items():
        model.set_parameter(name, value)
    if out is not None:
        model.save_parameters(out)
    reports, changed = [], []
    for name, now in model.named_parameters().items():
        entries = tuple(now.detach().cpu().flatten().tolist())
        reports.append(ParameterReport(name, tuple(model.parameter_base_shapes[name]), tuple(now.shape), entries))
        if not torch.equal(now, before[name]):
            changed.append(name)
    path = None if out is None else str(out)
    return ParametersReport(str(target.artifact), target.model, tuple(reports), tuple(changed), path)
