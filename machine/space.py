"""What a solve of a block works with: its arrays and live rows, graphs evaluated for them, lines for the log."""

from __future__ import annotations

from math import inf, isfinite, sqrt
from typing import Any, Final, NamedTuple

from neml2_aoti_plugin._solve import tables
from neml2_aoti_plugin._solve.tables import CONVERGED, DONE, FIRST, LANES, LAST, OUTCOME, UPDATE, SolveTable

from . import calls
from .calls import Graph, copy, inlined, inner, integer_rows, integers, number_blocks, number_rows, numbers
from .elimination import factor, fill_up, load, norm_of, put_side, substitute, take_side

# Where no row is done before the first step.
NONE_DONE: Final = -1.0


class Space(NamedTuple):
    """What a solve works with: its table, its graphs and what their calls share, and its arrays."""

    table: Any
    residual: Any
    jacobian: Any
    call: Any
    # Vectors `(capacity, n)` of the live rows: unknowns, direction, trial, and `-r` at the first, then at the last.
    u: Any
    step: Any
    trial: Any
    b: Any
    # Further trials of some rows, and `-r` there.
    further: Any
    further_b: Any
    # Of all rows: where last steps lead to, and the initial guess.
    last_step: Any
    guess: Any
    # Givens of the live rows, of the further trials, `(capacity, q)`, and of all rows, `(rows, q)`.
    g: Any
    further_g: Any
    givens: Any
    # Numbers of the live rows: residual norm, that of the trial, slope over squared norm, step length.
    norm: Any
    trial_norm: Any
    slope: Any
    alpha: Any
    # Of the live rows the place in the batch, the row in the linearisation, the slot of the factors; the live row of a
    # further trial; the places of all rows of an attempt.
    place: Any
    source: Any
    slot: Any
    tried: Any
    member: Any
    lu: Any
    pivots: Any
    # What comes of each row of the batch; their columns are those of `tables`.
    norms: Any
    record: Any
    solution: Any
    # Lines for the log; empty where nobody reads them.
    history: Any


_factors_size, _pivots_size = inlined(tables.factors_size), inlined(tables.pivots_size)


@inlined
def graph_of(t: Any, place: Any) -> Any:
    """One of the graphs that a table names."""
    of = integer_rows(t[SolveTable.GRAPHS_AT], (len(tables.OUTPUTS), tables.GRAPH_COLUMNS))
    fault = tables.BROKEN + 2 * place
    return Graph(
        of[place, tables.RUN], of[place, tables.CONTAINER], t[SolveTable.EXECUTOR], tables.OUTPUTS[place], fault
    )


@inlined
def space(t: Any) -> Any:
    """What a table names, in the order of the fields."""
    rows, capacity, n, q = t[SolveTable.ROWS], t[SolveTable.CAPACITY], t[SolveTable.N], t[SolveTable.Q]
    vectors = number_blocks(t[SolveTable.VECTORS], (tables.VECTOR_KINDS, capacity, n))
    givens = number_blocks(t[SolveTable.GIVEN_VECTORS], (tables.GIVEN_KINDS, capacity, q))
    of_rows = number_rows(t[SolveTable.NUMBERS], (tables.NUMBER_KINDS, capacity))
    indices = integer_rows(t[SolveTable.INDICES], (tables.INDEX_KINDS, capacity))
    return Space(
        t,
        graph_of(t, tables.RESIDUAL),
        graph_of(t, tables.JACOBIAN),
        calls.call_with(
            t[SolveTable.FUNCTIONS], t[SolveTable.ARGUMENTS_AT], t[SolveTable.ARGUMENTS], 2, t[SolveTable.HANDLES]
        ),
        vectors[0],
        vectors[1],
        vectors[2],
        vectors[3],
        vectors[4],
        vectors[5],
        vectors[6],
        vectors[7],
        givens[0],
        givens[1],
        number_rows(t[SolveTable.GIVENS], (rows, q)),
        of_rows[0],
        of_rows[1],
        of_rows[2],
        of_rows[3],
        indices[0],
        indices[1],
        indices[2],
        indices[3],
        indices[4],
        numbers(t[SolveTable.FACTORS], (_factors_size(capacity, n),)),
        integers(t[SolveTable.PIVOTS], (_pivots_size(capacity, n),)),
        number_rows(t[SolveTable.NORMS], (rows, 2)),
        integer_rows(t[SolveTable.RECORD], (rows, 2)),
        number_rows(t[SolveTable.SOLUTION], (rows, n)),
        number_rows(t[SolveTable.HISTORY], (t[SolveTable.HISTORY_LINES], tables.HISTORY_COLUMNS)),
    )


@inlined
def predict(t: Any) -> Any:
    """Run the predictor as often as it is to be run; what it gives are variables, and inputs of its next run."""
    for _ in range(t[SolveTable.PREDICTIONS]):
        outcome = calls.call_graph(t[SolveTable.PREDICTOR_AT])
        if outcome != tables.CALLED:
            return tables.BROKEN + 2 * tables.PREDICTOR + (0 if outcome == tables.FAILED else 1)
    return DONE


@inner
def gather(s: Any) -> None:
    """Put the variables side by side: unknowns to the initial guess, givens to their rows."""
    t, n = s.table, s.table[SolveTable.N]
    variables = integer_rows(t[SolveTable.VARIABLES_AT], (t[SolveTable.VARIABLES], tables.VARIABLE))
    first = 0
    for k in range(len(variables)):
        width, step = variables[k, tables.VARIABLE_WIDTH], variables[k, tables.VARIABLE_STEP]
        target, at = (s.guess, first) if first < n else (s.givens, first - n)
        for row in range(t[SolveTable.ROWS]):
            source = numbers(variables[k, tables.VARIABLE_ADDRESS] + 8 * step * row, (width,))
            for i in range(width):
                target[row, at + i] = source[i]
        first += width


@inlined
def enter(s: Any, k: Any, unknowns: Any, row: Any) -> None:
    """Let a row of the batch be one of the live rows, with these unknowns."""
    copy(unknowns, row, s.u, k)
    copy(s.givens, row, s.g, k)
    s.place[k] = row


@inlined
def leave(s: Any, k: Any, unknowns: Any, outcome: Any, updates: Any, norm: Any) -> None:
    """Let a live row go with its outcome, after so many updates of this attempt."""
    row = s.place[k]
    copy(unknowns, k, s.solution, row)
    s.record[row, OUTCOME] = outcome
    s.record[row, UPDATE] += updates
    s.norms[row, LAST] = norm


@inner
def linearise(jacobian: Any, s: Any, rows: Any, atol: Any) -> Any:
    """Evaluate the Jacobian and `-r` of the first rows, factor it, and solve for the directions.

    At an initial guess, rows leave first whose norm is below `atol`. Gives what is wrong with the graph, and the number
    of rows that stay.
    """
    n, live, call = s.u.shape[1], 0, s.call
    if calls.run(jacobian, call, s.u, s.g, rows):
        return jacobian.fault, 0
    a, b = calls.output(call, 0, rows, n, n), calls.output(call, 1, rows, n, 0)
    fault = DONE if a.address != 0 and b.address != 0 else jacobian.fault + 1
    if fault == DONE:
        for k in range(rows):
            calls.take(b, k, s.b, k)
            s.source[k] = k
        live = rows if atol == NONE_DONE else _begin(s, rows, atol)
        for start in range(0, live, LANES):
            end = min(start + LANES, live)
            for k in range(start, end):
                load(a, s.source[k], s.lu, k, n)
                put_side(s.b, k, s.lu, k)
            fill_up(s.lu, end, n)
            factor(s.lu, s.pivots, start // LANES, n)
            substitute(s.lu, s.pivots, start // LANES, n)
            for k in range(start, end):
                take_side(s.lu, k, s.step, k)
    calls.release(jacobian, call)
    return fault, live


@inner
def evaluate(s: Any, u: Any, g: Any, into: Any, rows: Any) -> Any:
    """Evaluate `-r` of the first rows."""
    residual, call = s.residual, s.call
    if calls.run(residual, call, u, g, rows):
        return residual.fault
    b = calls.output(call, 0, rows, u.shape[1], 0)
    for k in range(rows):
        if b.address != 0:
            calls.take(b, k, into, k)
    calls.release(residual, call)
    return DONE if b.address != 0 else residual.fault + 1


@inner
def _begin(s: Any, rows: Any, atol: Any) -> Any:
    """Judge the initial guesses of the rows; give the number of those that go on."""
    live = 0
    for k in range(rows):
        row, norm = s.place[k], norm_of(s.b, k)
        s.norms[row, FIRST] = norm
        # Nothing is relative to the first norm yet.
        small = norm < atol or norm == 0.0
        if small or not isfinite(norm):
            leave(s, k, s.u, CONVERGED if small else tables.DIVERGED, 0, norm)
            continue
        if live != k:
            copy(s.u, k, s.u, live)
            copy(s.g, k, s.g, live)
            copy(s.b, k, s.b, live)
        s.norm[live], s.place[live], s.source[live] = norm, row, k
        live += 1
    return live


@inner
def note(s: Any, kind: Any, number: Any, one: Any, two: Any, three: Any) -> None:
    """Note a line for the log, if anybody reads it."""
    line = s.table[SolveTable.NOTED]
    if line < len(s.history):
        s.history[line, 0], s.history[line, 1] = kind, number
        s.history[line, 2], s.history[line, 3], s.history[line, 4] = one, two, three
        s.table[SolveTable.NOTED] += 1


@inner
def note_iteration(s: Any, update: Any, live: Any, rows: Any) -> None:
    """Note the largest residual norm of the live rows and their largest first one; of all rows where none is live."""
    if len(s.history) == 0:
        return
    worst = worst0 = 0.0
    for k in range(live if live > 0 else rows):
        row = s.place[k] if live > 0 else s.member[k]
        norm, norm0 = s.norm[k] if live > 0 else s.norms[row, LAST], s.norms[row, FIRST]
        # One that is no number is the largest.
        worst = norm if norm > worst or norm != norm else worst
        worst0 = norm0 if norm0 > worst0 or norm0 != norm0 else worst0
    note(s, tables.ITERATION_LINE, update, worst, worst0, 0.0)


@inner
def note_trials(s: Any, trial: Any, live: Any, criteria: Any) -> None:
    """Note the least step length, the largest trial norm and the least that would be accepted."""
    if len(s.history) == 0:
        return
    alpha, worst, least = 1.0, 0.0, inf if live > 0 else 0.0
    for k in range(live):
        norm, slope = s.trial_norm[k], 1.0 if criteria.strong_wolfe else 2.0 * s.slope[k]
        alpha = min(alpha, s.alpha[k])
        worst = norm if norm > worst or norm != norm else worst
        least = min(least, s.norm[k] * sqrt(max(1.0 - criteria.c * s.alpha[k] * slope, 0.0)))
    note(s, tables.TRIAL_LINE, trial, alpha, worst, least)
