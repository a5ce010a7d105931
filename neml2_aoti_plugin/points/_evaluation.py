"""A step of the points: initial guesses, a second attempt without them, what is kept of it, and its derivatives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod, sqrt
from typing import Any

import torch
from torch import Tensor

from ..errors import DerivativeNotCompiledError, InputError
from ..model import Model, Solution
from ._plane_stress import PlaneStress, write
from ._roles import Base, Pair, Roles, Tensors, earlier

# As many Newton updates as this at the hardest point keep the step as it is. What a viscoplastic law takes from its
# predictor in a step of moderate size is 5 or 6, so that such a step grows a little.
TARGET = 8
# What a step is multiplied with after a failure, and the limits elsewhere.
CUT, LEAST, MOST = 0.5, 0.5, 2.0


# Some of the points, or all of them as a slice, of which torch makes no copy.
Part = Tensor | slice


class Trial:
    """What was updated of `n` points since the last commit, written in place: many updates may be of few points."""

    def __init__(self, n: int, device: torch.device) -> None:
        # Of the variables that are kept, and of unknowns; NaN at points that failed or were not updated.
        self.values: Tensors = {}
        with torch.inference_mode(False):
            self.converged, self.updated = (torch.zeros(n, dtype=torch.bool, device=device) for _ in range(2))
        # Newton updates of the hardest point, over all updates of the step.
        self.hardest = 0

    @property
    def failed(self) -> Tensor:
        """The points whose last update failed, `(n,)`."""
        return self.updated & ~self.converged

    def at(self, part: Part) -> Tensors:
        """The values at some of the points; none where one of these has not been updated."""
        return {name: x[part] for name, x in self.values.items()} if bool(self.updated[part].all()) else {}

    def write(self, part: Part, values: Tensors, found: Solution) -> None:
        """Take over an update of some of the points, with the values that are kept of it."""
        # An interrupt in here leaves points that have to be updated again.
        self.updated[part] = False
        for name, value in values.items():
            if name not in self.values:
                # Torch lets nobody write later on to what was made under torch.inference_mode.
                with torch.inference_mode(False):
                    self.values[name] = value.new_full((len(self.updated), *value.shape[1:]), torch.nan)
            self.values[name][part] = value
        self.converged[part] = found.converged
        self.updated[part] = True
        if len(found.iterations):
            self.hardest = max(self.hardest, int(found.iterations.max()))


@dataclass(frozen=True)
class Evaluator:
    """The model at the points."""

    model: Model
    roles: Roles
    # Outputs that the model takes as initial guesses.
    unknowns: tuple[str, ...]
    plane_stress: PlaneStress | None

    def step(
        self, driven: Tensors, old: Tensors, last: Tensors, pairs: Sequence[Pair], parameters: Tensors
    ) -> tuple[Solution, Tensors]:
        """Evaluate a step; the driven inputs are given back, in plane stress with the strains out of the plane."""
        inputs = {**driven, **{name: old[earlier(*of)] for name, of in self.roles.lagged.items()}}
        inputs.update({name: old[earlier(name, 1)] for name in self.roles.guesses})
        constraint = self.plane_stress
        if constraint is None:
            return self._evaluate(inputs, last, old, pairs, parameters), driven
        needed = constraint.needed(pairs)

        def at(rows: Tensor | None, strain: Tensor, near: Tensors) -> Solution:
            own, before = ({n: x if rows is None else x[rows] for n, x in all_.items()} for all_ in (inputs, old))
            own[constraint.strain] = strain
            return self._evaluate(own, near, before, needed, parameters, rows)

        strain = constraint.start(driven[constraint.strain], old, last)
        found, strain = constraint.solve(at, strain, last)
        return constraint.condensed(found, pairs), {**driven, constraint.strain: strain}

    def _evaluate(
        self,
        inputs: Tensors,
        near: Tensors,
        old: Tensors,
        pairs: Sequence[Pair],
        parameters: Tensors,
        rows: Tensor | None = None,
    ) -> Solution:
        """Evaluate all points, or some `rows`, from values `near` theirs; those that fail once more without."""
        guesses, wanted = {}, pairs or None
        for name in self.unknowns if near else ():
            # At points that have failed, the value before the step, or zero.
            before = old.get(earlier(name, 1), torch.zeros_like(near[name]))
            guesses[name] = torch.where(near[name].isfinite(), near[name], before)
        own = parameters_at(self.model, parameters, rows)
        # Blocks that all points share are only expanded where points are written to.
        expand = bool(guesses) or self.plane_stress is not None
        found = self.model.solve({**inputs, **guesses}, own, pairs=wanted, expand=expand)
        if guesses and not bool(found.converged.all()):
            failed = (~found.converged).nonzero().squeeze(-1)
            # Their updates are those of the attempt that counts.
            own = parameters_at(self.model, parameters, failed if rows is None else rows[failed])
            write(found, failed, self.model.solve({n: x[failed] for n, x in inputs.items()}, own, pairs=wanted))
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


def advanced(roles: Roles, old: Tensors, now: Tensors, mask: Tensor | None) -> Tensors:
    """The state one step on, from values at the end of the step; of the points in a mask, `(n,)`, or of all."""
    new: Tensors = {}
    for name, depth in roles.depth.items():
        value = now[name]
        for lag in range(1, depth + 1):
            kept = old[earlier(name, lag)]
            if mask is not None:
                value = torch.where(mask.reshape(mask.shape + (1,) * (kept.ndim - 1)), value, kept)
            new[earlier(name, lag)], value = value, kept
    return new


def step_factor(updates: int, *, failed: bool) -> float:
    """What to multiply the next step with, or after a failure the same one, by the updates of the hardest point."""
    if failed:
        return CUT
    return min(max(sqrt(TARGET / updates), LEAST), MOST) if updates else MOST


# -- derivatives ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PointDerivatives:
    """The derivatives of outputs by driven inputs and promoted parameters; in plane stress condensed ones."""

    model: Model
    driven: tuple[str, ...]
    plane_stress: PlaneStress | None

    def of_tangent(self, pairs: Sequence[Pair] | None) -> tuple[Pair, ...]:
        """The pairs of the tangent: those that the caller wants, or all that there are by driven inputs."""
        # Those by promoted parameters have their price, and are evaluated only where the caller names them.
        if pairs is None:
            return tuple(
                pair for pair in self.model.derivative_pairs if pair[1] in self.driven and not self._missing(pair)
            )
        for pair in pairs:
            self.require(pair)
        return tuple((out, by) for out, by in dict.fromkeys(map(tuple, pairs)))

    def by(self, names: Iterable[str]) -> tuple[Pair, ...]:
        """All that there are by some inputs and parameters."""
        return tuple((out, by) for out in self.model.output_names for by in names if not self._missing((out, by)))

    def require(self, pair: Pair) -> None:
        """Raise why there is no derivative, if there is none."""
        by = pair[-1] if isinstance(pair, tuple | list) and pair else None
        if by in self.model.inputs and by not in self.driven:
            raise DerivativeNotCompiledError(
                f"{by!r} is kept by the points; the tangent of points is by a driven input ({', '.join(self.driven)}) "
                f"or a promoted parameter. Or Points(..., driven=[{by!r}])."
            )
        self.model.require_pairs([pair])
        for out, by in self._missing(pair):
            raise DerivativeNotCompiledError(
                f"in plane stress d({pair[0]})/d({pair[1]}) takes d({out})/d({by}) too, which was not compiled into "
                f"{self.model.artifact}. Compile it: neml2-compile ... -d {out}:{by}."
            )

    def require_evaluated(self, pairs: Sequence[Pair] | None, out: str, by: str | None) -> None:
        """Raise why a derivative, or that by any input, is not among those of an update; None where it had none."""
        if pairs is None:
            raise InputError("this update left derivatives out. Call update(..., tangent=True).")
        if not self.model.derivative_pairs:
            self.model.require_pairs()
        pair = (out, by if by is not None else self.driven[0])
        self.require(pair)
        raise InputError(
            f"the tangent has the pairs {list(pairs)} only. Name the others: Points(..., pairs=[{pair!r}])."
        )

    def _missing(self, pair: Pair) -> list[Pair]:
        """What a derivative takes and was not compiled."""
        there = {*self.model.derivative_pairs, *self.model.parameter_derivative_pairs}
        takes = [pair] if self.plane_stress is None else self.plane_stress.takes(pair)
        return [one for one in takes if one not in there]


# -- gradients --------------------------------------------------------------------------------------------------------

# All is as the caller writes it, so that one node serves every notation and dimension. The state is no part of it.

# Raises why there is no derivative of an output by an input or parameter.
Refuse = Callable[[Pair], object]


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
                    ctx.refuse((out, by))
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
