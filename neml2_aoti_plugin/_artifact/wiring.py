"""What the metadata hands to each graph, to be compared with what the graph's package takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from . import schema as s
from .package import Signature

# Shape of an argument without its batch axes; None where the metadata does not tell.
Shapes = tuple[s.Shape | None, ...]


@dataclass(frozen=True)
class Wire:
    """The arguments of a graph.

    Args:
        file: its package.
        role: what it is for; a package has one.
        shapes: of its arguments.
        optional: how many of the last arguments it may do without.
        returns: how many tensors are taken from it; None where the metadata does not tell.
    """

    file: str
    role: str
    shapes: Shapes
    optional: int = 0
    returns: int | None = None


def wires(metadata: s.Metadata) -> list[Wire]:
    """List what each graph is given, segment after segment.

    Args:
        metadata: of the artifact.

    Returns:
        A wire per graph; one that two parts of a segment use comes twice.
    """
    known: dict[str, s.Shape] = {v.name: v.natural_shape for v in metadata.inputs}
    found: list[Wire] = []
    for part in metadata.segments:
        if isinstance(part, s.ForwardSegment):
            found += _forward(part, known)
        else:
            found += _implicit(part, known)
            known |= {v.name: v.natural_shape for v in part.unknown_variables}
    return found


def _forward(part: s.ForwardSegment, known: dict[str, s.Shape]) -> Iterator[Wire]:
    shapes = tuple(known.get(name) for name in part.taken)
    yield Wire(part.value, "value", shapes, returns=len(part.outputs))
    for role, of in (("jacobian", part.jacobian), ("parameter jacobian", part.parameter_jacobian)):
        if of is not None:
            blocks = max((pair.output + 1 for pair in of.pairs), default=0)
            yield Wire(of.file, role, shapes, returns=of.skip + blocks)
    if part.parameter_vjp is not None:
        of_outputs = (None for _ in part.parameter_vjp.outputs)
        gradients = len(part.parameter_vjp.parameters)
        yield Wire(part.parameter_vjp.file, "parameter vjp", (*shapes, *of_outputs), returns=gradients)


def _implicit(part: s.ImplicitSegment, known: dict[str, s.Shape]) -> Iterator[Wire]:
    u, g = (tuple(_packed(group) for group in groups) for groups in (part.unknowns, part.givens))
    p: Shapes = (None,) * len(part.parameters)
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
    if isinstance(by_given, s.FusedSensitivity):
        yield Wire(by_given.file, "sensitivity", u + g + p)
    elif by_given is not None:
        yield Wire(by_given.jacobian, "jacobian", u + g + p)
        yield Wire(by_given.jacobian_given, "jacobian by givens", u + g + p)
        if isinstance(by_given, s.DirectSensitivity):
            yield Wire(by_given.solve, "sensitivity solve", (None,) * (blocks + r * len(g)))
    if isinstance(by_parameter, s.FusedSensitivity):
        yield Wire(by_parameter.file, "parameter sensitivity", u + g + p)
    elif by_parameter is not None:
        yield Wire(by_parameter.dr_dparam, "jacobian by parameters", u + g + p)
        if isinstance(by_parameter, s.DirectParameterSensitivity):
            yield Wire(by_parameter.solve, "parameter sensitivity solve", (None, None))
    if part.predictor is not None:
        shapes = {**known, **{v.name: v.natural_shape for v in part.unknown_variables}}
        if part.predictor.feedback is not None:
            shapes[part.predictor.feedback.input.name] = part.predictor.feedback.input.natural_shape
        yield Wire(part.predictor.file, "predictor", tuple(shapes.get(name) for name in part.predictor.inputs))


def _packed(group: s.GroupInfo) -> s.Shape:
    if group.structure == "dense":
        return (sum(v.size for v in group.variables),)
    return (*group.sub_batch_shape, sum(v.width for v in group.variables))


def wire_fault(wire: Wire, signature: Signature | None) -> str:
    """Tell whether a graph takes what the metadata gives it.

    Args:
        wire: what it is given.
        signature: what its package takes; None where the package does not tell.

    Returns:
        What is wrong and the cure; empty for nothing.
    """
    if signature is None:
        return ""
    cure = (
        "It belongs to another model, or to an earlier compile of this one, or the metadata was edited: copy the whole "
        "artifact folder, or compile again."
    )
    given, taken = len(wire.shapes), len(signature.arguments)
    if not given - wire.optional <= taken <= given:
        return f"takes {taken} tensors, where the metadata gives it {given} as the {wire.role}. {cure}"
    if wire.returns not in (None, signature.outputs):
        return (
            f"gives {signature.outputs} tensors, where the metadata takes {wire.returns} from it as the {wire.role}. "
            f"{cure}"
        )
    for i, (shape, argument) in enumerate(zip(wire.shapes, signature.arguments, strict=False)):
        rank = len(argument.extents)
        if shape is None:
            continue
        # One axis or more of the batch stand before.
        if rank <= len(shape) or argument.extents[rank - len(shape) :] != shape:
            return (
                f"takes {_shown(argument.extents)} as tensor {i}, where the metadata gives it (*batch"
                f"{''.join(f', {n}' for n in shape)}) as the {wire.role}. {cure}"
            )
    return ""


def roles_fault(found: list[Wire]) -> dict[str, str]:
    """Packages that the metadata names for two things, with what is wrong and the cure."""
    roles: dict[str, list[str]] = {}
    for wire in found:
        if wire.role not in roles.setdefault(wire.file, []):
            roles[wire.file].append(wire.role)
    return {
        file: f"is named by the metadata as {' and as '.join(of)}, which it cannot be both. The metadata was edited: "
        "copy the whole artifact folder, or compile again."
        for file, of in roles.items()
        if len(of) > 1
    }


def _shown(extents: tuple[int | None, ...]) -> str:
    return "(" + ", ".join("*" if n is None else str(n) for n in extents) + ")"
