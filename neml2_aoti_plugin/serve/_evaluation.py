"""Calls that were gathered, evaluated by one compiled call, and the results handed back to each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from .._solve.outcome import failed_where, not_finite_rows
from ..errors import AOTIError, ConvergenceError
from ..model import Outcome
from ..model._outcomes import Given, reasons
from ._calls import Call, joined
from ._operations import CONVERGED, COTANGENT, GRADIENT, ITERATIONS, OUTCOME, TANGENT
from ._refusals import Refused, failed
from ._served import Served
from ._tensors import Array

# What a call gets: its tensors by name, or why it gets none.
Answer = dict[str, Array] | Refused
Tensors = dict[str, Tensor]

# How to get the rows that have not failed.
REST = f"The operation 'solve' answers with the other rows, and tells in {OUTCOME!r} how each ended."


def evaluate(served: Served, calls: Sequence[Call]) -> list[Answer]:
    """Evaluate calls together.

    Args:
        served: the model.
        calls: with the same key.

    Returns:
        What each call gets. Where the evaluation raises, each call is evaluated by itself, so that none suffers for
        another.
    """
    try:
        return _WAYS[calls[0].operation.name](served, calls)
    except Exception as error:
        if len(calls) > 1:
            return [answer for call in calls for answer in evaluate(served, [call])]
        return [_refusal(served, error)]


def _solve(served: Served, calls: Sequence[Call]) -> list[Answer]:
    first = calls[0]
    inputs, overrides = _inputs(served, calls), _overrides(served, calls)
    found = served.model.solve(inputs, overrides, pairs=first.head.pairs)
    arrays = {name: _array(value) for name, value in found.outputs.items()}
    arrays.update((f"{out}:{by}", _array(x)) for out, row in found.blocks.items() for by, x in row.items())
    outcome = _array(found.outcome)
    if first.operation.name == "solve":
        fared = {CONVERGED: _array(found.converged), ITERATIONS: _array(found.iterations), OUTCOME: outcome}
        return _split(calls, {**arrays, **fared})
    answers = _split(calls, arrays)
    if outcome.any():
        _refuse_failed(served, calls, answers, outcome)
    return answers


def _jvp(served: Served, calls: Sequence[Call]) -> list[Answer]:
    def run(chosen: Sequence[Call]) -> Tensors:
        given = _inputs(served, chosen)
        tangents = {
            name.removeprefix(TANGENT): given.pop(name) for name in chosen[0].head.names if name.startswith(TANGENT)
        }
        outputs, along = served.model.jvp(given, tangents, _overrides(served, chosen))
        return {**outputs, **{TANGENT + name: value for name, value in along.items()}}

    return _of_those_that_converge(served, calls, run)


def _param_vjp(served: Served, calls: Sequence[Call]) -> list[Answer]:
    """Each row has its own parameters, and so its own gradient; those of a call with common ones are summed."""
    shapes = served.model.parameter_base_shapes

    def run(chosen: Sequence[Call]) -> Tensors:
        given = _inputs(served, chosen)
        cotangents = {
            name.removeprefix(COTANGENT): given.pop(name) for name in chosen[0].head.names if name.startswith(COTANGENT)
        }
        overrides = _per_row(served, chosen, list(shapes)) if served.per_row else _overrides(served, chosen)
        return served.model.param_vjp(given, cotangents, overrides)

    answers: list[Answer] = []
    for call, answer in zip(calls, _of_those_that_converge(served, calls, run), strict=True):
        if not isinstance(answer, Refused):
            summed = {
                name: served.per_row
                and (name not in call.head.overrides or call.head.overrides[name].ndim == len(shapes[name]))
                for name in answer
            }
            answer = {GRADIENT + name: x.sum(0) if summed[name] else x for name, x in answer.items()}
        answers.append(answer)
    return answers


_WAYS: dict[str, Callable[[Served, Sequence[Call]], list[Answer]]] = {
    "forward": _solve,
    "solve": _solve,
    "jacobian": _solve,
    "jvp": _jvp,
    "param_vjp": _param_vjp,
}


def _inputs(served: Served, calls: Sequence[Call]) -> Tensors:
    """The tensors of all calls, one behind the other."""
    device = served.model.device
    found = {}
    for name, array in zip(calls[0].head.names, joined(list(calls)), strict=True):
        value = torch.from_numpy(array)
        found[name] = value if device.type == "cpu" else value.to(device)
    return found


def _overrides(served: Served, calls: Sequence[Call]) -> Tensors | None:
    """Values of promoted parameters for all calls: common ones, or one for each row where calls differ."""
    first = calls[0].head.overrides
    if not first:
        return None
    if all(_same(call.head.overrides, first) for call in calls[1:]) and (
        len(calls) == 1 or all(x.ndim == len(served.model.parameter_base_shapes[n]) for n, x in first.items())
    ):
        device = served.model.device
        return {name: torch.from_numpy(np.array(value)).to(device) for name, value in first.items()}
    return _per_row(served, calls, list(dict.fromkeys(name for call in calls for name in call.head.overrides)))


def _same(these: dict[str, Array], those: dict[str, Array]) -> bool:
    return these.keys() == those.keys() and all(np.array_equal(value, those[name]) for name, value in these.items())


def _per_row(served: Served, calls: Sequence[Call], names: list[str]) -> Tensors:
    """A value of each parameter for each row."""
    model = served.model
    present, found = model.named_parameters(), {}
    for name in names:
        base = tuple(model.parameter_base_shapes[name])
        own = present[name].detach().cpu().numpy()
        rows = [np.broadcast_to(call.head.overrides.get(name, own), (call.rows, *base)) for call in calls]
        found[name] = torch.from_numpy(np.concatenate(rows)).to(model.device)
    return found


def _array(value: Tensor) -> Array:
    found: Array = value.detach().cpu().numpy()
    return found


def _split(calls: Sequence[Call], arrays: dict[str, Array]) -> list[Answer]:
    """The rows of each call."""
    if len(calls) == 1:
        return [arrays]
    answers: list[Answer] = []
    start = 0
    for call in calls:
        end = start + call.rows
        answers.append({name: value[start:end] for name, value in arrays.items()})
        start = end
    return answers


def _refuse_failed(served: Served, calls: Sequence[Call], answers: list[Answer], outcome: Array) -> None:
    """Put refusals in the place of the answers to calls with rows that failed.

    Args:
        served: the model.
        calls: that were evaluated.
        answers: to each.
        outcome: an `Outcome` for each row of all calls.
    """
    start = 0
    for place, call in enumerate(calls):
        own = outcome[start : start + call.rows]
        if own.any():
            words = {Outcome(code).words: np.flatnonzero(own == code).tolist() for code in np.unique(own[own > 0])}
            lines = reasons(torch.from_numpy(own), _given(served, call))
            answers[place] = failed(words, call.rows, " ".join([*lines, REST]))
        start += call.rows


def _given(served: Served, call: Call) -> Given:
    bases = served.model.parameter_base_shapes
    overrides = {name: x[None] if x.ndim == len(bases[name]) else x for name, x in call.head.overrides.items()}
    return Given(_tensors(dict(zip(call.head.names, call.arrays, strict=True))), _tensors(overrides))


def _tensors(arrays: dict[str, Array]) -> Tensors:
    # Copied: torch warns of arrays that are not to be written to.
    return {name: torch.from_numpy(np.array(value)) for name, value in arrays.items()}


def _of_those_that_converge(
    served: Served, calls: Sequence[Call], run: Callable[[Sequence[Call]], Tensors]
) -> list[Answer]:
    """Evaluate by a call that tells nothing of single rows: those without rows that fail once more by themselves."""
    rows = sum(call.rows for call in calls)
    try:
        values = run(calls)
        together = calls[0].operation.name == "param_vjp" and not served.per_row
        lost = not_finite_rows(values.values(), () if together else (rows,))
        if lost is None:
            return _split(calls, {name: _array(value) for name, value in values.items()})
        marked = (TANGENT, COTANGENT)
        given = {name: value for name, value in _inputs(served, calls).items() if not name.startswith(marked)}
        outcome = failed_where(served.model.solve(given, _overrides(served, calls)).outcome, lost.expand(rows))
    except ConvergenceError as error:
        outcome = error.outcome  # type: ignore[attr-defined]
    answers: list[Answer] = [{} for _ in calls]
    _refuse_failed(served, calls, answers, _array(outcome))
    fine = [place for place, answer in enumerate(answers) if not isinstance(answer, Refused)]
    if fine:
        chosen = [calls[place] for place in fine]
        for place, answer in zip(fine, _of_those_that_converge(served, chosen, run), strict=True):
            answers[place] = answer
    return answers


def _refusal(served: Served, error: Exception) -> Refused:
    """What a client is told of an error that a single call has met."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, AOTIError) and isinstance(error, ValueError):
        # Paths of this machine are nobody's business.
        return Refused(400, str(error).replace(str(served.model.artifact), served.name))
    refused = Refused(500, f"model {served.name!r} could not be evaluated; the service's log says why.")
    refused.__cause__ = error
    return refused
