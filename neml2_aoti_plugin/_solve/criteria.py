"""By what a Newton solve decides about a row: each criterion once, for numbers and tensors alike.

The functions hold arithmetic, comparisons and `&`, `|` only, so that Python numbers, tensors and machine code take
the same lines. A row's criteria see numbers of that row alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    # The build imports this module, where numba alone is installed.
    from ..settings import NewtonSettings

# A full step that lets the residual norm fall to this part of it, or less, is followed by a chord step.
STEEP = 0.5

# A row whose residual norm is below this part of its limit has nothing to gain from another step.
FINE = 1e-4

# Sums of squares between these bounds have neither overflowed nor lost digits to underflow.
LEAST_SQUARES, MOST_SQUARES = 1e-280, 1e300


class Criteria(NamedTuple):
    """The settings that the criteria read, as numbers; see `NewtonSettings`."""

    atol: float
    # Limit of that norm relative to its first value.
    rtol: float
    # The same for a trial that stands without a test of its decrease; neml2 asks for `atol` there (0), as is done here
    # where such a trial might not have converged yet, for want of a small step.
    trial_rtol: float
    c: float
    cutback: float
    # Whether the acceptance is that of STRONG_WOLFE.
    strong_wolfe: bool
    searching: bool
    # Whether the relative test also asks for a small last step.
    small_steps: bool
    step_tol: float
    # Whether a row may take a second step by the same factors.
    chord_steps: bool


def criteria_of(settings: NewtonSettings, *, small_steps: bool = False, as_native: bool = False) -> Criteria:
    """The criteria of a solve.

    `as_native` asks for the iterates of neml2's C++ runtime, whose line search tests a trial that has converged by the
    relative tolerance alone, and which takes no chord steps.
    """
    return Criteria(
        float(settings.atol),
        float(settings.rtol),
        0.0 if as_native or small_steps else float(settings.rtol),
        float(settings.ls_c),
        float(settings.ls_cutback),
        settings.ls_type == "STRONG_WOLFE",
        settings.cuts > 0,
        small_steps,
        float(settings.substep_del_tol),
        settings.chord_steps and not as_native,
    )


def converged(norm: Any, norm0: Any, criteria: Criteria) -> Any:
    """Whether a residual norm meets the absolute or the relative tolerance; an exact zero always does."""
    return (norm < criteria.atol) | (norm < criteria.rtol * norm0) | (norm == 0.0)


def small_step(moved: Any, size: Any, norm: Any, criteria: Criteria) -> Any:
    """Whether the last step, of norm `moved` to unknowns of norm `size`, allows a row to have converged."""
    return (norm < criteria.atol) | (moved < criteria.step_tol * (size + criteria.atol))


def accepted(trial: Any, norm: Any, norm0: Any, slope: Any, alpha: Any, criteria: Criteria) -> Any:
    """Whether a trial of the line search may stand.

    Both tests ask that the square of the residual norm falls in proportion to the step length: `BACKTRACKING` takes
    the slope `b . du`, `STRONG_WOLFE` the squared norm itself, without a test of the curvature (neml2's definitions).
    A trial whose residual norm is small enough stands in any case. `trial` and `norm` are residual norms at the trial
    and before the step, `slope` is divided by the square of `norm`, and `alpha` is the step length.
    """
    ratio = trial / norm
    most = 1.0 - criteria.c * alpha if criteria.strong_wolfe else 1.0 - 2.0 * criteria.c * alpha * slope
    return (ratio * ratio <= most) | (trial <= criteria.atol) | (trial < criteria.trial_rtol * norm0)


def followed(trial: Any, norm: Any, norm0: Any, alpha: Any, criteria: Criteria) -> Any:
    """Whether a chord step follows an accepted step: a full one that was steep, and has not led to the limit yet.

    A chord step is one by the factors that are at hand. With it the method is of third order for two residuals and one
    Jacobian per update: J. F. Traub, Iterative Methods for the Solution of Equations, 1964.
    """
    steep = (alpha == 1.0) & (trial <= STEEP * norm) & (trial > 0.0)
    return criteria.chord_steps & steep & (trial >= criteria.atol) & (trial >= criteria.rtol * norm0)


def gains(norm: Any, norm0: Any, criteria: Criteria) -> Any:
    """Whether a row that has converged still gains by one more step, its last."""
    return (norm > FINE * criteria.atol) & (norm > FINE * criteria.rtol * norm0)


def carries(norm: Any, before: Any, norm0: Any, criteria: Criteria) -> Any:
    """Whether the last step may be taken by the linearisation at hand, that before the step that converged.

    Where a step lets the residual fall by a factor, another one by the same linearisation lets it fall by twice that
    factor, to first order: the Jacobian has changed by twice as much as its mean along the step. Where that is too
    little, the last step has a linearisation of its own.
    """
    after = 2.0 * norm * (norm / before)
    return (after <= FINE * criteria.atol) | (after <= FINE * criteria.rtol * norm0)
