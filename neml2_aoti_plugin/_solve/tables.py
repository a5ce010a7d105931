"""The tables of integers by which Python tells machine code what to do; both sides read their places here.

Machine code takes one address, that of a table: sizes, limits, and the addresses of functions, graphs and arrays.
"""

from __future__ import annotations

from typing import Final, NamedTuple

# Rows that a graph gets are filled up to a multiple of this: operators take two vectors at a time and the rest number
# by number, which rounds otherwise. With AVX-512 a vector has 8 doubles.
VECTOR: Final = 16
# Rows whose matrices are factored together, a number of each in a vector.
LANES: Final = 8

# How the solve of a row ended; `outcome.Outcome` names them.
CONVERGED, DIVERGED, OUT_OF_ITERATIONS, SINGULAR = range(4)

# What a solve comes to: done, or what is wrong with a graph.
DONE, RESIDUAL_FAILED, JACOBIAN_FAILED, RESIDUAL_IS_OTHER, JACOBIAN_IS_OTHER = range(5)
# What the call of a graph comes to: done, failed, outputs of other shapes than the table tells, which it tells now, or
# outputs that are no such tensors.
CALLED, FAILED, OTHER, UNREADABLE = range(4)

# The table of functions for tensors; behind them torch's number for float64.
CREATE, DELETE, DATA, DIM, SIZES, STRIDES, DTYPE, FLOAT64, FUNCTIONS = range(9)
# Columns of a table of arguments: address, number of axes, address of their sizes, of their strides; then, for the call
# of a single graph, the entries of a row, 0 for what all rows share.
ADDRESS, AXES, SIZES_AT, STRIDES_AT, ARGUMENT = range(5)
WIDTH, GRAPH_ARGUMENT = ARGUMENT, ARGUMENT + 1
# Columns of a table of outputs: where its rows go, the number of axes, and the sizes of these; then the most axes.
TARGET, OUTPUT_AXES, OUTPUT_SIZES, MOST_AXES = 0, 1, 2, 10
OUTPUT: Final = OUTPUT_SIZES + MOST_AXES
# Entries of the room for handles behind those of inputs: two outputs of a graph, and what is asked of one.
OUTPUTS, SCRATCH = 2, 4


class _Solve(NamedTuple):
    """Places in the table of a solve of a block."""

    ROWS: int
    CAPACITY: int
    N: int
    Q: int
    UPDATES: int
    CUTS: int
    RESIDUAL: int
    RESIDUAL_CONTAINER: int
    JACOBIAN: int
    JACOBIAN_CONTAINER: int
    EXECUTOR: int
    ARGUMENTS: int
    FUNCTIONS: int
    ARGUMENTS_AT: int
    HANDLES: int
    VECTORS: int
    GIVENS: int
    NUMBERS: int
    INDICES: int
    FACTORS: int
    FACTORS_SIZE: int
    PIVOTS: int
    PIVOTS_SIZE: int
    LIMITS: int
    FIRST_GUESS: int
    FIRST_GIVENS: int
    NORMS: int
    RECORD: int
    SOLUTION: int
    HISTORY: int
    HISTORY_LINES: int
    FAILED: int
    FIELDS: int


class _Call(NamedTuple):
    """Places in the table of the call of a graph."""

    RUN: int
    CONTAINER: int
    EXECUTOR: int
    FUNCTIONS: int
    ARGUMENTS: int
    ARGUMENTS_AT: int
    OUTPUTS: int
    OUTPUTS_AT: int
    HANDLES: int
    ROWS: int
    FILLED: int
    ROOM: int
    FIELDS: int


class _Columns(NamedTuple):
    """Places in the table of linear systems with several right-hand sides."""

    ROWS: int
    N: int
    Q: int
    MATRICES: int
    SIDES: int
    COUNT: int
    CHOSEN: int
    FACTORS: int
    FACTORS_SIZE: int
    PIVOTS: int
    PIVOTS_SIZE: int
    FOUND: int
    FIELDS: int


Solve = _Solve(*range(33))
Call = _Call(*range(13))
Columns = _Columns(*range(13))

# Kinds of vectors of a solve: unknowns, direction, trial, `-r`; further trials of some rows, `-r` there;
# what last steps lead to, in the places of the rows in the batch. Of givens: of
# the live rows, of the further trials.
U, STEP, TRIAL, B, FURTHER, FURTHER_B, LAST_STEP, VECTOR_KINDS = range(8)
OWN, FURTHER_OWN, GIVEN_KINDS = range(3)
# Columns of `numbers`, of the live rows: residual norm, that of the trial, slope over squared norm, step length.
NORM, TRIAL_NORM, SLOPE, ALPHA, NUMBER_COLUMNS = range(5)
# Columns of `indices`: place of a live row in the batch, its row in the linearisation, the slot of its factors; the
# live row of a further trial.
PLACE, SOURCE, SLOT, TRIED, INDEX_COLUMNS = range(5)
# Columns of `norms` and of `record`, of all rows: last and first residual norm; outcome and updates.
LAST, FIRST = range(2)
OUTCOME, UPDATE = range(2)
# Columns of `history`, a line each: 0 for an iteration and 1 for trials, its number, and its figures.
HISTORY_COLUMNS: Final = 5

# Vectors at the end of the factors beside those of the right-hand side: peaks, their places, whether there was one.
PEAK, BEST, SOUND, EXTRA = range(4)


def factors_size(rows: int, n: int) -> int:
    """Numbers that the factors of so many rows take."""
    return (-(-rows // LANES) * n * n + n + EXTRA) * LANES


def pivots_size(rows: int, n: int) -> int:
    """Numbers that their pivots take."""
    return -(-rows // LANES) * n * LANES
