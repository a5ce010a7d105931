"""One part of a long run: read rows, evaluate them, and write what they give. Any process may do it."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch

from ..errors import InputError
from ..model import Model
from .remote import ModelRef, model_of
from .sinks import Writable
from .sources import FAILED, Readable, Rows

OPERATIONS = ("forward", "jacobian")


@dataclass(frozen=True)
class Part:
    """Some rows of a long run.

    Args:
        model: to evaluate.
        operation: of `OPERATIONS`.
        start: the first row.
        stop: one behind the last.
        source: where to read them; None where they are `rows`.
        rows: the rows themselves.
        sink: where to write what they give; None where it is to be sent back.
    """

    model: ModelRef
    operation: str
    start: int
    stop: int
    source: Readable | None
    rows: Rows | None
    sink: Writable | None


@dataclass(frozen=True)
class Done:
    """What a part gave.

    Args:
        digest: of the rows of the source.
        failed: number of rows that failed.
        results: where there is no sink.
    """

    digest: str
    failed: int = 0
    results: Rows | None = None


def evaluate_part(part: Part) -> Done:
    """Evaluate a part.

    Raises:
        ArtifactError: the model is not the same here.
        InputError: the rows cannot be read or written.
    """
    rows = _rows(part)
    same = digest(rows)
    found = evaluate_rows(model_of(part.model), part.operation, rows, part.stop - part.start)
    failed = int(found[FAILED].sum())
    if part.sink is None:
        return Done(same, failed, found)
    part.sink.write(part.start, found)
    return Done(same, failed)


def read_part(part: Part) -> Done:
    """Read the rows of a part without evaluating them, to see whether they are still the same.

    Raises:
        InputError: they cannot be read.
    """
    return Done(digest(_rows(part)))


def _rows(part: Part) -> Rows:
    if part.rows is not None:
        return part.rows
    assert part.source is not None
    try:
        return part.source.read(part.start, part.stop)
    except InputError as error:
        raise InputError(
            f"a worker cannot read rows {part.start} to {part.stop - 1}: {error} The source must lie on a file system "
            "that all workers share, under the same path, and stay as it is."
        ) from error


def require_visible(part: Part) -> Done:
    """Refuse a process that lacks the model, the source or the sink of a run; rows are not evaluated."""
    model_of(part.model)
    if part.source is not None:
        _rows(part)
    if part.sink is not None:
        part.sink.require_visible()
    return Done("")


def evaluate_rows(model: Model, operation: str, rows: Rows, count: int) -> Rows:
    """Results of rows by name, NaN in those that fail; and `@failed`, which these are.

    Args:
        model: to evaluate.
        operation: `forward`, or `jacobian` for derivative blocks as well, by the name `output@input`.
        rows: inputs by name; one that has no row axis is the same for all.
        count: number of rows.
    """
    inputs = {name: torch.from_numpy(np.require(array, requirements=("C", "W"))) for name, array in rows.items()}
    found = model.solve(inputs, jacobian=operation == "jacobian")
    results = {name: value.numpy() for name, value in found.outputs.items()}
    for out, row in found.blocks.items():
        results.update({f"{out}@{by}": block.numpy() for by, block in row.items()})
    results[FAILED] = (~found.converged).numpy()
    return {name: np.broadcast_to(array, (count, *array.shape[1:])) for name, array in results.items()}


def digest(rows: Rows) -> str:
    """What tells rows from others, by their content."""
    found = blake2b(digest_size=16)
    for name in sorted(rows):
        found.update(name.encode())
        found.update(np.ascontiguousarray(rows[name]).data)
    return found.hexdigest()
