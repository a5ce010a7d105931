"""A step of the points: initial guesses, a second attempt without them, and what is kept of it until the commit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from ..model import Model, Solution
from ._plane_stress import PlaneStress, write
from ._roles import Pair, Roles, Tensors, earlier

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
        """Evaluate a step from the state `old` and the values of the last update of the step, none if there was none.

        The driven inputs, `(n, ...)`, are given back; in plane stress with the strains out of the plane. `parameters`
        are values in the place of the model's own.
        """
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
        """Evaluate points in one call of the model; those that fail from initial guesses once more without.

        `near` has values of the unknowns to start from, if any, `rows` says which of all points these are. The updates
        of a point are those of the attempt that counted.
        """
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
    """What to multiply the step with, from the updates of the hardest point in the update of the step that took most.

    After a failure it is for the same step, taken anew; else for the next one.
    """
    if failed:
        return CUT
    return min(max(sqrt(TARGET / updates), LEAST), MOST) if updates else MOST
