"""The operations of the row-wise Newton loop as numba kernels: one call between two graph calls.

Rows are decided one by one, each by its own numbers. The sums of a row are taken in the order of its entries, without
reassociation, so that the bits of a row depend on nothing but the row. What a graph has returned is read, never
written: it may be a constant that the graph owns.

All vectors of the live rows lie in `vectors[kind, row]` and `givens[kind, row]`, which the graphs are given views of.
The kernels take the same arrays in the same order, one by one: in a tuple they take three times as long to hand over.
"""

from __future__ import annotations

from math import isfinite
from typing import Any, Final

import numpy as np

from . import criteria as by
from .elimination import (
    clear_sides,
    copy,
    factor,
    fill_up,
    had_pivots,
    load,
    norm_of,
    put_side,
    substitute,
    substitute_one,
    take_side,
)
from .lanes import LANES
from .machine_code import inlined, kernel
from .outcome import Outcome

# Kinds of `vectors`: unknowns, direction, trial, `-r` at the trial; further trials of some rows.
U, STEP, TRIAL, B, FURTHER = range(5)
# Kinds of `givens`: of the live rows, of those with further trials.
GIVENS, FURTHER_GIVENS = range(2)
# Columns of `numbers`, of the live rows: residual norm, that of the trial, slope over squared norm, step length.
NORM, TRIAL_NORM, SLOPE, ALPHA = range(4)
# Columns of `indices`: place of a live row in the batch, its row in the linearisation, the slot of its factors; the
# live row of a further trial.
PLACE, SOURCE, SLOT, TRIED = range(4)
# Columns of `norms` and of `record`, of all rows: last and first residual norm; outcome and updates.
LAST, FIRST = range(2)
OUTCOME, UPDATES = range(2)

CONVERGED: Final = int(Outcome.CONVERGED)
DIVERGED: Final = int(Outcome.DIVERGED)
SINGULAR: Final = int(Outcome.SINGULAR)
# In `record` of a row that has converged and waits for a last step with a linearisation of its own.
WAITING: Final = -1

_converged, _small_step, _accepted = inlined(by.converged), inlined(by.small_step), inlined(by.accepted)
_gains, _carries, _followed = inlined(by.gains), inlined(by.carries), inlined(by.followed)


def packed(criteria: by.Criteria) -> Any:
    """Criteria as one array, which a kernel takes in a fraction of the time that a tuple takes."""
    return np.array([float(value) for value in criteria])


@inlined
def _unpacked(p: Any) -> Any:
    """The criteria in an array."""
    return by.Criteria(p[0], p[1], p[2], p[3], p[4], p[5] != 0.0, p[6] != 0.0, p[7] != 0.0, p[8], p[9] != 0.0)


@kernel
def begin(
    b: Any,
    vectors: Any,
    givens: Any,
    numbers: Any,
    indices: Any,
    lu: Any,
    pivots: Any,
    norms: Any,
    record: Any,
    solution: Any,
    limits: Any,
) -> Any:
    """Judge the first iterates of all rows; give the number of those that go on."""
    criteria = _unpacked(limits)
    u, g = vectors[U], givens[GIVENS]
    live = 0
    for row in range(len(solution)):
        norm = norm_of(b, row)
        norms[row, LAST] = norms[row, FIRST] = norm
        record[row, UPDATES] = 0
        # Nothing is relative to the first norm yet.
        small = norm < criteria.atol or norm == 0.0
        if small or not isfinite(norm):
            record[row, OUTCOME] = CONVERGED if small else DIVERGED
            copy(u, row, solution, row)
            continue
        if live != row:
            copy(u, row, u, live)
            copy(g, row, g, live)
        numbers[live, NORM] = norm
        indices[live, PLACE] = row
        indices[live, SOURCE] = row
        live += 1
    return live


@kernel
def advance(
    a: Any,
    b: Any,
    live: Any,
    update: Any,
    vectors: Any,
    givens: Any,
    numbers: Any,
    indices: Any,
    lu: Any,
    pivots: Any,
    norms: Any,
    record: Any,
    solution: Any,
    limits: Any,
) -> Any:
    """Factor, solve for the direction and set the full trial; rows without a direction leave.

    Gives the number of rows that stay.
    """
    u, step, trial, g = vectors[U], vectors[STEP], vectors[TRIAL], givens[GIVENS]
    n = u.shape[1]
    kept = 0
    for start in range(0, live, LANES):
        end = min(start + LANES, live)
        for k in range(start, end):
            load(a, indices[k, SOURCE], lu, k)
            put_side(b, indices[k, SOURCE], lu, k)
        fill_up(lu, end, n)
        factor(lu, pivots, start // LANES, n)
        substitute(lu, pivots, start // LANES, n)
        for k in range(start, end):
            source, row, norm = indices[k, SOURCE], indices[k, PLACE], numbers[k, NORM]
            finite = take_side(lu, k, step, kept)
            if not (finite and had_pivots(lu, k, n)):
                record[row, OUTCOME] = SINGULAR
                record[row, UPDATES] = update - 1
                norms[row, LAST] = norm
                copy(u, k, solution, row)
                continue
            if kept != k:
                copy(u, k, u, kept)
                copy(g, k, g, kept)
                numbers[kept, NORM] = norm
                indices[kept, PLACE] = row
            indices[kept, SLOT] = k
            slope = 0.0
            for i in range(n):
                slope += (b[source, i] / norm) * (step[kept, i] / norm)
                trial[kept, i] = u[kept, i] + step[kept, i]
            numbers[kept, SLOPE] = slope
            kept += 1
    return kept


@kernel
def judge(
    trial_b: Any,
    tried: Any,
    again: Any,
    more: Any,
    live: Any,
    vectors: Any,
    givens: Any,
    numbers: Any,
    indices: Any,
    lu: Any,
    pivots: Any,
    norms: Any,
    record: Any,
    solution: Any,
    limits: Any,
) -> Any:
    """Judge the full trials of all live rows or, `again`, the shorter ones of those that were refused.

    `more` tells whether a trial may be cut back. Gives the number of refused rows, whose shorter trials are set; and,
    where there are none, that of the rows whose chord steps are.
    """
    criteria = _unpacked(limits)
    trial, b, further = vectors[TRIAL], vectors[B], vectors[FURTHER]
    refused = 0
    for i in range(tried):
        k = i
        if again:
            k = indices[i, TRIED]
            copy(further, i, trial, k)
        else:
            numbers[k, ALPHA] = 1.0
        copy(trial_b, i, b, k)
        numbers[k, TRIAL_NORM] = norm_of(b, k)
        if more and not _stands(k, numbers, indices, norms, criteria):
            _shorten(k, refused, vectors, givens, numbers, indices, criteria)
            refused += 1
    if refused:
        return refused, 0
    return 0, _chords(live, vectors, givens, numbers, indices, lu, pivots, norms, criteria)


@inlined
def _stands(k: Any, numbers: Any, indices: Any, norms: Any, criteria: Any) -> Any:
    """Whether the trial of a live row may stand."""
    first = norms[indices[k, PLACE], FIRST]
    return _accepted(numbers[k, TRIAL_NORM], numbers[k, NORM], first, numbers[k, SLOPE], numbers[k, ALPHA], criteria)


@inlined
def _chords(
    live: Any,
    vectors: Any,
    givens: Any,
    numbers: Any,
    indices: Any,
    lu: Any,
    pivots: Any,
    norms: Any,
    criteria: Any,
) -> Any:
    """Set the chord steps of the live rows that take one; give the number of these."""
    trial, b, further = vectors[TRIAL], vectors[B], vectors[FURTHER]
    n = trial.shape[1]
    followed = 0
    end = 0
    while criteria.chord_steps and end < live:
        start, first = end, followed
        group = indices[start, SLOT] // LANES
        clear_sides(lu, n)
        while end < live and indices[end, SLOT] // LANES == group:
            norm0 = norms[indices[end, PLACE], FIRST]
            if _followed(numbers[end, TRIAL_NORM], numbers[end, NORM], norm0, numbers[end, ALPHA], criteria):
                put_side(b, end, lu, indices[end, SLOT])
                indices[followed, TRIED] = end
                followed += 1
            end += 1
        if followed == first:
            continue
        substitute(lu, pivots, group, n)
        tried, followed = followed, first
        for i in range(first, tried):
            k = indices[i, TRIED]
            if take_side(lu, indices[k, SLOT], further, followed):
                for j in range(n):
                    further[followed, j] += trial[k, j]
                copy(givens[GIVENS], k, givens[FURTHER_GIVENS], followed)
                indices[followed, TRIED] = k
                followed += 1
    return followed


@inlined
def _shorten(k: Any, i: Any, vectors: Any, givens: Any, numbers: Any, indices: Any, criteria: Any) -> None:
    """Set the next trial of a live row, as the refused row `i`."""
    alpha = numbers[k, ALPHA] / criteria.cutback
    numbers[k, ALPHA] = alpha
    indices[i, TRIED] = k
    for j in range(vectors.shape[2]):
        vectors[FURTHER, i, j] = vectors[U, k, j] + alpha * vectors[STEP, k, j]
    for j in range(givens.shape[2]):
        givens[FURTHER_GIVENS, i, j] = givens[GIVENS, k, j]


@kernel
def settle(
    further_b: Any,
    followed: Any,
    live: Any,
    update: Any,
    vectors: Any,
    givens: Any,
    numbers: Any,
    indices: Any,
    lu: Any,
    pivots: Any,
    norms: Any,
    record: Any,
    solution: Any,
    limits: Any,
) -> Any:
    """Accept the trials, and the chord steps that let the residual fall; rows that are done leave, the others move up.

    Gives the number of those that stay.
    """
    criteria = _unpacked(limits)
    u, step, trial, b, g = vectors[U], vectors[STEP], vectors[TRIAL], vectors[B], givens[GIVENS]
    further = vectors[FURTHER]
    for i in range(followed):
        k, norm = indices[i, TRIED], norm_of(further_b, i)
        if norm < numbers[k, TRIAL_NORM]:
            numbers[k, NORM] = numbers[k, TRIAL_NORM]
            numbers[k, TRIAL_NORM] = norm
            for j in range(u.shape[1]):
                step[k, j] = further[i, j] - trial[k, j]
            copy(further, i, trial, k)
            copy(further_b, i, b, k)
    kept = 0
    for k in range(live):
        row, norm = indices[k, PLACE], numbers[k, TRIAL_NORM]
        first = norms[row, FIRST]
        done = _converged(norm, first, criteria)
        if done and criteria.small_steps:
            moved = numbers[k, ALPHA] * norm_of(step, k)
            done = _small_step(moved, norm_of(trial, k), norm, criteria)
        if done or not isfinite(norm):
            record[row, OUTCOME] = CONVERGED if done else DIVERGED
            record[row, UPDATES] = update
            norms[row, LAST] = norm
            copy(trial, k, solution, row)
            if done and _gains(norm, first, criteria):
                if not _carries(norm, numbers[k, NORM], first, criteria):
                    record[row, OUTCOME] = WAITING
                elif substitute_one(lu, pivots, indices[k, SLOT], b, k):
                    for i in range(u.shape[1]):
                        solution[row, i] += b[k, i]
            continue
        copy(trial, k, u, kept)
        if kept != k:
            copy(g, k, g, kept)
        numbers[kept, NORM] = norm
        indices[kept, PLACE] = row
        indices[kept, SOURCE] = kept
        kept += 1
    return kept
