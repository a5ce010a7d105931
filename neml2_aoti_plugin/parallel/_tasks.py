"""The tasks of a long run, for any process: read some rows, evaluate them, and write or send back the results."""

from __future__ import annotations

import hashlib
import os
import pickle
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from ..errors import InputError
from ..model import Model, as_model
from ..model._operations import operation
from ._journal import require_seen
from ._sinks import FAILED, FileSink
from ._sources import Chunk, Rows

# Of `model._operations.OPERATIONS`; results of the others do not belong to files of rows.
OPERATIONS = ("forward", "jacobian")
# Models that a process keeps.
KEPT = 16


def loaded_model(given: Model | str | os.PathLike[str]) -> Model:
    """A model that rows can be mapped over; one on a GPU, or whose rows depend on each other, is refused."""
    model = as_model(given, device="cpu")
    if model.device.type != "cpu":
        raise InputError(
            f"{model.artifact} was loaded for {model.device}; rows from files are evaluated on a CPU. Load it with "
            "device='cpu', or give the rows to the model as it is: a GPU takes all of them at once."
        )
    if model.mode != "rowwise":
        raise InputError(
            f"{model.artifact} was loaded with mode={model.mode!r}, in which the iterates of a row depend on the "
            "others. Only with mode='rowwise' can rows be evaluated chunk by chunk."
        )
    return model


@lru_cache(KEPT)
def unpickled(recipe: bytes) -> Model:
    """A pickled model, loaded at its first use in this process."""
    found: Model = pickle.loads(recipe)
    return found


@dataclass(frozen=True)
class Task:
    """Some rows of a long run; the model is pickled where another process has to load it."""

    model: Model | bytes
    operation: str
    chunk: Chunk
    # Where to write results, and how the journal there begins; None where they are to be sent back.
    sink: FileSink | None
    header: bytes


def evaluate(task: Task) -> tuple[str, Rows | None]:
    """Evaluate the rows of a task: their digest, by which they are known again, and results where there is no sink."""
    rows, start = task.chunk.read(), task.chunk.start
    model = task.model if isinstance(task.model, Model) else unpickled(task.model)
    found = evaluate_rows(model, task.operation, rows, task.chunk.stop - start)
    if task.sink is None:
        return digest(rows), found
    require_seen(task.sink.journal, task.header)
    task.sink.write(start, found)
    return digest(rows), None


def read(task: Task) -> str:
    """The digest of a task's rows, which are not evaluated, to see whether they are still the same."""
    return digest(task.chunk.read())


def evaluate_rows(model: Model, name: str, rows: Rows, count: int) -> Rows:
    """Results of `count` rows by name, NaN in rows that fail; blocks as `output@input`, and `@failed`."""
    inputs = {name: torch.from_numpy(np.require(array, requirements=("C", "W"))) for name, array in rows.items()}
    with torch.no_grad():
        found = model.solve(inputs, jacobian="blocks" in operation(name, OPERATIONS).gives)
    results = {name: value.numpy() for name, value in found.outputs.items()}
    # No name of a variable holds an @.
    results.update({f"{out}@{by}": block.numpy() for out, row in found.blocks.items() for by, block in row.items()})
    results[FAILED] = (~found.converged).numpy()
    return {name: np.broadcast_to(array, (count, *array.shape[1:])) for name, array in results.items()}


def digest(rows: Rows) -> str:
    """The SHA-256 of names and values of rows."""
    found = hashlib.sha256()
    for name in sorted(rows):
        found.update(name.encode())
        found.update(np.ascontiguousarray(rows[name]).data)
    return found.hexdigest()
