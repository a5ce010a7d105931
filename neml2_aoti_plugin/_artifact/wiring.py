"""What the metadata hands to each graph, compared with what the graph's package takes.

Up to neml2 3.0.3 the metadata does not say in which order an explicit segment's graphs take their arguments: a
promoted parameter stands where its block stood among the inputs, while the metadata lists parameters behind them. Both
keep their own order; which argument is which shows in the package.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from msgspec.structs import replace

from ..errors import ArtifactError
from . import schema as s
from .package import GraphSignature

# Shape of an argument without its batch axes; None where the metadata does not say.
ArgumentShapes = tuple[s.Shape | None, ...]


@dataclass(frozen=True)
class Wire:
    """The arguments of a graph, by the name of its package."""

    file: str
    role: str  # what it is for; a package has one role
    shapes: ArgumentShapes
    optional: int = 0  # how many of the last arguments it may do without
    returns: int | None = None  # how many tensors are taken from it; None where the metadata does not say


def wires(metadata: s.Metadata) -> Iterator[Wire]:
    """What each graph is given, segment after segment; a graph that two parts of a segment use comes twice."""
    known: dict[str, s.Shape] = {v.name: v.natural_shape for v in metadata.inputs}
    for part in metadata.segments:
        if isinstance(part, s.ExplicitInfo):
            yield from _explicit(part, known)
        else:
            known |= {v.name: v.natural_shape for v in part.unknown_variables}
            yield from _implicit(part, known)


def _explicit(part: s.ExplicitInfo, known: dict[str, s.Shape]) -> Iterator[Wire]:
    shapes = tuple(known.get(name) for name in part.taken)
    yield Wire(part.value, "value", shapes, returns=len(part.outputs))
    for role, of in (("jacobian", part.jacobian), ("parameter jacobian", part.parameter_jacobian)):
        if of is not None:
            blocks = max((pair.output + 1 for pair in of.pairs), default=0)
            yield Wire(of.file, role, shapes, returns=of.skip + blocks)
    if part.parameter_vjp is not None:
        file, by, of_outputs = part.parameter_vjp
        yield Wire(file, "parameter vjp", (*shapes, *(None for _ in of_outputs)), returns=len(by))


def _implicit(part: s.ImplicitInfo, known: dict[str, s.Shape]) -> Iterator[Wire]:
    u, g = (tuple(_packed(group) for group in groups) for groups in (part.unknowns, part.givens))
    p: ArgumentShapes = (None,) * len(part.parameters)
    r, blocks = len(part.residuals), len(part.residuals) * len(part.unknowns)
    yield Wire(part.residual, "residual", u + g + p, returns=r)
    step, by_given, by_parameter = part.step, part.sensitivity, part.parameter_sensitivity
    if isinstance(step, s.DirectStep):
        yield Wire(step.jacobian, "jacobian", u + g + p, returns=blocks + r)
        yield Wire(step.solve, "solve", (None,) * (blocks + r), returns=len(u))
    elif isinstance(step, s.FusedStep):
        yield Wire(step.file, "step", u + g + p)
    else:
        yield Wire(step.matvec, "matvec", u + g + p + u)
        if step.precond_setup is not None:
            yield Wire(step.precond_setup, "preconditioner", u + g + p, len(p))
    if isinstance(by_given, s.PairGraph):
        yield Wire(by_given.file, "sensitivity", u + g + p)
    elif by_given is not None:
        yield Wire(by_given.jacobian, "jacobian", u + g + p)
        yield Wire(by_given.file, "jacobian by givens", u + g + p)
        if isinstance(by_given.solver, str):
            yield Wire(by_given.solver, "sensitivity solve", (None,) * (blocks + r * len(g)))
    if isinstance(by_parameter, s.PairGraph):
        yield Wire(by_parameter.file, "parameter sensitivity", u + g + p)
    elif by_parameter is not None:
        yield Wire(by_parameter.file, "jacobian by parameters", u + g + p)
        if isinstance(by_parameter.solver, str):
            yield Wire(by_parameter.solver, "parameter sensitivity solve", (None, None))
    if part.predictor is not None:
        fed_back = part.predictor.feedback
        shapes = {**known, **({fed_back.name: fed_back.natural_shape} if fed_back else {})}
        yield Wire(part.predictor.file, "predictor", tuple(shapes.get(name) for name in part.predictor.inputs))


def _packed(group: s.GroupInfo) -> s.Shape:
    if group.structure == "dense":
        return (sum(v.size for v in group.variables),)
    return (*group.sub_batch_shape, sum(v.width for v in group.variables))


def wire_faults(metadata: s.Metadata, signatures: Mapping[str, GraphSignature | None]) -> Iterator[tuple[str, str]]:
    """Packages that cannot take or be what the metadata says, each with what is wrong and the cure."""
    # By package, in order and each once.
    roles: dict[str, dict[str, None]] = {}
    for wire in wires(metadata):
        roles.setdefault(wire.file, {})[wire.role] = None
        fault = wire_fault(wire, signatures.get(wire.file))
        if fault:
            yield wire.file, fault
    for file, of in roles.items():
        if len(of) > 1:
            yield (
                file,
                f"is named by the metadata as {' and as '.join(of)}, which it cannot be both. The metadata was edited: "
                "copy the whole artifact folder, or compile again.",
            )


def wire_fault(wire: Wire, signature: GraphSignature | None) -> str:
    """What is wrong, with the cure, where a graph does not take what the metadata gives it; empty for nothing."""
    wrong = _misfit(wire, signature) if signature is not None else ""
    if not wrong:
        return ""
    return (
        f"{wrong} as the {wire.role}. It belongs to another model, or to an earlier compile of this one, or the "
        "metadata was edited: copy the whole artifact folder, or compile again."
    )


def _misfit(wire: Wire, signature: GraphSignature) -> str:
    given, taken = len(wire.shapes), len(signature.arguments)
    if not given - wire.optional <= taken <= given:
        return f"takes {taken} tensors, where the metadata gives it {given}"
    if wire.returns not in (None, signature.outputs):
        return f"gives {signature.outputs} tensors, where the metadata takes {wire.returns} from it"
    for i, (shape, argument) in enumerate(zip(wire.shapes, signature.arguments, strict=False)):
        extents = argument.extents
        # One axis or more of the batch stand before.
        if shape is not None and (len(extents) <= len(shape) or extents[len(extents) - len(shape) :] != shape):
            axes, expected = ("*" if n is None else str(n) for n in extents), ("*batch", *map(str, shape))
            return f"takes ({', '.join(axes)}) as tensor {i}, where the metadata gives it ({', '.join(expected)})"
    return ""


# -- the order of arguments where only packages show it ----------------------------------------------------------------


def with_argument_order(
    metadata: s.Metadata, signatures: Mapping[str, GraphSignature | None]
) -> tuple[s.Metadata, list[tuple[str, str]]]:
    """The metadata with the order of arguments wherever it is open; and packages that do not show it, with the cure."""
    shapes = {v.name: v.natural_shape for v in metadata.inputs} | {p.name: p.shape for p in metadata.parameters}
    segments: list[s.Segment] = []
    faults: list[tuple[str, str]] = []
    for segment in metadata.segments:
        orders = []
        if isinstance(segment, s.ExplicitInfo) and segment.parameters_among_inputs:
            for file in (segment.value, segment.jvp_package):
                # Others have faults of their own.
                if file is not None and file in signatures:
                    try:
                        orders.append(argument_order(segment, shapes, signatures[file]))
                    except ArtifactError as error:
                        faults.append((file, str(error)))
            if len(set(orders)) > 1:
                text = f"takes its arguments in another order than {segment.jvp_package}. Compile it again."
                faults.append((segment.value, text))
        if orders:
            segment = replace(segment, arguments=orders[0], parameters_among_inputs=False)
        segments.append(segment)
    return replace(metadata, segments=tuple(segments)), faults


def argument_order(
    segment: s.ExplicitInfo, shapes: dict[str, s.Shape], signature: GraphSignature | None
) -> tuple[str, ...]:
    """A segment's inputs and parameters in the order in which a graph takes them, if its package shows it."""

    def unclear(why: str) -> ArtifactError:
        return ArtifactError(
            f"does not show in which order its graph takes the inputs {', '.join(segment.inputs)} and the "
            f"promoted parameters {', '.join(segment.parameters)}: {why}. Compile the model again with neml2 3.0.4 or "
            "later."
        )

    count, promoted = len(segment.inputs) + len(segment.parameters), len(segment.parameters)
    if signature is None:
        raise unclear(f"it does not tell its arguments, expected {count}")
    if len(signature.arguments) != count:
        raise unclear(f"it takes {len(signature.arguments)} arguments, expected {count}")
    # The exporter of 3.0.3 hands inputs over as typed tensors and parameters as plain ones; that of 3.0.0 all as plain
    # ones, and there the batch axis is free, which parameters have none of.
    typed = any(argument.kind for argument in signature.arguments)
    plain = [not a.kind if typed else None not in a.extents for a in signature.arguments]
    if sum(plain) != promoted:
        raise unclear(f"{sum(plain)} of its {count} arguments look like parameters, expected {promoted}")
    inputs, parameters = iter(segment.inputs), iter(segment.parameters)
    names = tuple(next(parameters) if is_parameter else next(inputs) for is_parameter in plain)
    for name, is_parameter, argument in zip(names, plain, signature.arguments, strict=True):
        wanted = shapes.get(name)
        if wanted is not None:
            axes = argument.extents if is_parameter else argument.extents[len(argument.extents) - len(wanted) :]
            if axes != wanted:
                raise unclear(f"where {name!r} of shape {wanted} would stand it takes {argument.extents}")
    return names
