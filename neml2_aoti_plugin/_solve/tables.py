"""The tables of integers by which Python tells machine code what to do; both sides read their places here.

Machine code takes one address, that of a table: sizes, limits, and the addresses of functions, graphs and arrays.
"""

from __future__ import annotations

from collections import namedtuple
from typing import Final

# Rows that a graph gets are filled up to a multiple of this: operators take two vectors at a time and the rest number
# by number, which rounds otherwise. With AVX-512 a vector has 8 doubles.
VECTOR: Final = 16
# Rows whose matrices are factored together, a number of each in a vector.
LANES: Final = 8

# How the solve of a row ended; `outcome.Outcome` names them.
CONVERGED, DIVERGED, OUT_OF_ITERATIONS, SINGULAR = range(4)

# The graphs of a solve, in the order of their table, and how many outputs they have; behind them the predictor, which
# has the table of a call.
RESIDUAL, JACOBIAN, JACOBIAN_AT_SOLUTION, BY_GIVENS, PREDICTOR = range(5)
OUTPUTS: Final = (1, 2, 2, 1)
# Columns of that table: the function that runs a graph, and its container.
RUN, CONTAINER, GRAPH_COLUMNS = range(3)

# What a solve comes to: done, or `BROKEN + 2 * graph` where a graph failed, one more where its outputs are of other
# shapes than the metadata tells.
DONE, BROKEN = range(2)
# What the call of a graph comes to: done, failed, outputs of other shapes than the table tells, which it tells now, or
# outputs that are no such tensors.
CALLED, FAILED, OTHER, UNREADABLE = range(4)

# The table of functions for tensors; behind them torch's number for float64.
CREATE, DELETE, DATA, DIM, SIZES, STRIDES, DTYPE, FLOAT64, FUNCTIONS = range(9)
# Columns of a table of arguments: where the caller has it, and where the graph finds it, perhaps filled up; the number
# of axes, address of their sizes, of their strides; the entries of a row, 0 for what all rows share.
GIVEN, ADDRESS, AXES, SIZES_AT, STRIDES_AT, WIDTH, ARGUMENT = range(7)
# Columns of a table of outputs: where its rows go, the number of axes, and the sizes of these; then the most axes.
TARGET, OUTPUT_AXES, OUTPUT_SIZES, MOST_AXES = 0, 1, 2, 10
OUTPUT: Final = OUTPUT_SIZES + MOST_AXES
# Entries of the room for handles behind those of inputs and outputs: what is asked of an output.
SCRATCH: Final = 4
# Columns of the table of variables, unknowns before givens: entries of a row, address of the first row, and how many
# entries the next one is behind it, 0 where all rows share one.
VARIABLE_WIDTH, VARIABLE_ADDRESS, VARIABLE_STEP, VARIABLE = range(4)


# Places in the table of a solve of a block: sizes and graphs; variables and the initial guess; memory to work in;
# limits, what comes of the solve, and the log; derivatives.
_Solve = namedtuple(
    "_Solve",
    "ROWS CAPACITY N Q UPDATES CUTS GRAPHS_AT EXECUTOR FUNCTIONS ARGUMENTS ARGUMENTS_AT HANDLES "
    "VARIABLES VARIABLES_AT GIVENS PREDICTIONS PREDICTOR_AT VECTORS GIVEN_VECTORS NUMBERS INDICES FACTORS PIVOTS "
    "LIMITS NORMS RECORD SOLUTION HISTORY HISTORY_LINES NOTED FAILED "
    "SIDES COLUMNS_AT DIRECTIONS DIRECTION_ROW DERIVATIVES FIELDS",
)
# Places in the table of the call of a graph.
_Call = namedtuple(
    "_Call",
    "RUN CONTAINER EXECUTOR FUNCTIONS ARGUMENTS ARGUMENTS_AT OUTPUTS OUTPUTS_AT HANDLES ROWS FILLED ROOM FIELDS",
)
SolveTable = _Solve(*range(len(_Solve._fields)))
CallTable = _Call(*range(len(_Call._fields)))

# How many vectors, vectors of givens, numbers and indices each row of a solve has; the machine code has names for them.
VECTOR_KINDS, GIVEN_KINDS, NUMBER_KINDS, INDEX_KINDS = 8, 2, 4, 5
# Columns of `norms` and of `record`, of all rows: last and first residual norm; outcome and updates.
LAST, FIRST = range(2)
OUTCOME, UPDATE = range(2)
# Kinds of lines of `history`: an iteration, a trial, the rows of a second attempt; then its columns: the kind, a
# number, and figures.
ITERATION_LINE, TRIAL_LINE, ATTEMPT_LINE = range(3)
HISTORY_COLUMNS: Final = 5

# Vectors at the end of the factors beside those of the right-hand side: peaks, and their places.
PEAK, BEST, EXTRA = range(3)


def factors_size(rows: int, n: int) -> int:
    """Numbers that the factors of so many rows take."""
    return (-(-rows // LANES) * n * n + n + EXTRA) * LANES


def pivots_size(rows: int, n: int) -> int:
    """Numbers that their pivots take."""
    return -(-rows // LANES) * n * LANES
