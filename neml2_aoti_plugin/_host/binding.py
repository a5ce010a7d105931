"""The module that stands in for `neml2.aoti._aoti`: what neml2 imports from its C++ binding, by the same names.

Names, order and defaults of arguments are those of neml2's binding. Its Python solvers hand over systems of equations
as callables, which take all rows at once; the iterations are the runtime's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

from torch import Tensor

from .. import _log as log
from .._checks import whole_number
from .._solve.criteria import criteria_of
from .._solve.krylov import KrylovSystem, Products, solve_linear
from .._solve.outcome import Outcome, listener, outcome_line
from .._solve.system import Direction, Group, Groups, Layout, Linearisation, Structure, System
from .._solve.tensors import LockstepRows
from ..errors import ConvergenceError, InputError
from ..model import Model
from ..model._outcomes import advice
from ..settings import CacheStrategy, KrylovMethod, KrylovSettings, NewtonSettings, newton_settings

# What neml2 takes from its binding, some of it only at the first solve.
__all__ = [
    "ConvergenceError",
    "Model",
    "krylov_solve_eager",
    "krylov_solve_linear",
    "log",
    "newton_solve_eager",
    "newton_solve_eager_masked",
]

Residual = Callable[[list[Tensor]], list[Tensor]]
Step = Callable[[list[Tensor]], tuple[list[Tensor], list[Tensor]]]
JacobianProduct = Callable[[list[Tensor], list[Tensor]], Sequence[Tensor]]
PreconditionerSetup = Callable[[list[Tensor]], Sequence[Tensor]]
PreconditionerApply = Callable[[Sequence[Tensor], Tensor], Tensor]

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

    `residual_fn` gives `b = -r` at given unknowns by groups, `step_fn` the Newton step and `b`, and `u0` is the initial
    guess. Gives the unknowns, `True`, the number of updates, and, if `collect_log`, a line about each iteration and
    trial. A batch that does not converge as a whole is a `ConvergenceError`.
    """
    settings = _settings(atol, rtol, miters, ls_type, ls_max_iters, ls_cutback, ls_c, substep_del_tol)
    layouts = _layouts(unknown_layout, residual_layout, u0)
    return _solve(CallableSystem(residual_fn, step_fn), u0, layouts, settings, collect_log)


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

    Gives the last unknowns, which rows have converged (bool, batch shape), and the number of updates.
    """
    settings = _settings(atol, rtol, miters, ls_type, ls_max_iters, ls_cutback, ls_c, substep_del_tol)
    layouts = _layouts(unknown_layout, residual_layout, u0)
    criteria = criteria_of(settings, small_steps=True, as_native=True)
    rows = LockstepRows(CallableSystem(residual_fn, step_fn), list(u0), layouts, criteria)
    found = rows.solve(settings, listener())
    return found.unknowns, found.statistics.converged, rows.updates


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
    flat vectors `r` `(rows, N)` to `M^-1 r`. A linear solve that does not converge only logs a warning.
    """
    settings = _settings(atol, rtol, miters, ls_type, ls_max_iters, ls_cutback, ls_c, substep_del_tol)
    linear = _krylov_settings(method, restart, max_its, abs_tol, rel_tol, cache_strategy, cache_max_its)
    layouts = _layouts(unknown_layout, residual_layout, u0)
    products = CallableProducts(residual_fn, matvec_fn, precond_setup_fn, precond_apply_fn)
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
    """Solve `A x = b` iteratively, all `(rows, N)`; a row that does not converge only logs a warning."""
    return solve_linear(matvec_fn, b, _krylov_settings(method, restart, max_its, abs_tol, rel_tol, "none", 0)).x


def _solve(
    system: System, u0: Sequence[Tensor], layouts: tuple[Layout, Layout], settings: NewtonSettings, collect_log: bool
) -> tuple[list[Tensor], bool, int, list[str]]:
    """Solve in lockstep, or raise for the batch as a whole."""
    trace: list[str] = []
    shown = listener()

    def report(line: str) -> None:
        trace.append(line)
        if shown is not None:
            shown(line)

    rows = LockstepRows(system, list(u0), layouts, criteria_of(settings, as_native=True))
    log.emit("newton", "info", "---- begin newton solve ----")
    try:
        found = rows.solve(settings, report if collect_log else shown)
        if log.enabled("newton", "info"):
            log.emit("newton", "info", outcome_line(found.statistics, settings))
    finally:
        log.emit("newton", "info", "---- end newton solve ----")
    statistics = found.statistics
    if not statistics.all_converged:
        if bool((statistics.outcome == Outcome.DIVERGED).any()):
            how = f"diverged at iteration {rows.updates}: non-finite residual"
        else:
            how = (
                f"has not converged in {settings.miters} iterations: max |R| = {statistics.norm.amax().item():.6e}, "
                f"max |R0| = {statistics.norm0.amax().item():.6e}, atol = {settings.atol:g}, rtol = {settings.rtol:g}"
            )
        raise ConvergenceError(f"The Newton solve {how}. {advice()}")
    return found.unknowns, True, rows.updates, trace


_NEWTON = ("atol", "rtol", "miters", "ls_type", "ls_max_iters", "ls_cutback", "ls_c", "substep_del_tol")


def _settings(*values: Any) -> NewtonSettings:
    """The Newton settings that a call was given, checked."""
    return newton_settings(**dict(zip(_NEWTON, values, strict=True)))


def _krylov_settings(
    method: str, restart: int, max_its: int, abs_tol: float, rel_tol: float, cache_strategy: str, cache_max_its: int
) -> KrylovSettings:
    _one_of(method, KrylovMethod, "method")
    _one_of(cache_strategy, CacheStrategy, "cache_strategy")
    return KrylovSettings(
        cast("KrylovMethod", method),
        whole_number(restart, "restart", 1),
        max_its,
        abs_tol,
        rel_tol,
        cast("CacheStrategy", cache_strategy),
        cache_max_its,
    )


def _one_of(value: str, choices: Any, name: str) -> None:
    if value not in get_args(choices):
        raise InputError(f"{name} is {value!r}, expected one of {', '.join(get_args(choices))}.")


def _layouts(unknown: LayoutDescription, residual: LayoutDescription, u0: Sequence[Tensor]) -> tuple[Layout, Layout]:
    if len(u0) != len(unknown):
        raise InputError(f"the initial guess has {len(u0)} group(s), the layout of the unknowns {len(unknown)}.")
    for structure, _ in (*unknown, *residual):
        _one_of(structure, Structure, "structure")
    unknowns, residuals = (
        tuple(Group(cast("Structure", structure), tuple(sites)) for structure, sites in layout)
        for layout in (unknown, residual)
    )
    return unknowns, residuals


@dataclass(frozen=True)
class CallableSystem:
    """A `System` that neml2 gives as callables: `b = -r` at given unknowns, and the Newton step with `b`."""

    residual_fn: Residual
    step_fn: Step

    def residual(self, u: Groups) -> Groups:
        return self.residual_fn(u)

    def linearise(self, u: Groups) -> tuple[Groups, Linearisation]:
        du, b = self.step_fn(u)
        return b, Direction(du)

    def take(self, rows: Tensor) -> System:
        raise NotImplementedError("neml2's callables take all rows")


@dataclass(frozen=True)
class CallableProducts:
    """`Products` and a preconditioner that neml2 gives as callables."""

    residual_fn: Residual
    matvec_fn: JacobianProduct
    setup_fn: PreconditionerSetup | None
    apply_fn: PreconditionerApply | None

    def residual(self, u: Groups) -> Groups:
        return self.residual_fn(u)

    def product(self, u: Groups, v: Groups) -> Sequence[Tensor]:
        return self.matvec_fn(u, v)

    def set_up(self, u: Groups) -> Sequence[Tensor] | None:
        return self.setup_fn(u) if self.setup_fn is not None and self.apply_fn is not None else None

    def precondition(self, state: Sequence[Tensor], r: Tensor) -> Tensor:
        assert self.apply_fn is not None
        return self.apply_fn(state, r)

    def take(self, rows: Tensor) -> Products:
        raise NotImplementedError("neml2's callables take all rows")
