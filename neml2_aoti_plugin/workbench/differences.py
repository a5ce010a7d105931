"""Derivatives of a compiled model by central differences, each from two steps that must agree."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ..model import Model

Tensors = dict[str, Tensor]

# Of the steps, the larger is this part of the input's largest entry, and the other one half of it.
STEP = 1e-4
# Two estimates that differ by more than this part of the largest entry are not of one derivative.
AGREE = 1e-3
# Of an input that is zero everywhere.
SCALE = 1e-3


@dataclass(frozen=True)
class Difference:
    """A derivative by differences.

    Args:
        block: `(rows, *out_base, *by_base)`.
        smooth: the rows in which both steps gave the same derivative, bool, `(rows,)`.
    """

    block: Tensor
    smooth: Tensor


def by_input(model: Model, inputs: Mapping[str, Tensor], name: str, outs: Sequence[str]) -> dict[str, Difference]:
    """Derivatives of outputs by one input.

    Args:
        model: compiled, without sub-batch axes in what is asked for.
        inputs: `(rows, *base)` by name.
        name: of the input.
        outs: names of the outputs.
    """
    value = inputs[name]

    def evaluate(moved: Tensor, times: int) -> tuple[Tensors, Tensor]:
        repeated = {n: x.repeat(times, *(1,) * (x.ndim - 1)) for n, x in inputs.items() if n != name}
        found = model.solve({**repeated, name: moved})
        return found.outputs, found.converged

    return _differences(value, tuple(model.inputs[name].base_shape), outs, model, evaluate)


def by_parameter(model: Model, inputs: Mapping[str, Tensor], name: str, outs: Sequence[str]) -> dict[str, Difference]:
    """Derivatives of outputs by one promoted parameter that has no batch of its own; else as `by_input`."""
    rows = next(iter(inputs.values())).shape[0]
    value = model.named_parameters()[name].detach()
    base = tuple(model.parameter_base_shapes[name])

    def evaluate(moved: Tensor, times: int) -> tuple[Tensors, Tensor]:
        repeated = {n: x.repeat(times, *(1,) * (x.ndim - 1)) for n, x in inputs.items()}
        found = model.solve(repeated, {name: moved})
        return found.outputs, found.converged

    return _differences(value.expand(rows, *base), base, outs, model, evaluate)


def _differences(
    value: Tensor,
    base: tuple[int, ...],
    outs: Sequence[str],
    model: Model,
    evaluate: Callable[[Tensor, int], tuple[Tensors, Tensor]],
) -> dict[str, Difference]:
    """All entries, two steps, both signs: one call.

    Args:
        value: what to differentiate by, `(rows, *base)`.
        base: its base shape.
        outs: names of the outputs.
        model: their shapes.
        evaluate: outputs, and whether each row converged, for `value` moved and repeated so many times.
    """
    rows, width = value.shape[0], prod(base)
    largest = float(value.abs().max()) if value.numel() else 0.0
    steps = STEP * (largest or SCALE) * torch.tensor([1.0, -1.0, 0.5, -0.5], dtype=value.dtype, device=value.device)
    directions = torch.eye(width, dtype=value.dtype, device=value.device).reshape(width, *base)
    moves = steps.reshape(4, 1, 1, *(1,) * len(base)) * directions.unsqueeze(1)
    moved = (value + moves).reshape(4 * width * rows, *base)
    values, converged = evaluate(moved, 4 * width)
    whole = converged.reshape(4 * width, rows).all(0)
    found = {}
    for out in outs:
        shape = tuple(model.outputs[out].base_shape)
        far, back, near, nearer = values[out].reshape(4, width, rows, prod(shape)).to(torch.float64)
        coarse, fine = (far - back) / (2 * steps[0]), (near - nearer) / (2 * steps[2])
        # The error of a central difference goes with the square of its step.
        best = (4 * fine - coarse) / 3
        scale = torch.nan_to_num(best[:, whole]).abs().max() if bool(whole.any()) else torch.ones(())
        apart = (fine - coarse).abs().amax((0, 2))
        smooth = whole & (apart <= AGREE * scale)
        block = best.permute(1, 2, 0).reshape(rows, *shape, *base)
        found[out] = Difference(block, smooth)
    return found
