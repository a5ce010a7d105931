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
from ._sources import Arrays, Rows

# Of `model._operations.OPERATIONS`; results of the others do not belong to files of rows.
OPERATIONS = ("forward", "jacobian")
# Models that a process keeps.
KEPT = 16


@dataclass(frozen=True)
class Task:
    """Some rows of a long run; the model is pickled where another process has to load it."""

    model: Model | bytes
    operation: str
    # The first row, and one behind the last.
    start: int
    stop: int
    # The rows, or where to read them.
    rows: Arrays | Rows
    # Where to write results, and how the journal there begins; None where they are to be sent back.
    sink: FileSink | None
    header: bytes


@dataclass(frozen=True)
class Result:
    """What a task gave: a digest of its rows, by which they are known again; results where there is no sink."""

    digest: str
    results: Rows | None = None


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


def model_of(given: Model | bytes) -> Model:
    """The model that is meant; a pickled one is loaded at its first use in this process."""
    return given if isinstance(given, Model) else _unpickled(given)


@lru_cache(KEPT)
def _unpickled(recipe: bytes) -> Model:
    found: Model = pickle.loads(recipe)
    return found


def evaluate(task: Task) -> Result:
    """Evaluate the rows of a task, and write what they give to its sink if it has one."""
    rows = _read(task)
    known = digest(rows)
    found = evaluate_rows(model_of(task.model), task.operation, rows, task.stop - task.start)
    if task.sink is None:
        return Result(known, found)
    require_seen(task.sink.journal, task.header)
    task.sink.write(task.start, found)
    return Result(known)


def read(task: Task) -> str:
    """The digest of a task's rows, which are not evaluated, to see whether they are still the same."""
    return digest(_read(task))


def _read(task: Task) -> Rows:
    if not isinstance(task.rows, Arrays):
        return task.rows
    try:
        return task.rows.read(task.start, task.stop)
    except InputError as error:
        raise InputError(
            f"rows {task.start} to {task.stop - 1} cannot be read: {error} The source must stay as it is, and lie on a "
            "file system that all workers share, under the same path."
        ) from error


def evaluate_rows(model: Model, name: str, rows: Rows, count: int) -> Rows:
    """Results of `count` rows by name, NaN in rows that fail, and `@failed`, which these are.

    An input without the row axis is the same for all. The operation `jacobian` gives derivative blocks as well, by the
    name `output@input`.
    """
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
