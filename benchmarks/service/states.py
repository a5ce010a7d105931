"""Rows that requests are made of, and their answers, evaluated one by one in this process."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from neml2_aoti_plugin.model import Model

from ..batches import converging

Array = NDArray[np.float64]
ROWS = 256
STUB = "viscoplasticity"


@dataclass(frozen=True)
class States:
    """Rows of a stub's own history with rates over 6 decades.

    Args:
        artifact: its folder.
        inputs: of each row, each `(1, *base)`.
        outputs: of each row, each `(1, *base)`, evaluated alone.
    """

    artifact: Path
    inputs: list[dict[str, Tensor]]
    outputs: list[dict[str, Array]]


def make_states() -> States:
    """Make the rows; all of them converge."""
    artifact, pool = converging(STUB, ROWS, quick=False)
    model = Model(artifact)
    inputs = [{name: value[i : i + 1].contiguous() for name, value in pool.items()} for i in range(ROWS)]
    outputs = [{name: value.numpy().copy() for name, value in model.forward(row).items()} for row in inputs]
    return States(artifact, inputs, outputs)


def call_seconds(model: Model, inputs: Sequence[Mapping[str, Tensor]]) -> float:
    """The median time of a call of one row, called again and again."""
    times = []
    for row in inputs:
        start = time.perf_counter()
        model.forward(row)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def encode(row: Mapping[str, Tensor], binary: bool) -> tuple[bytes, int]:
    """The body of a request, and the length of its JSON head; 0 where it has nothing else."""
    tensors: list[dict[str, Any]] = []
    data = b""
    for name, value in row.items():
        array = value.numpy()
        tensor: dict[str, Any] = {"name": name, "shape": list(array.shape), "datatype": "FP64"}
        if binary:
            tensor["parameters"] = {"binary_data_size": array.nbytes}
            data += array.tobytes()
        else:
            tensor["data"] = array.reshape(-1).tolist()
        tensors.append(tensor)
    head = json.dumps({"inputs": tensors, "parameters": {"binary_data_output": binary}}).encode()
    return head + data, len(head) if binary else 0
