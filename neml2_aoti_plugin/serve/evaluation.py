"""Calls that were gathered, evaluated by one compiled call, and the results handed back to each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..errors import AOTIError, ConvergenceError
from .calls import Call, joined
from .operations import CONVERGED, COTANGENT, GRADIENT, ITERATIONS, TANGENT
from .refusals import Refused, not_converged
from .served import Served
from .tensors import Array

# What a call gets: its tensors by name, or why it gets none.
Answer = dict[str, Array] | Refused
Tensors = dict[str, Tensor]


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


def _forward(served: Served, calls: Sequence[Call]) -> list[Answer]:
    if served.implicit and len(calls) > 1:
        return _solve(served, calls)
    # The quickest way; it raises where a row fails, which one call alone may.
    try:
        outputs = served.model.forward(_inputs(served, calls), _overrides(served, calls))
    except ConvergenceError as error:
        return [not_converged(error.rows.tolist(), calls[0].rows)]  # type: ignore[attr-defined]
    return _split(calls, {name: _array(value) for name, value in outputs.items()})


def _solve(served: Served, calls: Sequence[Call]) -> list[Answer]:
    first = calls[0]
    inputs, overrides = _inputs(served, calls), _overrides(served, calls)
    found = served.model.solve(inputs, overrides, pairs=first.head.pairs)
    arrays = {name: _array(value) for name, value in found.outputs.items()}
    arrays.update((f"{out}:{by}", _array(x)) for out, row in found.blocks.items() for by, x in row.items())
    converged = _array(found.converged)
    if first.operation.name == "solve":
        return _split(calls, {**arrays, CONVERGED: converged, ITERATIONS: _array(found.iterations)})
    answers = _split(calls, arrays)
    if not converged.all():
        _refuse_failed(calls, answers, converged)
    return answers


def _jvp(served: Served, calls: Sequence[Call]) -> list[Answer]:
    def run(chosen: Sequence[Call]) -> list[Answer]:
        given = _inputs(served, chosen)
        tangents = {
            name.removeprefix(TANGENT): given.pop(name) for name in chosen[0].head.names if name.startswith(TANGENT)
        }
        outputs, along = served.model.jvp(given, tangents, _overrides(served, chosen))
        named = {**outputs, **{TANGENT + name: value for name, value in along.items()}}
        return _split(chosen, {name: _array(value) for name, value in named.items()})

    return _of_those_that_converge(calls, run)


def _param_vjp(served: Served, calls: Sequence[Call]) -> list[Answer]:
    """Each row has its own parameters, and so its own gradient; those of a call with common ones are summed."""
    shapes = served.model.parameter_base_shapes

    def run(chosen: Sequence[Call]) -> list[Answer]:
        given = _inputs(served, chosen)
        cotangents = {
            name.removeprefix(COTANGENT): given.pop(name) for name in chosen[0].head.names if name.startswith(COTANGENT)
        }
        if len(chosen) == 1:
            gradients = served.model.param_vjp(given, cotangents, _overrides(served, chosen))
            return [{GRADIENT + name: _array(value) for name, value in gradients.items()}]
        gradients = served.model.param_vjp(given, cotangents, _per_row(served, chosen, list(shapes)))
        answers = _split(chosen, {name: _array(value) for name, value in gradients.items()})
        found: list[Answer] = []
        for call, answer in zip(chosen, answers, strict=True):
            assert not isinstance(answer, Refused)
            common = {
                name: name not in call.head.overrides or call.head.overrides[name].ndim == len(shapes[name])
                for name in answer
            }
            found.append({GRADIENT + n: x.sum(0) if common[n] else x for n, x in answer.items()})
        return found

    return _of_those_that_converge(calls, run)


_WAYS: dict[str, Callable[[Served, Sequence[Call]], list[Answer]]] = {
    "forward": _forward,
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


def _refuse_failed(calls: Sequence[Call], answers: list[Answer], converged: Array) -> None:
    """Put refusals in the place of the answers to calls with rows that did not converge."""
    start = 0
    for place, call in enumerate(calls):
        own = converged[start : start + call.rows]
        if not own.all():
            answers[place] = not_converged(np.flatnonzero(~own).tolist(), call.rows)
        start += call.rows


def _of_those_that_converge(calls: Sequence[Call], run: Callable[[Sequence[Call]], list[Answer]]) -> list[Answer]:
    """Evaluate by a call that raises where a row fails: those without such rows once more by themselves."""
    try:
        return run(calls)
    except ConvergenceError as error:
        converged = _array(error.converged_mask)  # type: ignore[attr-defined]
    answers: list[Answer] = [{} for _ in calls]
    _refuse_failed(calls, answers, converged)
    fine = [place for place, answer in enumerate(answers) if not isinstance(answer, Refused)]
    if fine:
        for place, answer in zip(fine, run([calls[place] for place in fine]), strict=True):
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
