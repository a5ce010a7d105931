"""Solve an implicit segment over an increment that is cut into spans where a row does not converge.

A span [a, b] is a part of the increment from 0 to 1. Over a span the forces are interpolated between their old and new
values and the old state is what the span before it ended with. Rows that converge over a span leave; the others solve
its two halves. Derivatives go the same way, for all that is done to a given is linear in the givens.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import log
from ..artifact.schema import Given
from ..errors import ArtifactError
from ..settings import NewtonSettings
from ..solve.rows import Rows, Told
from .implicit import ImplicitStage, Solved
from .parameters import Values
from .tangents import Columns, Tangents, combine, dense, select

_LAG = re.compile(r"^(?P<name>.+)~(?P<lag>[1-9]\d*)$")


@dataclass
class Increment:
    """What all spans of one call share, and what they have come to.

    Args:
        stage: the segment.
        state: all variables of the call at the increment's ends.
        values: promoted parameters.
        settings: of the Newton solve.
        tangents: derivatives of the variables, where they are wanted.
        parameters: parameters to differentiate by.
        past: givens with a lag, and first iterates, at the start of each row's current span.
        past_tangents: their derivatives.
        unknowns: solution of each row.
        unknown_tangents: its derivatives, per row.
        outcome: how the rows fared.
    """

    stage: ImplicitStage
    state: dict[str, Tensor]
    values: Values
    settings: NewtonSettings
    tangents: Tangents | None
    parameters: frozenset[str]
    past: dict[str, Tensor]
    past_tangents: Tangents
    unknowns: dict[str, Tensor]
    outcome: Told
    unknown_tangents: Tangents = field(default_factory=dict)
    spans: int = 0
    depth: int = 0
    substepped: Tensor | None = None
    first: Rows | None = None


def solve(
    stage: ImplicitStage,
    state: dict[str, Tensor],
    values: Values,
    rows: int,
    settings: NewtonSettings,
    tangents: Tangents | None = None,
    parameters: frozenset[str] = frozenset(),
) -> tuple[Rows, Rows]:
    """Solve for the unknowns of all rows, and write them into `state` and their derivatives into `tangents`.

    Args:
        stage: the segment.
        state: all variables, `(rows, ...)` each.
        values: promoted parameters.
        rows: the batch.
        settings: of the Newton solve.
        tangents: derivatives of the variables; None if no derivatives are wanted.
        parameters: parameters to differentiate by.

    Returns:
        The outcome of each row, and what it was over the whole increment in one span.
    """
    like = next(iter(state.values()))
    unknowns = {v.name: like.new_zeros((rows, *v.natural_shape)) for v in stage.spec.unknown_variables}
    given = [g.variable.name for g in stage.spec.roles]
    predicted_from = stage.spec.predictor.inputs if stage.spec.predictor else ()
    past = {
        name: state[name].clone() for name in dict.fromkeys((*given, *predicted_from)) if _lag(name) and name in state
    }
    # A span starts from what the span before it ended with, the first one from the caller's guess.
    past.update({name: state[name].clone() if name in state else zero.clone() for name, zero in unknowns.items()})
    blank = Told(
        torch.zeros(rows, dtype=torch.bool, device=like.device),
        torch.zeros(rows, dtype=torch.int64, device=like.device),
        like.new_zeros(rows),
        like.new_zeros(rows),
    )
    increment = Increment(
        stage, state, values, settings, tangents, parameters, past, _past_tangents(tangents, past), unknowns, blank
    )
    _span(increment, 0.0, 1.0, torch.arange(rows, device=like.device), 0)
    state.update(unknowns)
    if tangents is not None:
        tangents.update({name: increment.unknown_tangents.get(name, {}) for name in unknowns})
    if log.enabled("substep", "info") and bool(blank.converged.all()):
        bisected = 0 if increment.substepped is None else int(increment.substepped.sum())
        what = "value" if tangents is None else "jacobian"
        log.emit(
            "substep",
            "info",
            f"{what}: B={rows} elements, {bisected} substepped, max depth={increment.depth}, "
            f"{increment.spans} segment-solves",
        )
    assert increment.first is not None, "the first span is always solved"
    return Rows([], lambda: blank), increment.first


def _past_tangents(tangents: Tangents | None, past: dict[str, Tensor]) -> Tangents:
    """Derivatives of what is chained from span to span, one block per row so that rows can be written."""
    if tangents is None:
        return {}
    return {
        name: {seed: c.expand(past[name].shape[0], -1, -1).clone() for seed, c in dense(columns, past[name]).items()}
        for name, columns in tangents.items()
        if name in past
    }


def _span(increment: Increment, a: float, b: float, rows: Tensor, level: int) -> None:
    """Solve the span [a, b] for some rows, in halves where it does not converge."""
    stage, spec = increment.stage, increment.stage.spec
    increment.spans += 1
    increment.depth = max(increment.depth, level)
    local = {name: value[rows] for name, value in increment.state.items()}
    local.update({name: value[rows] for name, value in increment.past.items()})
    local.update(_interpolated(spec.roles, increment, local, rows, a, b))
    values = increment.values.take(rows)
    stage.guess(local, len(rows))
    wanted = increment.tangents is not None
    solved = stage.solve(local, values, len(rows), increment.settings, gated=True)
    if level == 0:
        increment.first = solved.rows
    told = solved.rows.told
    ok = told.converged
    good = ok.nonzero().squeeze(-1)
    log.emit(
        "substep",
        "debug",
        f"{'  ' * (level + 1)}span [{a:g}, {b:g}] L{level}: active={len(rows)} -> converged={len(good)} "
        f"failed={len(rows) - len(good)}",
    )
    increment.outcome.iterations[rows] += told.iterations
    increment.outcome.norm[rows] = told.norm
    increment.outcome.norm0[rows] = told.norm0
    if wanted and len(good):
        _differentiate(increment, solved, values, local, rows, good, a, b)
    if len(good):
        _advance(increment, local, rows, good)
    if len(good) == len(rows):
        increment.outcome.converged[rows] = True
        return
    bad = (~ok).nonzero().squeeze(-1)
    increment.outcome.converged[rows[good]] = True
    if level == 0:
        increment.substepped = ~ok
    failing = rows[bad]
    if level >= spec.max_substepping_level:
        increment.outcome.converged[failing] = False
        for unknown in spec.unknown_variables:
            increment.unknowns[unknown.name][failing] = local[unknown.name][bad]
        return
    middle = 0.5 * (a + b)
    increment.outcome.converged[failing] = False
    _span(increment, a, middle, failing, level + 1)
    # A row that failed the first half has no state to start the second from.
    going_on = failing[increment.outcome.converged[failing]]
    increment.outcome.converged[going_on] = False
    if len(going_on):
        _span(increment, middle, b, going_on, level + 1)


def _interpolated(
    roles: tuple[Given, ...], increment: Increment, local: dict[str, Tensor], rows: Tensor, a: float, b: float
) -> dict[str, Tensor]:
    """Values over the span of the givens that are not chained."""
    found = {}
    for name, terms in _terms(roles, a, b).items():
        found[name] = sum(
            (factor * increment.state[source][rows] for factor, source in terms if factor),
            start=torch.zeros_like(local[name]),
        )
    return found


def _terms(roles: tuple[Given, ...], a: float, b: float) -> dict[str, list[tuple[float, str]]]:
    """Each force over the span [a, b] as a combination of its values at the increment's ends."""
    terms: dict[str, list[tuple[float, str]]] = {}
    for given in roles:
        name, pair = given.variable.name, given.pair
        if given.role == "incremental":
            terms[name] = [(b - a, name)]
        elif given.role in ("old_force", "cur_force") and pair is None:
            raise ArtifactError(f"given {name!r} has role {given.role} but no 'pair'; compile the model again.")
        elif given.role == "old_force" and pair is not None and _lag(name) == 1:
            terms[name] = [(1.0 - a, name), (a, pair)]
        elif given.role == "cur_force" and pair is not None:
            # neml2 pairs with the lag that comes first in the inputs; the increment starts at the latest one.
            old = f"{name}~1" if any(g.variable.name == f"{name}~1" for g in roles) else pair
            terms[name] = [(1.0 - b, old), (b, name)]
    return terms


def _lag(name: str) -> int:
    found = _LAG.match(name)
    return int(found["lag"]) if found else 0


def _advance(increment: Increment, local: dict[str, Tensor], rows: Tensor, good: Tensor) -> None:
    """Keep the solution of the rows that converged, and move their history on by one."""
    where = rows[good]
    for unknown in increment.stage.spec.unknown_variables:
        increment.unknowns[unknown.name][where] = local[unknown.name][good]
    for name in increment.past:
        source = _successor(name)
        if source in local:
            increment.past[name][where] = local[source][good]


def _successor(name: str) -> str:
    """What a history variable holds one span later: the next younger lag; a first iterate stays itself."""
    lag = _lag(name)
    if lag == 0:
        return name
    stem = name[: name.rindex("~")]
    return stem if lag == 1 else f"{stem}~{lag - 1}"


def _differentiate(
    increment: Increment,
    solved: Solved,
    values: Values,
    local: dict[str, Tensor],
    rows: Tensor,
    good: Tensor,
    a: float,
    b: float,
) -> None:
    """Carry the derivatives over the span for the rows that converged."""
    assert increment.tangents is not None
    roles = increment.stage.spec.roles
    here: Tangents = select(increment.tangents, rows)
    here.update(select(increment.past_tangents, rows))
    for name, terms in _terms(roles, a, b).items():
        here[name] = combine(
            [(f, dense(select({s: increment.tangents.get(s, {})}, rows)[s], local[name])) for f, s in terms]
        )
    found = increment.stage.carry(solved, values, here, increment.parameters, cut=b - a < 1.0)
    where = rows[good]
    total = len(increment.outcome.converged)
    for name, columns in found.items():
        _write(increment.unknown_tangents.setdefault(name, {}), columns, total, where, good)
    after: Tangents = {**here, **found}
    for name in increment.past:
        source = _successor(name)
        if source in after and source != name:
            columns = {s: c for s, c in dense(after[source], local[source]).items()}
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
