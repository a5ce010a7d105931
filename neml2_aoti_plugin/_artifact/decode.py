"""A metadata file of any schema, read into the objects of `schema`, and held against itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from msgspec.structs import replace

from ..errors import ArtifactError
from ..settings import NewtonSettings, changed_settings
from .document import AGAIN, Shape, convert
from .locate import Place
from .schema import ExplicitInfo, ImplicitInfo, Metadata, PairGraph, Segment, SolvedSensitivity
from .upgrade import released_form, upgrade


def read_metadata(place: Place, *, solver: dict[str, Any] | None = None) -> Metadata:
    """The metadata of a leaf, of any released schema, with Newton settings such as a stub's in place of the file's."""
    document, file = place.document, str(place.metadata)
    form = released_form(document, file)
    written = document["schema_version"]
    try:
        return metadata(document, file, place.digest, solver)
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


def metadata(document: dict[str, Any], file: str, digest: str = "", solver: dict[str, Any] | None = None) -> Metadata:
    """A document of any released schema as objects; `solver` is that of `read_metadata`, the file is for messages."""
    found = convert({**upgrade(document, file), "digest": digest}, Metadata, file)
    for complaint in chain(_strange_names(found), _strange_uses(found), _strange_shapes(found)):
        raise ArtifactError(f"{file}: {complaint}. {AGAIN}")
    if not solver:
        return found
    checked = changed_settings(NewtonSettings(), solver, "the model")
    given = {name: getattr(checked, name) for name in solver}
    segments = [
        replace(part, newton=dataclasses.replace(part.newton, **given)) if isinstance(part, ImplicitInfo) else part
        for part in found.segments
    ]
    return replace(found, segments=tuple(segments))


# -- what one place says of a name must hold in all others: complaints, each without its end ---------------------------


def _strange_names(found: Metadata) -> Iterator[str]:
    """What callers know by a name must be one thing."""
    renames = found.aliases
    for kind, things, to in (
        ("inputs", found.inputs, renames.inputs),
        ("outputs", found.outputs, renames.outputs),
        ("parameters", found.parameters, renames.parameters),
    ):
        seen: dict[str, str] = {}
        for name in (thing.name for thing in things):
            public = to.get(name, name)
            if public in seen:
                both = f"{seen[public]!r} and {name!r}, which are both called {public!r}"
                yield f"among the {kind} there are {both if to else f'{public!r} twice'}"
            seen[public] = name
    parameters = {renames.parameters.get(p.name, p.name) for p in found.parameters}
    for name in sorted(parameters):
        path = name.split(".")
        if not all(path):
            yield f"{name!r} is no name of a parameter: a part between its dots is empty"
        above = parameters.intersection(".".join(path[:k]) for k in range(1, len(path)))
        if above:
            yield f"{min(above)!r} is a parameter and a part of the name of another one, {name!r}"


def _strange_uses(found: Metadata) -> Iterator[str]:
    """Every name that is used must stand for something, and every value exist before it is read."""
    parameters = {p.name for p in found.parameters}
    inputs, outputs = {v.name for v in found.inputs}, {v.name for v in found.outputs}
    known = set(inputs)
    for i, part in enumerate(found.segments):
        where = f"segments[{i}]"
        strange = set(part.parameters) - parameters
        if strange:
            yield f"{where} takes {sorted(strange)}, which are not among the promoted parameters"
        # What it needs in which order, and what is there by then.
        needs: list[tuple[Iterable[str], set[str]]]
        if isinstance(part, ExplicitInfo):
            taken, computed = list(part.inputs), list(part.outputs)
            needs = [(taken, known)]
        else:
            taken, computed = ([v.name for g in groups for v in g.variables] for groups in (part.givens, part.unknowns))
            for what, names in (("unknown", computed), ("given", taken)):
                if len(set(names)) != len(names):
                    yield f"{where} has two {what}s of one name among {', '.join(names)}"
            needs = [(taken, known)]
            # What a predictor gives besides unknowns is a guess, which nothing else may take for a value.
            solved = known.union(computed)
            if part.predictor is not None:
                fed_back = [part.predictor.feedback.name] if part.predictor.feedback else []
                needs.append((part.predictor.inputs, solved.union(fed_back)))
            needs += [([role.name, *([role.pair] if role.pair else [])], solved) for role in part.roles]
        for needed, there in needs:
            for name in needed:
                if name not in there:
                    yield f"{where} needs input {name!r} which is not in the model's inputs or earlier outputs"
        known.update(computed)
        for graph, by in zip(_derivatives(part), (taken, list(part.parameters)), strict=True):
            for pair in graph.pairs if graph is not None else ():
                if pair.out not in computed or pair.wrt not in by:
                    of = ", ".join(sorted(set(computed)))
                    claim = f"a derivative of {pair.out!r} by {pair.wrt!r}"
                    yield f"{where} has {claim}, where it computes {of} from {', '.join(by)}"
    missing = outputs - known
    if missing:
        yield f"no segment computes the outputs {sorted(missing)}"
    strange = {i for _, i in found.derivatives} - inputs
    strange |= {o for o, _ in (*found.derivatives, *found.parameter_derivatives)} - outputs
    if strange:
        yield f"derivatives name {sorted(strange)}, which are no inputs or outputs of the model"
    strange = {p for _, p in found.parameter_derivatives} - parameters
    if strange:
        yield f"parameter_derivatives name {sorted(strange)}, which are not promoted"


def _strange_shapes(found: Metadata) -> Iterator[str]:
    """A variable must have one shape wherever it is spoken of: each place is taken for what it holds."""
    variables = [*found.inputs]
    for part in found.segments:
        if isinstance(part, ImplicitInfo):
            variables += [v for group in (*part.unknowns, *part.givens) for v in group.variables]
            variables += part.roles
            if part.predictor is not None and part.predictor.feedback is not None:
                variables.append(part.predictor.feedback)
    shapes: dict[str, Shape] = {}
    for v in variables:
        if shapes.setdefault(v.name, v.natural_shape) != v.natural_shape:
            yield f"{v.name!r} has the shape {v.natural_shape} here, {shapes[v.name]} there"
    bases = {v.name: v.base_shape for v in (*found.outputs, *variables)}
    bases |= {p.name: p.base_shape for p in found.parameters}
    # Outputs are listed without their site axes, and the derivatives of old files with them among the base axes.
    claims = [("output", v.name, v.base_shape) for v in found.outputs]
    for graph in (graph for part in found.segments for graph in _derivatives(part) if graph is not None):
        for pair in graph.pairs:
            claims.append(("derivative of", pair.out, pair.out_base_shape))
            claims.append(("derivative by", pair.wrt, pair.wrt_base_shape))
    for what, name, base in claims:
        if base not in (bases.get(name, base), shapes.get(name)):
            yield f"the {what} {name!r} has the base shape {base}, elsewhere it is {bases[name]}"


def _derivatives(part: Segment) -> tuple[PairGraph | SolvedSensitivity | None, PairGraph | SolvedSensitivity | None]:
    """What gives the derivatives of a segment by what it takes, and those by parameters."""
    if isinstance(part, ExplicitInfo):
        return part.jacobian, part.parameter_jacobian
    return part.sensitivity, part.parameter_sensitivity
