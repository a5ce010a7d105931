"""A compiled model at some points, with all its derivatives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .._solve.outcome import Outcome
from ..errors import InputError
from ..model import Model
from .comparison import scale_of
from .golden import Blocks
from .points import Points, Tensors, driver_names, driver_points, joined, random_points, read_points
from .target import Target


@dataclass(frozen=True)
class Where:
    """Which points to evaluate at: those of a file, else of a driver and around it, else random ones.

    Args:
        points: a file of points.
        driver: a driver of the stub whose calls are taken; its first one if None.
        rows: how many points of a driver, and how many random ones.
        seed: of the random ones.
        scales: their standard deviation by input.
    """

    points: Path | None = None
    driver: str | None = None
    rows: int = 16
    seed: int = 0
    scales: Mapping[str, float] | None = None

    @property
    def asked_for(self) -> bool:
        """Whether it names points rather than a number of them."""
        return self.points is not None or self.driver is not None or bool(self.scales)


@dataclass(frozen=True)
class Evaluated:
    """A compiled model at points where it converged.

    Args:
        points: those points.
        outputs: by name.
        blocks: derivatives by inputs and parameters, `(rows, ...)`, by pair.
        parameters: promoted parameters by name.
        not_finite: indices of the points, among all, at which it gave numbers that are not finite.
    """

    points: Points
    outputs: Tensors
    blocks: Blocks
    parameters: Tensors
    not_finite: Tensor

    def scale(self, pair: tuple[str, str], block: Tensor) -> float:
        """What an error of a derivative is measured by; `block` is the reference."""
        out, by = pair
        return scale_of(block, self.outputs[out], {**self.parameters, **self.points.inputs}[by])


def choose_points(target: Target, model: Model, where: Where) -> Points:
    """The points of a file; else those of the stub's driver and random ones around them; else random ones."""
    if where.points is not None:
        return read_points(where.points, model)
    scales = where.scales or {}
    driver = where.driver or next(iter(driver_names(target)), None)
    if driver is None:
        return random_points(model, where.rows, where.seed, scales)
    driven = driver_points(target, model, driver, where.rows)
    around = random_points(model, where.rows, where.seed, scales, driven)
    return joined([driven, around])


def evaluate(model: Model, points: Points) -> tuple[Evaluated, int]:
    """Evaluate a model with all its derivatives where it converges.

    Returns:
        What it gives, and the number of points where it does not converge or gives what is not finite.

    Raises:
        InputError: it converges nowhere.
    """
    on_device = Points({n: v.to(model.device) for n, v in points.inputs.items()}, points.source)
    solution = model.solve(on_device.inputs, jacobian=bool(model.derivative_pairs))
    converged = solution.converged
    rows = int(converged.sum())
    if rows == 0:
        raise InputError(
            f"the model converges at none of the {points.rows} points ({points.source}). Give points that it meets "
            "(--points FILE, or a stub with a driver), or a scale for its inputs (--scale NAME=VALUE)."
        )
    kept = on_device.at(converged)
    outputs = {name: value[converged] for name, value in solution.outputs.items()}
    blocks = {(out, by): block[converged] for out, row in solution.blocks.items() for by, block in row.items()}
    if model.parameter_derivative_pairs:
        found = model.param_jacobian(kept.inputs)[1]
        blocks |= {(out, by): block for out, row in found.items() for by, block in row.items()}
    not_finite = (solution.outcome == Outcome.NOT_FINITE).nonzero().squeeze(-1).cpu()
    return Evaluated(kept, outputs, blocks, dict(model.named_parameters()), not_finite), points.rows - rows
