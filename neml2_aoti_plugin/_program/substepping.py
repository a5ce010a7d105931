"""Solve an implicit segment over an increment that is cut into subincrements where a row does not converge.

A subincrement [a, b] is a part of the increment from 0 to 1. Over it the forces are interpolated between their old and
new values, and the old state is what the subincrement before it ended with. Rows that converge over it leave; the
others solve its two halves. Derivatives go the same way, for all that is done to a given is linear in the givens.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .. import _log as log
from .._artifact.schema import Given
from .._solve.outcome import Outcome, RowStatistics, Solved, blank
from ..errors import ArtifactError
from ..settings import NewtonSettings
from .implicit import ImplicitSegment
from .values import Columns, Tangents, Values, combine, dense, select

_LAG = re.compile(r"^(?P<name>.+)~(?P<lag>[1-9]\d*)$")


@dataclass
class Increment:
    """What all subincrements of one call share, and what they have come to."""

    segment: ImplicitSegment
    # All variables of the call at the increment's ends.
    state: dict[str, Tensor]
    values: Values
    settings: NewtonSettings
    # Derivatives of the variables, where they are wanted.
    tangents: Tangents | None
    parameters: frozenset[str]
    # Givens with a lag, and initial guesses, at the start of each row's current subincrement.
    past: dict[str, Tensor]
    past_tangents: Tangents
    unknowns: dict[str, Tensor]
    statistics: RowStatistics
    # Unknowns whose initial guess the caller gave; it serves the increment as a whole.
    given: frozenset[str]
    unknown_tangents: Tangents = field(default_factory=dict)
    solves: int = 0
    depth: int = 0
    substepped: Tensor | None = None
    first: Solved | None = None


def solve(
    segment: ImplicitSegment,
    state: dict[str, Tensor],
    values: Values,
    rows: int,
    settings: NewtonSettings,
    given: frozenset[str] = frozenset(),
    tangents: Tangents | None = None,
    parameters: frozenset[str] = frozenset(),
) -> tuple[RowStatistics, Solved]:
    """Solve for the unknowns of all rows, and write them into `state` and their derivatives into `tangents`."""
    spec = segment.spec
    # Which increments are cut is part of the result; it follows from plain Newton steps, as in neml2.
    settings = replace(settings, chord_steps=False)
    like = next(iter(state.values()))
    unknowns = {v.name: like.new_zeros((rows, *v.natural_shape)) for v in spec.unknown_variables}
    names = [g.name for g in spec.roles]
    predicted_from = spec.predictor.inputs if spec.predictor else ()
    past = {
        name: state[name].clone() for name in dict.fromkeys((*names, *predicted_from)) if _lag(name) and name in state
    }
    # A subincrement starts from what the one before it ended with, the first one from the caller's iterate.
    past.update({name: state[name].clone() if name in state else zero.clone() for name, zero in unknowns.items()})
    increment = Increment(
        segment,
        state,
        values,
        settings,
        tangents,
        parameters,
        past,
        _past_tangents(tangents, past),
        unknowns,
        blank(rows, like),
        given,
    )
    _solve_part(increment, 0.0, 1.0, torch.arange(rows, device=like.device), 0)
    state.update(unknowns)
    if tangents is not None:
        tangents.update({name: increment.unknown_tangents.get(name, {}) for name in unknowns})
    statistics = replace(increment.statistics, all_converged=bool(increment.statistics.converged.all()))
    if log.enabled("substep", "info") and statistics.all_converged:
        bisected = 0 if increment.substepped is None else int(increment.substepped.sum())
        what = "value" if tangents is None else "jacobian"
        log.emit(
            "substep",
            "info",
            f"{what}: B={rows} elements, {bisected} substepped, max depth={increment.depth}, "
            f"{increment.solves} segment-solves",
        )
    assert increment.first is not None, "the whole increment is always tried"
    return statistics, increment.first


def _past_tangents(tangents: Tangents | None, past: dict[str, Tensor]) -> Tangents:
    """Derivatives of what is chained between subincrements, one block per row so that rows can be written."""
    if tangents is None:
        return {}
    return {
        name: {seed: c.expand(past[name].shape[0], -1, -1).clone() for seed, c in dense(columns, past[name]).items()}
        for name, columns in tangents.items()
        if name in past
    }


def _solve_part(increment: Increment, a: float, b: float, rows: Tensor, level: int) -> None:
    """Solve the subincrement [a, b] for some rows, in halves where it does not converge."""
    segment, spec = increment.segment, increment.segment.spec
    increment.solves += 1
    increment.depth = max(increment.depth, level)
    local = {name: value[rows] for name, value in increment.state.items()}
    local.update({name: value[rows] for name, value in increment.past.items()})
    local.update(_interpolated(spec.roles, increment, local, rows, a, b))
    values = increment.values.take(rows)
    given = increment.given if level == 0 else frozenset()
    here = _tangents_over(increment, local, rows, a, b)
    cut = b - a < 1.0
    solved = segment.solve(local, values, len(rows), increment.settings, given, here, small_steps=True, cut=cut)
    if level == 0:
        increment.first = Solved(solved.unknowns, solved.statistics)
    found, total = solved.statistics, increment.statistics
    ok = found.converged
    good = ok.nonzero().squeeze(-1)
    log.emit(
        "substep",
        "debug",
        f"{'  ' * (level + 1)}span [{a:g}, {b:g}] L{level}: active={len(rows)} -> converged={len(good)} "
        f"failed={len(rows) - len(good)}",
    )
    total.iterations[rows] += found.iterations
    total.norms[rows] = found.norms
    total.outcome[rows] = found.outcome
    if here is not None and len(good):
        after = {**here, **segment.carry(solved, values, here, increment.parameters, cut=cut)}
        _keep_tangents(increment, after, local, rows, good)
    if len(good):
        _advance(increment, local, rows, good)
    if len(good) == len(rows):
        return
    if level == 0:
        increment.substepped = ~ok
    bad = (~ok).nonzero().squeeze(-1)
    failing = rows[bad]
    if level >= spec.max_substepping_level:
        for unknown in spec.unknown_variables:
            increment.unknowns[unknown.name][failing] = local[unknown.name][bad]
        return
    middle = 0.5 * (a + b)
    _solve_part(increment, a, middle, failing, level + 1)
    # A row that failed the first half has no state to start the second from.
    going_on = failing[total.outcome[failing] == Outcome.CONVERGED]
    if len(going_on):
        _solve_part(increment, middle, b, going_on, level + 1)


def _interpolated(
    roles: tuple[Given, ...], increment: Increment, local: dict[str, Tensor], rows: Tensor, a: float, b: float
) -> dict[str, Tensor]:
    """Values over the subincrement of the givens that are not chained."""
    found = {}
    for name, terms in _terms(roles, a, b).items():
        found[name] = sum(
            (factor * increment.state[source][rows] for factor, source in terms if factor),
            start=torch.zeros_like(local[name]),
        )
    return found


def _terms(roles: tuple[Given, ...], a: float, b: float) -> dict[str, list[tuple[float, str]]]:
    """Each force over the subincrement [a, b] as a combination of its values at the increment's ends."""
    terms: dict[str, list[tuple[float, str]]] = {}
    for given in roles:
        name, pair = given.name, given.pair
        if given.role == "incremental":
            terms[name] = [(b - a, name)]
        elif given.role in ("old_force", "cur_force") and pair is None:
            raise ArtifactError(f"given {name!r} has role {given.role} but no 'pair'; compile the model again.")
        elif given.role == "old_force" and pair is not None and _lag(name) == 1:
            terms[name] = [(1.0 - a, name), (a, pair)]
        elif given.role == "cur_force" and pair is not None:
            # neml2 pairs with the lag that comes first in the inputs; the increment starts at the latest one.
            old = f"{name}~1" if any(g.name == f"{name}~1" for g in roles) else pair
            terms[name] = [(1.0 - b, old), (b, name)]
    return terms


def _lag(name: str) -> int:
    found = _LAG.match(name)
    return int(found["lag"]) if found else 0


def _advance(increment: Increment, local: dict[str, Tensor], rows: Tensor, good: Tensor) -> None:
    """Keep the solution of the rows that converged, and move their history on by one."""
    where = rows[good]
    for unknown in increment.segment.spec.unknown_variables:
        increment.unknowns[unknown.name][where] = local[unknown.name][good]
    for name in increment.past:
        source = _successor(name)
        if source in local:
            increment.past[name][where] = local[source][good]


def _successor(name: str) -> str:
    """What a history variable holds one subincrement later: the next younger lag; a initial guess stays itself."""
    lag = _lag(name)
    if lag == 0:
        return name
    stem = name[: name.rindex("~")]
    return stem if lag == 1 else f"{stem}~{lag - 1}"


def _tangents_over(increment: Increment, local: dict[str, Tensor], rows: Tensor, a: float, b: float) -> Tangents | None:
    """Derivatives of all variables of some rows over the subincrement [a, b]; None where none are wanted."""
    whole = increment.tangents
    if whole is None:
        return None
    here: Tangents = select(whole, rows)
    here.update(select(increment.past_tangents, rows))
    for name, terms in _terms(increment.segment.spec.roles, a, b).items():
        here[name] = combine([(f, dense(select({s: whole.get(s, {})}, rows)[s], local[name])) for f, s in terms])
    return here


def _keep_tangents(increment: Increment, after: Tangents, local: dict[str, Tensor], rows: Tensor, good: Tensor) -> None:
    """Keep the derivatives of the rows that converged, and move those of their history on by one."""
    where, total = rows[good], len(increment.statistics.outcome)
    for unknown in increment.segment.spec.unknown_variables:
        _write(increment.unknown_tangents.setdefault(unknown.name, {}), after[unknown.name], total, where, good)
    for name in increment.past:
        source = _successor(name)
        if source in after and source != name:
            columns: Columns = {**dense(after[source], local[source])}
            _write(increment.past_tangents.setdefault(name, {}), columns, total, where, good)


def _write(into: Columns, columns: Columns, total: int, where: Tensor, good: Tensor) -> None:
    """Write the derivatives of some rows; rows without one by a seed have zero."""
    for seed in set(into) | set(columns):
        value = columns.get(seed)
        if value is None:
            present = into[seed]
            assert present is not None
            present[where] = 0.0
            continue
        if seed not in into:
            into[seed] = value.new_zeros((total, *value.shape[1:]))
        target = into[seed]
        assert target is not None
        target[where] = value[good] if value.shape[0] != 1 else value.expand(len(good), -1, -1)
