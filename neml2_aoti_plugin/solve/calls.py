"""Call compiled graphs from machine code: functions at addresses, arrays over memory, tensors behind handles.

A graph takes the handles of its inputs for its own, and gives handles of its outputs, which are to be deleted. An
output may come once for all rows, or strided; what is read of it is told by its sizes and strides.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from numba.np import arrayobj

from .machine_code import inlined, inner

# Rows that a graph gets are filled up to a multiple of this: operators take two vectors at a time and the rest number
# by number, which rounds otherwise. With AVX-512 a vector has 8 doubles.
VECTOR = 16

# Places in the table of functions; behind them torch's number for float64.
CREATE, DELETE, DATA, DIM, SIZES, STRIDES, DTYPE, FLOAT64 = range(8)
# Columns of the table of arguments: address, number of axes, address of their sizes, of their strides.
ADDRESS, AXES, SIZES_AT, STRIDES_AT, ARGUMENT = range(5)


class Graph(NamedTuple):
    """A graph, as machine code has it.

    Args:
        run: address of the function that runs it.
        container: handle of its container.
        executor: address of its proxy executor.
        outputs: number of its outputs.
    """

    run: int
    container: int
    executor: int
    outputs: int


class Call(NamedTuple):
    """What all calls of a solve share.

    Args:
        functions: addresses of the functions for tensors.
        arguments: the table of arguments; unknowns and givens come first.
        handles: room for the handles of inputs, and behind them of outputs.
        scratch: room for one number, and behind it for what is asked of an output.
    """

    functions: Any
    arguments: Any
    handles: Any
    scratch: Any


class Output(NamedTuple):
    """An output of a graph.

    Args:
        address: of its first entry.
        row: stride from row to row, 0 for one that is the same in all rows.
        first: stride of the axis behind the rows.
        second: stride of the axis behind that; 0 where there is none.
    """

    address: int
    row: int
    first: int
    second: int


def _function(*bits: int) -> Any:
    """A call of the C function at an address with integers of so many bits; it returns 32 bits."""

    @intrinsic  # type: ignore[untyped-decorator]
    def call(typing: Any, address: Any, arguments: Any) -> Any:
        signature = types.int32(types.int64, arguments)

        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            kinds = [types.int64 if width == 64 else types.int32 for width in bits]
            given = zip(cgutils.unpack_tuple(builder, values[1]), signature.args[1].types, kinds, strict=True)
            passed = [context.cast(builder, value, have, want) for value, have, want in given]
            form = ir.FunctionType(ir.IntType(32), [ir.IntType(width) for width in bits])
            return builder.call(builder.inttoptr(values[0], form.as_pointer()), passed)

        return signature, generate

    return call


_create = _function(64, 64, 64, 64, 64, 32, 32, 32, 64)
_delete = _function(64)
_ask = _function(64, 64)
_run = _function(64, 64, 64, 64, 64, 64, 64)


def _array(entry: Any, axes: int) -> Any:
    """An array over memory at an address, with its entries one after the other."""
    kind = types.Array(entry, axes, "C")

    @intrinsic  # type: ignore[untyped-decorator]
    def over(typing: Any, address: Any, shape: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            extents = cgutils.unpack_tuple(builder, values[1])
            extents = [context.cast(builder, n, t, types.intp) for n, t in zip(extents, signature.args[1], strict=True)]
            size = context.get_constant(types.intp, context.get_abi_sizeof(context.get_data_type(entry)))
            strides: list[Any] = []
            step = size
            for extent in reversed(extents):
                strides.insert(0, step)
                step = builder.mul(step, extent)
            found = arrayobj.make_array(kind)(context, builder)
            data = builder.inttoptr(values[0], context.get_data_type(entry).as_pointer())
            arrayobj.populate_array(found, data=data, shape=extents, strides=strides, itemsize=size, meminfo=None)
            return found._getvalue()

        return kind(types.int64, shape), generate

    return over


integers, numbers = _array(types.int64, 1), _array(types.float64, 1)
integer_rows, number_rows = _array(types.int64, 2), _array(types.float64, 2)


@inner
def run(graph: Any, call: Any, u: Any, g: Any, rows: Any) -> Any:
    """Run a graph for the first rows of unknowns and givens; tell whether it failed.

    Rows behind them are written over by copies of the first, so that no row is rounded by how many there are.
    """
    filled = (rows + VECTOR - 1) // VECTOR * VECTOR
    for k in range(rows, filled):
        for i in range(u.shape[1]):
            u[k, i] = u[0, i]
        for i in range(g.shape[1]):
            g[k, i] = g[0, i]
    functions, arguments, handles = call.functions, call.arguments, call.handles
    count = len(arguments)
    arguments[0, ADDRESS], arguments[1, ADDRESS] = u.ctypes.data, g.ctypes.data
    for k in range(count):
        if k < 2:
            integers(arguments[k, SIZES_AT], (1,))[0] = filled
        tensor = arguments[k]
        failed = _create(
            functions[CREATE],
            (
                tensor[ADDRESS],
                tensor[AXES],
                tensor[SIZES_AT],
                tensor[STRIDES_AT],
                0,
                functions[FLOAT64],
                0,
                -1,
                handles.ctypes.data + 8 * k,
            ),
        )
        if failed != 0:
            for made in range(k):
                _delete(functions[DELETE], (handles[made],))
            return True
    outputs = handles.ctypes.data + 8 * count
    given = (graph.container, handles.ctypes.data, count, outputs, graph.outputs, 0, graph.executor)
    return _run(graph.run, given) != 0


@inlined
def release(graph: Any, call: Any) -> None:
    """Delete the outputs of a graph that has run."""
    for k in range(graph.outputs):
        _delete(call.functions[DELETE], (call.handles[len(call.arguments) + k],))


@inner
def output(call: Any, place: Any, rows: Any, n: Any, axes: Any) -> Any:
    """Look at an output `(rows or 1, n)` or `(rows or 1, n, n)`; its address is 0 if it is no such tensor."""
    filled = (rows + VECTOR - 1) // VECTOR * VECTOR
    functions, found, handle = call.functions, call.scratch, call.handles[len(call.arguments) + place]
    at = found.ctypes.data
    nothing = Output(0, 0, 0, 0)
    _ask(functions[DTYPE], (handle, at))
    # It has 32 bits.
    if found[0] & 0xFFFFFFFF != functions[FLOAT64]:
        return nothing
    for k, question in enumerate((DIM, SIZES, STRIDES, DATA)):
        if _ask(functions[question], (handle, at + 8 * k)) != 0:
            return nothing
    if found[0] != axes:
        return nothing
    sizes, strides = integers(found[1], (axes,)), integers(found[2], (axes,))
    for k in range(1, axes):
        if sizes[k] != n:
            return nothing
    if sizes[0] != filled and sizes[0] != 1:
        return nothing
    return Output(found[3], strides[0] if sizes[0] == filled else 0, strides[1], strides[2] if axes > 2 else 0)


@inlined
def entry(x: Any, row: Any, i: Any, j: Any) -> Any:
    """One number of an output."""
    return numbers(x.address + 8 * (row * x.row + i * x.first + j * x.second), (1,))[0]


@inlined
def take(x: Any, row: Any, target: Any, place: Any) -> None:
    """Copy a row of an output to a place in an array."""
    for i in range(target.shape[1]):
        target[place, i] = entry(x, row, i, 0)
