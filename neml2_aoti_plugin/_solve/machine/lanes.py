"""Arithmetic on eight rows at a time, as vector instructions.

In an array of lanes the same number of eight rows lie side by side; an offset is that of the first lane. A loop over
them would not become vector instructions, since the compiler cannot tell that two arrays do not overlap. So each
operation is written in LLVM's language, which splits a vector for processors with shorter ones. Nothing is contracted
or reordered: the bits of a row do not depend on its lane.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from numba.np import arrayobj

from ..tables import LANES

_DOUBLE = ir.DoubleType()
_VECTOR = ir.VectorType(_DOUBLE, LANES)


# Emits the instructions of an operation: the builder, the pointer to a vector at an offset, the other arguments.
Emit = Callable[[Any, Callable[[Any], Any], Any], None]


def _operation(emit: Emit, offsets: int) -> Any:
    """An operation on one array, with integers for all else.

    Args:
        emit: its instructions.
        offsets: number of integers.
    """

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
