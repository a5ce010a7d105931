"""Small dense linear algebra as machine code: norms of rows; elimination and substitution, eight rows at a time.

The factors of a batch lie in one flat array, `lu`: those of eight rows are a group, whose number `i, j` has a vector of
eight lanes at `group + (i n + j) LANES`. At its end there is room for what is worked on: `n` vectors of a right-hand
side, then pivots (see `larger`). Sums are taken in the order of the entries, without reassociation, so that the bits of
a row depend on the row alone.

Arithmetic on eight lanes is written in LLVM's language: a loop over them would not become vector instructions, since
the compiler cannot tell that two arrays do not overlap. LLVM splits a vector for processors with shorter ones.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf, isfinite, nan, sqrt
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from numba.np import arrayobj

from neml2_aoti_plugin._solve.criteria import LEAST_SQUARES, MOST_SQUARES
from neml2_aoti_plugin._solve.tables import BEST, EXTRA, LANES

from .calls import entry_of, inlined, inner

_DOUBLE = ir.DoubleType()
_VECTOR = ir.VectorType(_DOUBLE, LANES)


def _operation(emit: Callable[[Any, Callable[[Any], Any], Any], None]) -> Any:
    """An operation on an array by offsets into it, those of the first lanes of vectors, and by numbers of vectors.

    `emit` takes the builder, what gives the pointer to the vector at an offset, and the offsets and numbers.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def operation(typing: Any, x: Any, offsets: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            data = arrayobj.make_array(signature.args[0])(context, builder, values[0]).data
            given = zip(cgutils.unpack_tuple(builder, values[1]), signature.args[1], strict=True)

            def vector_at(offset: Any) -> Any:
                return builder.bitcast(builder.gep(data, [offset]), _VECTOR.as_pointer())

            emit(builder, vector_at, [context.cast(builder, value, kind, types.int64) for value, kind in given])
            return context.get_dummy_value()

        return types.void(x, offsets), generate

    return operation


def _load(builder: Any, pointer: Any) -> Any:
    # Arrays are aligned to numbers, not to vectors.
    return builder.load(pointer, align=8)


def _store(builder: Any, value: Any, pointer: Any) -> None:
    builder.store(value, pointer, align=8)


def _behind(builder: Any, offset: Any, vectors: Any) -> Any:
    return builder.add(offset, builder.mul(vectors, ir.Constant(ir.IntType(64), LANES)))


@_operation
def larger(builder: Any, vector_at: Any, offsets: Any) -> None:
    """`(at, index, peak)`: where `|x|` is larger than the peak so far, it is the new one; its index lies behind it."""
    at, index, peak = offsets
    peaks, indices = vector_at(peak), vector_at(_behind(builder, peak, ir.Constant(ir.IntType(64), 1)))
    x, old = _load(builder, vector_at(at)), _load(builder, peaks)
    zero = ir.Constant(_VECTOR, [ir.Constant(_DOUBLE, 0.0)] * LANES)
    size = builder.select(builder.fcmp_ordered("<", x, zero), builder.fsub(zero, x), x)
    own = builder.sitofp(index, _DOUBLE)
    of_all = ir.Constant(_VECTOR, ir.Undefined)
    for lane in range(LANES):
        of_all = builder.insert_element(of_all, own, ir.Constant(ir.IntType(32), lane))
    found = builder.fcmp_ordered(">", size, old)
    _store(builder, builder.select(found, size, old), peaks)
    _store(builder, builder.select(found, of_all, _load(builder, indices)), indices)


@_operation
def divide(builder: Any, vector_at: Any, offsets: Any) -> None:
    """`(at, by)`: `x /= y`."""
    at, by = map(vector_at, offsets)
    _store(builder, builder.fdiv(_load(builder, at), _load(builder, by)), at)


@_operation
def multiply(builder: Any, vector_at: Any, offsets: Any) -> None:
    """`(at, by)`: `x *= y`."""
    at, by = map(vector_at, offsets)
    _store(builder, builder.fmul(_load(builder, at), _load(builder, by)), at)


@_operation
def subtract_multiple(builder: Any, vector_at: Any, offsets: Any) -> None:
    """`(at, source, count, factor)`: `x -= f y` for so many vectors of `x` and of `y`, one after the other."""
    at, source, count, factor = offsets
    multiple = _load(builder, vector_at(factor))
    with cgutils.for_range(builder, count) as loop:
        target = vector_at(_behind(builder, at, loop.index))
        product = builder.fmul(multiple, _load(builder, vector_at(_behind(builder, source, loop.index))))
        _store(builder, builder.fsub(_load(builder, target), product), target)


@_operation
def subtract_products(builder: Any, vector_at: Any, offsets: Any) -> None:
    """`(at, left, right, count)`: `x -= sum(y z)` over so many vectors of `y` and of `z`, one after the other."""
    at, left, right, count = offsets
    total = cgutils.alloca_once_value(builder, _load(builder, vector_at(at)))
    with cgutils.for_range(builder, count) as loop:
        y, z = (_load(builder, vector_at(_behind(builder, offset, loop.index))) for offset in (left, right))
        builder.store(builder.fsub(builder.load(total), builder.fmul(y, z)), total)
    _store(builder, builder.load(total), vector_at(at))


@inlined
def side_in(lu: Any, n: Any) -> Any:
    """The offset of the right-hand side."""
    return len(lu) - (n + EXTRA) * LANES


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


@inlined
def finite(x: Any, row: Any) -> Any:
    """Whether a row is finite."""
    found = True
    for i in range(x.shape[1]):
        found = found and isfinite(x[row, i])
    return found


@inlined
def load(a: Any, row: Any, lu: Any, slot: Any, n: Any) -> None:
    """Put the matrix of a row, from an output of a graph, into a slot, which is a lane of a group."""
    at = (slot // LANES) * n * n * LANES + slot % LANES
    for i in range(n):
        for j in range(n):
            lu[at] = entry_of(a, row, i, j)
            at += LANES


@inlined
def fill_up(lu: Any, slot: Any, n: Any) -> None:
    """Put the identity into a slot and all behind it in its group, so that they cost no special numbers."""
    while slot % LANES:
        at = (slot // LANES) * n * n * LANES + slot % LANES
        for i in range(n):
            for j in range(n):
                lu[at] = 1.0 if i == j else 0.0
                at += LANES
        slot += 1


@inner
def factor(lu: Any, pivots: Any, group: Any, n: Any) -> None:
    """Factor the matrices of a group in place by elimination with partial pivoting.

    Golub, van Loan, Matrix Computations, 4th ed., algorithm 3.4.1.
    """
    first, chosen = group * n * n * LANES, group * n * LANES
    peak = side_in(lu, n) + n * LANES
    best = peak + BEST * LANES
    for k in range(n):
        diagonal = first + (k * n + k) * LANES
        for lane in range(LANES):
            lu[peak + lane], lu[best + lane] = -1.0, k
        for i in range(k, n):
            larger(lu, (first + (i * n + k) * LANES, i, peak))
        for lane in range(LANES):
            place = int(lu[best + lane])
            pivots[chosen + k * LANES + lane] = place
            if place != k:
                for j in range(n):
                    one, two = first + (k * n + j) * LANES + lane, first + (place * n + j) * LANES + lane
                    lu[one], lu[two] = lu[two], lu[one]
            # The peak has served, and makes room for the inverse of the pivot.
            lu[peak + lane] = 1.0
        divide(lu, (peak, diagonal))
        for i in range(k + 1, n):
            multiple = first + (i * n + k) * LANES
            multiply(lu, (multiple, peak))
            subtract_multiple(lu, (multiple + LANES, diagonal + LANES, n - k - 1, multiple))


@inlined
def had_pivots(lu: Any, slot: Any, n: Any) -> Any:
    """Whether the matrix that was factored in a slot had a pivot in each column."""
    at, found = (slot // LANES) * n * n * LANES + slot % LANES, True
    for k in range(n):
        found = found and 0.0 < abs(lu[at + (k * n + k) * LANES]) < inf
    return found


@inner
def substitute(lu: Any, pivots: Any, group: Any, n: Any) -> None:
    """Solve with the factors of a group for the right-hand sides at `side_in`, in place."""
    first, chosen, x = group * n * n * LANES, group * n * LANES, side_in(lu, n)
    for k in range(n):
        for lane in range(LANES):
            place = pivots[chosen + k * LANES + lane]
            if place != k:
                one, two = x + k * LANES + lane, x + place * LANES + lane
                lu[one], lu[two] = lu[two], lu[one]
    for i in range(n):
        subtract_products(lu, (x + i * LANES, first + i * n * LANES, x, i))
    for i in range(n - 1, -1, -1):
        row = first + (i * n + i) * LANES
        subtract_products(lu, (x + i * LANES, row + LANES, x + (i + 1) * LANES, n - 1 - i))
        divide(lu, (x + i * LANES, row))


@inlined
def put_side(b: Any, row: Any, lu: Any, slot: Any) -> None:
    """Put a right-hand side into the lane of a slot."""
    n = b.shape[1]
    at = side_in(lu, n) + slot % LANES
    for i in range(n):
        lu[at + i * LANES] = b[row, i]


@inlined
def clear_sides(lu: Any, n: Any) -> None:
    """Set all right-hand sides to zero."""
    at = side_in(lu, n)
    for i in range(n * LANES):
        lu[at + i] = 0.0


@inlined
def take_side(lu: Any, slot: Any, x: Any, row: Any) -> None:
    """Take the solution of a slot's lane."""
    n = x.shape[1]
    at = side_in(lu, n) + slot % LANES
    for i in range(n):
        x[row, i] = lu[at + i * LANES]
