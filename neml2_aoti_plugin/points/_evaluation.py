"""Evaluate points: what the model is given, first iterates and a second try without, the plane's constraint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..model import Model, Solution
from ._roles import Pair, Roles, earlier

if TYPE_CHECKING:
    from ._plane_stress import PlaneStress

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Trial:
    """An update that is not committed.

    Args:
        values: of the variables that are kept, and of first iterates.
        converged: `(n,)`.
        hardest: Newton updates of the hardest point, over all updates of the step.
    """

    values: Tensors
    converged: Tensor
    hardest: int


@dataclass(frozen=True)
class Evaluator:
    """The model at the points.

    Args:
        model: the model.
        roles: of its inputs.
        iterates: outputs that it takes as first iterates.
        plane_stress: the constraint, if there is one.
    """

    model: Model
    roles: Roles
    iterates: tuple[str, ...]
    plane_stress: PlaneStress | None

    def step(
        self, driven: Tensors, old: Tensors, trial: Trial | None, pairs: Sequence[Pair]
    ) -> tuple[Solution, Tensors]:
        """Evaluate a step at all points.

        Args:
            driven: the driven inputs, `(n, ...)`.
            old: the state, by name such as `stress~1`.
            trial: the last update of this step, if there was one.
            pairs: derivatives to evaluate.

        Returns:
            The solution, and the driven inputs; in plane stress with the strains out of the plane.
        """
        inputs = {**driven, **{name: old[earlier(*of)] for name, of in self.roles.lagged.items()}}
        inputs.update({name: old[earlier(name, 1)] for name in self.roles.starts})
        first = {} if trial is None else {name: self._usable(name, trial.values[name], old) for name in self.iterates}
        constraint = self.plane_stress
        if constraint is None:
            return evaluate(self.model, inputs, first, pairs), driven

        def at(rows: Tensor | None, strain: Tensor, iterates: Tensors | None) -> Solution:
            own = {name: value if rows is None else value[rows] for name, value in inputs.items()}
            own[constraint.strain] = strain
            starts = first if iterates is None else {n: self._usable(n, x, old, rows) for n, x in iterates.items()}
            return evaluate(self.model, own, starts, constraint.needed(pairs), rows)

        strain = constraint.start(driven[constraint.strain], old, trial.values if trial else None)
        found, strain = constraint.solve(at, strain, self.iterates)
        return constraint.condensed(found, pairs), {**driven, constraint.strain: strain}

    def _usable(self, name: str, value: Tensor, old: Tensors, rows: Tensor | None = None) -> Tensor:
        """A first iterate that is finite: at points that have failed, the value before the step, or zero."""
        before = old.get(earlier(name, 1))
        if before is None:
            return value.nan_to_num(0.0, 0.0, 0.0)
        return torch.where(value.isfinite(), value, before if rows is None else before[rows])


def advanced(roles: Roles, old: Tensors, now: Tensors, mask: Tensor | None) -> Tensors:
    """The state one step on.

    Args:
        roles: of the inputs.
        old: the state.
        now: values at the end of the step, by variable.
        mask: the points that go on, `(n,)`; None for all.
    """
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
    model: Model, inputs: Tensors, iterates: Tensors, pairs: Sequence[Pair], rows: Tensor | None = None
) -> Solution:
    """Evaluate points in one call of the model; those that fail from first iterates once more without.

    Args:
        model: the model.
        inputs: by name, `(points, ...)`.
        iterates: first iterates by name, `(points, ...)`; none to start where the model does.
        pairs: derivatives to evaluate.
        rows: which of all points these are; None for all.

    Returns:
        The solution, with the updates of the try that counted.
    """
    wanted = pairs or None
    found = model.solve({**inputs, **iterates}, _parameters(model, rows), pairs=wanted)
    if not iterates or bool(found.converged.all()):
        return found
    failed = (~found.converged).nonzero().squeeze(-1)
    again = model.solve(
        {name: value[failed] for name, value in inputs.items()},
        _parameters(model, failed if rows is None else rows[failed]),
        pairs=wanted,
    )
    write(found, failed, again)
    return found


def write(whole: Solution, rows: Tensor, part: Solution) -> None:
    """Write the solution of some points into that of all, in place.

    Args:
        whole: of all points; its tensors are nobody else's.
        rows: which points.
        part: their solution.
    """
    for name, value in part.outputs.items():
        whole.outputs[name][rows] = value
    for out, row in part.blocks.items():
        for by, block in row.items():
            whole.blocks[out][by][rows] = block
    whole.converged[rows] = part.converged
    whole.iterations[rows] = part.iterations
    whole.outcome[rows] = part.outcome


def _parameters(model: Model, rows: Tensor | None) -> Mapping[str, Tensor] | None:
    """Parameters that have a value for each point, for some of the points."""
    if rows is None:
        return None
    bases = model.parameter_base_shapes
    return {
        name: value[rows]
        for name, value in model.named_parameters().items()
        if value.ndim > len(bases[name]) and value.shape[0] > 1
    }
