"""What is told of an artifact, as frozen objects."""

from __future__ import annotations

from dataclasses import dataclass

from ..settings import NewtonSettings


@dataclass(frozen=True)
class VariableReport:
    """An input or an output.

    Args:
        name: at the boundary of the model.
        type: neml2's name of its type; empty where the artifact does not tell.
        base_shape: axes that its type owns.
        sub_batch_shape: sizes of its site axes.
        kind: `force`, `old force`, `old state`, `first iterate` or `input`; of an output `state` or `output`.
        of: of an `old force` or `old state`, the variable whose earlier value it is; else null.
        steps_back: of such a variable, by how many steps; else 0.
    """

    name: str
    type: str
    base_shape: tuple[int, ...]
    sub_batch_shape: tuple[int, ...]
    kind: str
    of: str | None
    steps_back: int


@dataclass(frozen=True)
class ParameterReport:
    """A promoted parameter.

    Args:
        name: at the boundary of the model.
        base_shape: axes of its type.
        shape: of the stored value, `(*batch, *base_shape)`.
        values: the stored value, row-major.
    """

    name: str
    base_shape: tuple[int, ...]
    shape: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class FileReport:
    """A graph's package.

    Args:
        name: of the file.
        bytes: its size; null where it is missing.
    """

    name: str
    bytes: int | None


@dataclass(frozen=True)
class SegmentReport:
    """A segment.

    Args:
        kind: `forward` or `implicit`.
        inputs: names of what it takes; of an implicit one the givens.
        outputs: names of what it gives; of an implicit one the unknowns.
        parameters: names of the promoted parameters that it takes.
        unknowns: number of unknown entries of a row; 0 for a forward segment.
        groups: structure of each group of unknowns, `dense` or `block`.
        linear_solver: `direct`, `gmres`, `bicgstab`, or `fused` where one graph does the whole step; null if forward.
        preconditioned: whether an iterative linear solver has a preconditioner.
        newton: the settings of the Newton solve; null if forward.
        predicted: names of the unknowns that a predictor gives a first iterate.
        max_substepping_level: how often an increment may be halved.
        files: its packages.
    """

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    parameters: tuple[str, ...]
    unknowns: int
    groups: tuple[str, ...]
    linear_solver: str | None
    preconditioned: bool
    newton: NewtonSettings | None
    predicted: tuple[str, ...]
    max_substepping_level: int
    files: tuple[FileReport, ...]


@dataclass(frozen=True)
class LeafReport:
    """What was compiled for one device and dtype.

    Args:
        device: `cpu`, `cuda`, ...
        dtype: `float64` or `float32`.
        folder: of the packages.
        bytes: of all its packages.
        built_for: platform, processor and instruction sets, as the packages record them; empty where they do not.
        fault: why it does not belong to the metadata, with the cure; empty if it does for all that can be told.
        doubt: why it may not belong to it, with the cure; empty if there is no doubt.
        left: packages in it that the metadata does not name; an earlier compile left them.
        absent: packages that the metadata names and it does not have.
    """

    device: str
    dtype: str
    folder: str
    bytes: int
    built_for: str
    fault: str
    doubt: str
    left: tuple[str, ...]
    absent: tuple[str, ...]


@dataclass(frozen=True)
class ArtifactReport:
    """What is in an artifact.

    Args:
        artifact: its folder or metadata file.
        model: name of the model.
        schema: version of its metadata.
        release: the neml2 releases that write this schema.
        sealed: whether it has a seal; it is as it was sealed then.
        leaves: what it was compiled for.
        leaf: the leaf whose segments and files are told, as `device/dtype`.
        inputs: of the model.
        outputs: of the model.
        parameters: promoted parameters with their stored values.
        derivatives: the compiled (output, input) pairs.
        parameter_derivatives: the compiled (output, parameter) pairs.
        segments: in the order in which they are evaluated.
    """

    artifact: str
    model: str
    schema: int
    release: str
    sealed: bool
    leaves: tuple[LeafReport, ...]
    leaf: str
    inputs: tuple[VariableReport, ...]
    outputs: tuple[VariableReport, ...]
    parameters: tuple[ParameterReport, ...]
    derivatives: tuple[tuple[str, str], ...]
    parameter_derivatives: tuple[tuple[str, str], ...]
    segments: tuple[SegmentReport, ...]
