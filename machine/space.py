"""What a solve of a block works with: its arrays, its graphs, the initial guess in them, and lines for the log."""

from __future__ import annotations

from math import inf, sqrt
from typing import Any, NamedTuple

from neml2_aoti_plugin._solve import tables
from neml2_aoti_plugin._solve.tables import (
    ALPHA,
    DONE,
    FIRST,
    HISTORY_COLUMNS,
    INDEX_COLUMNS,
    ITERATION_LINE,
    LAST,
    MEMBER,
    NORM,
    NUMBER_COLUMNS,
    PLACE,
    SLOPE,
    TRIAL_LINE,
    TRIAL_NORM,
    Solve,
)

from .calls import (
    Graph,
    call_with,
    copies,
    filled,
    inlined,
    inner,
    integer_rows,
    integers,
    look,
    number_rows,
    numbers,
    place_rows,
    release,
    start_graph,
)
from .elimination import copy


class Space(NamedTuple):
    """The arrays of a solve: vectors `(capacity, n)` of the live rows, but for `last_step` and `guess`, of all rows."""

    u: Any
    step: Any
    trial: Any
    # `-r` at the unknowns, then at the trials.
    b: Any
    # Further trials of some rows, and `-r` there.
    further: Any
    further_b: Any
    last_step: Any
    guess: Any
    # Givens of the live rows, of the further trials, `(capacity, q)`, and of all rows, `(rows, q)`.
    g: Any
    further_g: Any
    givens: Any
    # Their columns are those of `tables`.
    numbers: Any
    indices: Any
    lu: Any
    pivots: Any
    norms: Any
    record: Any
    solution: Any
    # Lines for the log; empty where nobody reads them.
    history: Any


class Graphs(NamedTuple):
    """The graphs of a solve, and what their calls share."""

    residual: Any
    jacobian: Any
    call: Any


@inlined
def space(t: Any) -> Any:
    """The arrays that a table names."""
    rows, capacity, n, q = t[Solve.ROWS], t[Solve.CAPACITY], t[Solve.N], t[Solve.Q]
    vectors, givens = t[Solve.VECTORS], t[Solve.GIVEN_VECTORS]
    size, given = 8 * capacity * n, 8 * capacity * q
    return Space(
        number_rows(vectors + tables.U * size, (capacity, n)),
        number_rows(vectors + tables.STEP * size, (capacity, n)),
        number_rows(vectors + tables.TRIAL * size, (capacity, n)),
        number_rows(vectors + tables.B * size, (capacity, n)),
        number_rows(vectors + tables.FURTHER * size, (capacity, n)),
        number_rows(vectors + tables.FURTHER_B * size, (capacity, n)),
        number_rows(vectors + tables.LAST_STEP * size, (capacity, n)),
        number_rows(vectors + tables.GUESS * size, (capacity, n)),
        number_rows(givens + tables.OWN * given, (capacity, q)),
        number_rows(givens + tables.FURTHER_OWN * given, (capacity, q)),
        number_rows(t[Solve.GIVENS], (rows, q)),
        number_rows(t[Solve.NUMBERS], (capacity, NUMBER_COLUMNS)),
        integer_rows(t[Solve.INDICES], (capacity, INDEX_COLUMNS)),
        numbers(t[Solve.FACTORS], (t[Solve.FACTORS_SIZE],)),
        integers(t[Solve.PIVOTS], (t[Solve.PIVOTS_SIZE],)),
        number_rows(t[Solve.NORMS], (rows, 2)),
        integer_rows(t[Solve.RECORD], (rows, 2)),
        number_rows(t[Solve.SOLUTION], (rows, n)),
        number_rows(t[Solve.HISTORY], (t[Solve.HISTORY_LINES], HISTORY_COLUMNS)),
    )


@inlined
def graph_of(t: Any, place: Any, outputs: Any) -> Any:
    """One of the graphs that a table names."""
    of = integer_rows(t[Solve.GRAPHS_AT], (tables.GRAPHS, tables.GRAPH_COLUMNS))
    fault = tables.BROKEN + 2 * place
    return Graph(of[place, tables.RUN], of[place, tables.CONTAINER], t[Solve.EXECUTOR], outputs, fault)


@inner
def gather(t: Any, s: Any) -> None:
    """Put the variables side by side: unknowns to the initial guess, givens to their rows."""
    rows, n = t[Solve.ROWS], t[Solve.N]
    variables = integer_rows(t[Solve.VARIABLES_AT], (t[Solve.VARIABLES], tables.VARIABLE))
    first = 0
    for k in range(len(variables)):
        address, width = variables[k, tables.VARIABLE_ADDRESS], variables[k, tables.VARIABLE_WIDTH]
        of_unknowns = first < n
        target = s.guess if of_unknowns else s.givens
        at = first if of_unknowns else first - n
        for row in range(rows):
            source = numbers(address + 8 * width * row, (width,))
            for i in range(width):
                target[row, at + i] = source[i] if address != 0 else 0.0
        first += width


@inner
def predict(t: Any, s: Any) -> Any:
    """Run the predictor as often as it is to be run, each time with what came out of it before; fill the guess."""
    rows, outputs = t[Solve.ROWS], t[Solve.PREDICTED]
    fill = filled(rows)
    graph = graph_of(t, tables.PREDICTOR, outputs)
    count = t[Solve.PREDICTOR_ARGUMENTS]
    call = call_with(t[Solve.FUNCTIONS], t[Solve.PREDICTOR_ARGUMENTS_AT], count, outputs, t[Solve.PREDICTOR_HANDLES])
    arguments, room = call.arguments, t[Solve.PREDICTOR_ROOM]
    for k in range(count):
        width = arguments[k, tables.WIDTH]
        copies(arguments[k, tables.ADDRESS], room, rows, fill, width)
        arguments[k, tables.ADDRESS] = room
        integers(arguments[k, tables.SIZES_AT], (1,))[0] = fill
        room += 8 * fill * width
    predicted = integer_rows(t[Solve.PREDICTED_AT], (outputs, tables.PREDICTED))
    for _ in range(t[Solve.PREDICTIONS]):
        if start_graph(graph, call):
            return graph.fault
        sound = True
        for place in range(outputs):
            width, column = predicted[place, tables.PREDICTED_WIDTH], predicted[place, tables.PREDICTED_COLUMN]
            again = predicted[place, tables.PREDICTED_ARGUMENT]
            if width == 0:
                continue
            if not (look(call, place) and _gives_rows(call, fill, width)):
                sound = False
                continue
            if column >= 0:
                place_rows(call, rows, s.guess, column, width)
            if again >= 0:
                target = number_rows(arguments[again, tables.ADDRESS], (fill, width))
                place_rows(call, rows, target, 0, width)
                for row in range(rows, fill):
                    copy(target, 0, target, row)
        release(graph, call)
        if not sound:
            return graph.fault + 1
    return DONE


@inlined
def _gives_rows(call: Any, fill: Any, width: Any) -> Any:
    """Whether the output that was looked at has rows, or one for all, of so many entries."""
    axes = call.scratch[0]
    if axes < 1:
        return False
    sizes = integers(call.scratch[1], (axes,))
    size = 1
    for k in range(1, axes):
        size *= sizes[k]
    return size == width and (sizes[0] == fill or sizes[0] == 1)


@inner
def note(s: Any, line: Any, kind: Any, number: Any, one: Any, two: Any, three: Any) -> Any:
    """Note a line for the log, if anybody reads it; give the next one."""
    if line >= len(s.history):
        return line
    s.history[line, 0], s.history[line, 1] = kind, number
    s.history[line, 2], s.history[line, 3], s.history[line, 4] = one, two, three
    return line + 1


@inner
def note_iteration(s: Any, line: Any, update: Any, live: Any, rows: Any) -> Any:
    """Note the largest residual norm of the live rows and their largest first one; of all rows where none is live."""
    if line >= len(s.history):
        return line
    worst = worst0 = 0.0
    for k in range(live if live > 0 else rows):
        row = s.indices[k, PLACE if live > 0 else MEMBER]
        norm, norm0 = s.numbers[k, NORM] if live > 0 else s.norms[row, LAST], s.norms[row, FIRST]
        # One that is no number is the largest.
        worst = norm if norm > worst or norm != norm else worst
        worst0 = norm0 if norm0 > worst0 or norm0 != norm0 else worst0
    return note(s, line, ITERATION_LINE, update, worst, worst0, 0.0)


@inner
def note_trials(s: Any, line: Any, trial: Any, live: Any, criteria: Any) -> Any:
    """Note the least step length, the largest trial norm and the least that would be accepted."""
    if line >= len(s.history):
        return line
    alpha, worst, least = 1.0, 0.0, inf if live > 0 else 0.0
    for k in range(live):
        norm, slope = s.numbers[k, TRIAL_NORM], 1.0 if criteria.strong_wolfe else 2.0 * s.numbers[k, SLOPE]
        alpha = min(alpha, s.numbers[k, ALPHA])
        worst = norm if norm > worst or norm != norm else worst
        least = min(least, s.numbers[k, NORM] * sqrt(max(1.0 - criteria.c * s.numbers[k, ALPHA] * slope, 0.0)))
    return note(s, line, TRIAL_LINE, trial, alpha, worst, least)
