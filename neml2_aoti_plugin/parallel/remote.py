"""What a worker process does: it keeps models, and evaluates an operation on some rows."""

from __future__ import annotations

import gc
import pickle
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import ConvergenceError
from ..model import Model
from ..settings import NewtonSettings
from . import exchange
from .exchange import Arrays, Entry, Key

# Models that a process keeps; a driver has a few.
KEPT = 16

# How the rows of a chunk fared of which some have failed; there are no results then.
FARED = ("record", "norms", "segments")


@dataclass(frozen=True)
class ModelRef:
    """A model, for a process that may not have it yet.

    Args:
        key: tells models apart.
        recipe: the pickled model, or a file that holds it.
    """

    key: str
    recipe: bytes | Path


@dataclass(frozen=True)
class Order:
    """An operation on the rows of a chunk.

    Args:
        model: to evaluate.
        operation: a name of `OPERATIONS`.
        settings: Newton settings in place of the artifact's.
        arguments: file of the arguments.
        entries: where each lies in it.
        options: keyword arguments of the operation.
        results: file to write, which is not there yet.
    """

    model: ModelRef
    operation: str
    settings: NewtonSettings | None
    arguments: Path
    entries: tuple[Entry, ...]
    options: dict[str, Any]
    results: Path


@dataclass(frozen=True)
class Reply:
    """What an order gave.

    Args:
        entries: where each array lies in the file of results.
        once: those that are the same for all rows.
        failed: whether rows have not converged, so that there are no results but how the rows fared.
    """

    entries: tuple[Entry, ...]
    once: frozenset[Key] = field(default_factory=frozenset)
    failed: bool = False


_models: OrderedDict[str, Model] = OrderedDict()
_lock = threading.Lock()
_is_worker = False


def be_worker() -> None:
    """Note that this process is there for chunks alone."""
    global _is_worker
    _is_worker = True


def model_of(ref: ModelRef) -> Model:
    """The model that is meant, loaded at its first use; it refuses an artifact that is not the same here.

    Raises:
        ArtifactError: the artifact is not there, or differs.
    """
    # On one thread: the processes share the cores already. It counts for the calling thread alone.
    torch.set_num_threads(1)
    with _lock:
        found = _models.get(ref.key)
        if found is None:
            recipe = ref.recipe if isinstance(ref.recipe, bytes) else ref.recipe.read_bytes()
            found = _models[ref.key] = pickle.loads(recipe)
            if len(_models) > KEPT:
                _models.popitem(last=False)
            if _is_worker:
                # loky collects garbage every second, and need not look at all that was imported.
                gc.freeze()
        _models.move_to_end(ref.key)
        return found


def evaluate(order: Order) -> Reply:
    """Do what is ordered.

    Raises:
        ArtifactError: the model cannot be loaded here.
        OSError: the arguments cannot be read, or the results not be written.
    """
    model = model_of(order.model)
    model._caller.settings = order.settings
    given = exchange.mapped(order.arguments, order.entries)
    once: frozenset[Key] = frozenset()
    failed = False
    with torch.no_grad():
        try:
            found, once = OPERATIONS[order.operation](model, given, **order.options)
        except ConvergenceError as error:
            statistics, segments = error._fared  # type: ignore[attr-defined]
            values = (statistics.record, statistics.norms, segments)
            found = {("fared", name): value for name, value in zip(FARED, values, strict=True)}
            failed = True
    return Reply(exchange.write(order.results, found), once, failed)


# -- operations -------------------------------------------------------------------------------------------------------

Found = tuple[Arrays, frozenset[Key]]
NOWHERE: frozenset[Key] = frozenset()


def of_kind(given: Mapping[Key, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    """The arrays of one kind, by name."""
    return {key[1]: value for key, value in given.items() if key[0] == kind}


def _called(given: Arrays) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor] | None]:
    """Inputs and parameters."""
    return of_kind(given, "input"), of_kind(given, "parameter") or None


def _named(kind: str, values: Mapping[str, torch.Tensor]) -> Arrays:
    return {(kind, name): value for name, value in values.items()}


def _blocks(blocks: Mapping[str, Mapping[str, torch.Tensor]]) -> Arrays:
    return {("block", out, by): value for out, row in blocks.items() for by, value in row.items()}


def _forward(model: Model, given: Arrays) -> Found:
    inputs, parameters = _called(given)
    return _named("output", model.forward(inputs, parameters)), NOWHERE


def _solve(model: Model, given: Arrays, **options: Any) -> Found:
    inputs, parameters = _called(given)
    found = model.solve(inputs, parameters, **options)
    rows = {"converged": found.converged, "iterations": found.iterations, "outcome": found.outcome}
    once = _once(model, given, found.blocks, options.get("expand", True))
    return {**_named("output", found.outputs), **_named("row", rows), **_blocks(found.blocks)}, once


def _jacobian(model: Model, given: Arrays, **options: Any) -> Found:
    inputs, parameters = _called(given)
    outputs, blocks = model.jacobian(inputs, parameters, **options)
    once = _once(model, given, blocks, options.get("expand", False))
    return {**_named("output", outputs), **_blocks(blocks)}, once


def _once(
    model: Model, given: Arrays, blocks: Mapping[str, Mapping[str, torch.Tensor]], expand: bool
) -> frozenset[Key]:
    """The blocks that came without batch axes, as only a model of one forward segment gives them."""
    if expand or model._plan is None or not blocks:
        return NOWHERE
    # The batch axis shows in one row: what all rows have in common comes without it.
    ranks: dict[Key, int] = {("input", name): len(known.natural_shape) for name, known in model.inputs.items()}
    ranks |= {("parameter", name): len(base) for name, base in model.parameter_base_shapes.items()}
    one = {key: value[:1] if value.ndim > ranks[key] else value for key, value in given.items()}
    pairs = [(out, by) for out, row in blocks.items() for by in row]
    whole = model.jacobian(*_called(one), pairs=pairs, expand=True)[1]
    return frozenset(("block", out, by) for out, by in pairs if blocks[out][by].ndim < whole[out][by].ndim)


def _jvp(model: Model, given: Arrays) -> Found:
    inputs, parameters = _called(given)
    outputs, along = model.jvp(inputs, of_kind(given, "tangent"), parameters)
    return {**_named("output", outputs), **_named("along", along)}, NOWHERE


def _linearise(model: Model, given: Arrays, pairs: list[tuple[str, str]]) -> Found:
    inputs, parameters = _called(given)
    outputs, matrices, _ = model.linearise(inputs, pairs, parameters)
    numbered = {str(place): matrix for place, matrix in enumerate(matrices)}
    return {**_named("output", outputs), **_named("matrix", numbered)}, NOWHERE


def _param_jacobian(model: Model, given: Arrays, params: list[str] | None) -> Found:
    inputs, parameters = _called(given)
    outputs, blocks = model.param_jacobian(inputs, parameters, params=params)
    return {**_named("output", outputs), **_blocks(blocks)}, NOWHERE


def _param_vjp(model: Model, given: Arrays, params: list[str] | None) -> Found:
    inputs, parameters = _called(given)
    found = model.param_vjp(inputs, of_kind(given, "cotangent"), parameters, params=params)
    return _named("gradient", found), NOWHERE


OPERATIONS: dict[str, Callable[..., Found]] = {
    "forward": _forward,
    "solve": _solve,
    "jacobian": _jacobian,
    "jvp": _jvp,
    "linearise": _linearise,
    "param_jacobian": _param_jacobian,
    "param_vjp": _param_vjp,
}
