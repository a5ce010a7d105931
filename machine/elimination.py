"""Small dense linear algebra as machine code: norms of rows; elimination and substitution, eight rows at a time.

The factors of a batch lie in one flat array, `lu`: those of eight rows are a group, whose number `i, j` has a vector of
eight lanes at `group + (i n + j) LANES`. At its end there is room for what is worked on: `n` vectors of a right-hand
side, then pivots (see `larger`) and which lanes have them all. Sums are taken in the order of the entries,
without reassociation, so that the bits of a row depend on the row alone.

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
from neml2_aoti_plugin._solve.tables import BEST, EXTRA, LANES, SOUND

from .calls import entry_of, inlined, inner

_DOUBLE = ir.DoubleType()
_VECTOR = ir.VectorType(_DOUBLE, LANES)


# Emits the instructions of an operation: the builder, the pointer to a vector at an offset, the other arguments.
Emit = Callable[[Any, Callable[[Any], Any], Any], None]


def _operation(emit: Emit, offsets: int) -> Any:
    """An operation on one array, with so many offsets: those of the first lanes, and numbers of vectors."""

    # numba takes no variable number of arguments here.
    def with_two(context: Any, x: Any, i: Any, j: Any) -> Any:
        return types.void(x, *[types.int64] * 2), generate

    def with_three(context: Any, x: Any, i: Any, j: Any, k: Any) -> Any:
        return types.void(x, *[types.int64] * 3), generate

    def with_four(context: Any, x: Any, i: Any, j: Any, k: Any, m: Any) -> Any:
        return types.void(x, *[types.int64] * 4), generate

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = arrayobj.make_array(signature.args[0])(context, builder, arguments[0]).data

        def vector_at(offset: Any) -> Any:
            return builder.bitcast(builder.gep(data, [offset]), _VECTOR.as_pointer())

        emit(builder, vector_at, arguments[1:])
        return context.get_dummy_value()

    return intrinsic({2: with_two, 3: with_three, 4: with_four}[offsets])


def _load(builder: Any, pointer: Any) -> Any:
    # Arrays are aligned to numbers, not to vectors.
    return builder.load(pointer, align=8)


def _store(builder: Any, value: Any, pointer: Any) -> None:
    builder.store(value, pointer, align=8)


def _behind(builder: Any, offset: Any, vectors: Any) -> Any:
    return builder.add(offset, builder.mul(vectors, ir.Constant(ir.IntType(64), LANES)))


def _emit_larger(builder: Any, vector_at: Any, arguments: Any) -> None:
    at, index, peak = arguments
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


def _emit_divide(builder: Any, vector_at: Any, arguments: Any) -> None:
    at, by = map(vector_at, arguments)
    _store(builder, builder.fdiv(_load(builder, at), _load(builder, by)), at)


def _emit_multiply(builder: Any, vector_at: Any, arguments: Any) -> None:
    at, by = map(vector_at, arguments)
    _store(builder, builder.fmul(_load(builder, at), _load(builder, by)), at)


def _emit_subtract_multiple(builder: Any, vector_at: Any, arguments: Any) -> None:
    at, source, count, factor = arguments
    multiple = _load(builder, vector_at(factor))
    with cgutils.for_range(builder, count) as loop:
        target = vector_at(_behind(builder, at, loop.index))
        product = builder.fmul(multiple, _load(builder, vector_at(_behind(builder, source, loop.index))))
        _store(builder, builder.fsub(_load(builder, target), product), target)


def _emit_subtract_products(builder: Any, vector_at: Any, arguments: Any) -> None:
    at, left, right, count = arguments
    total = cgutils.alloca_once_value(builder, _load(builder, vector_at(at)))
    with cgutils.for_range(builder, count) as loop:
        y, z = (_load(builder, vector_at(_behind(builder, offset, loop.index))) for offset in (left, right))
        builder.store(builder.fsub(builder.load(total), builder.fmul(y, z)), total)
    _store(builder, builder.load(total), vector_at(at))


# `larger(x, at, index, peak)`: where `|x|` is larger than the peak so far, it is the new one; behind the peaks lie the
# indices of theirs.
larger = _operation(_emit_larger, 3)
# `divide(x, at, by)`: `x /= y`, and `multiply`: `x *= y`; `by` is the offset of `y` in the same array.
divide = _operation(_emit_divide, 2)
multiply = _operation(_emit_multiply, 2)
# `subtract_multiple(x, at, source, count, factor)`: `x -= f y` for so many vectors one after the other; `source` and
# `factor` are the offsets of `y` and `f`.
subtract_multiple = _operation(_emit_subtract_multiple, 4)
# `subtract_products(x, at, left, right, count)`: `x -= sum(y z)` over so many vectors, one after the other; `left` and
# `right` are the offsets of `y` and `z`.
subtract_products = _operation(_emit_subtract_products, 4)


@inlined
def side_in(lu: Any, n: Any) -> Any:
    """The offset of the right-hand side."""
    return len(lu) - (n + EXTRA) * LANES


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

    Golub, van Loan, Matrix Computations, 4th ed., algorithm 3.4.1. Lanes without a pivot in some column are noted.
    """
    first, chosen = group * n * n * LANES, group * n * LANES
    peak = side_in(lu, n) + n * LANES
    best, sound = peak + BEST * LANES, peak + SOUND * LANES
    for lane in range(LANES):
        lu[sound + lane] = 1.0
    for k in range(n):
        diagonal = first + (k * n + k) * LANES
        for lane in range(LANES):
            lu[peak + lane], lu[best + lane] = -1.0, k
        for i in range(k, n):
            larger(lu, first + (i * n + k) * LANES, i, peak)
        for lane in range(LANES):
            place = int(lu[best + lane])
            pivots[chosen + k * LANES + lane] = place
            if not 0.0 < lu[peak + lane] < inf:
                lu[sound + lane] = 0.0
            if place != k:
                for j in range(n):
                    one, two = first + (k * n + j) * LANES + lane, first + (place * n + j) * LANES + lane
                    lu[one], lu[two] = lu[two], lu[one]
        # The peaks have served, and make room for the inverse of the pivots.
        for lane in range(LANES):
            lu[peak + lane] = 1.0
        divide(lu, peak, diagonal)
        for i in range(k + 1, n):
            multiple = first + (i * n + k) * LANES
            multiply(lu, multiple, peak)
            subtract_multiple(lu, multiple + LANES, diagonal + LANES, n - k - 1, multiple)


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
        subtract_products(lu, x + i * LANES, first + i * n * LANES, x, i)
    for i in range(n - 1, -1, -1):
        row = first + (i * n + i) * LANES
        subtract_products(lu, x + i * LANES, row + LANES, x + (i + 1) * LANES, n - 1 - i)
        divide(lu, x + i * LANES, row)


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
def take_side(lu: Any, slot: Any, x: Any, row: Any) -> Any:
    """Take the solution of a slot's lane; tell whether it is finite."""
    n = x.shape[1]
    at = side_in(lu, n) + slot % LANES
    sound = True
    for i in range(n):
        x[row, i] = lu[at + i * LANES]
        sound = sound and isfinite(x[row, i])
    return sound


@inlined
def had_pivots(lu: Any, slot: Any, n: Any) -> Any:
    """Whether the matrix in a slot of the group that was factored last had a pivot in each column."""
    return lu[side_in(lu, n) + (n + SOUND) * LANES + slot % LANES] != 0.0


@inlined
def substitute_one(lu: Any, pivots: Any, slot: Any, x: Any, row: Any) -> Any:
    """Solve with the factors of one slot, in place; tell whether the solution is finite."""
    n = x.shape[1]
    lane = slot % LANES
    first, chosen = (slot // LANES) * n * n * LANES + lane, (slot // LANES) * n * LANES + lane
    for k in range(n):
        place = pivots[chosen + k * LANES]
        x[row, k], x[row, place] = x[row, place], x[row, k]
    for i in range(n):
        total = x[row, i]
        for j in range(i):
            total -= lu[first + (i * n + j) * LANES] * x[row, j]
        x[row, i] = total
    sound = True
    for i in range(n - 1, -1, -1):
        total = x[row, i]
        for j in range(i + 1, n):
            total -= lu[first + (i * n + j) * LANES] * x[row, j]
        total /= lu[first + (i * n + i) * LANES]
        sound = sound and isfinite(total)
        x[row, i] = total
    return sound
