"""A request for an evaluation, read and checked as a whole before it queues."""

from __future__ import annotations

from typing import Any

import numpy as np

from ._calls import Call, Head, Place
from ._limits import Limits
from ._operations import TANGENT, Operation
from ._parts import NOTHING, flag_of, id_of, object_of, pass_over, read_json, require_known
from ._refusals import Refused, shown
from ._served import VERSION, Served
from ._tensors import Array, Port, from_binary, from_json, require_shape

_TOP = frozenset({"id", "parameters", "inputs", "outputs", "model_name", "model_version"})
_PARAMETERS = frozenset({"operation", "parameter_overrides", "binary_data_output"})
_INPUT = frozenset({"name", "shape", "datatype", "parameters", "data"})
_INPUT_OPTIONS = frozenset({"binary_data_size"})
_OUTPUT = frozenset({"name", "parameters"})
_OUTPUT_OPTIONS = frozenset({"binary_data"})

# How many heads are remembered for each model, and how long the JSON of one may be. Clients send the same again and
# again, and to read it takes several times as long as to find it.
HEADS, LONGEST = 256, 4096


def read_call(served: Served, body: bytes, header_length: bytes | None, limits: Limits) -> Call:
    """Read a request.

    Args:
        served: the model.
        body: of the request.
        header_length: the header `Inference-Header-Content-Length`, where the request has it.
        limits: of the service.

    Returns:
        The request, checked.

    Raises:
        Refused: something about it is wrong.
    """
    if header_length is None:
        return _read(served, body, memoryview(b""), limits)
    cut = _header_length(header_length, len(body))
    text, binary = body[:cut], memoryview(body)[cut:]
    head: Head | None = served.heads.get(text)
    if head is not None and len(binary) == head.size:
        return Call(head, binary)
    call = _read(served, text, binary, limits)
    # Calls may be told apart by their key: not those that must be evaluated by themselves.
    if call.head.places and served.per_row and len(text) <= LONGEST:
        if len(served.heads) >= HEADS:
            served.heads.clear()
        served.heads[text] = call.head
    return call


def _read(served: Served, text: bytes, binary: memoryview, limits: Limits) -> Call:
    document = read_json(text)
    if type(document) is not dict:
        raise Refused(400, f"the request is {shown(document)}, expected a JSON object with 'inputs'.")
    require_known(document, _TOP, "the request")
    parameters = object_of(document, "parameters", "the request")
    pass_over(parameters, _PARAMETERS, "parameters")
    operation = _operation(served, parameters.get("operation", "forward"))
    given, places = _inputs(document, operation, binary, limits)
    rows = next(iter(given.values())).shape[0]
    names = operation.required
    if len(given) != len(names):
        names = tuple(name for name in operation.ports if name in given)
    overrides = {}
    if "parameter_overrides" in parameters:
        overrides = _overrides(parameters["parameter_overrides"], served, rows)
    outputs = _outputs(document, operation, flag_of(parameters, "binary_data_output", "parameters"))
    pairs = None
    if operation.pairs:
        asked = {name for name, _ in outputs}
        pairs = tuple(pair for name, pair in operation.pairs.items() if name in asked) or tuple(
            operation.pairs.values()
        )
    _require_name(document, served)
    alone = object() if not served.per_row else None
    is_binary = len(places) == len(names)
    head = Head(
        operation,
        names,
        rows,
        overrides,
        pairs,
        outputs,
        id_of(document),
        (operation.name, names, pairs, bool(overrides), alone),
        tuple(places[name] for name in names) if is_binary else (),
        len(binary),
    )
    return Call(head, binary if is_binary else [given[name] for name in names])


def _header_length(text: bytes, total: int) -> int:
    """The length of the JSON part of a request with binary data."""
    if text.isdigit() and len(text) < 20 and int(text) <= total:
        return int(text)
    raise Refused(
        400,
        f"the header Inference-Header-Content-Length is {shown(text.decode('latin-1'))}, expected the length of the "
        f"JSON part, {total} (the length of the body) at most.",
    )


def _operation(served: Served, name: object) -> Operation:
    known = served.operations.get(name) if type(name) is str else None
    if isinstance(known, Operation):
        return known
    there = ", ".join(n for n, x in served.operations.items() if isinstance(x, Operation))
    reason = f": {known.reason}" if known is not None else ""
    raise Refused(
        400, f"parameters: operation is {shown(name)}, expected one of {there} for model {served.name!r}{reason}."
    )


def _inputs(
    document: dict[str, Any], operation: Operation, binary: memoryview, limits: Limits
) -> tuple[dict[str, Array], dict[str, Place]]:
    """The tensors of a request by name, all with the same number of rows; and where they lie in the binary data."""
    entries = document.get("inputs")
    if type(entries) is not list or not entries:
        raise Refused(400, f"inputs is {shown(entries)}, expected a list of tensors: {', '.join(operation.required)}.")
    given: dict[str, Array] = {}
    places: dict[str, Place] = {}
    rows = begin = 0
    for entry in entries:
        if type(entry) is not dict:
            raise Refused(400, f"inputs holds {shown(entry)}, expected an object with name, shape, datatype and data.")
        name = entry.get("name")
        port = None
        if type(name) is str:
            port = operation.inputs.get(name) or operation.optional.get(name)
        if port is None or name in given:
            _refuse_name(name, given, operation)
        assert port is not None
        own = require_shape(entry.get("shape"), port)
        if own != rows:
            if rows:
                raise Refused(400, f"input {name!r} has {own} rows, but the inputs before it have {rows}.")
            if own > limits.request_rows:
                raise Refused(
                    413, f"input {name!r} has {own} rows, more than the {limits.request_rows} that a request may have."
                )
            rows = own
        if entry.get("datatype") != port.datatype:
            raise Refused(
                400, f"input {name!r} has the datatype {shown(entry.get('datatype'))}, expected {port.datatype!r}."
            )
        if not _INPUT.issuperset(entry):
            require_known(entry, _INPUT, f"input {name!r}")
        options = object_of(entry, "parameters", f"input {name!r}") if "parameters" in entry else NOTHING
        if options:
            pass_over(options, _INPUT_OPTIONS, f"parameters of input {name!r}")
        shape = (own, *port.shape)
        if "binary_data_size" in options:
            if "data" in entry:
                raise Refused(400, f"input {name!r} has both data and binary_data_size, expected one of them.")
            array = from_binary(binary[begin:], options["binary_data_size"], shape, port)
            first = begin // array.itemsize
            places[port.name] = (first, first + array.size, shape)
            begin += array.nbytes
        else:
            array = from_json(entry.get("data"), shape, port)
        given[port.name] = array
    if len(binary) > begin:
        raise Refused(400, f"the body has {len(binary) - begin} bytes more of binary data than its inputs tell.")
    missing = [name for name in operation.required if name not in given]
    if missing:
        raise Refused(400, f"inputs lack {', '.join(map(repr, missing))}, which {operation.name} needs.")
    if operation.name == "jvp" and not any(name.startswith(TANGENT) for name in given):
        there = ", ".join(name for name in operation.optional if name.startswith(TANGENT)) or "none, by its derivatives"
        raise Refused(400, f"inputs hold no tangent, which jvp needs one of: {there}.")
    return given, places


def _refuse_name(name: object, given: dict[str, Array], operation: Operation) -> None:
    if type(name) is str and name in given:
        raise Refused(400, f"input {name!r} is there twice.")
    more = f"; it also takes {', '.join(operation.optional)}" if operation.optional else ""
    raise Refused(
        400,
        f"inputs hold {shown(name)}, which {operation.name} does not take. It needs "
        f"{', '.join(operation.required)}{more}.",
    )


def _overrides(given: object, served: Served, rows: int) -> dict[str, Array]:
    """Values of promoted parameters; they may come as a string of JSON, where a client sends no objects there."""
    if type(given) is str:
        given = read_json(given.encode("utf-8", "surrogatepass"))
    if type(given) is not dict:
        raise Refused(400, f"parameter_overrides is {shown(given)}, expected an object from name to value.")
    shapes, found = served.model.parameter_base_shapes, {}
    for name, value in given.items():
        if name not in shapes:
            raise Refused(
                400,
                f"parameter_overrides holds {shown(name)}, which is no promoted parameter of model {served.name!r}; "
                f"there are: {', '.join(shapes) or 'none'}.",
            )
        found[name] = _override(name, value, tuple(shapes[name]), served.datatype, rows)
    return found


def _override(name: str, value: object, base: tuple[int, ...], kind: str, rows: int) -> Array:
    """One value: a number for all entries, or lists of the base shape, or of the base shape for each row."""
    what = Port(f"parameter_overrides: {name}", kind, base)
    if type(value) in (int, float):
        return np.broadcast_to(from_json([value], (1,), what)[0], base)
    for shape in ((rows, *base), base):
        try:
            if shape:
                return from_json(value, shape, what)
        except Refused:
            continue
    shapes = f"{list(base)} or {[rows, *base]}" if base else f"[{rows}]"
    raise Refused(
        400, f"parameter_overrides: {name} is {shown(value)}, expected a number, or lists of the shape {shapes}."
    )


def _outputs(document: dict[str, Any], operation: Operation, binary: bool) -> tuple[tuple[str, bool], ...]:
    """Which tensors the answer has, and whether each is binary data."""
    entries = document.get("outputs")
    if entries is None or entries == []:
        return tuple((name, binary) for name in operation.outputs)
    if type(entries) is not list:
        raise Refused(400, f"outputs is {shown(entries)}, expected a list of objects with a name.")
    found: dict[str, bool] = {}
    for entry in entries:
        name = entry.get("name") if type(entry) is dict else None
        if type(name) is not str or name not in operation.outputs or name in found:
            raise Refused(
                400,
                f"outputs holds {shown(entry)}, expected each once, with a name out of {', '.join(operation.outputs)}.",
            )
        require_known(entry, _OUTPUT, f"output {name!r}")
        options = object_of(entry, "parameters", f"output {name!r}")
        pass_over(options, _OUTPUT_OPTIONS, f"parameters of output {name!r}")
        found[name] = flag_of(options, "binary_data", f"output {name!r}") if "binary_data" in options else binary
    return tuple(found.items())


def _require_name(document: dict[str, Any], served: Served) -> None:
    """Refuse a request for another model or version than its address names."""
    for key, wanted in (("model_name", served.name), ("model_version", VERSION)):
        found = document.get(key)
        if found not in (None, wanted):
            raise Refused(400, f"{key} is {shown(found)}, but the address is that of {wanted!r}.")
