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
from .elimination import copy, factor, norm_of, substitute
from .machine_code import inlined, inner, kernel
from .outcome import Outcome

# Kinds of `vectors`: unknowns, direction, trial, `-r` at the trial; further trials of some rows.
U, STEP, TRIAL, B, FURTHER = range(5)
# Kinds of `givens`: of the live rows, of those with further trials.
GIVENS, FURTHER_GIVENS = range(2)
# Columns of `numbers`, of the live rows: residual norm, that of the trial, slope over squared norm, step length.
NORM, TRIAL_NORM, SLOPE, ALPHA = range(4)
# Columns of `indices`: place of a live row in the batch, its row in the linearisation; live row of a further trial.
PLACE, SOURCE, TRIED = range(3)
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
    kept = 0
    for k in range(live):
        source, row, norm = indices[k, SOURCE], indices[k, PLACE], numbers[k, NORM]
        copy(b, source, step, kept)
        sound = factor(a, source, lu, pivots, kept)
        if sound:
            sound = substitute(lu, pivots, kept, step, kept)
        if not sound:
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
        slope = 0.0
        for i in range(u.shape[1]):
            slope += (b[source, i] / norm) * (step[kept, i] / norm)
            trial[kept, i] = u[kept, i] + step[kept, i]
        numbers[kept, SLOPE] = slope
        kept += 1
    return kept


@inner
def _settled(
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
    criteria: Any,
) -> Any:
    """See `settle`."""
    u, step, trial, b, g = vectors[U], vectors[STEP], vectors[TRIAL], vectors[B], givens[GIVENS]
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
                elif substitute(lu, pivots, k, b, k):
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
    u, step, trial, b, further = vectors[U], vectors[STEP], vectors[TRIAL], vectors[B], vectors[FURTHER]
    for i in range(followed):
        k, norm = indices[i, TRIED], norm_of(further_b, i)
        if norm < numbers[k, TRIAL_NORM]:
            numbers[k, NORM] = numbers[k, TRIAL_NORM]
            numbers[k, TRIAL_NORM] = norm
            for j in range(u.shape[1]):
                step[k, j] = further[i, j] - trial[k, j]
            copy(further, i, trial, k)
            copy(further_b, i, b, k)
    criteria = _unpacked(limits)
    return _settled(live, update, vectors, givens, numbers, indices, lu, pivots, norms, record, solution, criteria)


@kernel
def judge(
    trial_b: Any,
    live: Any,
    update: Any,
    hold: Any,
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
    """Judge the full trials; where no row has a further trial, settle at once.

    Gives the number of live rows; that of refused ones, whose shorter trials are set; and, where there are none, that
    of rows whose chord steps are.
    """
    criteria = _unpacked(limits)
    b = vectors[B]
    refused = 0
    for k in range(live):
        copy(trial_b, k, b, k)
        numbers[k, TRIAL_NORM] = norm_of(b, k)
        numbers[k, ALPHA] = 1.0
        if criteria.searching and not _stands(k, numbers, indices, norms, criteria):
            _shorten(k, refused, vectors, givens, numbers, indices, criteria)
            refused += 1
    followed = 0 if refused else _chords(live, vectors, givens, numbers, indices, lu, pivots, norms, criteria)
    if refused == 0 and followed == 0 and not hold:
        live = _settled(live, update, vectors, givens, numbers, indices, lu, pivots, norms, record, solution, criteria)
    return live, refused, followed


@kernel
def judge_again(
    short_b: Any,
    refused: Any,
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
    """Judge the trials of the refused rows; `more` tells whether they may be cut back again.

    Gives the number of those that are refused again, whose shorter trials are set; and, where there are none, that of
    rows whose chord steps are.
    """
    criteria = _unpacked(limits)
    trial, b, short = vectors[TRIAL], vectors[B], vectors[FURTHER]
    left = 0
    for i in range(refused):
        k = indices[i, TRIED]
        copy(short_b, i, b, k)
        copy(short, i, trial, k)
        numbers[k, TRIAL_NORM] = norm_of(b, k)
        if more and not _stands(k, numbers, indices, norms, criteria):
            _shorten(k, left, vectors, givens, numbers, indices, criteria)
            left += 1
    followed = 0 if left else _chords(live, vectors, givens, numbers, indices, lu, pivots, norms, criteria)
    return left, followed


@inner
def _stands(k: Any, numbers: Any, indices: Any, norms: Any, criteria: Any) -> Any:
    """Whether the trial of a live row may stand."""
    first = norms[indices[k, PLACE], FIRST]
    return _accepted(numbers[k, TRIAL_NORM], numbers[k, NORM], first, numbers[k, SLOPE], numbers[k, ALPHA], criteria)


@inner
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
    followed = 0
    if not criteria.chord_steps:
        return followed
    for k in range(live):
        first = norms[indices[k, PLACE], FIRST]
        if not _followed(numbers[k, TRIAL_NORM], numbers[k, NORM], first, numbers[k, ALPHA], criteria):
            continue
        copy(b, k, further, followed)
        if substitute(lu, pivots, k, further, followed):
            for j in range(trial.shape[1]):
                further[followed, j] += trial[k, j]
            copy(givens[GIVENS], k, givens[FURTHER_GIVENS], followed)
            indices[followed, TRIED] = k
            followed += 1
    return followed


@inner
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
def last_steps(a: Any, b: Any, waiting: Any, vectors: Any, lu: Any, pivots: Any, record: Any, solution: Any) -> None:
    """Take the last step of the waiting rows by a linearisation at their solution."""
    steps = vectors[STEP]
    for i in range(len(waiting)):
        row = waiting[i]
        record[row, OUTCOME] = CONVERGED
        copy(b, i, steps, 0)
        if factor(a, i, lu, pivots, 0) and substitute(lu, pivots, 0, steps, 0):
            for j in range(steps.shape[1]):
                solution[row, j] += steps[0, j]
