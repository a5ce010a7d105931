"""Newton's method for a batch of one row: the steps of `newton`, decided by numbers instead of tensors.

At one row the small tensor operations of the decisions would take about as long as the graphs. The decisions are the
same, so that a row has the same result on its own as in a batch, but for rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import hypot, isfinite

import torch
from torch import Tensor

from .. import log
from ..program.systems import Groups, System
from ..settings import NewtonSettings
from .groups import Layout
from .linesearch import acceptance
from .rows import ROUGH, Rows, Told


def solve_row(
    system: System,
    u: Groups,
    g: Groups,
    tail: Sequence[Tensor],
    layouts: tuple[Layout, Layout],
    settings: NewtonSettings,
    *,
    gated: bool,
) -> Rows:
    """Solve `r(u) = 0` for one row; see `newton.solve_rows`."""
    b, linear = system.evaluate(u, g, tail)
    numbers = _numbers(b)
    norm = hypot(*numbers)
    norm0, limit, before = norm, settings.atol, norm
    du: Groups = []
    alpha = 1.0
    trials = settings.ls_max_iters - 1
    # The first step is the one that goes too far.
    stale, cutting = False, trials >= 2
    verbose = log.enabled("newton", "debug")
    last = max(settings.miters - 1, 0)
    for i in range(last + 1):
        lost = not isfinite(norm)
        small = norm < settings.atol
        done = norm < limit
        if gated and i > 0 and done and not small:
            moved = hypot(*_numbers(du)) * alpha
            done = moved < settings.substep_del_tol * (hypot(*_numbers(u)) + settings.atol)
        if verbose:
            log.emit("newton", "debug", f"ITERATION {i:3d}, |R| = {norm:.6e}, |R0| = {norm0:.6e}")
        if done or lost or i == last:
            if done and i > 0 and norm > ROUGH * limit:
                if stale and norm * norm > ROUGH * limit * before:
                    b, linear = system.evaluate(u, g, tail)
                du = system.direction(u, g, tail, b, linear)
                u = [_moved(x, d) for x, d in zip(u, du, strict=True)]
            return _rows(u, done, i, norm, norm0)
        if stale:
            b, linear = system.evaluate(u, g, tail)
        du = system.direction(u, g, tail, b, linear)
        limit = max(norm0 * settings.rtol, settings.atol)
        slope = 0.0
        if trials >= 2:
            slope = sum([x * y for x, y in zip(numbers, _numbers(du), strict=True)])
        # Quadratic convergence goes on as it did: the next norm is to this one as this was to the last, squared.
        ending = i > 0 and norm * norm * norm < limit * before * before
        stale = system.direct and (ending or cutting)
        before = norm
        trial = [x + d for x, d in zip(u, du, strict=True)]
        b, linear = (system.residual(trial, g, tail), linear) if stale else system.evaluate(trial, g, tail)
        numbers = _numbers(b)
        norm = hypot(*numbers)
        alpha = 1.0
        for _ in range(trials - 1):
            if norm * norm <= max(acceptance(settings, before * before, slope, alpha), limit * limit):
                break
            alpha = alpha / settings.ls_cutback
            trial = [x + alpha * d for x, d in zip(u, du, strict=True)]
            b = system.residual(trial, g, tail)
            numbers = _numbers(b)
            norm = hypot(*numbers)
        cutting = alpha != 1.0
        if cutting and system.residual_apart and not stale:
            if system.direct:
                stale = True
            else:
                b, linear = system.evaluate(trial, g, tail)
                numbers = _numbers(b)
                norm = hypot(*numbers)
        u = trial
    raise AssertionError("the last iteration returns")


def _numbers(groups: Groups) -> list[float]:
    """The entries of a row."""
    if len(groups) == 1 and groups[0].ndim == 2:
        only: list[float] = groups[0].tolist()[0]
        return only
    return [v for x in groups for v in x.flatten().tolist()]


def _moved(x: Tensor, d: Tensor) -> Tensor:
    """Take a step where it is finite."""
    step = x + d
    return step if isfinite(step.sum().item()) else torch.where(step.isfinite(), step, x)


def _rows(u: Groups, done: bool, iterations: int, norm: float, norm0: float) -> Rows:
    device, dtype = u[0].device, u[0].dtype

    def tell() -> Told:
        return Told(
            torch.tensor([done], device=device),
            torch.tensor([iterations], device=device),
            torch.tensor([norm], dtype=dtype, device=device),
            torch.tensor([norm0], dtype=dtype, device=device),
        )

    return Rows(u, tell, done)
