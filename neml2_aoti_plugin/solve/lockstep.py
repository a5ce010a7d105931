"""Newton's method over a batch whose rows keep step with one another, as neml2's C++ runtime does it.

All rows take every iteration until all have converged. The iterates are those of the C++ runtime, operation for
operation; what it evaluates without need is left out, and a norm whose square overflows is taken with scaling
(there it is infinite, and makes the next finite norm look converged).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import log
from ..errors import ConvergenceError
from ..settings import NewtonSettings
from . import linesearch
from .groups import Layout, per_row, row_norm_squares, row_norms, scaled_row_norms
from .linesearch import Report, Residual

Step = Callable[[list[Tensor]], tuple[list[Tensor], list[Tensor]]]

_ADVICE = "A better predictor, a line search or a smaller time step may help."


def solve(
    residual: Residual,
    step: Step,
    u0: Sequence[Tensor],
    unknown_layout: Layout,
    residual_layout: Layout,
    settings: NewtonSettings,
    *,
    trace: list[str] | None = None,
) -> tuple[list[Tensor], int]:
    """Solve `r(u) = 0` for all rows, or fail as a whole.

    Args:
        residual: `b = -r` at given unknowns, one tensor per residual group.
        step: the full Newton step `du` at given unknowns, with `A du = b`; what it returns as `b` is not used.
        u0: first guess, one tensor per unknown group; a batch shape that broadcasts to that of the residual.
        unknown_layout: the unknown groups.
        residual_layout: the residual groups.
        settings: tolerances and limits.
        trace: takes the lines that the channel `newton` shows at level `debug`.

    Returns:
        The unknowns, and the number of updates taken.

    Raises:
        ConvergenceError: a residual is not finite, or the iterations are used up.
    """
    log.emit("newton", "info", "---- begin newton solve ----")
    try:
        return _solve(residual, step, list(u0), unknown_layout, residual_layout, settings, _reporter(trace))
    finally:
        log.emit("newton", "info", "---- end newton solve ----")


def _solve(
    residual: Residual,
    step: Step,
    u: list[Tensor],
    unknown_layout: Layout,
    residual_layout: Layout,
    settings: NewtonSettings,
    report: Report | None,
) -> tuple[list[Tensor], int]:
    b = residual(u)
    norm_sq = row_norm_squares(b, residual_layout)
    norm0 = norm = norm_sq.sqrt()
    for i in range(max(settings.miters, 1)):
        if i > 0:
            du, _ = step(u)
            u, b, norm_sq = linesearch.search(
                residual, u, b, du, norm_sq, unknown_layout, residual_layout, settings, report=report
            )
            norm = norm_sq.sqrt()
        worst = _worst(norm, _close(norm, norm0, settings))
        if not math.isfinite(worst):
            norm = scaled_row_norms(b, residual_layout)
            norm0 = norm if i == 0 else norm0
            worst = _worst(norm, _close(norm, norm0, settings))
        if report is not None:
            report(_iteration_line(i, norm, norm0))
        if not math.isfinite(worst):
            log.emit("newton", "info", f"diverged at iter {i} (non-finite residual)")
            raise ConvergenceError(f"The Newton solve diverged at iteration {i}: non-finite residual. {_ADVICE}")
        if worst == 0.0:
            if log.enabled("newton", "info"):
                where = "converged at predictor" if i == 0 else "converged"
                log.emit("newton", "info", f"{where} (iters={i}, reason={_reason(norm, norm0, settings)})")
            return u, i
    largest, largest0 = norm.amax().item(), norm0.amax().item()
    outcome = f"NOT converged (max_iters={settings.miters}, |R|={largest:.6e}, |R0|={largest0:.6e})"
    log.emit("newton", "info", outcome)
    raise ConvergenceError(
        f"The Newton solve has not converged in {settings.miters} iterations: max |R| = {largest:.6e}, "
        f"max |R0| = {largest0:.6e}, atol = {settings.atol:g}, rtol = {settings.rtol:g}. {_ADVICE}"
    )


def solve_masked(
    residual: Residual,
    step: Step,
    u0: Sequence[Tensor],
    unknown_layout: Layout,
    residual_layout: Layout,
    settings: NewtonSettings,
) -> tuple[list[Tensor], Tensor, int]:
    """Solve `r(u) = 0` for as many rows as will converge; a row that has converged does not move any more.

    The relative test also asks that the last step of the row was small (`substep_del_tol`), for the first guess of
    a substep may be so far off that the relative test alone means little.

    Args:
        residual: as for `solve`.
        step: as for `solve`.
        u0: as for `solve`.
        unknown_layout: as for `solve`.
        residual_layout: as for `solve`.
        settings: as for `solve`.

    Returns:
        The last unknowns, which rows have converged (bool, `(*batch,)`), and the number of updates taken.
    """
    report = _reporter(None)
    b = residual(list(u0))
    norm_sq = row_norm_squares(b, residual_layout)
    norm0 = norm_sq.sqrt()
    # A guess common to all rows gets the batch shape at once: each row ends where it likes.
    u = [x.expand(norm0.shape + x.shape[-g.trailing :]).contiguous() for x, g in zip(u0, unknown_layout, strict=True)]
    converged = norm0 < settings.atol
    worst = _worst(norm0, converged)
    if worst == 0.0:
        return u, converged, 0
    if not math.isfinite(worst):
        norm0 = scaled_row_norms(b, residual_layout)
        # A finite norm over an infinite one would look converged.
        norm0 = torch.where(norm0.isfinite(), norm0, math.nan)
    settled: Tensor | None = None
    i = 0
    for i in range(1, settings.miters):
        du, _ = step(u)
        if settled is not None:
            du = [d.masked_fill(per_row(settled, g), 0.0) for d, g in zip(du, unknown_layout, strict=True)]
        before = u
        u, b, norm_sq = linesearch.search(
            residual, u, b, du, norm_sq, unknown_layout, residual_layout, settings, settled, report
        )
        norm = norm_sq.sqrt()
        moved = [x - y for x, y in zip(u, before, strict=True)]
        lengths = row_norms(moved, unknown_layout), row_norms(u, unknown_layout)
        settled = _settled(settled, norm, norm0, *lengths, settings)
        if report is not None:
            report(_iteration_line(i, norm, norm0))
        worst = _worst(norm, settled)
        if worst == 0.0:
            break
        if not math.isfinite(worst):
            norm = scaled_row_norms(b, residual_layout)
            lengths = scaled_row_norms(moved, unknown_layout), scaled_row_norms(u, unknown_layout)
            settled = _settled(settled, norm, norm0, *lengths, settings)
            if (settled | ~norm.isfinite()).all():
                break
    return u, converged if settled is None else settled, i


def _close(norm: Tensor, norm0: Tensor, settings: NewtonSettings) -> Tensor:
    return (norm < settings.atol) | (norm / norm0 < settings.rtol)


def _settled(
    before: Tensor | None, norm: Tensor, norm0: Tensor, moved: Tensor, size: Tensor, settings: NewtonSettings
) -> Tensor:
    small = moved < settings.substep_del_tol * (size + settings.atol)
    converged = (norm < settings.atol) | ((norm / norm0 < settings.rtol) & small)
    return converged if before is None else before | converged


def _worst(norm: Tensor, converged: Tensor) -> float:
    """The largest norm among the rows that have not converged: 0 if all have, not finite if any is not.

    One number, so that one transfer from the device answers both questions of an iteration.
    """
    if norm.numel() == 0:
        return 0.0
    return norm.masked_fill(converged, 0.0).amax().item()


def _reporter(trace: list[str] | None) -> Report | None:
    """What takes the lines about single iterations, or none if nobody reads them."""
    shown = log.enabled("newton", "debug")
    if trace is None:
        return (lambda line: log.emit("newton", "debug", line)) if shown else None

    def report(line: str) -> None:
        trace.append(line)
        log.emit("newton", "debug", line)

    return report


def _iteration_line(i: int, norm: Tensor, norm0: Tensor) -> str:
    largest, largest0 = (n.amax().item() if n.numel() else 0.0 for n in (norm, norm0))
    return f"ITERATION {i:3d}, |R| = {largest:.6e}, |R0| = {largest0:.6e}"


def _reason(norm: Tensor, norm0: Tensor, settings: NewtonSettings) -> str:
    """By which test the rows have converged."""
    absolute = bool((norm < settings.atol).all())
    relative = bool((norm / norm0 < settings.rtol).all())
    if absolute and relative:
        return "both"
    return "abs_tol" if absolute else "rel_tol" if relative else "mixed"
