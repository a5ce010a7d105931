"""neml2's eager solver entry points: its Python solvers hand over callables, the iterations are the runtime's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast, get_args

from torch import Tensor

from .. import _log as log
from .._solve import newton
from .._solve.criteria import criteria_of
from .._solve.groups import Group, Layout, Structure
from .._solve.krylov import solve_linear
from .._solve.lockstep import FrozenRows, LockstepRows
from .._solve.newton import Solved
from .._solve.outcome import Outcome
from .._solve.preconditioned import KrylovSystem
from .._solve.system import System
from ..errors import ConvergenceError, InputError
from ..model._outcomes import advice
from ..settings import CacheStrategy, KrylovMethod, KrylovSettings, LineSearch, NewtonSettings
from .callables import (
    CallableProducts,
    CallableSystem,
    JacobianProduct,
    PreconditionerApply,
    PreconditionerSetup,
    Residual,
    Step,
)

LayoutDescription = Sequence[tuple[str, Sequence[int]]]
"""For each group its structure (`dense` or `block`) and the sizes of its site axes."""


def newton_solve_eager(
    residual_fn: Residual,
    step_fn: Step,
    unknown_layout: LayoutDescription,
    residual_layout: LayoutDescription,
    u0: Sequence[Tensor],
    atol: float,
    rtol: float,
    miters: int,
    ls_type: str,
    ls_max_iters: int,
    ls_cutback: float,
    ls_c: float,
    substep_del_tol: float = 1e-6,
    collect_log: bool = False,
) -> tuple[list[Tensor], bool, int, list[str]]:
    """Solve a nonlinear system by Newton's method, all rows of the batch in step with one another.

    Args:
        residual_fn: `b = -r` at given unknowns, one tensor per residual group.
        step_fn: the Newton step and `b` at given unknowns.
        unknown_layout: structure and site axes of each unknown group.
        residual_layout: the same for the residual groups.
        u0: initial guess, one tensor per unknown group.
        atol: see `NewtonSettings`, as for the next seven.
        rtol: relative tolerance.
        miters: one more than the number of updates allowed.
        ls_type: `BACKTRACKING` or `STRONG_WOLFE`.
        ls_max_iters: one more than the number of trials allowed.
        ls_cutback: divisor of the step length.
        ls_c: slack of the acceptance criterion.
        substep_del_tol: not used here.
        collect_log: also return a line about each iteration and each trial of the line search.

    Returns:
        The unknowns, `True`, the number of updates, and the lines.

    Raises:
        ConvergenceError: a residual became non-finite, or the iterations are used up.
        InputError: a layout or a setting is not valid.
    """
    settings = _newton_settings(atol, rtol, miters, ls_type, ls_max_iters, ls_cutback, ls_c, substep_del_tol)
    unknowns, residuals = _layouts(unknown_layout, residual_layout, u0)
    return _solve(CallableSystem(residual_fn, step_fn), u0, (unknowns, residuals), settings, collect_log)


def newton_solve_eager_masked(
    residual_fn: Residual,
    step_fn: Step,
    unknown_layout: LayoutDescription,
    residual_layout: LayoutDescription,
    u0: Sequence[Tensor],
    atol: float,
    rtol: float,
    miters: int,
    ls_type: str,
    ls_max_iters: int,
    ls_cutback: float,
    ls_c: float,
    substep_del_tol: float = 1e-6,
) -> tuple[list[Tensor], Tensor, int]:
    """As `newton_solve_eager`, but a row that does not converge fails on its own.

    Returns:
        The last unknowns, which rows have converged (bool, batch shape), and the number of updates.

    Raises:
        InputError: a layout or a setting is not valid.
    """
    settings = _newton_settings(atol, rtol, miters, ls_type, ls_max_iters, ls_cutback, ls_c, substep_del_tol)
    unknowns, residuals = _layouts(unknown_layout, residual_layout, u0)
    criteria = criteria_of(settings, small_steps=True, as_native=True)
    rows = FrozenRows(CallableSystem(residual_fn, step_fn), list(u0), (unknowns, residuals), criteria)
    found = newton.solve(rows, settings, newton.listener())
    statistics = found.statistics
    return found.unknowns, statistics.converged, rows.updates


def krylov_solve_eager(
    residual_fn: Residual,
    matvec_fn: JacobianProduct,
    precond_setup_fn: PreconditionerSetup | None,
    precond_apply_fn: PreconditionerApply | None,
    unknown_layout: LayoutDescription,
    residual_layout: LayoutDescription,
    u0: Sequence[Tensor],
    atol: float,
    rtol: float,
    miters: int,
    ls_type: str,
    ls_max_iters: int,
    ls_cutback: float,
    ls_c: float,
    substep_del_tol: float = 1e-6,
    collect_log: bool = False,
    method: str = "gmres",
    restart: int = 40,
    max_its: int = 1000,
    abs_tol: float = 0.0,
    rel_tol: float = 1e-4,
    cache_strategy: str = "none",
    cache_max_its: int = 10,
) -> tuple[list[Tensor], bool, int, list[str]]:
    """As `newton_solve_eager`, with each step from an iterative linear solve.

    In place of `step_fn` it takes `matvec_fn`, `(u, v) -> A(u) v` by groups, and, unless both are `None`, a
    preconditioner: `precond_setup_fn` gives its state at given unknowns, and `precond_apply_fn` takes the state and
    flat vectors `r` `(rows, N)` to `M^-1 r`. The arguments from `method` on are the fields of `KrylovSettings`.

    Raises:
        ConvergenceError: as for `newton_solve_eager`; a linear solve that does not converge only logs a warning.
        InputError: a layout or a setting is not valid.
        AOTIError: a group is not dense.
    """
    settings = _newton_settings(atol, rtol, miters, ls_type, ls_max_iters, ls_cutback, ls_c, substep_del_tol)
    linear = _krylov_settings(method, restart, max_its, abs_tol, rel_tol, cache_strategy, cache_max_its)
    unknowns, residuals = _layouts(unknown_layout, residual_layout, u0)
    products = CallableProducts(residual_fn, matvec_fn, precond_setup_fn, precond_apply_fn)
    layouts = unknowns, residuals
    return _solve(KrylovSystem(products, linear, layouts), u0, layouts, settings, collect_log)


def krylov_solve_linear(
    matvec_fn: Callable[[Tensor], Tensor],
    b: Tensor,
    method: str = "gmres",
    restart: int = 40,
    max_its: int = 1000,
    abs_tol: float = 0.0,
    rel_tol: float = 1e-4,
) -> Tensor:
    """Solve `A x = b` iteratively; a row that does not converge only logs a warning.

    Args:
        matvec_fn: `v -> A v`, both `(rows, N)`.
        b: right-hand sides, `(rows, N)`.
        method: see `KrylovSettings`, as for all that follow.
        restart: directions before GMRES starts afresh.
        max_its: limit of products (GMRES) or iterations (BiCGStab).
        abs_tol: absolute tolerance.
        rel_tol: relative tolerance.

    Returns:
        `(rows, N)`.

    Raises:
        InputError: a setting is not valid.
    """
    settings = _krylov_settings(method, restart, max_its, abs_tol, rel_tol, "none", 0)
    return solve_linear(matvec_fn, b, settings).x


def _solve(
    system: System, u0: Sequence[Tensor], layouts: tuple[Layout, Layout], settings: NewtonSettings, collect_log: bool
) -> tuple[list[Tensor], bool, int, list[str]]:
    """Solve in lockstep, or raise for the batch as a whole."""
    trace: list[str] = []
    shown = newton.listener()

    def tell(line: str) -> None:
        trace.append(line)
        if shown is not None:
            shown(line)

    rows = LockstepRows(system, list(u0), layouts, criteria_of(settings, as_native=True))
    log.emit("newton", "info", "---- begin newton solve ----")
    try:
        found = newton.solve(rows, settings, tell if collect_log else shown)
        if log.enabled("newton", "info"):
            log.emit("newton", "info", newton.outcome_line(found.statistics, settings))
    finally:
        log.emit("newton", "info", "---- end newton solve ----")
    if not found.statistics.all_converged:
        raise _failure(found, rows.updates, settings)
    return found.unknowns, True, rows.updates, trace


def _failure(found: Solved, updates: int, settings: NewtonSettings) -> RuntimeError:
    """The error for a batch that did not converge as a whole."""
    statistics = found.statistics
    if bool((statistics.outcome == Outcome.DIVERGED).any()):
        return ConvergenceError(f"The Newton solve diverged at iteration {updates}: non-finite residual. {advice()}")
    largest, largest0 = statistics.norm.amax().item(), statistics.norm0.amax().item()
    return ConvergenceError(
        f"The Newton solve has not converged in {settings.miters} iterations: max |R| = {largest:.6e}, "
        f"max |R0| = {largest0:.6e}, atol = {settings.atol:g}, rtol = {settings.rtol:g}. {advice()}"
    )


def _newton_settings(
    atol: float,
    rtol: float,
    miters: int,
    ls_type: str,
    ls_max_iters: int,
    ls_cutback: float,
    ls_c: float,
    substep_del_tol: float,
) -> NewtonSettings:
    _one_of(ls_type, LineSearch, "ls_type")
    return NewtonSettings(
        atol, rtol, miters, cast("LineSearch", ls_type), ls_max_iters, ls_cutback, ls_c, substep_del_tol
    )


def _krylov_settings(
    method: str, restart: int, max_its: int, abs_tol: float, rel_tol: float, cache_strategy: str, cache_max_its: int
) -> KrylovSettings:
    _one_of(method, KrylovMethod, "method")
    _one_of(cache_strategy, CacheStrategy, "cache_strategy")
    if restart < 1:
        raise InputError(f"restart must be at least 1, not {restart}")
    return KrylovSettings(
        cast("KrylovMethod", method),
        restart,
        max_its,
        abs_tol,
        rel_tol,
        cast("CacheStrategy", cache_strategy),
        cache_max_its,
    )


def _one_of(value: str, choices: Any, name: str) -> None:
    if value not in get_args(choices):
        raise InputError(f"{name} must be one of {', '.join(get_args(choices))}, not {value!r}")


def _layouts(unknown: LayoutDescription, residual: LayoutDescription, u0: Sequence[Tensor]) -> tuple[Layout, Layout]:
    if len(u0) != len(unknown):
        raise InputError(f"the initial guess has {len(u0)} group(s), the layout of the unknowns {len(unknown)}")
    unknowns, residuals = (tuple(_group(*entry) for entry in layout) for layout in (unknown, residual))
    return unknowns, residuals


def _group(structure: str, sub_batch_shape: Sequence[int]) -> Group:
    _one_of(structure, Structure, "structure")
    return Group(cast("Structure", structure), tuple(sub_batch_shape))
