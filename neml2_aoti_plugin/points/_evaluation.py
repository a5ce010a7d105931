"""A step of the points: initial guesses, a second attempt without them, what it cost, and gradients through it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod, sqrt
from typing import Any

import torch
from torch import Tensor

from ..errors import DerivativeNotCompiledError, InputError
from ..model import Model, Solution
from ._plane_stress import PlaneStress, Tensors, write
from ._roles import Base, Pair, Roles, compiled_pairs, earlier, require_pair

# As many Newton updates as this at the hardest point keep the step as it is. What a viscoplastic law takes from its
# predictor in a step of moderate size is 5 or 6, so that such a step grows a little.
TARGET = 8
# What a step is multiplied with after a failure, and the limits elsewhere.
CUT, LEAST, MOST = 0.5, 0.5, 2.0


@dataclass(frozen=True)
class Trial:
    """What was updated since the last commit."""

    # Of the variables that are kept, and of unknowns; NaN at points that failed or were not updated.
    values: Tensors
    # `(n,)`.
    converged: Tensor
    # `(n,)`.
    updated: Tensor
    # Newton updates of the hardest point, over all updates of the step.
    hardest: int

    @property
    def failed(self) -> Tensor:
        """The points whose last update failed, `(n,)`."""
        return self.updated & ~self.converged

    def at(self, part: Tensor | None) -> Tensors | None:
        """The values at a part of the points, or at all; None where one of these has not been updated."""
        if part is None:
            return self.values if bool(self.updated.all()) else None
        return {name: x[part] for name, x in self.values.items()} if bool(self.updated[part].all()) else None


def with_part(last: Trial | None, part: Tensor, new: Trial, n: int) -> Trial:
    """The trial of `n` points in which an update of a part of them is written in place over the last one, if any."""

    def own(value: Tensor) -> Tensor:
        # Torch lets nobody write to what was made under torch.inference_mode.
        return value.clone() if value.is_inference() else value

    if last is None:
        values = {name: value.new_full((n, *value.shape[1:]), torch.nan) for name, value in new.values.items()}
        converged, updated, hardest = new.converged.new_zeros(n), new.updated.new_zeros(n), 0
    else:
        values = {name: own(value) for name, value in last.values.items()}
        converged, updated, hardest = own(last.converged), own(last.updated), last.hardest
    # An interrupt in here leaves points that have to be updated again.
    updated[part] = False
    for name, value in new.values.items():
        values[name][part] = value
    converged[part] = new.converged
    updated[part] = True
    return Trial(values, converged, updated, max(hardest, new.hardest))


@dataclass(frozen=True)
class Evaluator:
    """The model at the points."""

    model: Model
    roles: Roles
    # Outputs that the model takes as initial guesses.
    unknowns: tuple[str, ...]
    plane_stress: PlaneStress | None

    def step(
        self, driven: Tensors, old: Tensors, last: Tensors | None, pairs: Sequence[Pair], parameters: Tensors
    ) -> tuple[Solution, Tensors]:
        """Evaluate a step from the state `old` and the values of the last update of the step, if there was one.

        The driven inputs, `(n, ...)`, are given back; in plane stress with the strains out of the plane. `parameters`
        are values in the place of the model's own.
        """
        inputs = {**driven, **{name: old[earlier(*of)] for name, of in self.roles.lagged.items()}}
        inputs.update({name: old[earlier(name, 1)] for name in self.roles.guesses})
        guesses = {} if last is None else {name: self._usable(name, last[name], old) for name in self.unknowns}
        constraint = self.plane_stress
        if constraint is None:
            return evaluate(self.model, inputs, guesses, pairs, parameters), driven

        def at(rows: Tensor | None, strain: Tensor, known: Tensors | None) -> Solution:
            own = {name: value if rows is None else value[rows] for name, value in inputs.items()}
            own[constraint.strain] = strain
            starts = guesses if known is None else {n: self._usable(n, x, old, rows) for n, x in known.items()}
            return evaluate(self.model, own, starts, constraint.needed(pairs), parameters, rows)

        strain = constraint.start(driven[constraint.strain], old, last)
        found, strain = constraint.solve(at, strain, self.unknowns)
        return constraint.condensed(found, pairs), {**driven, constraint.strain: strain}

    def pairs_by(self, names: Collection[str]) -> tuple[Pair, ...]:
        """The pairs of outputs and of these inputs and parameters whose derivatives can be evaluated."""
        there = compiled_pairs(self.model)
        found = [(out, by) for out in self.model.output_names for by in names if (out, by) in there]
        if self.plane_stress is None:
            return tuple(found)
        return self.plane_stress.condensable(self.model, found, chosen=False)

    def refuse_gradient(self, out: str, by: str) -> None:
        """Raise why an output has no derivative by what autograd asks for."""
        require_pair(self.model, self.roles.driven, (out, by))
        if self.plane_stress is not None:
            self.plane_stress.condensable(self.model, [(out, by)], chosen=True)

    def _usable(self, name: str, value: Tensor, old: Tensors, rows: Tensor | None = None) -> Tensor:
        """An initial guess that is finite: at points that have failed, the value before the step, or zero."""
        before = old.get(earlier(name, 1))
        if before is None:
            return value.nan_to_num(0.0, 0.0, 0.0)
        return torch.where(value.isfinite(), value, before if rows is None else before[rows])


def advanced(roles: Roles, old: Tensors, now: Tensors, mask: Tensor | None) -> Tensors:
    """The state one step on, from values at the end of the step; of the points in a mask, `(n,)`, or of all."""
    new: Tensors = {}
    for name in roles.depth:
        value = now[name]
        for lag in range(1, roles.depth[name] + 1):
            kept = old[earlier(name, lag)]
            if mask is not None:
                value = torch.where(mask.reshape(mask.shape + (1,) * (kept.ndim - 1)), value, kept)
            new[earlier(name, lag)], value = value, kept
    return new


def evaluate(
    model: Model,
    inputs: Tensors,
    guesses: Tensors,
    pairs: Sequence[Pair],
    parameters: Tensors,
    rows: Tensor | None = None,
) -> Solution:
    """Evaluate points in one call of the model; those that fail from initial guesses once more without.

    `rows` says which of all points these are. The updates of a point are those of the attempt that counted.
    """
    wanted = pairs or None
    found = model.solve({**inputs, **guesses}, parameters_at(model, parameters, rows), pairs=wanted)
    if not guesses or bool(found.converged.all()):
        return found
    failed = (~found.converged).nonzero().squeeze(-1)
    again = model.solve(
        {name: value[failed] for name, value in inputs.items()},
        parameters_at(model, parameters, failed if rows is None else rows[failed]),
        pairs=wanted,
    )
    write(found, failed, again)
    return found


def parameters_at(model: Model, parameters: Tensors, rows: Tensor | None) -> Tensors:
    """The parameters in the place of the model's own, for some of the points: also those with a value for each."""
    if rows is None:
        return parameters
    found, bases = dict(parameters), model.parameter_base_shapes
    for name, value in {**model.named_parameters(), **parameters}.items():
        if value.ndim > len(bases[name]) and value.shape[0] > 1:
            found[name] = value[rows]
    return found


def step_factor(updates: int, *, failed: bool) -> float:
    """What to multiply the step with, from the updates of the hardest point in the update of the step that took most.

    After a failure it is for the same step, taken anew; else for the next one.
    """
    if failed:
        return CUT
    return min(max(sqrt(TARGET / updates), LEAST), MOST) if updates else MOST


# -- gradients through one update -------------------------------------------------------------------------------------

# All is as the caller writes it, so that one node serves every notation and dimension. The state is no part of it.

# Raises why there is no derivative of an output by an input or parameter.
Refuse = Callable[[str, str], object]


class _Node(torch.autograd.Function):
    """Outputs `(n, *out)` by values, by blocks `(n, *out, *by)`."""

    @staticmethod
    def forward(
        ctx: Any,
        outputs: Mapping[str, Tensor],
        blocks: Mapping[Pair, Tensor],
        bys: tuple[str, ...],
        refuse: Refuse,
        *values: Tensor,
    ) -> tuple[Tensor, ...]:
        """Give copies of the outputs, which become part of the graph."""
        ctx.outs, ctx.pairs, ctx.bys, ctx.refuse = tuple(outputs), tuple(blocks), bys, refuse
        ctx.shapes = [value.shape for value in values]
        # Torch notices when a caller writes to a tangent that a gradient still needs.
        ctx.save_for_backward(*blocks.values())
        ctx.set_materialize_grads(False)
        return tuple(value.clone() for value in outputs.values())

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """Contract the cotangents of the outputs with the derivatives."""
        if torch.is_grad_enabled():
            # The derivatives are constants here, by which a second derivative would lack a term without a word.
            raise DerivativeNotCompiledError(
                "a gradient through Points was asked for with create_graph=True, and neml2-compile compiles first "
                "derivatives only."
            )
        blocks = dict(zip(ctx.pairs, ctx.saved_tensors, strict=True))
        given = {out: c for out, c in zip(ctx.outs, cotangents, strict=True) if c is not None}
        gradients: list[Tensor | None] = [None] * 4
        for by, shape, needed in zip(ctx.bys, ctx.shapes, ctx.needs_input_grad[4:], strict=True):
            total: Tensor | None = None
            for out, cotangent in given.items() if needed else ():
                if (out, by) not in blocks:
                    ctx.refuse(out, by)
                block = blocks[out, by]
                base, n = block.shape[cotangent.ndim :], len(block)
                row = cotangent.reshape(n, 1, prod(cotangent.shape[1:]))
                # A point that the loss leaves out, such as one that failed, would be NaN times zero.
                used = (row != 0.0).any(-1, keepdim=True)
                matrix = torch.where(used, block.reshape(n, row.shape[-1], prod(base)), 0.0)
                term = (row @ matrix).reshape(n, *base)
                total = term if total is None else total + term
            gradients.append(None if total is None else total.sum_to_size(shape))
        return tuple(gradients)


def attached(
    outputs: Mapping[str, Tensor],
    blocks: Mapping[Pair, Tensor],
    values: Mapping[str, Tensor],
    shape_of: Callable[[str], Base],
    refuse: Refuse,
) -> dict[str, Tensor]:
    """The outputs of an update as parts of a graph, by values that autograd follows, of `shape_of` each at a point."""
    for (out, by), block in blocks.items():
        if tuple(block.shape) != (*outputs[out].shape, *shape_of(by)):
            raise InputError(
                f"autograd does not follow {by!r} through Points, since its derivatives are per site of a sub-batch. "
                "Call under torch.no_grad(); Model.forward is followed."
            )
    found = _Node.apply(outputs, blocks, tuple(values), refuse, *values.values())  # type: ignore[no-untyped-call]
    return dict(zip(outputs, found, strict=True))
