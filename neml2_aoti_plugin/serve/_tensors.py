"""The tensors of the Open Inference Protocol: out of JSON or binary data, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._refusals import Refused, shown

Array = NDArray[Any]

# The protocol's names of the dtypes that are sent.
DTYPES: dict[str, np.dtype[Any]] = {
    "FP64": np.dtype("<f8"),
    "FP32": np.dtype("<f4"),
    "INT64": np.dtype("<i8"),
    "BOOL": np.dtype("?"),
}
# What a number in JSON may be read as, all entries of one list looked at together.
_NUMBERS = {float, int}
_INTEGERS = {int}


@dataclass(frozen=True)
class Port:
    """An input or output of an operation as the protocol knows it.

    Args:
        name: of the tensor.
        datatype: the protocol's name of its dtype.
        shape: without the rows.
        rows: whether its first axis is that of the rows.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    rows: bool = True

    @property
    def metadata(self) -> dict[str, object]:
        """What the model's metadata tells of it."""
        lead = [-1] if self.rows else []
        return {"name": self.name, "datatype": self.datatype, "shape": [*lead, *self.shape]}


def require_shape(shape: object, port: Port) -> int:
    """Check the shape of an input.

    Args:
        shape: as the request has it.
        port: of the input.

    Returns:
        The number of rows.

    Raises:
        Refused: it is another one.
    """
    # `type` and not isinstance: neither true nor 6.0 is an extent.
    if type(shape) is list and shape and _INTEGERS.issuperset(map(type, shape)):
        rows: int = shape[0]
        if rows >= 1 and tuple(shape[1:]) == port.shape:
            return rows
    wanted = ", ".join(("rows", *map(str, port.shape)))
    raise Refused(400, f"input {port.name!r} has the shape {shown(shape)}, expected [{wanted}] with one row or more.")


def from_binary(body: memoryview, size: object, shape: Sequence[int], port: Port) -> Array:
    """An input out of the binary data of a request.

    Args:
        body: what is left of the binary data.
        size: number of bytes that the request tells for this input.
        shape: that the request tells, checked.
        port: of the input.

    Returns:
        A view on the data, not to be written to.

    Raises:
        Refused: the size is not that of the shape, or there are not as many bytes.
    """
    dtype = DTYPES[port.datatype]
    wanted = prod(shape) * dtype.itemsize
    if type(size) is not int or size != wanted:
        raise Refused(
            400,
            f"input {port.name!r}: binary_data_size is {shown(size)}, but {port.datatype} of the shape "
            f"{list(shape)} takes {wanted} bytes.",
        )
    if len(body) < wanted:
        raise Refused(
            400, f"input {port.name!r}: binary_data_size is {size}, but the body has only {len(body)} bytes left."
        )
    return np.frombuffer(body, dtype, prod(shape)).reshape(shape)


def from_json(data: object, shape: Sequence[int], port: Port) -> Array:
    """An input out of JSON: one flat list, or lists nested like the shape.

    Args:
        data: as it was parsed.
        shape: that the request tells, checked.
        port: of the input.

    Returns:
        The array.

    Raises:
        Refused: the data are of another form, or are no numbers.
    """
    if type(data) is not list:
        raise Refused(400, f"input {port.name!r}: data is {shown(data)}, expected a list of numbers.")
    flat: list[Any] = data
    if flat and type(flat[0]) is list:
        flat = _flattened(flat, shape, port)
    if len(flat) != prod(shape):
        raise Refused(
            400, f"input {port.name!r}: data has {len(flat)} entries, but the shape {list(shape)} takes {prod(shape)}."
        )
    if not _NUMBERS.issuperset(map(type, flat)):
        place, wrong = next((i, x) for i, x in enumerate(flat) if type(x) not in _NUMBERS)
        raise Refused(400, f"input {port.name!r}: entry {place} of data is {shown(wrong)}, expected a number.")
    try:
        return np.array(flat, DTYPES[port.datatype]).reshape(shape)
    except OverflowError:
        raise Refused(400, f"input {port.name!r}: data holds a number too large for {port.datatype}.") from None


def _flattened(data: list[Any], shape: Sequence[int], port: Port) -> list[Any]:
    """The entries of nested lists, which must be nested like the shape."""
    level = data
    for depth, extent in enumerate(shape):
        last = depth == len(shape) - 1
        if depth == 0:
            fits = len(level) == extent
        else:
            fits = set(map(type, level)) == {list} and set(map(len, level)) == {extent}
            level = list(chain.from_iterable(level)) if fits else level
        if not fits or (last and any(type(entry) is list for entry in level)):
            raise Refused(
                400,
                f"input {port.name!r}: data is nested otherwise than the shape {list(shape)}. Nest it like the shape, "
                "or give one flat list in the order of rows.",
            )
    return level
