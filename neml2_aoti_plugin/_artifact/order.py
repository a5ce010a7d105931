"""Find out in which order a forward graph takes inputs and promoted parameters, where the metadata does not tell.

Up to neml2 3.0.3 a parameter stands where its block stood among the inputs, while the metadata lists parameters behind
them. Both keep their own order; which argument is which shows in the graph's package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from ..errors import ArtifactError
from .package import Signature
from .schema import ForwardSegment, Metadata, Segment, Shape


def with_argument_order(metadata: Metadata, leaf: Path, signature_of: Callable[[Path], Signature | None]) -> Metadata:
    """Find the order of arguments wherever it is open.

    Args:
        metadata: of the artifact.
        leaf: the folder of its packages.
        signature_of: reads from a package what its graph takes.

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
    ordered = (_ordered(s, shapes, leaf, signature_of) for s in metadata.segments)
    return replace(metadata, segments=tuple(ordered))


def order_faults(metadata: Metadata, leaf: Path, signatures: Mapping[str, Signature | None]) -> dict[str, str]:
    """Tell which packages take their arguments in another order than the one that was found.

    The order was read from packages before they were looked over; these may be others by then.

    Args:
        metadata: with the order of arguments.
        leaf: the folder of its packages.
        signatures: by file, what the graphs take that were looked over.

    Returns:
        By file what is wrong and the cure.
    """
    shapes = {v.name: v.natural_shape for v in metadata.inputs} | {p.name: p.shape for p in metadata.parameters}
    found = {}
    for segment in metadata.segments:
        if not isinstance(segment, ForwardSegment) or not segment.arguments:
            continue
        for file in _ordering(segment):
            if file not in signatures:
                continue
            try:
                order = argument_order(segment, shapes, signatures[file], leaf / file)
            except ArtifactError:
                order = ()
            if order != segment.arguments:
                found[file] = "was changed while the model was loaded. Load the model again."
    return found


def _ordering(segment: ForwardSegment) -> list[str]:
    """The packages that tell the order."""
    return [segment.value, *([segment.jacobian.file] if segment.jacobian else [])]


def _ordered(
    segment: Segment, shapes: dict[str, Shape], leaf: Path, signature_of: Callable[[Path], Signature | None]
) -> Segment:
    if not isinstance(segment, ForwardSegment) or not segment.parameters_among_inputs:
        return segment
    files = _ordering(segment)
    orders = {file: argument_order(segment, shapes, signature_of(leaf / file), leaf / file) for file in files}
    if len(set(orders.values())) > 1:
        raise ArtifactError(
            f"{leaf}: {' and '.join(files)} take their arguments in different orders, {orders}. Compile the model "
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
