"""Newton's method over the rows of a block as one call that needs no interpreter: compiled graphs included.

Each row is decided by its own numbers. The sums of a row are taken in the order of its entries, without reassociation,
and graphs get whole vectors of rows, so that the bits of a row depend on nothing but the row. The live rows lie
together at the front of the arrays of `Space`; rows that are done leave, and the others move up.
"""

from __future__ import annotations

from math import inf, isfinite, nan, sqrt
from typing import Any, Final, NamedTuple

from .. import criteria as by
from ..tables import (
    ALPHA,
    ARGUMENT,
    CONVERGED,
    DIVERGED,
    DONE,
    FIRST,
    FUNCTIONS,
    FURTHER,
    FURTHER_B,
    FURTHER_OWN,
    HISTORY_COLUMNS,
    INDEX_COLUMNS,
    JACOBIAN_FAILED,
    JACOBIAN_IS_OTHER,
    LANES,
    LAST,
    LAST_STEP,
    NORM,
    NUMBER_COLUMNS,
    OUT_OF_ITERATIONS,
    OUTCOME,
    OUTPUTS,
    OWN,
    PLACE,
    RESIDUAL_FAILED,
    RESIDUAL_IS_OTHER,
    SCRATCH,
    SINGULAR,
    SLOPE,
    SLOT,
    SOURCE,
    STEP,
    TRIAL,
    TRIAL_NORM,
    TRIED,
    UPDATE,
    B,
    Columns,
    Solve,
    U,
)
from .calls import (
    Call,
    Graph,
    Output,
    entry_of,
    integer_rows,
    integers,
    number_rows,
    numbers,
    output,
    release,
    run,
    take,
)
from .compiled import entry, inlined, inner
from .elimination import (
    clear_sides,
    copy,
    factor,
    fill_up,
    had_pivots,
    load,
    norm_of,
    put_side,
    side_in,
    substitute,
    substitute_one,
    take_side,
)

# In `record` of a row that has converged: it waits for a last step with a linearisation of its own; it has a last step.
WAITING: Final = -1
STEPPING: Final = -2
CRITERIA: Final = len(by.Criteria._fields)

_converged, _small_step, _accepted = inlined(by.converged), inlined(by.small_step), inlined(by.accepted)
_gains, _carries, _followed = inlined(by.gains), inlined(by.carries), inlined(by.followed)


class Space(NamedTuple):
    """The arrays of a solve.

    Args:
        u: unknowns of the live rows; as are those that follow, `(capacity, n)`.
        step: directions.
        trial: trials.
        b: `-r` at the unknowns, then at the trials.
        further: further trials of some rows.
        further_b: `-r` there.
        last_step: what last steps lead to, in the places of the rows in the batch.
        g: givens of the live rows, `(capacity, q)`.
        further_g: givens of the further trials.
        numbers: see `NORM` and what follows it.
        indices: see `PLACE` and what follows it.
        lu: factors.
        pivots: of the factors.
        norms: of all rows.
        record: of all rows.
        solution: of all rows.
        history: lines for the log; empty where nobody reads them.
    """

    u: Any
    step: Any
    trial: Any
    b: Any
    further: Any
    further_b: Any
    last_step: Any
    g: Any
    further_g: Any
    numbers: Any
    indices: Any
    lu: Any
    pivots: Any
    norms: Any
    record: Any
    solution: Any
    history: Any


@inlined
def _unpacked(p: Any) -> Any:
    """The criteria in an array."""
    return by.Criteria(p[0], p[1], p[2], p[3], p[4], p[5] != 0.0, p[6] != 0.0, p[7] != 0.0, p[8], p[9] != 0.0)


@inlined
def _space(t: Any) -> Any:
    """The arrays that a table names."""
    rows, capacity, n, q = t[Solve.ROWS], t[Solve.CAPACITY], t[Solve.N], t[Solve.Q]
    vectors, givens = t[Solve.VECTORS], t[Solve.GIVENS]
    size, given = 8 * capacity * n, 8 * capacity * q
    return Space(
        number_rows(vectors + U * size, (capacity, n)),
        number_rows(vectors + STEP * size, (capacity, n)),
        number_rows(vectors + TRIAL * size, (capacity, n)),
        number_rows(vectors + B * size, (capacity, n)),
        number_rows(vectors + FURTHER * size, (capacity, n)),
        number_rows(vectors + FURTHER_B * size, (capacity, n)),
        number_rows(vectors + LAST_STEP * size, (capacity, n)),
        number_rows(givens + OWN * given, (capacity, q)),
        number_rows(givens + FURTHER_OWN * given, (capacity, q)),
        number_rows(t[Solve.NUMBERS], (capacity, NUMBER_COLUMNS)),
        integer_rows(t[Solve.INDICES], (capacity, INDEX_COLUMNS)),
        numbers(t[Solve.FACTORS], (t[Solve.FACTORS_SIZE],)),
        integers(t[Solve.PIVOTS], (t[Solve.PIVOTS_SIZE],)),
        number_rows(t[Solve.NORMS], (rows, 2)),
        integer_rows(t[Solve.RECORD], (rows, 2)),
        number_rows(t[Solve.SOLUTION], (rows, n)),
        number_rows(t[Solve.HISTORY], (t[Solve.HISTORY_LINES], HISTORY_COLUMNS)),
    )


@entry
def solve_block(table: Any) -> Any:
    """Solve the rows of a block from their first iterates.

    Args:
        table: address of the integers of `tables.Solve`; the number of rows that failed is put there.

    Returns:
        `DONE`, or what is wrong with a graph.
    """
    t = integers(table, (Solve.FIELDS,))
    s = _space(t)
    criteria = _unpacked(numbers(t[Solve.LIMITS], (CRITERIA,)))
    count = t[Solve.ARGUMENTS]
    handles, scratch = t[Solve.HANDLES], t[Solve.HANDLES] + 8 * (count + OUTPUTS)
    call = Call(
        integers(t[Solve.FUNCTIONS], (FUNCTIONS,)),
        integer_rows(t[Solve.ARGUMENTS_AT], (count, ARGUMENT)),
        integers(handles, (count + OUTPUTS,)),
        integers(scratch, (SCRATCH,)),
    )
    residual = Graph(t[Solve.RESIDUAL], t[Solve.RESIDUAL_CONTAINER], t[Solve.EXECUTOR], 1)
    jacobian = Graph(t[Solve.JACOBIAN], t[Solve.JACOBIAN_CONTAINER], t[Solve.EXECUTOR], 2)
    rows, n, updates, cuts = t[Solve.ROWS], t[Solve.N], t[Solve.UPDATES], t[Solve.CUTS]
    givens = number_rows(t[Solve.FIRST_GIVENS], (rows, t[Solve.Q]))
    guess = number_rows(t[Solve.FIRST_GUESS], (rows, n))
    for row in range(rows):
        copy(guess, row, s.u, row)
        copy(givens, row, s.g, row)
    t[Solve.FAILED] = 0
    if rows == 0:
        _note_iteration(s, 0, 0, 0)
        return DONE
    fault, a = _linearise(jacobian, call, s, rows)
    if fault != DONE:
        return fault
    live, update, line = _begin(s, criteria), 0, 0
    while True:
        line = _note_iteration(s, line, update, live)
        if live == 0 or update == updates:
            break
        if update > 0:
            fault, a = _linearise(jacobian, call, s, live)
            if fault != DONE:
                return fault
        update += 1
        live = _advance(a, live, update, s)
        release(jacobian, call)
        fault, followed, line = _try(residual, call, s, live, cuts, line, criteria)
        if fault != DONE:
            return fault
        live = _settle(followed, live, update, s, criteria)
    if update == 0:
        release(jacobian, call)
    for k in range(live):
        # They stay where they are.
        row = s.indices[k, PLACE]
        copy(s.u, k, s.solution, row)
        s.record[row, OUTCOME], s.record[row, UPDATE] = OUT_OF_ITERATIONS, update
        s.norms[row, LAST] = s.numbers[k, NORM]
    for row in range(rows):
        if s.record[row, OUTCOME] > CONVERGED:
            t[Solve.FAILED] += 1
    return _take_last_steps(residual, jacobian, call, s, givens)


@inner
def _linearise(jacobian: Any, call: Any, s: Any, rows: Any) -> Any:
    """Evaluate the Jacobian and `-r` of the first rows, the latter into `b`; outputs are to be released."""
    nothing = Output(0, 0, 0, 0)
    if run(jacobian, call, s.u, s.g, rows):
        return JACOBIAN_FAILED, nothing
    n = s.u.shape[1]
    a, b = output(call, 0, rows, n, 3), output(call, 1, rows, n, 2)
    if a.address == 0 or b.address == 0:
        release(jacobian, call)
        return JACOBIAN_IS_OTHER, nothing
    for k in range(rows):
        take(b, k, s.b, k)
    return DONE, a


@inner
def _evaluate(residual: Any, call: Any, u: Any, g: Any, into: Any, rows: Any) -> Any:
    """Evaluate `-r` of the first rows."""
    if run(residual, call, u, g, rows):
        return RESIDUAL_FAILED
    b = output(call, 0, rows, u.shape[1], 2)
    for k in range(rows):
        if b.address != 0:
            take(b, k, into, k)
    release(residual, call)
    return DONE if b.address != 0 else RESIDUAL_IS_OTHER


@inner
def _begin(s: Any, criteria: Any) -> Any:
    """Judge the first iterates of all rows; give the number of those that go on."""
    live = 0
    for row in range(len(s.solution)):
        norm = norm_of(s.b, row)
        s.norms[row, LAST] = s.norms[row, FIRST] = norm
        s.record[row, UPDATE] = 0
        # Nothing is relative to the first norm yet.
        small = norm < criteria.atol or norm == 0.0
        if small or not isfinite(norm):
            s.record[row, OUTCOME] = CONVERGED if small else DIVERGED
            copy(s.u, row, s.solution, row)
            continue
        if live != row:
            copy(s.u, row, s.u, live)
            copy(s.g, row, s.g, live)
            copy(s.b, row, s.b, live)
        s.numbers[live, NORM] = norm
        s.indices[live, PLACE] = s.indices[live, SOURCE] = row
        live += 1
    return live


@inlined
def _directions(a: Any, s: Any, start: Any, end: Any) -> None:
    """Factor the Jacobians of a group of rows, and solve for their directions."""
    n = s.u.shape[1]
    for k in range(start, end):
        load(a, s.indices[k, SOURCE], s.lu, k, n)
        put_side(s.b, k, s.lu, k)
    fill_up(s.lu, end, n)
    factor(s.lu, s.pivots, start // LANES, n)
    substitute(s.lu, s.pivots, start // LANES, n)


@inner
def _advance(a: Any, live: Any, update: Any, s: Any) -> Any:
    """Solve for the directions and set the full trials; rows without a direction leave.

    Gives the number of rows that stay.
    """
    n = s.u.shape[1]
    kept = 0
    for start in range(0, live, LANES):
        end = min(start + LANES, live)
        _directions(a, s, start, end)
        for k in range(start, end):
            row, norm = s.indices[k, PLACE], s.numbers[k, NORM]
            if not (take_side(s.lu, k, s.step, kept) and had_pivots(s.lu, k, n)):
                s.record[row, OUTCOME], s.record[row, UPDATE] = SINGULAR, update - 1
                s.norms[row, LAST] = norm
                copy(s.u, k, s.solution, row)
                continue
            if kept != k:
                copy(s.u, k, s.u, kept)
                copy(s.g, k, s.g, kept)
                s.numbers[kept, NORM] = norm
                s.indices[kept, PLACE] = row
            s.indices[kept, SLOT] = k
            slope = 0.0
            for i in range(n):
                slope += (s.b[k, i] / norm) * (s.step[kept, i] / norm)
                s.trial[kept, i] = s.u[kept, i] + s.step[kept, i]
            s.numbers[kept, SLOPE], s.numbers[kept, ALPHA] = slope, 1.0
            kept += 1
    return kept


@inner
def _try(residual: Any, call: Any, s: Any, live: Any, cuts: Any, line: Any, criteria: Any) -> Any:
    """Try the full steps, shorten those that may not stand, and try chord steps.

    Gives what is wrong with the graph, the number of chord steps, and the next line for the log.
    """
    if live == 0:
        return DONE, 0, _note_trials(s, line, 1, live, criteria)
    fault = _evaluate(residual, call, s.trial, s.g, s.b, live)
    for k in range(live):
        s.numbers[k, TRIAL_NORM] = norm_of(s.b, k)
        s.indices[k, TRIED] = k
    line = _note_trials(s, line, 1, live, criteria)
    refused = _shorten(live, s, criteria) if fault == DONE and cuts > 0 else 0
    cut = 0
    while fault == DONE and refused > 0:
        cut += 1
        fault = _evaluate(residual, call, s.further, s.further_g, s.further_b, refused)
        for i in range(refused):
            k = s.indices[i, TRIED]
            copy(s.further, i, s.trial, k)
            copy(s.further_b, i, s.b, k)
            s.numbers[k, TRIAL_NORM] = norm_of(s.b, k)
        line = _note_trials(s, line, cut + 1, live, criteria)
        refused = _shorten(refused, s, criteria) if cut < cuts else 0
    followed = _set_chord_steps(live, s, criteria) if fault == DONE and criteria.chord_steps else 0
    if followed > 0:
        fault = _evaluate(residual, call, s.further, s.further_g, s.further_b, followed)
    return fault, followed, line


@inner
def _shorten(tried: Any, s: Any, criteria: Any) -> Any:
    """Set shorter trials of the rows whose last ones may not stand; give the number of these."""
    refused = 0
    for i in range(tried):
        k = s.indices[i, TRIED]
        norm0 = s.norms[s.indices[k, PLACE], FIRST]
        alpha = s.numbers[k, ALPHA]
        if _accepted(s.numbers[k, TRIAL_NORM], s.numbers[k, NORM], norm0, s.numbers[k, SLOPE], alpha, criteria):
            continue
        alpha = alpha / criteria.cutback
        s.numbers[k, ALPHA] = alpha
        for j in range(s.u.shape[1]):
            s.further[refused, j] = s.u[k, j] + alpha * s.step[k, j]
        copy(s.g, k, s.further_g, refused)
        s.indices[refused, TRIED] = k
        refused += 1
    return refused


@inner
def _set_chord_steps(live: Any, s: Any, criteria: Any) -> Any:
    """Set the chord steps of the live rows that take one; give the number of these."""
    n = s.u.shape[1]
    followed = end = 0
    while end < live:
        first, group = followed, s.indices[end, SLOT] // LANES
        clear_sides(s.lu, n)
        while end < live and s.indices[end, SLOT] // LANES == group:
            norm0 = s.norms[s.indices[end, PLACE], FIRST]
            if _followed(s.numbers[end, TRIAL_NORM], s.numbers[end, NORM], norm0, s.numbers[end, ALPHA], criteria):
                put_side(s.b, end, s.lu, s.indices[end, SLOT])
                s.indices[followed, TRIED] = end
                followed += 1
            end += 1
        if followed == first:
            continue
        substitute(s.lu, s.pivots, group, n)
        tried, followed = followed, first
        for i in range(first, tried):
            k = s.indices[i, TRIED]
            if take_side(s.lu, s.indices[k, SLOT], s.further, followed):
                for j in range(n):
                    s.further[followed, j] += s.trial[k, j]
                copy(s.g, k, s.further_g, followed)
                s.indices[followed, TRIED] = k
                followed += 1
    return followed


@inner
def _settle(followed: Any, live: Any, update: Any, s: Any, criteria: Any) -> Any:
    """Accept the trials, and the chord steps that let the residual fall; rows that are done leave, the others move up.

    Gives the number of those that stay.
    """
    n = s.u.shape[1]
    for i in range(followed):
        k, norm = s.indices[i, TRIED], norm_of(s.further_b, i)
        if norm < s.numbers[k, TRIAL_NORM]:
            s.numbers[k, NORM] = s.numbers[k, TRIAL_NORM]
            s.numbers[k, TRIAL_NORM] = norm
            for j in range(n):
                s.step[k, j] = s.further[i, j] - s.trial[k, j]
            copy(s.further, i, s.trial, k)
            copy(s.further_b, i, s.b, k)
    kept = 0
    for k in range(live):
        row, norm = s.indices[k, PLACE], s.numbers[k, TRIAL_NORM]
        norm0 = s.norms[row, FIRST]
        done = _converged(norm, norm0, criteria)
        if done and criteria.small_steps:
            moved = s.numbers[k, ALPHA] * norm_of(s.step, k)
            done = _small_step(moved, norm_of(s.trial, k), norm, criteria)
        if done or not isfinite(norm):
            s.record[row, OUTCOME], s.record[row, UPDATE] = CONVERGED if done else DIVERGED, update
            s.norms[row, LAST] = norm
            copy(s.trial, k, s.solution, row)
            if done and _gains(norm, norm0, criteria):
                if not _carries(norm, s.numbers[k, NORM], norm0, criteria):
                    s.record[row, OUTCOME] = WAITING
                elif substitute_one(s.lu, s.pivots, s.indices[k, SLOT], s.b, k):
                    s.record[row, OUTCOME] = STEPPING
                    for i in range(n):
                        s.last_step[row, i] = s.trial[k, i] + s.b[k, i]
            continue
        copy(s.trial, k, s.u, kept)
        if kept != k:
            copy(s.g, k, s.g, kept)
        s.numbers[kept, NORM] = norm
        s.indices[kept, PLACE], s.indices[kept, SOURCE] = row, kept
        kept += 1
    return kept


@inner
def _take_last_steps(residual: Any, jacobian: Any, call: Any, s: Any, givens: Any) -> Any:
    """Take the last steps that let the residual fall; tell what is wrong with a graph."""
    fault = _set_last_steps(jacobian, call, s, givens)
    if fault != DONE:
        return fault
    stepping = 0
    for row in range(len(s.record)):
        if s.record[row, OUTCOME] == STEPPING:
            s.record[row, OUTCOME] = CONVERGED
            copy(s.last_step, row, s.u, stepping)
            copy(givens, row, s.g, stepping)
            s.indices[stepping, PLACE] = row
            stepping += 1
    if stepping == 0:
        return DONE
    fault = _evaluate(residual, call, s.u, s.g, s.b, stepping)
    for k in range(stepping):
        row = s.indices[k, PLACE]
        if fault == DONE and norm_of(s.b, k) < s.norms[row, LAST]:
            copy(s.u, k, s.solution, row)
    return fault


@inner
def _set_last_steps(jacobian: Any, call: Any, s: Any, givens: Any) -> Any:
    """Set the last steps of the rows that wait for a linearisation of their own; tell what is wrong with the graph."""
    n, waiting = s.u.shape[1], 0
    for row in range(len(s.record)):
        if s.record[row, OUTCOME] == WAITING:
            s.record[row, OUTCOME] = CONVERGED
            copy(s.solution, row, s.u, waiting)
            copy(givens, row, s.g, waiting)
            s.indices[waiting, PLACE], s.indices[waiting, SOURCE] = row, waiting
            waiting += 1
    if waiting == 0:
        return DONE
    fault, a = _linearise(jacobian, call, s, waiting)
    if fault != DONE:
        return fault
    for start in range(0, waiting, LANES):
        end = min(start + LANES, waiting)
        _directions(a, s, start, end)
        for k in range(start, end):
            if take_side(s.lu, k, s.step, k) and had_pivots(s.lu, k, n):
                row = s.indices[k, PLACE]
                s.record[row, OUTCOME] = STEPPING
                for i in range(n):
                    s.last_step[row, i] = s.u[k, i] + s.step[k, i]
    release(jacobian, call)
    return DONE


@inner
def _note_iteration(s: Any, line: Any, update: Any, live: Any) -> Any:
    """Note the largest residual norm of the live rows and their largest first one; of all rows where none is live."""
    if line >= len(s.history):
        return line
    worst = worst0 = 0.0
    for k in range(live if live > 0 else len(s.norms)):
        row = s.indices[k, PLACE] if live > 0 else k
        norm, norm0 = s.numbers[k, NORM] if live > 0 else s.norms[k, LAST], s.norms[row, FIRST]
        # One that is no number is the largest.
        worst = norm if norm > worst or norm != norm else worst
        worst0 = norm0 if norm0 > worst0 or norm0 != norm0 else worst0
    s.history[line, 0], s.history[line, 1], s.history[line, 2], s.history[line, 3] = 0.0, update, worst, worst0
    return line + 1


@inner
def _note_trials(s: Any, line: Any, trial: Any, live: Any, criteria: Any) -> Any:
    """Note the least step length, the largest trial norm and the least that would be accepted."""
    if line >= len(s.history):
        return line
    alpha, worst, least = 1.0, 0.0, inf if live > 0 else 0.0
    for k in range(live):
        norm, slope = s.numbers[k, TRIAL_NORM], 1.0 if criteria.strong_wolfe else 2.0 * s.numbers[k, SLOPE]
        alpha = min(alpha, s.numbers[k, ALPHA])
        worst = norm if norm > worst or norm != norm else worst
        least = min(least, s.numbers[k, NORM] * sqrt(max(1.0 - criteria.c * s.numbers[k, ALPHA] * slope, 0.0)))
    s.history[line, 0], s.history[line, 1] = 1.0, trial
    s.history[line, 2], s.history[line, 3], s.history[line, 4] = alpha, worst, least
    return line + 1


@entry
def solve_columns(table: Any) -> Any:
    """Solve `A X = -B` for chosen columns of `B`, row by row; NaN where a matrix is singular.

    Args:
        table: address of the integers of `tables.Columns`.

    Returns:
        `DONE`.
    """
    t = integers(table, (Columns.FIELDS,))
    rows, n, q, count = t[Columns.ROWS], t[Columns.N], t[Columns.Q], t[Columns.COUNT]
    a, b = Output(t[Columns.MATRICES], n * n, n, 1), Output(t[Columns.SIDES], n * q, q, 1)
    chosen, found = integers(t[Columns.CHOSEN], (count,)), number_rows(t[Columns.FOUND], (rows * count, n))
    lu = numbers(t[Columns.FACTORS], (t[Columns.FACTORS_SIZE],))
    pivots = integers(t[Columns.PIVOTS], (t[Columns.PIVOTS_SIZE],))
    side = side_in(lu, n)
    for start in range(0, rows, LANES):
        lanes = min(LANES, rows - start)
        for lane in range(lanes):
            load(a, start + lane, lu, lane, n)
        fill_up(lu, lanes, n)
        factor(lu, pivots, 0, n)
        for c in range(count):
            for lane in range(LANES):
                row = start + min(lane, lanes - 1)
                for i in range(n):
                    lu[side + i * LANES + lane] = -entry_of(b, row, i, chosen[c])
            substitute(lu, pivots, 0, n)
            for lane in range(lanes):
                sound = had_pivots(lu, lane, n)
                for i in range(n):
                    found[(start + lane) * count + c, i] = lu[side + i * LANES + lane] if sound else nan
    return DONE
