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

from ..tables import (
    ADDRESS,
    AXES,
    CALLED,
    CREATE,
    DATA,
    DELETE,
    DIM,
    DTYPE,
    FAILED,
    FLOAT64,
    FUNCTIONS,
    GRAPH_ARGUMENT,
    MOST_AXES,
    OTHER,
    OUTPUT,
    OUTPUT_AXES,
    OUTPUT_SIZES,
    SCRATCH,
    SIZES,
    SIZES_AT,
    STRIDES,
    STRIDES_AT,
    TARGET,
    UNREADABLE,
    VECTOR,
    WIDTH,
)
from ..tables import Call as Table
from .compiled import entry, inlined, inner


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
def start(graph: Any, call: Any) -> Any:
    """Run a graph on the tensors that the table of arguments tells of; tell whether it failed."""
    functions, arguments, handles = call.functions, call.arguments, call.handles
    count = len(arguments)
    for k in range(count):
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
def filled(rows: Any) -> Any:
    """Rows with those that fill them up to whole vectors."""
    return (rows + VECTOR - 1) // VECTOR * VECTOR


@inner
def run(graph: Any, call: Any, u: Any, g: Any, rows: Any) -> Any:
    """Run a graph for the first rows of unknowns and givens; tell whether it failed.

    Rows behind them are written over by copies of the first, so that no row is rounded by how many there are.
    """
    for k in range(rows, filled(rows)):
        for i in range(u.shape[1]):
            u[k, i] = u[0, i]
        for i in range(g.shape[1]):
            g[k, i] = g[0, i]
    arguments = call.arguments
    arguments[0, ADDRESS], arguments[1, ADDRESS] = u.ctypes.data, g.ctypes.data
    integers(arguments[0, SIZES_AT], (1,))[0] = integers(arguments[1, SIZES_AT], (1,))[0] = filled(rows)
    return start(graph, call)


@inlined
def release(graph: Any, call: Any) -> None:
    """Delete the outputs of a graph that has run."""
    for k in range(graph.outputs):
        _delete(call.functions[DELETE], (call.handles[len(call.arguments) + k],))


@inlined
def look(call: Any, place: Any) -> Any:
    """Ask an output for its axes, sizes, strides and memory, into `scratch`; tell whether it is one of float64."""
    functions, found, handle = call.functions, call.scratch, call.handles[len(call.arguments) + place]
    at = found.ctypes.data
    _ask(functions[DTYPE], (handle, at))
    # It has 32 bits.
    sound = found[0] & 0xFFFFFFFF == functions[FLOAT64]
    for k, question in enumerate((DIM, SIZES, STRIDES, DATA)):
        sound = _ask(functions[question], (handle, at + 8 * k)) == 0 and sound
    return sound


@inner
def output(call: Any, place: Any, rows: Any, n: Any, axes: Any) -> Any:
    """Look at an output `(rows or 1, n)` or `(rows or 1, n, n)`; its address is 0 if it is no such tensor."""
    nothing, found = Output(0, 0, 0, 0), call.scratch
    if not look(call, place) or found[0] != axes:
        return nothing
    sizes, strides = integers(found[1], (axes,)), integers(found[2], (axes,))
    for k in range(1, axes):
        if sizes[k] != n:
            return nothing
    if sizes[0] != filled(rows) and sizes[0] != 1:
        return nothing
    return Output(found[3], strides[0] if sizes[0] == filled(rows) else 0, strides[1], strides[2] if axes > 2 else 0)


@inlined
def entry_of(x: Any, row: Any, i: Any, j: Any) -> Any:
    """One number of an output."""
    return numbers(x.address + 8 * (row * x.row + i * x.first + j * x.second), (1,))[0]


@inlined
def take(x: Any, row: Any, target: Any, place: Any) -> None:
    """Copy a row of an output to a place in an array."""
    for i in range(target.shape[1]):
        target[place, i] = entry_of(x, row, i, 0)


@entry
def call_graph(table: Any) -> Any:
    """Run a graph for rows of any number, filled up to so many by copies of the first one.

    Args:
        table: address of the integers of `tables.Call`.

    Returns:
        `CALLED`, and the outputs of the rows are at their targets, one after the other; or what was wrong. An output
        that is the same for all rows has one row.
    """
    t = integers(table, (Table.FIELDS,))
    count, outputs, rows, fill = t[Table.ARGUMENTS], t[Table.OUTPUTS], t[Table.ROWS], t[Table.FILLED]
    arguments, told = (
        integer_rows(t[Table.ARGUMENTS_AT], (count, GRAPH_ARGUMENT)),
        integer_rows(t[Table.OUTPUTS_AT], (outputs, OUTPUT)),
    )
    room = t[Table.ROOM]
    for k in range(count):
        width = arguments[k, WIDTH]
        if width == 0:
            continue
        integers(arguments[k, SIZES_AT], (1,))[0] = fill
        if fill != rows:
            source, copies = number_rows(arguments[k, ADDRESS], (rows, width)), number_rows(room, (fill, width))
            for row in range(fill):
                for i in range(width):
                    copies[row, i] = source[row if row < rows else 0, i]
            arguments[k, ADDRESS] = room
            room += 8 * fill * width
    handles = t[Table.HANDLES]
    call = Call(
        integers(t[Table.FUNCTIONS], (FUNCTIONS,)),
        arguments,
        integers(handles, (count + outputs,)),
        integers(handles + 8 * (count + outputs), (SCRATCH,)),
    )
    graph = Graph(t[Table.RUN], t[Table.CONTAINER], t[Table.EXECUTOR], outputs)
    if start(graph, call):
        return FAILED
    found = CALLED
    for place in range(outputs):
        found = max(found, _fetch(call, place, told[place], rows, fill))
    release(graph, call)
    return found


@inner
def _fetch(call: Any, place: Any, told: Any, rows: Any, fill: Any) -> Any:
    """Copy an output to its target, if it has the axes and sizes that the table tells; else tell them there."""
    found = call.scratch
    if not look(call, place) or found[0] < 1 or found[0] > MOST_AXES:
        return UNREADABLE
    axes = found[0]
    sizes, strides = integers(found[1], (axes,)), integers(found[2], (axes,))
    same, once = told[OUTPUT_AXES] == axes, sizes[0] == 1
    if not once and sizes[0] != fill:
        return UNREADABLE
    told[OUTPUT_AXES], width, dense = axes, 1, True
    for k in range(axes - 1, -1, -1):
        # The first one tells whether there is a row for each.
        size = sizes[k] if k > 0 else (1 if once else 0)
        same = same and told[OUTPUT_SIZES + k] == size
        told[OUTPUT_SIZES + k] = size
        if k > 0:
            dense = dense and (strides[k] == width or size == 1)
            width *= size
    if not same or told[TARGET] == 0:
        return OTHER
    count = 1 if once else rows
    target = number_rows(told[TARGET], (count, width))
    for row in range(count):
        at = found[3] + 8 * row * strides[0]
        if dense:
            source = numbers(at, (width,))
            for i in range(width):
                target[row, i] = source[i]
            continue
        for i in range(width):
            rest, offset = i, 0
            for k in range(axes - 1, 0, -1):
                offset += rest % sizes[k] * strides[k]
                rest //= sizes[k]
            target[row, i] = numbers(at + 8 * offset, (1,))[0]
    return CALLED
