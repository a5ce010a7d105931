"""`neml2-aoti inspect`: what is in an artifact, from its metadata and the sizes of its files; no graph is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .._artifact import schema as s
from ..errors import ArtifactError
from ..settings import NewtonSettings
from .options import command, target_arguments
from .output import Report

if TYPE_CHECKING:
    from rich.text import Text
    from rich.tree import Tree

    from .._artifact.locate import Place
    from .target import Target

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
        """The tree."""
        from rich.text import Text
        from rich.tree import Tree

        tree = Tree(Text.assemble((self.model, "bold"), f"  {self.artifact}"))
        tree.add(f"schema {self.schema}, neml2 {self.release}; {'sealed' if self.sealed else 'no seal'}")
        leaves = tree.add("leaves")
        for leaf in self.leaves:
            name = f"{leaf.device}/{leaf.dtype}"
            mark = " (shown here)" if name == self.leaf and len(self.leaves) > 1 else ""
            branch = leaves.add(f"{name}  {_size(leaf.bytes)}  {leaf.built_for}{mark}")
            for colour, text in (
                ("red", leaf.fault),
                ("yellow", leaf.doubt),
                ("red", f"missing: {', '.join(leaf.absent)}" if leaf.absent else ""),
                ("dim", f"not named by the metadata: {', '.join(leaf.left)}" if leaf.left else ""),
            ):
                if text:
                    branch.add(Text(text, colour))
        for title, variables in (("inputs", self.inputs), ("outputs", self.outputs)):
            branch = tree.add(title)
            for variable in variables:
                branch.add(_variable_line(variable))
        parameters = tree.add(f"parameters{'' if self.parameters else ': none promoted'}")
        for parameter in self.parameters:
            shown = shown_values(parameter, "g")
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


@command("""\
  neml2-aoti inspect aoti/elasticity
  neml2-aoti inspect aoti/elasticity_aoti.i elasticity
  neml2-aoti inspect aoti/elasticity --json
""")
@target_arguments()
def inspect(target: Target) -> ArtifactReport:
    """Show what is in a compiled model: leaves, inputs, outputs, parameters, derivatives, segments, files."""
    return describe(target)


# -- the tree ----------------------------------------------------------------------------------------------------------


def shown_values(parameter: ParameterReport, form: str) -> str:
    """The first values of a parameter, each by this format."""
    shown = [format(value, form) for value in parameter.values[:VALUES]]
    return ", ".join([*shown, *(["..."] if len(parameter.values) > VALUES else [])])


def _size(count: int) -> str:
    """A number of bytes, for people."""
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count} bytes"


def _variable_line(variable: VariableReport) -> Text:
    from rich.text import Text

    shape = f" {list(variable.base_shape)}" if variable.base_shape else ""
    sites = f", sub-batch {list(variable.sub_batch_shape)}" if variable.sub_batch_shape else ""
    meaning = variable.kind
    if variable.of is not None:
        steps = "one step" if variable.steps_back == 1 else f"{variable.steps_back} steps"
        meaning = f"{variable.kind}: {variable.of} {steps} before"
    kind = f"  {variable.type or 'tensor'}{shape}{sites}  "
    return Text.assemble((variable.name, "bold"), kind, (meaning, "dim"))


def _add_segment(tree: Tree, number: int, segment: SegmentReport) -> None:
    from rich.text import Text

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
        branch.add("Newton: " + ", ".join(f"{name}={value}" for name, value in vars(segment.newton).items()))
        branch.add(f"initial guess from a predictor: {', '.join(segment.predicted) or 'no'}")
        if segment.max_substepping_level:
            branch.add(f"substepping: an increment is halved {segment.max_substepping_level} times at most")
    files = branch.add("files")
    for file in segment.files:
        size = Text("missing", "red") if file.bytes is None else _size(file.bytes)
        files.add(Text.assemble(f"{file.name}  ", size))


# -- what the tree shows -----------------------------------------------------------------------------------------------


def describe(target: Target) -> ArtifactReport:
    """What is in an artifact; if no leaf is asked for, the one that `Model` takes is shown, else the first."""
    from .._artifact.decode import read_metadata
    from .target import leaf_name, release_of

    there = target.places()
    usual = next((place for place in there if leaf_name(place) == "cpu/float64"), there[0])
    place = target.place() if target.device or target.dtype else usual
    metadata = read_metadata(place, solver=target.solver)
    outer = _Outer(metadata)
    inputs, parameters = metadata.aliases.inputs, metadata.aliases.parameters
    return ArtifactReport(
        artifact=str(target.artifact),
        model=target.model,
        schema=metadata.schema,
        release=release_of(metadata.schema),
        sealed=place.folder.sealed is not None,
        leaves=tuple(_leaf(p) for p in there),
        leaf=leaf_name(place),
        inputs=tuple(outer.input(variable) for variable in metadata.inputs),
        outputs=tuple(outer.output(variable) for variable in metadata.outputs),
        parameters=tuple(
            ParameterReport(parameters.get(p.name, p.name), p.base_shape, p.shape, p.values)
            for p in metadata.parameters
        ),
        derivatives=outer.pairs(metadata.derivatives, inputs),
        parameter_derivatives=outer.pairs(metadata.parameter_derivatives, parameters),
        segments=tuple(outer.segment(part, place) for part in metadata.segments),
    )


class _Outer:
    """Metadata as it is at the boundary of the model, whose names may be others than inside."""

    def __init__(self, metadata: s.Metadata) -> None:
        self.metadata, self.names = metadata, metadata.aliases

    def pairs(self, pairs: tuple[tuple[str, str], ...], by: dict[str, str]) -> tuple[tuple[str, str], ...]:
        return tuple((self.names.outputs.get(o, o), by.get(b, b)) for o, b in pairs)

    def input(self, variable: s.Variable) -> VariableReport:
        from .target import lag

        inputs, outputs = ({v.name for v in side} for side in (self.metadata.inputs, self.metadata.outputs))
        implicit = [part for part in self.metadata.segments if isinstance(part, s.ImplicitInfo)]
        base, steps = lag(variable.name)
        if steps and base in outputs:
            return self._variable(variable, self.names.inputs, "old state", self.names.outputs.get(base, base), steps)
        if steps and base in inputs:
            return self._variable(variable, self.names.inputs, "old force", self.names.inputs.get(base, base), steps)
        if any(variable.name == unknown.name for part in implicit for unknown in part.unknown_variables):
            return self._variable(variable, self.names.inputs, "initial guess")
        is_force = any(lag(name) == (variable.name, 1) for name in inputs)
        return self._variable(variable, self.names.inputs, "force" if is_force else "input")

    def output(self, variable: s.Variable) -> VariableReport:
        from .target import lag

        is_state = any(lag(v.name)[0] == variable.name and lag(v.name)[1] for v in self.metadata.inputs)
        return self._variable(variable, self.names.outputs, "state" if is_state else "output")

    def _variable(
        self, variable: s.Variable, names: dict[str, str], kind: str, of: str | None = None, steps: int = 0
    ) -> VariableReport:
        name = names.get(variable.name, variable.name)
        return VariableReport(name, variable.type, variable.base_shape, variable.sub_batch_shape, kind, of, steps)

    def segment(self, part: s.Segment, place: Place) -> SegmentReport:
        renamed = {**self.names.inputs, **self.names.outputs}
        parameters = tuple(self.names.parameters.get(name, name) for name in part.parameters)
        files = tuple(FileReport(name, _bytes(place.leaf / name)) for name in sorted(part.files))

        def shown(found: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(renamed.get(name, name) for name in found)

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
    from .._artifact.decode import read_metadata
    from .._artifact.kinship import kinship
    from .._artifact.locate import dtype_name

    # Before neml2 3.0.7 each has its own.
    metadata = read_metadata(place)
    files = [place.leaf / name for name in sorted(metadata.files)]
    total = sum(size for size in map(_bytes, files) if size is not None)
    family, dtype = place.device.type, dtype_name(place.dtype) or ""
    kin = kinship(metadata, place)
    built_for = _built_for(place, files)
    return LeafReport(
        family, dtype, str(place.leaf), total, built_for, kin.fault, kin.doubt, left=kin.left, absent=kin.absent
    )


def _built_for(place: Place, files: list[Path]) -> str:
    """What the first package that can be read records."""
    from .._artifact.package import build_in, open_archive, read_package

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
    try:
        return file.stat().st_size
    except OSError:
        return None
