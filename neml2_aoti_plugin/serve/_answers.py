"""The answer to an evaluation, as JSON and binary data."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson

from ._asgi import JSON, Headers
from ._calls import Call
from ._served import VERSION
from ._tensors import Array

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
    head = call.head
    chosen = [arrays[output] for output, _ in head.outputs]
    shapes = tuple([array.shape for array in chosen])
    known = head.answers.get(shapes)
    if known is not None:
        headers, text = known
        return headers, b"".join([text, *[array.tobytes() for array in chosen]])
    outputs: list[dict[str, Any]] = []
    binary: list[bytes] = []
    for (output, as_binary), array in zip(head.outputs, chosen, strict=True):
        told: dict[str, Any] = {"name": output, "datatype": _NAMES[array.dtype.str[1:]], "shape": array.shape}
        if as_binary:
            data = array.tobytes()
            told["parameters"] = {"binary_data_size": len(data)}
            binary.append(data)
        else:
            told["data"] = np.ascontiguousarray(array).reshape(-1)
        outputs.append(told)
    document: dict[str, Any] = {"model_name": name, "model_version": VERSION, "outputs": outputs}
    if head.id is not None:
        document["id"] = head.id
    text = orjson.dumps(document, option=_OPTIONS)
    if not binary:
        return JSON, text
    headers = [
        (b"content-type", b"application/octet-stream"),
        (b"inference-header-content-length", str(len(text)).encode()),
    ]
    if len(binary) == len(outputs):
        head.answers[shapes] = headers, text
    return headers, b"".join((text, *binary))
