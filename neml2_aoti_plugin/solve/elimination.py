"""Small dense linear algebra of one row as numba kernels: norms, elimination, substitution.

Sums are taken in the order of the entries, without reassociation, so that the bits of a row depend on the row alone.
A row is told by its index: a view of it would cost more than the arithmetic, to run and to compile.
"""

from __future__ import annotations

from math import inf, isfinite, nan, sqrt
from typing import Any

from .criteria import LEAST_SQUARES, MOST_SQUARES
from .machine_code import inner, kernel


@inner
def copy(source: Any, row: Any, target: Any, place: Any) -> None:
    """Copy a row of one array to a place in another one."""
    for i in range(source.shape[1]):
        target[place, i] = source[row, i]


@inner
def norm_of(x: Any, row: Any) -> Any:
    """Euclidean norm of a row; squares that would overflow or vanish are taken with scaling."""
    total = 0.0
    for i in range(x.shape[1]):
        total += x[row, i] * x[row, i]
    if LEAST_SQUARES < total < MOST_SQUARES:
        return sqrt(total)
    peak = 0.0
    for i in range(x.shape[1]):
        size = abs(x[row, i])
        if not size < inf:
            return nan if size != size else inf
        peak = max(peak, size)
    if peak == 0.0:
        return 0.0
    total = 0.0
    for i in range(x.shape[1]):
        total += (x[row, i] / peak) * (x[row, i] / peak)
    return peak * sqrt(total)


@inner
def factor(a: Any, row: Any, lu: Any, pivots: Any, place: Any) -> Any:
    """Factor a matrix by elimination with partial pivoting; tell whether it has a pivot in each column.

    Golub, van Loan, Matrix Computations, 4th ed., algorithm 3.4.1.
    """
    n = a.shape[1]
    for i in range(n):
        for j in range(n):
            lu[place, i, j] = a[row, i, j]
    for k in range(n):
        best, peak = k, abs(lu[place, k, k])
        for i in range(k + 1, n):
            size = abs(lu[place, i, k])
            if size > peak:
                best, peak = i, size
        pivots[place, k] = best
        if not 0.0 < peak < inf:
            return False
        if best != k:
            for j in range(n):
                lu[place, k, j], lu[place, best, j] = lu[place, best, j], lu[place, k, j]
        inverse = 1.0 / lu[place, k, k]
        for i in range(k + 1, n):
            multiple = lu[place, i, k] * inverse
            lu[place, i, k] = multiple
            if multiple != 0.0:
                for j in range(k + 1, n):
                    lu[place, i, j] -= multiple * lu[place, k, j]
    return True


@inner
def substitute(lu: Any, pivots: Any, place: Any, x: Any, row: Any) -> Any:
    """Solve with the factors of `factor`, in place; tell whether all entries of the solution are finite."""
    n = x.shape[1]
    for k in range(n):
        best = pivots[place, k]
        x[row, k], x[row, best] = x[row, best], x[row, k]
    for i in range(n):
        total = x[row, i]
        for j in range(i):
            total -= lu[place, i, j] * x[row, j]
        x[row, i] = total
    sound = True
    for i in range(n - 1, -1, -1):
        total = x[row, i]
        for j in range(i + 1, n):
            total -= lu[place, i, j] * x[row, j]
        total /= lu[place, i, i]
        sound = sound and isfinite(total)
        x[row, i] = total
    return sound


@kernel
def columns(a: Any, b: Any, chosen: Any, lu: Any, pivots: Any, x: Any, found: Any) -> None:
    """Solve `A X = -B` for chosen columns of `B`, row by row; NaN where a matrix is singular."""
    n = a.shape[1]
    for row in range(len(found)):
        sound = factor(a, row, lu, pivots, 0)
        for c in range(len(chosen)):
            for i in range(n):
                x[0, i] = -b[row, i, chosen[c]] if sound else nan
            if sound:
                substitute(lu, pivots, 0, x, 0)
            for i in range(n):
                found[row, c, i] = x[0, i]
