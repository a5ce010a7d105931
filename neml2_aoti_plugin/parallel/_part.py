"""One part of a long run: read rows, evaluate them, and write what they give. Any process may do it."""

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
from ._sinks import FileSink, require_same_journal
from ._sources import FAILED, Arrays, Rows

OPERATIONS = ("forward", "jacobian")
# Models that a process keeps.
KEPT = 16


@dataclass(frozen=True)
class Part:
    """Some rows of a long run.

    Args:
        model: to evaluate; for another process its recipe, the pickled model.
        operation: of `OPERATIONS`.
        start: the first row.
        stop: one behind the last.
        rows: the rows themselves, or where to read them.
        sink: where to write what they give; None where it is to be sent back.
    """

    model: Model | bytes
    operation: str
    start: int
    stop: int
    rows: Arrays | Rows
    sink: FileSink | None


@dataclass(frozen=True)
class Done:
    """What a part gave.

    Args:
        digest: of the rows of the source.
        results: where there is no sink.
    """

    digest: str
    results: Rows | None = None


def loaded_model(given: Model | str | os.PathLike[str]) -> Model:
    """A model that rows can be mapped over.

    Args:
        given: a model, or the path of its artifact or of its stub.

    Raises:
        InputTypeError: it is neither.
        InputError: it is on a GPU, or its rows depend on each other.
        ArtifactError: as for `Model`.
    """
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
    """The model that is meant; out of its recipe it is loaded at its first use in this process.

    Raises:
        ArtifactError: the artifact is not there, or differs from the caller's.
    """
    return given if isinstance(given, Model) else _unpickled(given)


@lru_cache(KEPT)
def _unpickled(recipe: bytes) -> Model:
    found: Model = pickle.loads(recipe)
    return found


def evaluate_part(part: Part) -> Done:
    """Evaluate a part.

    Raises:
        ArtifactError: the model is not the same here.
        InputError: the rows cannot be read or written.
    """
    rows = _rows(part)
    same = digest(rows)
    found = evaluate_rows(model_of(part.model), part.operation, rows, part.stop - part.start)
    if part.sink is None:
        return Done(same, found)
    part.sink.write(part.start, found)
    return Done(same)


def read_part(part: Part) -> Done:
    """Read the rows of a part without evaluating them, to see whether they are still the same.

    Raises:
        InputError: they cannot be read.
    """
    return Done(digest(_rows(part)))


def _rows(part: Part) -> Rows:
    if not isinstance(part.rows, Arrays):
        return part.rows
    try:
        return part.rows.read(part.start, part.stop)
    except InputError as error:
        raise InputError(
            f"rows {part.start} to {part.stop - 1} cannot be read: {error} The source must stay as it is, and lie on a "
            "file system that all workers share, under the same path."
        ) from error


def require_visible(header: bytes, part: Part) -> Done:
    """Refuse a process that lacks the model, the source or the sink of a run; rows are not evaluated.

    Args:
        header: how the journal begins.
        part: one row.
    """
    model_of(part.model)
    if part.sink is not None:
        require_same_journal(part.sink.journal, header)
    return read_part(part)


def evaluate_rows(model: Model, operation: str, rows: Rows, count: int) -> Rows:
    """Results of rows by name, NaN in those that fail; and `@failed`, which these are.

    Args:
        model: to evaluate.
        operation: `forward`, or `jacobian` for derivative blocks as well, by the name `output@input`.
        rows: inputs by name; one that has no row axis is the same for all.
        count: number of rows.
    """
    inputs = {name: torch.from_numpy(np.require(array, requirements=("C", "W"))) for name, array in rows.items()}
    with torch.no_grad():
        found = model.solve(inputs, jacobian=operation == "jacobian")
    results = {name: value.numpy() for name, value in found.outputs.items()}
    # No name of a variable holds an @.
    results.update({f"{out}@{by}": block.numpy() for out, row in found.blocks.items() for by, block in row.items()})
    results[FAILED] = (~found.converged).numpy()
    return {name: np.broadcast_to(array, (count, *array.shape[1:])) for name, array in results.items()}


def digest(rows: Rows) -> str:
    """What tells rows from others, by their content."""
    found = hashlib.sha256()
    for name in sorted(rows):
        found.update(name.encode())
        found.update(np.ascontiguousarray(rows[name]).data)
    return found.hexdigest()
