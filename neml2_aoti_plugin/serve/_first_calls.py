"""The first call of each operation of a model, before anybody waits for it."""

from __future__ import annotations

import numpy as np

from ._calls import Call, Head
from ._evaluation import evaluate
from ._operations import COTANGENT, TANGENT, Operation
from ._refusals import Refused
from ._served import Served
from ._tensors import DTYPES


def call_first(served: Served) -> None:
    """Evaluate each operation of a model once, so that its graphs and the machine code are loaded.

    Whether the row converges does not matter: nobody knows which values suit the model.

    Raises:
        Refused: the model cannot be evaluated.
    """
    for operation in served.operations.values():
        if isinstance(operation, Operation):
            call = _call(served, operation)
            (answer,) = evaluate(served, [call])
            if isinstance(answer, Refused) and answer.status != 422:
                raise RuntimeError(f"{operation.name} of model {served.name!r} failed") from (
                    answer.__cause__ or answer
                )


def _call(served: Served, operation: Operation) -> Call:
    names = list(operation.inputs)
    # One tangent is enough, and there is one at least.
    names += [name for name in operation.optional if name.startswith(TANGENT)][:1]
    arrays = []
    for name in names:
        port = operation.ports[name]
        # At zero strain most models have a solution. Scalars are one now and zero a step earlier, so that time passes.
        one = (not port.shape and "~" not in name) or name.startswith((TANGENT, COTANGENT))
        arrays.append(np.full((1, *port.shape), float(one), DTYPES[port.datatype]))
    pairs = tuple(operation.pairs.values()) or None
    outputs = tuple((name, False) for name in operation.outputs)
    return Call(Head(operation, tuple(names), 1, {}, pairs, outputs, None, None), arrays)
