"""Derivatives of a compiled model by central differences, each from two steps; kinks are found and left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ..model import Model
from .points import Tensors

# Of the steps, the larger is this part of the input's largest entry, and the other one half of it.
STEPS = {torch.float64: 1e-4, torch.float32: 1e-2}
# Two estimates, or slopes from both sides, that differ by more than this part of the largest entry are not of one
# derivative.
AGREE = 1e-3
# What is below this part of the output over the input is zero but for rounding.
ZERO = 1e-5
# Of an input that is zero everywhere.
SCALE = 1e-3


@dataclass(frozen=True)
class Difference:
    """A derivative by differences, `(rows, *out_base, *by_base)`."""

    block: Tensor
    smooth: Tensor  # the rows in which both steps gave the same derivative, from both sides, bool


def differentiate(model: Model, inputs: Mapping[str, Tensor], by: str, outs: Sequence[str]) -> dict[str, Difference]:
    """Derivatives of outputs, at inputs `(rows, *base)`, by one input, or by one parameter that has no batch."""
    is_input = by in model.inputs
    base = tuple(model.inputs[by].base_shape if is_input else model.parameter_base_shapes[by])
    rows = next(iter(inputs.values())).shape[0]
    value = inputs[by] if is_input else model.named_parameters()[by].detach().expand(rows, *base)

    def evaluate(moved: Tensor, times: int) -> tuple[Tensors, Tensor]:
        repeated = {n: x.repeat(times, *(1,) * (x.ndim - 1)) for n, x in inputs.items() if n != by}
        found = model.solve({**repeated, by: moved}) if is_input else model.solve(repeated, {by: moved})
        return found.outputs, found.converged

    return central(value, base, outs, evaluate)


def central(
    value: Tensor,
    base: tuple[int, ...],
    outs: Sequence[str],
    evaluate: Callable[[Tensor, int], tuple[Tensors, Tensor]],
) -> dict[str, Difference]:
    """Derivatives by all entries of `value`, `(rows, *base)`, from two steps to both sides.

    `evaluate` gives the outputs, and whether each row converged, for the value moved and repeated so many times.
    """
    rows, width = value.shape[0], prod(base)
    largest = float(value.abs().max()) if value.numel() else 0.0
    step = STEPS[value.dtype] * (largest or SCALE)
    steps = step * torch.tensor([1.0, -1.0, 0.5, -0.5], dtype=value.dtype, device=value.device)
    directions = torch.eye(width, dtype=value.dtype, device=value.device).reshape(width, *base)
    moves = steps.reshape(4, 1, 1, *(1,) * len(base)) * directions.unsqueeze(1)
    moved = (value + moves).reshape(4 * width * rows, *base)
    values, converged = evaluate(moved, 4 * width)
    middle, stays = evaluate(value, 1)
    whole = converged.reshape(4 * width, rows).all(0) & stays
    found = {}
    for out in outs:
        shape = tuple(values[out].shape[1:])
        far, back, near, nearer = values[out].reshape(4, width, rows, prod(shape)).to(torch.float64)
        coarse, fine = (far - back) / (2 * steps[0]), (near - nearer) / (2 * steps[2])
        # The error of a central difference goes with the square of its step.
        best = (4 * fine - coarse) / 3
        found_largest = float(best[:, whole].abs().max()) if bool(whole.any()) and best.numel() else 0.0
        size = float(middle[out][whole].abs().max()) if bool(whole.any()) and best.numel() else 0.0
        scale = max(found_largest, ZERO * size / (largest or SCALE))
        # The slopes from both sides differ by an amount that goes with the step, unless there is a kink.
        between = middle[out].reshape(rows, prod(shape)).to(torch.float64)
        jump = 2 * (near + nearer - 2 * between) / steps[2] - (far + back - 2 * between) / steps[0]
        apart = torch.maximum((fine - coarse).abs(), jump.abs()).amax((0, 2))
        smooth = whole & (apart <= AGREE * scale)
        block = best.permute(1, 2, 0).reshape(rows, *shape, *base)
        found[out] = Difference(block, smooth)
    return found
