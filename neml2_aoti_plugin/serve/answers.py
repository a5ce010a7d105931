"""The answer to an evaluation, as JSON and binary data."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson

from .asgi import JSON, Headers
from .calls import Call
from .served import VERSION
from .tensors import Array

_OPTIONS = orjson.OPT_SERIALIZE_NUMPY
_NAMES = {"f8": "FP64", "f4": "FP32", "i8": "INT64", "b1": "BOOL"}


def write_answer(name: str, call: Call, arrays: dict[str, Array]) -> tuple[Headers, bytes]:
    """The answer to a call.

    Args:
        name: of the model.
        call: as it was read.
        arrays: tensors by name; those that the call asked for are sent.

    Returns:
        Headers without the length, and body. A number that is not finite is null in JSON, which has no NaN.
    """
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
            told["data"] = np.ascontiguousarray(array).reshape(-1)
        outputs.append(told)
    document: dict[str, Any] = {"model_name": name, "model_version": VERSION, "outputs": outputs}
    if call.id is not None:
        document["id"] = call.id
    head = orjson.dumps(document, option=_OPTIONS)
    if not binary:
        return JSON, head
    headers = [
        (b"content-type", b"application/octet-stream"),
        (b"inference-header-content-length", str(len(head)).encode()),
    ]
    return headers, b"".join((head, *binary))
