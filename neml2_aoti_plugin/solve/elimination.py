"""Small dense linear algebra of one row as numba kernels: norms, elimination, substitution.

Sums are taken in the order of the entries, without reassociation, so that the bits of a row depend on the row alone.
"""

from __future__ import annotations

from math import inf, isfinite, nan, sqrt
from typing import Any

from .criteria import LEAST_SQUARES, MOST_SQUARES
from .machine_code import kernel


@kernel
def norm_of(x: Any) -> Any:
    """Euclidean norm; squares that would overflow or vanish are taken with scaling."""
    total = 0.0
    for i in range(len(x)):
        total += x[i] * x[i]
    if LEAST_SQUARES < total < MOST_SQUARES:
        return sqrt(total)
    peak = 0.0
    for i in range(len(x)):
        size = abs(x[i])
        if not size < inf:
            return nan if size != size else inf
        peak = max(peak, size)
    if peak == 0.0:
        return 0.0
    total = 0.0
    for i in range(len(x)):
        total += (x[i] / peak) * (x[i] / peak)
    return peak * sqrt(total)


@kernel
def factor(a: Any, pivots: Any) -> Any:
    """Factor a matrix in place by elimination with partial pivoting; tell whether it has a pivot in each column.

    Golub, van Loan, Matrix Computations, 4th ed., algorithm 3.4.1.
    """
    n = a.shape[0]
    for k in range(n):
        place, peak = k, abs(a[k, k])
        for i in range(k + 1, n):
            size = abs(a[i, k])
            if size > peak:
                place, peak = i, size
        pivots[k] = place
        if not 0.0 < peak < inf:
            return False
        if place != k:
            for j in range(n):
                a[k, j], a[place, j] = a[place, j], a[k, j]
        inverse = 1.0 / a[k, k]
        for i in range(k + 1, n):
            multiple = a[i, k] * inverse
            a[i, k] = multiple
            if multiple != 0.0:
                for j in range(k + 1, n):
                    a[i, j] -= multiple * a[k, j]
    return True


@kernel
def substitute(a: Any, pivots: Any, x: Any) -> None:
    """Solve with the factors of `factor`, in place."""
    n = len(x)
    for k in range(n):
        place = pivots[k]
        x[k], x[place] = x[place], x[k]
    for i in range(n):
        total = x[i]
        for j in range(i):
            total -= a[i, j] * x[j]
        x[i] = total
    for i in range(n - 1, -1, -1):
        total = x[i]
        for j in range(i + 1, n):
            total -= a[i, j] * x[j]
        x[i] = total / a[i, i]


@kernel
def all_finite(x: Any) -> Any:
    """Whether all entries are finite."""
    sound = True
    for i in range(len(x)):
        sound = sound and isfinite(x[i])
    return sound


@kernel
def columns(a: Any, b: Any, chosen: Any, lu: Any, pivots: Any, found: Any) -> None:
    """Solve `A X = -B` for chosen columns of `B`, row by row; NaN where a matrix is singular."""
    n = a.shape[1]
    for row in range(len(found)):
        lu[:] = a[row]
        x = found[row]
        if not factor(lu, pivots):
            x[:] = nan
            continue
        for c in range(len(chosen)):
            for i in range(n):
                x[c, i] = -b[row, i, chosen[c]]
            substitute(lu, pivots, x[c])
