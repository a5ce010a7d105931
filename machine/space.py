"""What a solve of a block works with: its arrays, its graphs, the initial guess in them, and lines for the log."""

from __future__ import annotations

from math import inf, sqrt
from typing import Any, NamedTuple

from neml2_aoti_plugin._solve import tables
from neml2_aoti_plugin._solve.tables import FIRST, LAST, Solve

from .calls import (
    Graph,
    call_graph,
    call_with,
    inlined,
    inner,
    integer_rows,
    integers,
    number_blocks,
    number_rows,
    numbers,
)


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
    of = integer_rows(t[Solve.GRAPHS_AT], (len(tables.OUTPUTS), tables.GRAPH_COLUMNS))
    fault = tables.BROKEN + 2 * place
    return Graph(of[place, tables.RUN], of[place, tables.CONTAINER], t[Solve.EXECUTOR], tables.OUTPUTS[place], fault)


@inlined
def space(t: Any) -> Any:
    """What a table names."""
    rows, capacity, n, q = t[Solve.ROWS], t[Solve.CAPACITY], t[Solve.N], t[Solve.Q]
    vectors = number_blocks(t[Solve.VECTORS], (tables.VECTOR_KINDS, capacity, n))
    givens = number_blocks(t[Solve.GIVEN_VECTORS], (tables.GIVEN_KINDS, capacity, q))
    of_rows = number_rows(t[Solve.NUMBERS], (tables.NUMBER_KINDS, capacity))
    indices = integer_rows(t[Solve.INDICES], (tables.INDEX_KINDS, capacity))
    return Space(
        t,
        graph_of(t, tables.RESIDUAL),
        graph_of(t, tables.JACOBIAN),
        call_with(t[Solve.FUNCTIONS], t[Solve.ARGUMENTS_AT], t[Solve.ARGUMENTS], 2, t[Solve.HANDLES]),
        vectors[tables.U],
        vectors[tables.STEP],
        vectors[tables.TRIAL],
        vectors[tables.B],
        vectors[tables.FURTHER],
        vectors[tables.FURTHER_B],
        vectors[tables.LAST_STEP],
        vectors[tables.GUESS],
        givens[tables.OWN],
        givens[tables.FURTHER_OWN],
        number_rows(t[Solve.GIVENS], (rows, q)),
        of_rows[tables.NORM],
        of_rows[tables.TRIAL_NORM],
        of_rows[tables.SLOPE],
        of_rows[tables.ALPHA],
        indices[tables.PLACE],
        indices[tables.SOURCE],
        indices[tables.SLOT],
        indices[tables.TRIED],
        indices[tables.MEMBER],
        numbers(t[Solve.FACTORS], (_factors_size(capacity, n),)),
        integers(t[Solve.PIVOTS], (_pivots_size(capacity, n),)),
        number_rows(t[Solve.NORMS], (rows, 2)),
        integer_rows(t[Solve.RECORD], (rows, 2)),
        number_rows(t[Solve.SOLUTION], (rows, n)),
        number_rows(t[Solve.HISTORY], (t[Solve.HISTORY_LINES], tables.HISTORY_COLUMNS)),
    )


@inlined
def predict(t: Any) -> Any:
    """Run the predictor as often as it is to be run; what it gives are variables, and inputs of its next run."""
    for _ in range(t[Solve.PREDICTIONS]):
        outcome = call_graph(t[Solve.PREDICTOR_AT])
        if outcome != tables.CALLED:
            return tables.BROKEN + 2 * tables.PREDICTOR + (0 if outcome == tables.FAILED else 1)
    return tables.DONE


@inner
def gather(s: Any) -> None:
    """Put the variables side by side: unknowns to the initial guess, givens to their rows."""
    t, n = s.table, s.table[Solve.N]
    variables = integer_rows(t[Solve.VARIABLES_AT], (t[Solve.VARIABLES], tables.VARIABLE))
    first = 0
    for k in range(len(variables)):
        width, step = variables[k, tables.VARIABLE_WIDTH], variables[k, tables.VARIABLE_STEP]
        target, at = (s.guess, first) if first < n else (s.givens, first - n)
        for row in range(t[Solve.ROWS]):
            source = numbers(variables[k, tables.VARIABLE_ADDRESS] + 8 * step * row, (width,))
            for i in range(width):
                target[row, at + i] = source[i]
        first += width


@inner
def note(s: Any, kind: Any, number: Any, one: Any, two: Any, three: Any) -> None:
    """Note a line for the log, if anybody reads it."""
    line = s.table[Solve.NOTED]
    if line < len(s.history):
        s.history[line, 0], s.history[line, 1] = kind, number
        s.history[line, 2], s.history[line, 3], s.history[line, 4] = one, two, three
        s.table[Solve.NOTED] += 1


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
