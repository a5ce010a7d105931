"""Newton's method for a batch of one row: the steps of `newton`, decided by numbers instead of tensors.

At one row the small tensor operations of the decisions would take about as long as the graphs. The arithmetic is the
same, operation by operation, so that a row has the same result on its own as in a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import torch
from torch import Tensor

from .. import log
from ..settings import NewtonSettings
from .layout import Layout, norms, row_dots, scaled_row_norms
from .linesearch import acceptance
from .rows import Rows
from .systems import Groups, System


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
    of_u, of_r = layouts
    b, linear = system.evaluate(u, g, tail)
    norm = norms(b, of_r).item()
    if not isfinite(norm):
        # The square may have overflowed: over an infinite first norm, all would look converged.
        norm = scaled_row_norms(b, of_r).item()
    norm0, limit = norm, settings.atol
    du: Groups = []
    alpha = 1.0
    verbose = log.enabled("newton", "debug")
    last = max(settings.miters - 1, 0)
    for i in range(last + 1):
        lost = not isfinite(norm)
        small = norm < settings.atol
        done = norm < limit
        if gated and i > 0 and done and not small:
            moved = norms(du, of_u).item() * alpha
            done = moved < settings.substep_del_tol * (norms(u, of_u).item() + settings.atol)
        if verbose:
            log.emit("newton", "debug", f"ITERATION {i:3d}, |R| = {norm:.6e}, |R0| = {norm0:.6e}")
        ending = done or lost or i == last
        if not ending or i > 0:
            du = system.direction(u, g, tail, b, linear)
        if ending:
            final = [_polished(x, d) for x, d in zip(u, du, strict=True)] if done and i > 0 else u
            return _rows(final, done, i, norm, norm0)
        limit = max(norm0 * settings.rtol, settings.atol)
        trial = [x + d for x, d in zip(u, du, strict=True)]
        trial_b, linear = system.evaluate(trial, g, tail)
        trial_norm = norms(trial_b, of_r).item()
        alpha = 1.0
        trials = settings.ls_max_iters - 1
        if trials >= 2:
            squared = norm * norm
            bdu = None if settings.ls_type == "STRONG_WOLFE" else row_dots(b, du, of_r, of_u).item()
            for _ in range(trials - 1):
                limit_squared = max(acceptance(settings, squared, bdu, alpha), settings.atol * settings.atol)
                if trial_norm * trial_norm <= limit_squared:
                    break
                alpha = alpha / settings.ls_cutback
                trial = [x + alpha * d for x, d in zip(u, du, strict=True)]
                trial_b = system.residual(trial, g, tail)
                trial_norm = norms(trial_b, of_r).item()
            if alpha != 1.0 and system.residual_apart:
                trial_b, linear = system.evaluate(trial, g, tail)
                trial_norm = norms(trial_b, of_r).item()
        u, b, norm = trial, trial_b, trial_norm
    raise AssertionError("the last iteration returns")


def _polished(x: Tensor, d: Tensor) -> Tensor:
    """One more step for a row that has converged, where it is finite."""
    step = x + d
    return step if isfinite(step.sum().item()) else torch.where(step.isfinite(), step, x)


def _rows(u: Groups, done: bool, iterations: int, norm: float, norm0: float) -> Rows:
    device, dtype = u[0].device, u[0].dtype
    return Rows(
        u,
        torch.tensor([done], device=device),
        torch.tensor([iterations], device=device),
        torch.tensor([norm], dtype=dtype, device=device),
        torch.tensor([norm0], dtype=dtype, device=device),
    )
