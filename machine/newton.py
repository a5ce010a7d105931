"""Newton's method over the rows of a block as one call that needs no interpreter: compiled graphs included.

The initial guess, the solve and the derivatives at the solution are one pass over the block. Each row is decided by its
own numbers. The sums of a row are taken in the order of its entries, without reassociation, and graphs get whole
vectors of rows, so that the bits of a row depend on nothing but the row. The live rows lie together at the front of the
arrays of `Space`; rows that are done leave, and the others move up.
"""

from __future__ import annotations

from math import isfinite, nan
from typing import Any, Final

from neml2_aoti_plugin._solve import criteria as by
from neml2_aoti_plugin._solve import tables
from neml2_aoti_plugin._solve.tables import CONVERGED, DONE, FIRST, LANES, LAST, OUTCOME, UPDATE, SolveTable

from .calls import copy, entry_of, inlined, inner, integers, number_rows, numbers, output, release, run
from .elimination import clear_sides, finite, had_pivots, norm_of, put_side, side_in, substitute, take_side
from .space import (
    NONE_DONE,
    enter,
    evaluate,
    gather,
    graph_of,
    leave,
    linearise,
    note,
    note_iteration,
    note_trials,
    predict,
    space,
)

# In `record` of a row that has converged: it waits for a last step with a linearisation of its own; it has a last step.
WAITING: Final = -1
STEPPING: Final = -2
CRITERIA: Final = len(by.Criteria._fields)

_converged, _small_step, _accepted = inlined(by.converged), inlined(by.small_step), inlined(by.accepted)
_gains, _carries, _followed = inlined(by.gains), inlined(by.carries), inlined(by.followed)


@inlined
def _unpacked(p: Any, chord_steps: Any) -> Any:
    """The criteria in an array, with chord steps or without."""
    return by.Criteria(
        p[0], p[1], p[2], p[3], p[4], p[5] != 0.0, p[6] != 0.0, p[7] != 0.0, p[8], chord_steps and p[9] != 0.0
    )


@inner
def solve_block(table: Any) -> Any:
    """Solve the rows of a block by a table of `tables.SolveTable`; gives `DONE`, or what is wrong with a graph.

    The number of rows that failed is put into the table.
    """
    t = integers(table, (SolveTable.FIELDS,))
    s, rows = space(t), t[SolveTable.ROWS]
    fault = predict(t)
    if fault != DONE:
        return fault
    gather(s)
    limits = numbers(t[SolveTable.LIMITS], (CRITERIA,))
    criteria = _unpacked(limits, True)
    for row in range(rows):
        s.record[row, UPDATE] = 0
        s.member[row] = row
    fault = _attempt(s, rows, criteria)
    if fault == DONE and criteria.chord_steps:
        # Without an update there was no chord step, and a second attempt would end as the first.
        failed = 0
        for row in range(rows):
            if s.record[row, OUTCOME] > CONVERGED and s.record[row, UPDATE] > 0:
                s.member[failed] = row
                failed += 1
        if failed > 0:
            note(s, tables.ATTEMPT_LINE, failed, 0.0, 0.0, 0.0)
            fault = _attempt(s, failed, _unpacked(limits, False))
    if fault == DONE:
        fault = _take_last_steps(s)
    t[SolveTable.FAILED] = 0
    for row in range(rows):
        if s.record[row, OUTCOME] != CONVERGED:
            t[SolveTable.FAILED] += 1
    if fault == DONE and t[SolveTable.SIDES] > 0 and rows > 0:
        fault = _differentiate(s)
    return fault


@inner
def _attempt(s: Any, rows: Any, criteria: Any) -> Any:
    """Solve the rows at the places in `member` from their initial guess; give what is wrong with a graph."""
    if rows == 0:
        note_iteration(s, 0, 0, 0)
        return DONE
    for k in range(rows):
        enter(s, k, s.guess, s.member[k])
    fault, live = linearise(s.jacobian, s, rows, criteria.atol)
    update = 0
    while fault == DONE:
        note_iteration(s, update, live, rows)
        if live == 0 or update == s.table[SolveTable.UPDATES]:
            for k in range(live):
                leave(s, k, s.u, tables.OUT_OF_ITERATIONS, update, s.norm[k])
            break
        if update > 0:
            fault, live = linearise(s.jacobian, s, live, NONE_DONE)
            if fault != DONE:
                break
        update += 1
        live = _advance(live, update, s)
        fault, followed = _try(s, live, criteria)
        if fault == DONE:
            live = _settle(followed, live, update, s, criteria)
    return fault


@inner
def _advance(live: Any, update: Any, s: Any) -> Any:
    """Set the full trials; rows without a direction leave. Gives the number of rows that stay."""
    n, kept = s.u.shape[1], 0
    for k in range(live):
        norm = s.norm[k]
        if not (finite(s.step, k) and had_pivots(s.lu, k, n)):
            leave(s, k, s.u, tables.SINGULAR, update - 1, norm)
            continue
        if kept != k:
            copy(s.u, k, s.u, kept)
            copy(s.g, k, s.g, kept)
            copy(s.step, k, s.step, kept)
            s.norm[kept], s.place[kept] = norm, s.place[k]
        slope = 0.0
        for i in range(n):
            slope += (s.b[k, i] / norm) * (s.step[kept, i] / norm)
            s.trial[kept, i] = s.u[kept, i] + s.step[kept, i]
        s.slot[kept], s.slope[kept], s.alpha[kept] = k, slope, 1.0
        kept += 1
    return kept


@inner
def _try(s: Any, live: Any, criteria: Any) -> Any:
    """Try the full steps, shorten those that may not stand, and try chord steps.

    Gives what is wrong with the graph, and the number of chord steps.
    """
    if live == 0:
        note_trials(s, 1, live, criteria)
        return DONE, 0
    fault = evaluate(s, s.trial, s.g, s.b, live)
    for k in range(live):
        s.trial_norm[k], s.tried[k] = norm_of(s.b, k), k
    note_trials(s, 1, live, criteria)
    cut, cuts = 0, s.table[SolveTable.CUTS]
    refused = _shorten(live, s, criteria) if fault == DONE and cuts > 0 else 0
    while fault == DONE and refused > 0:
        cut += 1
        fault = evaluate(s, s.further, s.further_g, s.further_b, refused)
        for i in range(refused):
            k = s.tried[i]
            copy(s.further, i, s.trial, k)
            copy(s.further_b, i, s.b, k)
            s.trial_norm[k] = norm_of(s.b, k)
        note_trials(s, cut + 1, live, criteria)
        refused = _shorten(refused, s, criteria) if cut < cuts else 0
    followed = _set_chord_steps(live, s, criteria) if fault == DONE and criteria.chord_steps else 0
    if followed > 0:
        fault = evaluate(s, s.further, s.further_g, s.further_b, followed)
    return fault, followed


@inner
def _shorten(tried: Any, s: Any, criteria: Any) -> Any:
    """Set shorter trials of the rows whose last ones may not stand; give the number of these."""
    refused = 0
    for i in range(tried):
        k = s.tried[i]
        norm0, alpha = s.norms[s.place[k], FIRST], s.alpha[k]
        if _accepted(s.trial_norm[k], s.norm[k], norm0, s.slope[k], alpha, criteria):
            continue
        s.alpha[k] = alpha = alpha / criteria.cutback
        for j in range(s.u.shape[1]):
            s.further[refused, j] = s.u[k, j] + alpha * s.step[k, j]
        copy(s.g, k, s.further_g, refused)
        s.tried[refused] = k
        refused += 1
    return refused


@inner
def _set_chord_steps(live: Any, s: Any, criteria: Any) -> Any:
    """Set the chord steps of the live rows that take one; give the number of these."""
    n = s.u.shape[1]
    followed = end = 0
    while end < live:
        first, group = followed, s.slot[end] // LANES
        clear_sides(s.lu, n)
        while end < live and s.slot[end] // LANES == group:
            norm0 = s.norms[s.place[end], FIRST]
            if _followed(s.trial_norm[end], s.norm[end], norm0, s.alpha[end], criteria):
                put_side(s.b, end, s.lu, s.slot[end])
                s.tried[followed] = end
                followed += 1
            end += 1
        if followed == first:
            continue
        substitute(s.lu, s.pivots, group, n)
        tried, followed = followed, first
        for i in range(first, tried):
            k = s.tried[i]
            take_side(s.lu, s.slot[k], s.further, followed)
            if finite(s.further, followed):
                for j in range(n):
                    s.further[followed, j] += s.trial[k, j]
                copy(s.g, k, s.further_g, followed)
                s.tried[followed] = k
                followed += 1
    return followed


@inner
def _settle(followed: Any, live: Any, update: Any, s: Any, criteria: Any) -> Any:
    """Accept the trials; rows that are done leave, the others move up. Gives the number of those that stay."""
    for i in range(followed):
        # A chord step that lets the residual fall is the trial of its row.
        k, norm = s.tried[i], norm_of(s.further_b, i)
        if norm < s.trial_norm[k]:
            s.norm[k], s.trial_norm[k] = s.trial_norm[k], norm
            for j in range(s.u.shape[1]):
                s.step[k, j] = s.further[i, j] - s.trial[k, j]
            copy(s.further, i, s.trial, k)
            copy(s.further_b, i, s.b, k)
    kept = 0
    for k in range(live):
        row, norm = s.place[k], s.trial_norm[k]
        done = _converged(norm, s.norms[row, FIRST], criteria)
        if done and criteria.small_steps:
            moved = s.alpha[k] * norm_of(s.step, k)
            done = _small_step(moved, norm_of(s.trial, k), norm, criteria)
        if done or not isfinite(norm):
            leave(s, k, s.trial, CONVERGED if done else tables.DIVERGED, update, norm)
            if done:
                _set_last_step(s, k, row, norm, criteria)
            continue
        copy(s.trial, k, s.u, kept)
        if kept != k:
            copy(s.g, k, s.g, kept)
        s.norm[kept], s.place[kept] = norm, row
        kept += 1
    return kept


@inlined
def _set_last_step(s: Any, k: Any, row: Any, norm: Any, criteria: Any) -> None:
    """Set the last step of a row that has converged, by the factors at hand, or let it wait for factors of its own."""
    n, norm0, slot = s.u.shape[1], s.norms[row, FIRST], s.slot[k]
    if not _gains(norm, norm0, criteria):
        return
    if not _carries(norm, s.norm[k], norm0, criteria):
        s.record[row, OUTCOME] = WAITING
        return
    clear_sides(s.lu, n)
    put_side(s.b, k, s.lu, slot)
    substitute(s.lu, s.pivots, slot // LANES, n)
    take_side(s.lu, slot, s.step, k)
    _step_last(s, k, s.trial)


@inlined
def _step_last(s: Any, k: Any, unknowns: Any) -> None:
    """Note the last step of a live row, if it is finite."""
    row = s.place[k]
    if finite(s.step, k):
        s.record[row, OUTCOME] = STEPPING
        for i in range(s.u.shape[1]):
            s.last_step[row, i] = unknowns[k, i] + s.step[k, i]


@inner
def _take_last_steps(s: Any) -> Any:
    """Take the last steps that let the residual fall; tell what is wrong with a graph."""
    waiting = _collected(s, WAITING, s.solution)
    if waiting > 0:
        fault, _ = linearise(s.jacobian, s, waiting, NONE_DONE)
        if fault != DONE:
            return fault
        for k in range(waiting):
            if had_pivots(s.lu, k, s.u.shape[1]):
                _step_last(s, k, s.u)
    stepping = _collected(s, STEPPING, s.last_step)
    if stepping == 0:
        return DONE
    fault = evaluate(s, s.u, s.g, s.b, stepping)
    for k in range(stepping):
        row = s.place[k]
        if fault == DONE and norm_of(s.b, k) < s.norms[row, LAST]:
            copy(s.u, k, s.solution, row)
    return fault


@inner
def _collected(s: Any, mark: Any, unknowns: Any) -> Any:
    """Let the rows with a mark in `record` be the live ones, with these unknowns; give their number."""
    found = 0
    for row in range(len(s.record)):
        if s.record[row, OUTCOME] == mark:
            s.record[row, OUTCOME] = CONVERGED
            enter(s, found, unknowns, row)
            found += 1
    return found


@inner
def _differentiate(s: Any) -> Any:
    """Solve `A X = -B` at the solution for chosen columns of `B`, or for its products with directions.

    `B` is the derivative of the residual by the givens. NaN in rows whose `A` is singular.
    """
    t, call = s.table, s.call
    rows, n, q = t[SolveTable.ROWS], t[SolveTable.N], t[SolveTable.Q]
    for row in range(rows):
        enter(s, row, s.solution, row)
    fault, _ = linearise(graph_of(t, tables.JACOBIAN_AT_SOLUTION), s, rows, NONE_DONE)
    if fault != DONE:
        return fault
    by_givens = graph_of(t, tables.BY_GIVENS)
    if run(by_givens, call, s.u, s.g, rows):
        return by_givens.fault
    b = output(call, 0, rows, n, q)
    if b.address != 0:
        for start in range(0, rows, LANES):
            _derivatives_of(s, b, start, min(start + LANES, rows))
    release(by_givens, call)
    return DONE if b.address != 0 else by_givens.fault + 1


@inlined
def _derivatives_of(s: Any, b: Any, start: Any, end: Any) -> None:
    """The derivatives of a group of rows, by all right-hand sides."""
    t = s.table
    n, q, sides = t[SolveTable.N], t[SolveTable.Q], t[SolveTable.SIDES]
    columns = integers(t[SolveTable.COLUMNS_AT], (sides,))
    directions, step = t[SolveTable.DIRECTIONS], t[SolveTable.DIRECTION_ROW]
    found = number_rows(t[SolveTable.DERIVATIVES], (t[SolveTable.ROWS] * sides, n))
    side = side_in(s.lu, n)
    for c in range(sides):
        for lane in range(LANES):
            row = min(start + lane, end - 1)
            for i in range(n):
                if directions == 0:
                    total = entry_of(b, row, i, columns[c])
                else:
                    along = numbers(directions + 8 * row * step, (q * sides,))
                    total = 0.0
                    for j in range(q):
                        total += entry_of(b, row, i, j) * along[j * sides + c]
                s.lu[side + i * LANES + lane] = -total
        substitute(s.lu, s.pivots, start // LANES, n)
        for row in range(start, end):
            take_side(s.lu, row, found, row * sides + c)
    for row in range(start, end):
        if not had_pivots(s.lu, row, n):
            found[row * sides : (row + 1) * sides] = nan
