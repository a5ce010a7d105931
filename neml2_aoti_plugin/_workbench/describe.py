"""What is in an artifact, from its metadata and the sizes of its files; no graph is loaded."""

from __future__ import annotations

from pathlib import Path

from .._artifact import schema as s
from .._artifact.compatibility import files_of
from .._artifact.decode import read_metadata
from .._artifact.kinship import kinship
from .._artifact.locate import DTYPES, Place
from .._artifact.package import build_in, open_archive, read_package
from .._artifact.upgrade import RELEASES
from ..errors import ArtifactError
from .contents import ArtifactReport, FileReport, LeafReport, ParameterReport, SegmentReport, VariableReport
from .names import lag
from .target import Target, places


def describe(target: Target, device: str | None = None, dtype: str | None = None) -> ArtifactReport:
    """Tell what is in an artifact.

    Args:
        target: the artifact.
        device: of the leaf to tell of; if neither is given, the one that `Model` takes, else the first.
        dtype: likewise.

    Returns:
        The report.

    Raises:
        InputError: there is no such leaf.
        ArtifactError: the artifact may not be loaded, or its metadata is damaged.
    """
    there = places(target)
    if not there:
        raise ArtifactError(f"{target.artifact} has metadata and no leaf (a folder DEVICE/DTYPE). Copy it whole.")
    usual = [p for p in there if p.device.type == "cpu" and name_of(p) == "float64"]
    place = target.place(device, dtype) if device or dtype else (usual or there)[0]
    metadata = read_metadata(place.metadata, place.folder, solver=target.solver)
    return ArtifactReport(
        artifact=str(target.artifact),
        model=target.model,
        schema=metadata.schema,
        release=release_of(metadata.schema),
        sealed=place.folder.sealed is not None,
        leaves=tuple(_leaf(p) for p in there),
        leaf=f"{place.device.type}/{name_of(place)}",
        inputs=tuple(_input(v, metadata) for v in metadata.inputs),
        outputs=tuple(_output(v, metadata) for v in metadata.outputs),
        parameters=tuple(
            ParameterReport(metadata.aliases.parameters.get(p.name, p.name), p.base_shape, p.shape, p.values)
            for p in metadata.parameters
        ),
        derivatives=boundary_pairs(metadata),
        parameter_derivatives=boundary_parameter_pairs(metadata),
        segments=tuple(_segment(part, metadata, place) for part in metadata.segments),
    )


def boundary_pairs(metadata: s.Metadata) -> tuple[tuple[str, str], ...]:
    """The compiled (output, input) pairs by boundary names."""
    names = metadata.aliases
    return tuple((names.outputs.get(o, o), names.inputs.get(i, i)) for o, i in metadata.derivatives)


def boundary_parameter_pairs(metadata: s.Metadata) -> tuple[tuple[str, str], ...]:
    """The compiled (output, parameter) pairs by boundary names."""
    names = metadata.aliases
    return tuple((names.outputs.get(o, o), names.parameters.get(p, p)) for o, p in metadata.parameter_derivatives)


def name_of(place: Place) -> str:
    """The dtype of a leaf, as its folder is called."""
    return next(name for name, dtype in DTYPES.items() if dtype == place.dtype)


def release_of(schema: int) -> str:
    """The neml2 releases that write a schema."""
    return RELEASES.get(schema, "none; an unreleased neml2")


def _input(variable: s.Variable, metadata: s.Metadata) -> VariableReport:
    names, outputs = metadata.aliases, {v.name for v in metadata.outputs}
    unknowns = {
        v.name for part in metadata.segments if isinstance(part, s.ImplicitInfo) for v in part.unknown_variables
    }
    base, steps = lag(variable.name)
    inputs = {v.name for v in metadata.inputs}
    if steps and base in outputs:
        kind, of = "old state", names.outputs.get(base, base)
    elif steps and base in inputs:
        kind, of = "old force", names.inputs.get(base, base)
    elif variable.name in unknowns:
        kind, of = "first iterate", None
    else:
        kind, of = "force" if any(lag(n) == (variable.name, 1) for n in inputs) else "input", None
    return _variable(variable, names.inputs, kind, of, steps if of else 0)


def _output(variable: s.Variable, metadata: s.Metadata) -> VariableReport:
    is_state = any(lag(v.name)[0] == variable.name and lag(v.name)[1] for v in metadata.inputs)
    return _variable(variable, metadata.aliases.outputs, "state" if is_state else "output", None, 0)


def _variable(variable: s.Variable, names: dict[str, str], kind: str, of: str | None, steps: int) -> VariableReport:
    name = names.get(variable.name, variable.name)
    return VariableReport(name, variable.type, variable.base_shape, variable.sub_batch_shape, kind, of, steps)


def _segment(part: s.Segment, metadata: s.Metadata, place: Place) -> SegmentReport:
    names = metadata.aliases
    renamed = {**names.inputs, **names.outputs}
    parameters = tuple(names.parameters.get(name, name) for name in part.parameters)
    files = tuple(FileReport(name, _size(place.leaf / name)) for name in sorted(files_of(_alone(part, metadata))))

    def shown(found: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(renamed.get(name, name) for name in found)

    if isinstance(part, s.ExplicitInfo):
        return SegmentReport(
            "forward", shown(part.inputs), shown(part.outputs), parameters, 0, (), None, False, None, (), 0, files
        )
    unknowns = part.unknown_variables
    return SegmentReport(
        kind="implicit",
        inputs=shown(tuple(given.variable.name for given in part.roles)),
        outputs=shown(tuple(v.name for v in unknowns)),
        parameters=parameters,
        unknowns=sum(v.size for v in unknowns),
        groups=tuple(group.structure for group in part.unknowns),
        linear_solver=_linear_solver(part),
        preconditioned=isinstance(part.step, s.KrylovStep) and part.step.precond_setup is not None,
        newton=part.newton,
        predicted=shown(part.predictor.outputs) if part.predictor else (),
        max_substepping_level=part.max_substepping_level,
        files=files,
    )


def _linear_solver(part: s.ImplicitInfo) -> str:
    if isinstance(part.step, s.KrylovStep):
        return part.step.settings.method
    return "direct" if isinstance(part.step, s.DirectStep) else "fused"


def _alone(part: s.Segment, metadata: s.Metadata) -> s.Metadata:
    """The metadata of one segment, of which `files_of` lists the packages."""
    return s.Metadata(metadata.inputs, metadata.outputs, (), (part,), (), ())


def _leaf(place: Place) -> LeafReport:
    # Before neml2 3.0.7 each has its own.
    metadata = read_metadata(place.metadata, place.folder)
    sizes = [_size(place.leaf / name) for name in sorted(files_of(metadata))]
    total = sum(size for size in sizes if size is not None)
    built_for = _built_for(place, metadata)
    return LeafReport(
        place.device.type, name_of(place), str(place.leaf), total, built_for, **vars(kinship(metadata, place))
    )


def _built_for(place: Place, metadata: s.Metadata) -> str:
    """What the first package that can be read records."""
    for name in sorted(files_of(metadata)):
        file = place.leaf / name
        try:
            with open_archive(file, read_package(file, place.folder).data) as archive:
                build = build_in(archive)
        except ArtifactError:
            continue
        words = (build.platform, build.machine, build.cpu_isa if place.device.type == "cpu" else "")
        capability = f"compute capability {build.compute_capability}" if build.compute_capability else ""
        return " ".join(word for word in (*words, capability) if word)
    return ""


def _size(file: Path) -> int | None:
    try:
        return file.stat().st_size
    except OSError:
        return None
