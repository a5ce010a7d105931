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

from neml2_aoti_plugin._solve import tables
from neml2_aoti_plugin._solve.tables import ADDRESS, GIVEN, OUTPUT_AXES, OUTPUT_SIZES, SIZES_AT, TARGET, VECTOR, WIDTH
from neml2_aoti_plugin._solve.tables import CallTable as Table

# For any processor of the family: the one at hand is known when the package runs.
numba.config.CPU_NAME, numba.config.CPU_FEATURES = "generic", ""


def inner(function: Callable[..., Any], **options: Any) -> Any:
    """A function that other such functions call: without the interpreter, without numba's runtime, no exceptions."""
    options |= {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "_nrt": False}
    return numba.njit(nogil=True, error_model="numpy", **options)(function)


def inlined(function: Callable[..., Any]) -> Any:
    """A short function that is compiled as if its lines stood where it is called."""
    return inner(function, inline="always")


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
number_blocks = _array(types.float64, 3)


@inner
def copy(source: Any, row: Any, target: Any, place: Any) -> None:
    """Copy a row of one array to a place in another one."""
    for i in range(source.shape[1]):
        target[place, i] = source[row, i]


@inlined
def call_with(functions: Any, arguments: Any, count: Any, outputs: Any, handles: Any) -> Any:
    """A call whose table of arguments and room for handles stand at addresses."""
    return Call(
        integers(functions, (tables.FUNCTIONS,)),
        integer_rows(arguments, (count, tables.ARGUMENT)),
        integers(handles, (count + outputs,)),
        integers(handles + 8 * (count + outputs), (tables.SCRATCH,)),
    )


@inner
def _start(graph: Any, call: Any) -> Any:
    """Run a graph on the tensors that the table of arguments tells of; tell whether it failed."""
    functions, arguments, handles = call.functions, call.arguments, call.handles
    count, float64 = len(arguments), functions[tables.FLOAT64]
    for k in range(count):
        tensor, at = arguments[k], handles.ctypes.data + 8 * k
        extents = tensor[tables.AXES], tensor[SIZES_AT], tensor[tables.STRIDES_AT]
        if _create(functions[tables.CREATE], (tensor[ADDRESS], *extents, 0, float64, 0, -1, at)) != 0:
            for made in range(k):
                _delete(functions[tables.DELETE], (handles[made],))
            return True
    outputs = handles.ctypes.data + 8 * count
    given = (graph.container, handles.ctypes.data, count, outputs, graph.outputs, 0, graph.executor)
    return _run(graph.run, given) != 0


@inlined
def _filled(rows: Any) -> Any:
    """Rows with those that fill them up to whole vectors."""
    return (rows + VECTOR - 1) // VECTOR * VECTOR


@inner
def run(graph: Any, call: Any, u: Any, g: Any, rows: Any) -> Any:
    """Run a graph for the first rows of unknowns and givens; tell whether it failed.

    Rows behind them are written over by copies of the first, so that no row is rounded by how many there are.
    """
    fill = _filled(rows)
    for k in range(rows, fill):
        copy(u, 0, u, k)
        copy(g, 0, g, k)
    arguments = call.arguments
    arguments[0, ADDRESS], arguments[1, ADDRESS] = u.ctypes.data, g.ctypes.data
    integers(arguments[0, SIZES_AT], (1,))[0] = integers(arguments[1, SIZES_AT], (1,))[0] = fill
    return _start(graph, call)


@inlined
def release(graph: Any, call: Any) -> None:
    """Delete the outputs of a graph that has run."""
    for k in range(graph.outputs):
        _delete(call.functions[tables.DELETE], (call.handles[len(call.arguments) + k],))


@inlined
def _look(call: Any, place: Any) -> Any:
    """Ask an output for its axes, sizes, strides and memory, into `scratch`; tell whether it is one of float64."""
    functions, found, handle = call.functions, call.scratch, call.handles[len(call.arguments) + place]
    at = found.ctypes.data
    _ask(functions[tables.DTYPE], (handle, at))
    # It has 32 bits.
    sound = found[0] & 0xFFFFFFFF == functions[tables.FLOAT64]
    for k, question in enumerate((tables.DIM, tables.SIZES, tables.STRIDES, tables.DATA)):
        sound = _ask(functions[question], (handle, at + 8 * k)) == 0 and sound
    return sound


@inner
def output(call: Any, place: Any, rows: Any, n: Any, m: Any) -> Any:
    """Look at an output `(rows or 1, n, m)`, `(rows or 1, n)` for no `m`; its address is 0 if it is something else."""
    found, axes, fill = call.scratch, 2 if m == 0 else 3, _filled(rows)
    if _look(call, place) and found[0] == axes:
        sizes, strides = integers(found[1], (axes,)), integers(found[2], (axes,))
        if sizes[1] == n and (axes == 2 or sizes[2] == m) and (sizes[0] == fill or sizes[0] == 1):
            return Output(found[3], strides[0] if sizes[0] == fill else 0, strides[1], strides[2] if axes > 2 else 0)
    return Output(0, 0, 0, 0)


@inlined
def entry_of(x: Any, row: Any, i: Any, j: Any) -> Any:
    """One number of an output."""
    return numbers(x.address + 8 * (row * x.row + i * x.first + j * x.second), (1,))[0]


@inlined
def take(x: Any, row: Any, target: Any, place: Any) -> None:
    """Copy a row of an output to a place in an array."""
    for i in range(target.shape[1]):
        target[place, i] = entry_of(x, row, i, 0)


@inner
def call_graph(table: Any) -> Any:
    """Run a graph for rows of any number, by a table of `tables.Call`, filled up to so many by copies of the first one.

    Gives `CALLED`, and the outputs of the rows are at their targets, one after the other; or what was wrong. An output
    that is the same for all rows has one row.
    """
    t = integers(table, (Table.FIELDS,))
    outputs, rows, fill, room = t[Table.OUTPUTS], t[Table.ROWS], t[Table.FILLED], t[Table.ROOM]
    told = integer_rows(t[Table.OUTPUTS_AT], (outputs, tables.OUTPUT))
    call = call_with(t[Table.FUNCTIONS], t[Table.ARGUMENTS_AT], t[Table.ARGUMENTS], outputs, t[Table.HANDLES])
    arguments = call.arguments
    for k in range(len(arguments)):
        given, width = arguments[k, GIVEN], arguments[k, WIDTH]
        arguments[k, ADDRESS] = given
        if width == 0:
            continue
        integers(arguments[k, SIZES_AT], (1,))[0] = fill
        if fill != rows:
            source, target = number_rows(given, (rows, width)), number_rows(room, (fill, width))
            for row in range(fill):
                copy(source, row if row < rows else 0, target, row)
            arguments[k, ADDRESS] = room
            room += 8 * fill * width
    graph = Graph(t[Table.RUN], t[Table.CONTAINER], t[Table.EXECUTOR], outputs, 0)
    if _start(graph, call):
        return tables.FAILED
    found = tables.CALLED
    for place in range(outputs):
        found = max(found, _fetch(call, place, told[place], rows, fill))
    release(graph, call)
    return found


@inner
def _fetch(call: Any, place: Any, told: Any, rows: Any, fill: Any) -> Any:
    """Copy an output to its target, if it has the axes and sizes that the table tells; else tell them there."""
    found = call.scratch
    if not _look(call, place) or found[0] < 1 or found[0] > tables.MOST_AXES:
        return tables.UNREADABLE
    axes = found[0]
    sizes, strides = integers(found[1], (axes,)), integers(found[2], (axes,))
    once = sizes[0] == 1
    if not once and sizes[0] != fill:
        return tables.UNREADABLE
    # The first size tells whether there is a row for each.
    first = 1 if once else 0
    same = told[OUTPUT_AXES] == axes and told[OUTPUT_SIZES] == first
    told[OUTPUT_AXES], told[OUTPUT_SIZES], width, dense = axes, first, 1, True
    for k in range(axes - 1, 0, -1):
        same = same and told[OUTPUT_SIZES + k] == sizes[k]
        told[OUTPUT_SIZES + k] = sizes[k]
        dense = dense and (strides[k] == width or sizes[k] == 1)
        width *= sizes[k]
    if not same or told[TARGET] == 0:
        return tables.OTHER
    count = 1 if once else rows
    target = number_rows(told[TARGET], (count, width))
    for row in range(count):
        at = found[3] + 8 * row * strides[0]
        source = numbers(at, (width,))
        for i in range(width):
            if dense:
                target[row, i] = source[i]
                continue
            rest, offset = i, 0
            for k in range(axes - 1, 0, -1):
                offset += rest % sizes[k] * strides[k]
                rest //= sizes[k]
            target[row, i] = numbers(at + 8 * offset, (1,))[0]
    return tables.CALLED
