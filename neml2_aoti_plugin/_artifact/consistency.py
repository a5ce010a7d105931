"""Does a metadata file agree with itself? What one place says of a name must hold in all others."""

from __future__ import annotations

from typing import Any

from ..errors import ArtifactError
from . import schema as s

_AGAIN = "The metadata is damaged or was edited; compile the model again with neml2-compile."


def check_names(found: s.Metadata, file: str) -> None:
    """Check that every name that is used stands for something, and every value exists before it is read.

    Args:
        found: all that the file tells.
        file: for messages.

    Raises:
        ArtifactError: a name stands for nothing.
    """
    parameters = {p.name for p in found.parameters}
    known = {v.name for v in found.inputs}
    for i, part in enumerate(found.segments):
        where = f"{file}: segments[{i}]"
        missing = set(part.parameters) - parameters
        if missing:
            raise ArtifactError(f"{where} takes {sorted(missing)}, which are not among the promoted parameters.")
        if isinstance(part, s.ForwardSegment):
            _need(part.inputs, known, where)
            known |= set(part.outputs)
            continue
        unknowns = {v.name for v in part.unknown_variables}
        for what, groups in (("unknown", part.unknowns), ("given", part.givens)):
            names = [v.name for group in groups for v in group.variables]
            if len(set(names)) != len(names):
                raise ArtifactError(f"{where} has two {what}s of one name among {', '.join(names)}. {_AGAIN}")
        if part.predictor is not None:
            fed_back = {part.predictor.feedback.input.name} if part.predictor.feedback else set()
            _need(part.predictor.inputs, known | unknowns | fed_back, where)
            # What it gives besides unknowns is a guess, which nothing else may take for a value.
        _need([v.name for g in part.givens for v in g.variables], known, where)
        _need([given.variable.name for given in part.roles], known | unknowns, where)
        _need([given.pair for given in part.roles if given.pair is not None], known | unknowns, where)
        known |= unknowns
    missing = {v.name for v in found.outputs} - known
    if missing:
        raise ArtifactError(f"{file}: no segment computes the outputs {sorted(missing)}.")
    inputs, outputs = {v.name for v in found.inputs}, {v.name for v in found.outputs}
    unknown = {i for _, i in found.derivatives} - inputs | {
        o for o, _ in (*found.derivatives, *found.parameter_derivatives) if o not in outputs
    }
    if unknown:
        raise ArtifactError(f"{file}: derivatives name {sorted(unknown)}, which are no inputs or outputs of the model.")
    unpromoted = {p for _, p in found.parameter_derivatives} - parameters
    if unpromoted:
        raise ArtifactError(f"{file}: parameter_derivatives name {sorted(unpromoted)}, which are not promoted.")


def check_boundary(found: s.Metadata, file: str) -> None:
    """Check that what callers know by a name is one thing.

    Args:
        found: all that the file tells.
        file: for messages.

    Raises:
        ArtifactError: two inputs, two outputs or two parameters have one name at the boundary.
    """
    renames = found.aliases
    for kind, names, to in (
        ("inputs", [v.name for v in found.inputs], renames.inputs),
        ("outputs", [v.name for v in found.outputs], renames.outputs),
        ("parameters", [p.name for p in found.parameters], renames.parameters),
    ):
        seen: dict[str, str] = {}
        for name in names:
            public = to.get(name, name)
            if public in seen:
                which = (
                    f"{seen[public]!r} and {name!r}, which are both called {public!r}" if to else f"{public!r} twice"
                )
                raise ArtifactError(f"{file}: among the {kind} there are {which}. {_AGAIN}")
            seen[public] = name
    parameters = {renames.parameters.get(p.name, p.name) for p in found.parameters}
    for name in sorted(parameters):
        path = name.split(".")
        if not all(path):
            raise ArtifactError(
                f"{file}: {name!r} is no name of a parameter: a part between its dots is empty. {_AGAIN}"
            )
        above = parameters.intersection(".".join(path[:k]) for k in range(1, len(path)))
        if above:
            raise ArtifactError(
                f"{file}: {min(above)!r} is a parameter and a part of the name of another one, {name!r}. {_AGAIN}"
            )


def check_shapes(found: s.Metadata, file: str) -> None:
    """Check that a variable has one shape wherever it is spoken of: each place is taken for what it holds.

    Args:
        found: all that the file tells.
        file: for messages.

    Raises:
        ArtifactError: two places tell different shapes.
    """
    shapes: dict[str, s.Shape] = {}
    for v in _variables(found):
        if shapes.setdefault(v.name, v.natural_shape) != v.natural_shape:
            raise ArtifactError(
                f"{file}: {v.name!r} has the shape {v.natural_shape} here, {shapes[v.name]} there. {_AGAIN}"
            )
    bases = {v.name: v.base_shape for v in (*found.outputs, *_variables(found))}
    bases |= {p.name: p.base_shape for p in found.parameters}
    # Outputs are listed without their site axes, and the derivatives of old files with them among the base axes.
    claims = [("output", v.name, v.base_shape) for v in found.outputs]
    for pair in _pairs(found):
        claims += [("derivative of", pair.out, pair.out_base_shape), ("derivative by", pair.wrt, pair.wrt_base_shape)]
    for what, name, base in claims:
        if base not in (bases.get(name, base), shapes.get(name)):
            raise ArtifactError(
                f"{file}: the {what} {name!r} has the base shape {base}, elsewhere it is {bases[name]}. {_AGAIN}"
            )


def _variables(found: s.Metadata) -> list[s.Variable]:
    """All mentions of variables with their sites."""
    variables = [*found.inputs]
    for part in found.segments:
        if isinstance(part, s.ImplicitSegment):
            variables += [v for group in (*part.unknowns, *part.givens) for v in group.variables]
            variables += [given.variable for given in part.roles]
            if part.predictor is not None and part.predictor.feedback is not None:
                variables.append(part.predictor.feedback.input)
    return variables


def _pairs(found: s.Metadata) -> list[s.Pair]:
    """All derivative pairs of all segments."""
    pairs: list[s.Pair] = []
    for part in found.segments:
        if isinstance(part, s.ForwardSegment):
            pairs += [*(part.jacobian.pairs if part.jacobian else ())]
            pairs += [*(part.parameter_jacobian.pairs if part.parameter_jacobian else ())]
        else:
            pairs += [*(part.sensitivity.pairs if part.sensitivity else ())]
            pairs += [*(part.parameter_sensitivity.pairs if part.parameter_sensitivity else ())]
    return pairs


def _need(wanted: Any, known: set[str], where: str) -> None:
    for name in wanted:
        if name not in known:
            raise ArtifactError(
                f"{where} needs input {name!r} which is not in the model's inputs or earlier outputs. The metadata is "
                "damaged or was edited; compile the model again with neml2-compile."
            )
