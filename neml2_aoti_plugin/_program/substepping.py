"""Solve an implicit segment over an increment that is cut into subincrements where a row does not converge.

A subincrement [a, b] is a part of the increment from 0 to 1. Over it the forces are interpolated between their old and
new values, and the old state is what the subincrement before it ended with. Rows that converge over it leave; the
others solve its two halves. Derivatives go the same way, for all that is done to a given is linear in the givens.
"""

from __future__ import annotations

import re
from dataclasses import replace

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
    # Which increments are cut is part of the result; it follows from plain Newton steps, as in neml2.
    settings = replace(settings, chord_steps=False)
    increment = _Increment(segment, state, values, rows, settings, given, tangents, parameters)
    whole = torch.arange(rows, device=increment.statistics.record.device)
    increment.solve_part(0.0, 1.0, whole, 0)
    state.update(increment.unknowns)
    if tangents is not None:
        tangents.update({name: increment.unknown_tangents.get(name, {}) for name in increment.unknowns})
    statistics = replace(increment.statistics, all_converged=bool(increment.statistics.converged.all()))
    if log.enabled("substep", "info") and statistics.all_converged:
        what = "value" if tangents is None else "jacobian"
        log.emit(
            "substep",
            "info",
            f"{what}: B={rows} elements, {increment.substepped} substepped, max depth={increment.depth}, "
            f"{increment.solves} segment-solves",
        )
    assert increment.first is not None, "the whole increment is always tried"
    return statistics, increment.first


class _Increment:
    """What all subincrements of one call share, and what they have come to."""

    def __init__(
        self,
        segment: ImplicitSegment,
        state: dict[str, Tensor],
        values: Values,
        rows: int,
        settings: NewtonSettings,
        given: frozenset[str],
        tangents: Tangents | None,
        parameters: frozenset[str],
    ) -> None:
        self.spec = spec = segment.spec
        self._segment, self._values, self._settings, self._parameters = segment, values, settings, parameters
        # All variables of the call at the increment's ends, and their derivatives where they are wanted.
        self._state, self._tangents = state, tangents
        # Unknowns whose initial guess the caller gave; it serves the increment as a whole.
        self._given = given
        like = next(iter(state.values()))
        self.unknowns = {v.name: like.new_zeros((rows, *v.natural_shape)) for v in spec.unknown_variables}
        self.unknown_tangents: Tangents = {}
        self.statistics = blank(rows, like)
        self.solves = self.depth = self.substepped = 0
        self.first: Solved | None = None
        # Givens with a lag, and initial guesses, at the start of each row's current subincrement: what the one before
        # it ended with; of the first one the caller's.
        names = (*(g.name for g in spec.roles), *(spec.predictor.inputs if spec.predictor else ()))
        self._past = {name: state[name].clone() for name in dict.fromkeys(names) if _lag(name) and name in state}
        self._past.update({name: state.get(name, zero).clone() for name, zero in self.unknowns.items()})
        # One block per row, so that rows can be written.
        self._past_tangents: Tangents = {
            name: {seed: c.expand(rows, -1, -1).clone() for seed, c in dense(columns, self._past[name]).items()}
            for name, columns in (tangents or {}).items()
            if name in self._past
        }

    def solve_part(self, a: float, b: float, rows: Tensor, level: int) -> None:
        """Solve the subincrement [a, b] for some rows, in halves where it does not converge."""
        self.solves += 1
        self.depth = max(self.depth, level)
        local = {name: value[rows] for name, value in self._state.items()}
        local.update({name: value[rows] for name, value in self._past.items()})
        local.update(self._interpolated(local, rows, a, b))
        values = self._values.take(rows)
        given = self._given if level == 0 else frozenset()
        here = self._tangents_over(local, rows, a, b)
        cut = b - a < 1.0
        solved = self._segment.solve(local, values, len(rows), self._settings, given, here, small_steps=True, cut=cut)
        if level == 0:
            self.first = Solved(solved.unknowns, solved.statistics)
        found, total = solved.statistics, self.statistics
        good, bad = (x.nonzero().squeeze(-1) for x in (found.converged, ~found.converged))
        log.emit(
            "substep",
            "debug",
            f"{'  ' * (level + 1)}span [{a:g}, {b:g}] L{level}: active={len(rows)} -> converged={len(good)} "
            f"failed={len(bad)}",
        )
        total.iterations[rows] += found.iterations
        total.norms[rows] = found.norms
        total.outcome[rows] = found.outcome
        if len(good):
            if here is not None:
                after = {**here, **self._segment.carry(solved, values, here, self._parameters, cut=cut)}
                self._keep_tangents(after, local, rows[good], good)
            self._advance(local, rows[good], good)
        if not len(bad):
            return
        if level == 0:
            self.substepped = len(bad)
        failing = rows[bad]
        if level >= self.spec.max_substepping_level:
            for name, value in self.unknowns.items():
                value[failing] = local[name][bad]
            return
        middle = 0.5 * (a + b)
        self.solve_part(a, middle, failing, level + 1)
        # A row that failed the first half has no state to start the second from.
        going_on = failing[total.outcome[failing] == Outcome.CONVERGED]
        if len(going_on):
            self.solve_part(middle, b, going_on, level + 1)

    def _interpolated(self, local: dict[str, Tensor], rows: Tensor, a: float, b: float) -> dict[str, Tensor]:
        """Values over the subincrement of the givens that are not chained."""
        found = {}
        for name, terms in _terms(self.spec.roles, a, b).items():
            found[name] = sum(
                (factor * self._state[source][rows] for factor, source in terms if factor),
                start=torch.zeros_like(local[name]),
            )
        return found

    def _advance(self, local: dict[str, Tensor], where: Tensor, good: Tensor) -> None:
        """Keep the solution of the rows that converged, and move their history on by one."""
        for name, value in self.unknowns.items():
            value[where] = local[name][good]
        for name, value in self._past.items():
            source = successor(name)
            if source in local:
                value[where] = local[source][good]

    def _tangents_over(self, local: dict[str, Tensor], rows: Tensor, a: float, b: float) -> Tangents | None:
        """Derivatives of all variables of some rows over the subincrement [a, b]; None where none are wanted."""
        whole = self._tangents
        if whole is None:
            return None
        here = {**select(whole, rows), **select(self._past_tangents, rows)}
        for name, terms in _terms(self.spec.roles, a, b).items():
            here[name] = combine([(f, dense(select({s: whole.get(s, {})}, rows)[s], local[name])) for f, s in terms])
        return here

    def _keep_tangents(self, after: Tangents, local: dict[str, Tensor], where: Tensor, good: Tensor) -> None:
        """Keep the derivatives of the rows that converged, and move those of their history on by one."""
        total = len(self.statistics.outcome)
        for name in self.unknowns:
            _write(self.unknown_tangents.setdefault(name, {}), after[name], total, where, good)
        for name in self._past:
            source = successor(name)
            if source in after and source != name:
                columns: Columns = {**dense(after[source], local[source])}
                _write(self._past_tangents.setdefault(name, {}), columns, total, where, good)


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


def successor(name: str) -> str:
    """What a history variable holds one subincrement later: the next younger lag; an initial guess stays itself."""
    lag = _lag(name)
    if lag == 0:
        return name
    stem = name[: name.rindex("~")]
    return stem if lag == 1 else f"{stem}~{lag - 1}"


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
