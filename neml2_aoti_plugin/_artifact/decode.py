"""A metadata file of any schema, read into the objects of `schema`, and held against itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable
from typing import Any

from msgspec.structs import replace

from ..errors import ArtifactError
from ..settings import NewtonSettings, changed_settings
from .document import AGAIN, Shape, convert
from .locate import Place
from .schema import (
    ExplicitInfo,
    ImplicitInfo,
    Metadata,
    Pair,
    PairGraph,
    SolvedSensitivity,
)
from .upgrade import released_form, upgrade


def read_metadata(place: Place, *, solver: dict[str, Any] | None = None) -> Metadata:
    """The metadata of a leaf, of any released schema.

    `solver` are Newton settings that take the place of the file's, such as those of a stub's `[Solvers]` block.
    """
    document, file = place.document, str(place.metadata)
    form = released_form(document, file)
    written = document["schema_version"]
    try:
        found = metadata(document, file, place.digest)
    except RecursionError as error:
        raise ArtifactError(
            f"{file}: nested too deeply for a metadata file. Compile the model again with neml2-compile."
        ) from error
    except ArtifactError as error:
        if form == written:
            raise
        raise ArtifactError(
            f"{file}: written in schema {written}, which no neml2 release wrote; read like schema {form} it does not "
            f"fit: {error}"
        ) from error
    return with_solver(found, solver or {})


def metadata(document: dict[str, Any], file: str, digest: str = "") -> Metadata:
    """A document of any released schema as objects; the file is for messages."""
    found = convert({**upgrade(document, file), "digest": digest}, Metadata, file)
    require_consistent(found, file)
    return found


def with_solver(found: Metadata, solver: dict[str, Any]) -> Metadata:
    """The metadata with other Newton settings in all implicit segments, by the field names of `NewtonSettings`."""
    checked = changed_settings(NewtonSettings(), solver, "the model")
    given = {name: getattr(checked, name) for name in solver}
    changed = (
        replace(part, newton=dataclasses.replace(part.newton, **given)) if isinstance(part, ImplicitInfo) else part
        for part in found.segments
    )
    return replace(found, segments=tuple(changed))


# -- what one place says of a name must hold in all others -------------------------------------------------------------


def require_consistent(found: Metadata, file: str) -> None:
    """Refuse metadata that does not agree with itself."""
    _check_boundary(found, file)
    _check_names(found, file)
    _check_shapes(found, file)


def _check_names(found: Metadata, file: str) -> None:
    """Every name that is used must stand for something, and every value exist before it is read."""
    parameters = {p.name for p in found.parameters}
    inputs, outputs = {v.name for v in found.inputs}, {v.name for v in found.outputs}
    known = set(inputs)
    for i, part in enumerate(found.segments):
        where = f"{file}: segments[{i}]"
        missing = set(part.parameters) - parameters
        if missing:
            raise ArtifactError(f"{where} takes {sorted(missing)}, which are not among the promoted parameters.")
        if isinstance(part, ExplicitInfo):
            _need(part.inputs, known, where)
            _check_pairs(part.jacobian, part.outputs, part.inputs, where)
            _check_pairs(part.parameter_jacobian, part.outputs, part.parameters, where)
            known |= set(part.outputs)
            continue
        unknowns = {v.name for v in part.unknown_variables}
        for what, groups in (("unknown", part.unknowns), ("given", part.givens)):
            names = [v.name for group in groups for v in group.variables]
            if len(set(names)) != len(names):
                raise ArtifactError(f"{where} has two {what}s of one name among {', '.join(names)}. {AGAIN}")
        givens = [v.name for g in part.givens for v in g.variables]
        _need(givens, known, where)
        _check_pairs(part.sensitivity, unknowns, givens, where)
        _check_pairs(part.parameter_sensitivity, unknowns, part.parameters, where)
        if part.predictor is not None:
            fed_back = {part.predictor.feedback.input.name} if part.predictor.feedback else set()
            _need(part.predictor.inputs, known | unknowns | fed_back, where)
        # What a predictor gives besides unknowns is a guess, which nothing else may take for a value.
        known |= unknowns
        _need((given.name for given in part.roles), known, where)
        _need((given.pair for given in part.roles if given.pair is not None), known, where)
    missing = outputs - known
    if missing:
        raise ArtifactError(f"{file}: no segment computes the outputs {sorted(missing)}.")
    strange = {i for _, i in found.derivatives} - inputs
    strange |= {o for o, _ in (*found.derivatives, *found.parameter_derivatives)} - outputs
    if strange:
        raise ArtifactError(f"{file}: derivatives name {sorted(strange)}, which are no inputs or outputs of the model.")
    strange = {p for _, p in found.parameter_derivatives} - parameters
    if strange:
        raise ArtifactError(f"{file}: parameter_derivatives name {sorted(strange)}, which are not promoted.")


def _need(wanted: Iterable[str], known: set[str], where: str) -> None:
    for name in wanted:
        if name not in known:
            raise ArtifactError(
                f"{where} needs input {name!r} which is not in the model's inputs or earlier outputs. {AGAIN}"
            )


def _check_pairs(
    graph: PairGraph | SolvedSensitivity | None,
    computed: Collection[str],
    taken: Collection[str],
    where: str,
) -> None:
    """The derivatives of a segment must be those of what it computes by what it takes."""
    for pair in graph.pairs if graph is not None else ():
        if pair.out not in computed or pair.wrt not in taken:
            of, by = ", ".join(sorted(computed)), ", ".join(taken)
            raise ArtifactError(
                f"{where} has a derivative of {pair.out!r} by {pair.wrt!r}, where it computes {of} from {by}. {AGAIN}"
            )


def _check_boundary(found: Metadata, file: str) -> None:
    """What callers know by a name must be one thing."""
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
                raise ArtifactError(f"{file}: among the {kind} there are {which}. {AGAIN}")
            seen[public] = name
    parameters = {renames.parameters.get(p.name, p.name) for p in found.parameters}
    for name in sorted(parameters):
        path = name.split(".")
        if not all(path):
            raise ArtifactError(
                f"{file}: {name!r} is no name of a parameter: a part between its dots is empty. {AGAIN}"
            )
        above = parameters.intersection(".".join(path[:k]) for k in range(1, len(path)))
        if above:
            raise ArtifactError(
                f"{file}: {min(above)!r} is a parameter and a part of the name of another one, {name!r}. {AGAIN}"
            )


def _check_shapes(found: Metadata, file: str) -> None:
    """A variable must have one shape wherever it is spoken of: each place is taken for what it holds."""
    variables, pairs = [*found.inputs], list[Pair]()
    for part in found.segments:
        blocks: list[Any]
        if isinstance(part, ExplicitInfo):
            blocks = [part.jacobian, part.parameter_jacobian]
        else:
            blocks = [part.sensitivity, part.parameter_sensitivity]
            variables += [v for group in (*part.unknowns, *part.givens) for v in group.variables]
            variables += part.roles
            if part.predictor is not None and part.predictor.feedback is not None:
                variables.append(part.predictor.feedback.input)
        pairs += [pair for graph in blocks if graph is not None for pair in graph.pairs]
    shapes: dict[str, Shape] = {}
    for v in variables:
        if shapes.setdefault(v.name, v.natural_shape) != v.natural_shape:
            raise ArtifactError(
                f"{file}: {v.name!r} has the shape {v.natural_shape} here, {shapes[v.name]} there. {AGAIN}"
            )
    bases = {v.name: v.base_shape for v in (*found.outputs, *variables)}
    bases |= {p.name: p.base_shape for p in found.parameters}
    # Outputs are listed without their site axes, and the derivatives of old files with them among the base axes.
    claims = [("output", v.name, v.base_shape) for v in found.outputs]
    for pair in pairs:
        claims += [("derivative of", pair.out, pair.out_base_shape), ("derivative by", pair.wrt, pair.wrt_base_shape)]
    for what, name, base in claims:
        if base not in (bases.get(name, base), shapes.get(name)):
            raise ArtifactError(
                f"{file}: the {what} {name!r} has the base shape {base}, elsewhere it is {bases[name]}. {AGAIN}"
            )
