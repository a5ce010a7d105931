"""Call compiled graphs from machine code: functions at addresses, arrays over memory, tensors behind handles.

A graph takes the handles of its inputs for its own, and gives handles of its outputs, which are to be deleted. An
output may come once for all rows, or strided; what is read of it is told by its sizes and strides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numba
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from numba.np import arrayobj

from neml2_aoti_plugin._solve.tables import (
    ADDRESS,
    ARGUMENT,
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
from neml2_aoti_plugin._solve.tables import Call as Table

# For any processor of the family: the one at hand is known when the package runs.
numba.config.CPU_NAME, numba.config.CPU_FEATURES = "generic", ""


def inner(function: Callable[..., Any], **options: Any) -> Any:
    """A function that other such functions call: without the interpreter, without numba's runtime, no exceptions."""
    options |= {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "_nrt": False}
    return numba.njit(nogil=True, error_model="numpy", **options)(function)


def inlined(function: Callable[..., Any]) -> Any:
    """A short function that is compiled as if its lines stood where it is called."""
    return inner(function, inline="always")


def entry(function: Callable[..., Any]) -> Any:
    """A function that Python calls, with the address of a table; it gives an integer."""
    return inner(function)


class Graph(NamedTuple):
    """A graph, as machine code has it: addresses of its function and of its proxy executor, handle of its container."""

    run: int
    container: int
    executor: int
    outputs: int
    # What a solve comes to where it fails.
    fault: int


class Call(NamedTuple):
    """What calls of the same arguments share.

    `handles` has room for the handles of inputs, and behind them of outputs; `scratch` for what is asked of an output.
    """

    functions: Any
    arguments: Any
    handles: Any
    scratch: Any


class Output(NamedTuple):
    """An output of a graph: its address, the stride of the rows, 0 for one that all share, and of the axes behind."""

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
def start_graph(graph: Any, call: Any) -> Any:
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
    return start_graph(graph, call)


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
def output(call: Any, place: Any, rows: Any, n: Any, m: Any) -> Any:
    """Look at an output `(rows or 1, n, m)`, `(rows or 1, n)` for no `m`; its address is 0 if it is something else."""
    nothing, found, axes = Output(0, 0, 0, 0), call.scratch, 2 if m == 0 else 3
    if not look(call, place) or found[0] != axes:
        return nothing
    sizes, strides = integers(found[1], (axes,)), integers(found[2], (axes,))
    if sizes[1] != n or (axes > 2 and sizes[2] != m):
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


@inlined
def copies(address: Any, room: Any, rows: Any, fill: Any, width: Any) -> None:
    """Copy rows to a room and fill them up with the first one; zeros where there is no address."""
    target = number_rows(room, (fill, width))
    for row in range(fill):
        source = numbers(address + 8 * width * (row if row < rows else 0), (width,))
        for i in range(width):
            target[row, i] = source[i] if address != 0 else 0.0


@inner
def place_rows(call: Any, rows: Any, target: Any, first: Any, width: Any) -> None:
    """Copy the rows of the output that `look` has asked of to columns of an array, whatever its strides."""
    found = call.scratch
    axes = found[0]
    sizes, strides = integers(found[1], (axes,)), integers(found[2], (axes,))
    dense, size = True, 1
    for k in range(axes - 1, 0, -1):
        dense = dense and (strides[k] == size or sizes[k] == 1)
        size *= sizes[k]
    for row in range(rows):
        at = found[3] + (8 * row * strides[0] if sizes[0] > 1 else 0)
        if dense:
            source = numbers(at, (width,))
            for i in range(width):
                target[row, first + i] = source[i]
            continue
        for i in range(width):
            rest, offset = i, 0
            for k in range(axes - 1, 0, -1):
                offset += rest % sizes[k] * strides[k]
                rest //= sizes[k]
            target[row, first + i] = numbers(at + 8 * offset, (1,))[0]


@inlined
def call_with(functions: Any, arguments: Any, count: Any, outputs: Any, handles: Any) -> Any:
    """A call whose table of arguments and room for handles stand at addresses."""
    return Call(
        integers(functions, (FUNCTIONS,)),
        integer_rows(arguments, (count, ARGUMENT)),
        integers(handles, (count + outputs,)),
        integers(handles + 8 * (count + outputs), (SCRATCH,)),
    )


@entry
def call_graph(table: Any) -> Any:
    """Run a graph for rows of any number, by a table of `tables.Call`, filled up to so many by copies of the first one.

    Gives `CALLED`, and the outputs of the rows are at their targets, one after the other; or what was wrong. An output
    that is the same for all rows has one row.
    """
    t = integers(table, (Table.FIELDS,))
    outputs, rows, fill, room = t[Table.OUTPUTS], t[Table.ROWS], t[Table.FILLED], t[Table.ROOM]
    told = integer_rows(t[Table.OUTPUTS_AT], (outputs, OUTPUT))
    call = call_with(t[Table.FUNCTIONS], t[Table.ARGUMENTS_AT], t[Table.ARGUMENTS], outputs, t[Table.HANDLES])
    arguments = call.arguments
    for k in range(len(arguments)):
        width = arguments[k, WIDTH]
        if width == 0:
            continue
        integers(arguments[k, SIZES_AT], (1,))[0] = fill
        if fill != rows:
            copies(arguments[k, ADDRESS], room, rows, fill, width)
            arguments[k, ADDRESS] = room
            room += 8 * fill * width
    graph = Graph(t[Table.RUN], t[Table.CONTAINER], t[Table.EXECUTOR], outputs, 0)
    if start_graph(graph, call):
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
    sizes = integers(found[1], (axes,))
    same, once = told[OUTPUT_AXES] == axes, sizes[0] == 1
    if not once and sizes[0] != fill:
        return UNREADABLE
    told[OUTPUT_AXES], width = axes, 1
    for k in range(axes):
        # The first one tells whether there is a row for each.
        size = sizes[k] if k > 0 else (1 if once else 0)
        same = same and told[OUTPUT_SIZES + k] == size
        told[OUTPUT_SIZES + k] = size
        width *= size if k > 0 else 1
    if not same or told[TARGET] == 0:
        return OTHER
    count = 1 if once else rows
    place_rows(call, count, number_rows(told[TARGET], (count, width)), 0, width)
    return CALLED
