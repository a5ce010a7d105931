"""Find out in which order a forward graph takes inputs and promoted parameters, where the metadata does not tell.

Up to neml2 3.0.3 a parameter stands where its block stood among the inputs, while the metadata lists parameters behind
them. Both keep their own order; which argument is which shows in the graph's package.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..errors import ArtifactError
from .package import Signature, read_signature
from .schema import ForwardSegment, Metadata, Segment, Shape


def with_argument_order(metadata: Metadata, folder: Path) -> Metadata:
    """Find the order of arguments wherever it is open.

    Args:
        metadata: of the artifact.
        folder: of its packages.

    Returns:
        The metadata with `arguments` in those segments.

    Raises:
        ArtifactError: a package does not tell the order.
        ArtifactNotFoundError: a package is missing.
    """
    if not any(isinstance(s, ForwardSegment) and s.parameters_among_inputs for s in metadata.segments):
        return metadata
    shapes = {v.name: v.natural_shape for v in metadata.inputs}
    shapes |= {p.name: p.shape for p in metadata.parameters}
    return replace(metadata, segments=tuple(_ordered(s, shapes, folder) for s in metadata.segments))


def _ordered(segment: Segment, shapes: dict[str, Shape], folder: Path) -> Segment:
    if not isinstance(segment, ForwardSegment) or not segment.parameters_among_inputs:
        return segment
    files = [segment.value, *([segment.jacobian.file] if segment.jacobian else [])]
    orders = {file: argument_order(segment, shapes, read_signature(folder / file), folder / file) for file in files}
    if len(set(orders.values())) > 1:
        raise ArtifactError(
            f"{folder}: {' and '.join(files)} take their arguments in different orders, {orders}. Compile the model "
            "again."
        )
    return replace(segment, arguments=orders[segment.value], parameters_among_inputs=False)


def argument_order(
    segment: ForwardSegment, shapes: dict[str, Shape], signature: Signature | None, file: Path
) -> tuple[str, ...]:
    """Tell the arguments of a graph apart.

    Args:
        segment: the segment, with inputs and parameters each in their own order.
        shapes: of the model's inputs and of stored parameters by name, as far as known.
        signature: what the graph takes.
        file: its package, for messages.

    Returns:
        The names in the order in which the graph takes them.

    Raises:
        ArtifactError: the package does not tell, or it tells of other arguments.
    """
    count, promoted = len(segment.inputs) + len(segment.parameters), len(segment.parameters)
    if signature is None or len(signature.arguments) != count:
        found = "does not tell its arguments" if signature is None else f"takes {len(signature.arguments)} arguments"
        raise _unclear(segment, file, f"it {found}, expected {count}")
    # The exporter of 3.0.3 hands inputs over as typed tensors and parameters as plain ones; that of 3.0.0 all as plain
    # ones, and there the batch axis is free, which parameters have none of.
    typed = any(argument.kind for argument in signature.arguments)
    plain = [not a.kind if typed else None not in a.extents for a in signature.arguments]
    if sum(plain) != promoted:
        raise _unclear(
            segment, file, f"{sum(plain)} of its {count} arguments look like parameters, expected {promoted}"
        )
    inputs, parameters = iter(segment.inputs), iter(segment.parameters)
    names = tuple(next(parameters) if is_parameter else next(inputs) for is_parameter in plain)
    for name, is_parameter, argument in zip(names, plain, signature.arguments, strict=True):
        wanted = shapes.get(name)
        if wanted is None:
            continue
        axes = argument.extents if is_parameter else argument.extents[len(argument.extents) - len(wanted) :]
        if axes != wanted:
            raise _unclear(segment, file, f"where {name!r} of shape {wanted} would stand it takes {argument.extents}")
    return names


def _unclear(segment: ForwardSegment, file: Path, why: str) -> ArtifactError:
    return ArtifactError(
        f"{file}: cannot tell in which order the graph takes the inputs {', '.join(segment.inputs)} and the promoted "
        f"parameters {', '.join(segment.parameters)}: {why}. Compile the model again with neml2 3.0.4 or later."
    )
