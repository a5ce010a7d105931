"""Solve an implicit segment over an increment that is cut into subincrements where a row does not converge.

A subincrement [a, b] is a part of the increment from 0 to 1. Over it the forces are interpolated between their old and
new values, and the old state is what the subincrement before it ended with. Rows that converge over it leave; the
others solve its two halves. Derivatives go the same way, for all that is done to a given is linear in the givens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from .. import _log as log
from .._artifact.schema import Given
from .._solve.outcome import Outcome, RowStatistics, Solved, blank
from ..errors import ArtifactError
from ..settings import NewtonSettings
from .implicit import ImplicitSegment
from .values import Seed, State, Tangents, Values, dense

_LAG = re.compile(r"^(?P<name>.+)~(?P<lag>[1-9]\d*)$")

# A variable `(rows, ...)`, under VALUE, with its derivatives `(rows, entries, m)` under their seeds.
Carried = dict[Seed, Tensor]
VALUE: Seed = ("value", "")


def solve(
    segment: ImplicitSegment,
    state: State,
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
    for name, found in increment.unknowns.items():
        state[name] = found.pop(VALUE)
        if tangents is not None:
            tangents[name] = {**found}
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
        state: State,
        values: Values,
        rows: int,
        settings: NewtonSettings,
        given: frozenset[str],
        tangents: Tangents | None,
        parameters: frozenset[str],
    ) -> None:
        self.spec = spec = segment.spec
        self._segment, self._values, self._settings, self._parameters = segment, values, settings, parameters
        # Unknowns whose initial guess the caller gave; it serves the increment as a whole.
        self._given = given
        self._differentiated = tangents is not None
        # All variables of the call at the increment's ends.
        self._ends: dict[str, Carried] = {}
        for name, value in state.items():
            columns = dense((tangents or {}).get(name, {}), value)
            self._ends[name] = {VALUE: value, **{seed: x.expand(rows, -1, -1) for seed, x in columns.items()}}
        like = next(iter(state.values()))
        self.unknowns: dict[str, Carried] = {
            v.name: {VALUE: like.new_zeros((rows, *v.natural_shape))} for v in spec.unknown_variables
        }
        self.statistics = blank(rows, like)
        self.solves = self.depth = self.substepped = 0
        self.first: Solved | None = None
        # Givens with a lag, and initial guesses, at the start of each row's current subincrement: what the one before
        # it ended with; of the first one the caller's.
        names = (*(g.name for g in spec.roles), *(spec.predictor.inputs if spec.predictor else ()))
        past = {name: self._ends[name] for name in names if _lag(name) and name in state}
        past.update({name: self._ends.get(name, zero) for name, zero in self.unknowns.items()})
        self._past = {name: {key: x.clone() for key, x in carried.items()} for name, carried in past.items()}

    def solve_part(self, a: float, b: float, rows: Tensor, level: int) -> None:
        """Solve the subincrement [a, b] for some rows, in halves where it does not converge."""
        self.solves += 1
        self.depth = max(self.depth, level)
        local = {name: _taken(carried, rows) for name, carried in {**self._ends, **self._past}.items()}
        for name, terms in _terms(self.spec.roles, a, b).items():
            zero = torch.zeros_like(local[name][VALUE])
            local[name] = _sum(zero, ((factor, _taken(self._ends[of], rows)) for factor, of in terms if factor))
        state = {name: carried.pop(VALUE) for name, carried in local.items()}
        tangents: Tangents | None = {name: {**found} for name, found in local.items()} if self._differentiated else None
        values, cut = self._values.take(rows, {}), b - a < 1.0
        given = self._given if level == 0 else frozenset()
        solved = self._segment.solve(
            state, values, len(rows), self._settings, given, tangents, small_steps=True, cut=cut
        )
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
            if tangents is not None:
                tangents.update(self._segment.sensitivity.carry(solved, values, tangents, self._parameters, cut))
            self._advance(state, tangents or {}, rows[good], good)
        if not len(bad):
            return
        if level == 0:
            self.substepped = len(bad)
        failing = rows[bad]
        if level >= self.spec.max_substepping_level:
            for name, carried in self.unknowns.items():
                carried[VALUE][failing] = state[name][bad]
            return
        middle = 0.5 * (a + b)
        self.solve_part(a, middle, failing, level + 1)
        # A row that failed the first half has no state to start the second from.
        going_on = failing[total.outcome[failing] == Outcome.CONVERGED]
        if len(going_on):
            self.solve_part(middle, b, going_on, level + 1)

    def _advance(self, state: State, tangents: Tangents, where: Tensor, good: Tensor) -> None:
        """Keep what the rows that converged have come to, and move their history on by one."""
        kept = [(carried, name) for name, carried in self.unknowns.items()]
        kept += [(carried, successor(name)) for name, carried in self._past.items()]
        for into, name in kept:
            if name not in state:
                continue
            fresh = {VALUE: state[name], **dense(tangents.get(name, {}), state[name])}
            for key in {**into, **fresh}:
                value = fresh.get(key)
                if value is None:
                    # Rows without a derivative by a seed have zero.
                    into[key][where] = 0.0
                    continue
                if key not in into:
                    into[key] = value.new_zeros((len(into[VALUE]), *value.shape[1:]))
                into[key][where] = value[good] if value.shape[0] > 1 else value


def _taken(carried: Carried, rows: Tensor) -> Carried:
    """A variable in some rows."""
    return {key: x[rows] for key, x in carried.items()}


def _sum(zero: Tensor, terms: Iterable[tuple[float, Carried]]) -> Carried:
    """A linear combination of variables, from a value of zeros."""
    total = {VALUE: zero}
    for factor, carried in terms:
        for key, x in carried.items():
            total[key] = total[key] + factor * x if key in total else factor * x
    return total


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
