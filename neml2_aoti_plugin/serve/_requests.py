"""Requests for evaluations read and checked as a whole before they wait, and answers written: JSON and binary data."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from typing import Any, NoReturn, TypeVar

import msgspec
import numpy as np
from msgspec import UNSET, Struct, UnsetType
from numpy.typing import NDArray

from ._limits import Limits, Refused, bad_request, shown
from ._served import DTYPES, TANGENT, VERSION, Served, Shape, Signature

Array = NDArray[Any]
_Options = TypeVar("_Options", bound=Struct)

JSON = "application/json"
HEADER_LENGTH = "inference-header-content-length"
# How parameters begin that change what is asked for, and so cannot be passed over.
EXTENSIONS = ("shared_memory_", "classification")
_NAMES = {dtype.str[1:]: name for name, dtype in DTYPES.items()}


class Input(Struct, forbid_unknown_fields=True, omit_defaults=True):
    """A tensor of a request, in the protocol's form."""

    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Any] | None = None
    data: list[Any] | UnsetType = UNSET


class Output(Struct, forbid_unknown_fields=True, omit_defaults=True):
    """A tensor that is asked for."""

    name: str
    parameters: dict[str, Any] | None = None


class Request(Struct, forbid_unknown_fields=True, omit_defaults=True):
    """A request in the protocol's form."""

    inputs: list[Input]
    id: str | None = None
    parameters: dict[str, Any] | None = None
    outputs: list[Output] | None = None
    model_name: str | None = None
    model_version: str | None = None


class RequestOptions(Struct):
    """What is read of a request's parameters."""

    operation: str = "forward"
    parameter_overrides: dict[str, Any] | str | None = None
    binary_data_output: bool = False


class InputOptions(Struct):
    """What is read of an input's parameters."""

    binary_data_size: int | UnsetType = UNSET


class OutputOptions(Struct):
    """What is read of an output's parameters."""

    binary_data: bool | UnsetType = UNSET


_DECODER = msgspec.json.Decoder(Request)


@dataclass(frozen=True, eq=False)
class Call:
    """A checked request.

    `arrays` are `(rows, ...)` in the operation's order, perhaps views that must not be written to; `overrides` are
    `base` or `(rows, *base)`; `pairs` are the derivative blocks to evaluate, None where the operation has none;
    `outputs` are the tensors of the answer, each with whether it is sent as binary data. Calls with the same `key` may
    be evaluated together.
    """

    signature: Signature
    arrays: dict[str, Array]
    rows: int
    overrides: dict[str, Array]
    pairs: tuple[tuple[str, str], ...] | None
    outputs: tuple[tuple[str, bool], ...]
    id: str | None = None
    key: Hashable = None


def read_call(served: Served, body: bytes, header_length: bytes | None, limits: Limits) -> Call:
    """Read a request for a model; `header_length` is the header that tells the length of the JSON part, if any."""
    cut = len(body)
    if header_length is not None:
        if not (header_length.isdigit() and len(header_length) < 20 and int(header_length) <= cut):
            raise bad_request(
                f"the header Inference-Header-Content-Length is {shown(header_length.decode('latin-1'))}, expected the "
                f"length of the JSON part, {cut} (the length of the body) at most."
            )
        cut = int(header_length)
    request = read_request(body[:cut])
    if request.model_name not in (None, served.name):
        raise bad_request(f"model_name is {shown(request.model_name)}, but the address is that of {served.name!r}.")
    if request.model_version not in (None, VERSION):
        raise bad_request(f"model_version is {shown(request.model_version)}, but there is {VERSION!r} alone.")
    options = _options(request.parameters, RequestOptions, "parameters")
    signature = served.signatures.get(options.operation)
    if signature is None:
        reason = f": {served.lacking[options.operation]}" if options.operation in served.lacking else ""
        raise bad_request(
            f"parameters: operation is {shown(options.operation)}, expected one of {', '.join(served.signatures)} for "
            f"model {served.name!r}{reason}."
        )
    arrays = _inputs(request, signature, memoryview(body)[cut:], limits)
    rows = next(iter(arrays.values())).shape[0]
    overrides = _overrides(options.parameter_overrides, served, rows)
    outputs = _outputs(request, signature, options.binary_data_output)
    asked = tuple(signature.pairs[name] for name, _ in outputs if name in signature.pairs)
    pairs = asked or tuple(signature.pairs.values()) or None
    key = (signature.name, tuple(arrays), pairs, bool(overrides))
    return Call(signature, arrays, rows, overrides, pairs, outputs, request.id, key)


# -- JSON ------------------------------------------------------------------------------------------------------------


def read_request(text: bytes) -> Request:
    """The JSON of a request, with the bare NaN and Infinity that Python's own module writes."""
    document: Any = None
    try:
        try:
            found = _DECODER.decode(text)
            # What has more colons than what was read may have a name twice, of which the decoder takes the last.
            if text.count(b":") == msgspec.json.encode(found).count(b":"):
                return found
        except msgspec.ValidationError:
            raise
        except (msgspec.DecodeError, UnicodeDecodeError):
            # No JSON, unless it is the JSON of Python's module.
            pass
        document = _read_slowly(text)
        return msgspec.convert(document, Request)
    except msgspec.ValidationError as error:
        _refuse(error, text if document is None else document, "the request")
    except RecursionError:
        raise bad_request("the request is nested too deeply.") from None


def _read_slowly(text: bytes) -> Any:
    try:
        found = json.loads(text.decode(), object_pairs_hook=_object, parse_float=_number, parse_int=_number)
        # Half a surrogate pair, which JSON may hold, cannot be sent back.
        msgspec.json.encode(found)
    except ValueError as error:
        raise bad_request(f"the request is no JSON: {error}.") from None
    except RecursionError:
        raise bad_request("the request is nested too deeply.") from None
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise bad_request(f"{shown(twice)} is there twice in one object.")
    return found


def _number(text: str) -> float:
    found = float(text)
    if math.isinf(found):
        raise bad_request(f"the number {shown(text)} is too large.")
    return found if "." in text or "e" in text or "E" in text else int(text)


def _refuse(error: msgspec.ValidationError, document: Any, where: str) -> NoReturn:
    """The decoder's complaint as a sentence with the path of the key and what was found there."""
    text, _, path = str(error).partition(" - at `$")
    path = path.rstrip("`")
    place = f"{where}: {path.lstrip('.')}" if path else where
    expected = re.fullmatch(r"Expected `(.*)`, got `(.*)`", text)
    if expected is None:
        lacks = re.fullmatch(r"Object missing required field `(.*)`", text)
        raise bad_request(f"{place} lacks {lacks[1]!r}." if lacks else f"{place}: {text}.") from None
    found = expected[2]
    try:
        value = msgspec.json.decode(document) if isinstance(document, bytes) else document
        for key, index in re.findall(r"\.([^.\[]+)|\[(\d+)\]", path):
            value = value[key or int(index)]
        found = shown(value)
    except (msgspec.DecodeError, ValueError, LookupError, TypeError, RecursionError):
        # The place is one that has no name of its own, such as a value of an object.
        pass
    raise bad_request(f"{place} is {found}, expected {expected[1]}.") from None


def _options(given: dict[str, Any] | None, kind: type[_Options], where: str) -> _Options:
    """What is read of parameters; extensions of the protocol that are not here and mistyped names are refused."""
    if not given:
        return kind()
    known = kind.__struct_fields__
    # Custom ones, such as a `content_type` or a `priority`, are passed over.
    for name in given:
        if name.startswith(EXTENSIONS):
            raise bad_request(f"{where}: {shown(name)} is of an extension of the protocol that this service lacks.")
        meant = [] if name in known else difflib.get_close_matches(name[:40], known, 1, 0.8)
        if meant:
            raise bad_request(f"{where}: unknown {shown(name)}; did you mean {meant[0]!r}?")
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        _refuse(error, given, where)


# -- what is asked ---------------------------------------------------------------------------------------------------


def _inputs(request: Request, signature: Signature, binary: memoryview, limits: Limits) -> dict[str, Array]:
    """The tensors of a request in the operation's order, all with the same number of rows."""
    given: dict[str, Array] = {}
    known = {**signature.inputs, **signature.optional}
    rows = 0
    for entry in request.inputs:
        name = entry.name
        if name in given:
            raise bad_request(f"input {name!r} is there twice.")
        if name not in known:
            more = f"; it also takes {', '.join(signature.optional)}" if signature.optional else ""
            raise bad_request(
                f"inputs hold {shown(name)}, which {signature.name} does not take. It needs "
                f"{', '.join(signature.inputs)}{more}."
            )
        _require_form(entry, known[name], signature.datatype)
        own = entry.shape[0]
        if rows and own != rows:
            raise bad_request(f"input {name!r} has {own} rows, but the inputs before it have {rows}.")
        if own > limits.request_rows:
            raise Refused(
                413, f"input {name!r} has {own} rows, more than the {limits.request_rows} that a request may have."
            )
        rows = own
        options = _options(entry.parameters, InputOptions, f"parameters of input {name!r}")
        if options.binary_data_size is UNSET:
            given[name] = from_json(entry.data, entry.shape, DTYPES[entry.datatype], f"input {name!r}: data")
        else:
            given[name] = _from_binary(binary, options.binary_data_size, entry)
            binary = binary[given[name].nbytes :]
    if binary:
        raise bad_request(f"the body has {len(binary)} bytes more of binary data than its inputs tell.")
    missing = [name for name in signature.inputs if name not in given]
    if missing:
        raise bad_request(f"inputs lack {', '.join(map(repr, missing))}, which {signature.name} needs.")
    if signature.operation.takes == "tangents" and not any(name.startswith(TANGENT) for name in given):
        there = ", ".join(name for name in signature.optional if name.startswith(TANGENT))
        raise bad_request(f"inputs hold no tangent, which {signature.name} needs one of: {there or 'none'}.")
    return {name: given[name] for name in known if name in given}


def _require_form(entry: Input, shape: Shape, datatype: str) -> None:
    """Refuse an input of another shape or dtype than the model's, or without rows."""
    if len(entry.shape) == 0 or entry.shape[0] < 1 or tuple(entry.shape[1:]) != shape:
        wanted = ", ".join(("rows", *map(str, shape)))
        raise bad_request(
            f"input {entry.name!r} has the shape {shown(entry.shape)}, expected [{wanted}] with one row or more."
        )
    if entry.datatype != datatype:
        raise bad_request(f"input {entry.name!r} has the datatype {shown(entry.datatype)}, expected {datatype!r}.")


def _from_binary(binary: memoryview, size: int, entry: Input) -> Array:
    """An input out of what is left of the binary data: a view, not to be written to."""
    dtype, name = DTYPES[entry.datatype], entry.name
    wanted = prod(entry.shape) * dtype.itemsize
    if entry.data is not UNSET:
        raise bad_request(f"input {name!r} has both data and binary_data_size, expected one of them.")
    if size != wanted:
        raise bad_request(
            f"input {name!r}: binary_data_size is {size}, but {entry.datatype} of the shape {entry.shape} takes "
            f"{wanted} bytes."
        )
    if len(binary) < wanted:
        raise bad_request(
            f"input {name!r}: binary_data_size is {size}, but the body has only {len(binary)} bytes left."
        )
    return np.frombuffer(binary, dtype, prod(entry.shape)).reshape(entry.shape)


def from_json(data: Any, shape: Sequence[int], dtype: np.dtype[Any], where: str) -> Array:
    """Numbers out of JSON: one flat list, or lists nested like the shape."""
    if type(data) is not list:
        raise bad_request(f"{where} is {'absent' if data is UNSET else shown(data)}, expected a list of numbers.")
    nested = bool(data) and type(data[0]) is list
    kind: Any = float
    for _ in shape if nested else (0,):
        kind = list[kind]
    try:
        numbers = msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        _refuse(error, data, where)
    if not nested and len(data) != prod(shape):
        raise bad_request(f"{where} has {len(data)} entries, but the shape {list(shape)} takes {prod(shape)}.")
    try:
        found = np.array(numbers, dtype)
    except ValueError:
        # Lists of different lengths.
        found = np.empty(0)
    if nested and found.shape != tuple(shape):
        raise bad_request(
            f"{where} is nested otherwise than the shape {list(shape)}. Nest it like the shape, or give one flat list "
            "in the order of rows."
        )
    return found.reshape(shape)


def _overrides(given: dict[str, Any] | str | None, served: Served, rows: int) -> dict[str, Array]:
    """Values of promoted parameters; they may come as a string of JSON, where a client sends no objects there."""
    if type(given) is str:
        given = _read_slowly(given.encode())
        if type(given) is not dict:
            raise bad_request(f"parameter_overrides is {shown(given)}, expected an object from name to value.")
    assert given is None or isinstance(given, dict)
    shapes, found = served.model.parameter_base_shapes, {}
    for name, value in (given or {}).items():
        if name not in shapes:
            raise bad_request(
                f"parameter_overrides holds {shown(name)}, which is no promoted parameter of model {served.name!r}; "
                f"there are: {', '.join(shapes) or 'none'}."
            )
        found[name] = _override(name, value, tuple(shapes[name]), served, rows)
    return found


def _override(name: str, value: object, base: tuple[int, ...], served: Served, rows: int) -> Array:
    """One value: a number for all entries, or lists of the base shape, or of the base shape for each row."""
    dtype, where = DTYPES[served.datatype], f"parameter_overrides: {name}"
    if type(value) in (int, float):
        return np.broadcast_to(from_json([value], (1,), dtype, where)[0], base)
    for shape in ((rows, *base), base):
        with suppress(Refused):
            if shape:
                return from_json(value, shape, dtype, where)
    shapes = f"{list(base)} or {[rows, *base]}" if base else f"[{rows}]"
    raise bad_request(f"{where} is {shown(value)}, expected a number, or lists of the shape {shapes}.")


def _outputs(request: Request, signature: Signature, binary: bool) -> tuple[tuple[str, bool], ...]:
    """Which tensors the answer has, and whether each is binary data."""
    found: dict[str, bool] = {}
    for entry in request.outputs or ():
        if entry.name not in signature.outputs or entry.name in found:
            raise bad_request(
                f"outputs holds {shown(entry.name)}, expected each once, with a name out of "
                f"{', '.join(signature.outputs)}."
            )
        options = _options(entry.parameters, OutputOptions, f"parameters of output {entry.name!r}")
        found[entry.name] = binary if options.binary_data is UNSET else options.binary_data
    return tuple(found.items()) or tuple((name, binary) for name in signature.outputs)


# -- the answer ------------------------------------------------------------------------------------------------------


def write_answer(name: str, call: Call, arrays: dict[str, Array]) -> tuple[dict[str, str], bytes]:
    """Headers and body of the answer of the model of that name; a number that is not finite is null in JSON."""
    outputs: list[dict[str, Any]] = []
    binary: list[bytes] = []
    for output, as_binary in call.outputs:
        array = arrays[output]
        told: dict[str, Any] = {"name": output, "datatype": _NAMES[array.dtype.str[1:]], "shape": array.shape}
        if as_binary:
            data = array.tobytes()
            told["parameters"] = {"binary_data_size": len(data)}
            binary.append(data)
        else:
            told["data"] = array.reshape(-1).tolist()
        outputs.append(told)
    document: dict[str, Any] = {"model_name": name, "model_version": VERSION, "outputs": outputs}
    if call.id is not None:
        document["id"] = call.id
    text = msgspec.json.encode(document)
    if not binary:
        return {"content-type": JSON}, text
    return {"content-type": "application/octet-stream", HEADER_LENGTH: str(len(text))}, b"".join((text, *binary))
