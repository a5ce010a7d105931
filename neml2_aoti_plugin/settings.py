"""What a nonlinear and a linear iterative solve may be told: tolerances, limits, methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from sys import float_info
from typing import Annotated, Any, Literal, get_args

from msgspec import Meta

from ._checks import require_names, shown_value
from .errors import InputError, InputTypeError

LineSearch = Literal["BACKTRACKING", "STRONG_WOLFE"]
KrylovMethod = Literal["gmres", "bicgstab"]
CacheStrategy = Literal["none", "chord", "max_its"]
# Of numbers in files; a damaged one would keep a solve busy for years.
_Tolerance = Annotated[float, Meta(ge=0.0, le=float_info.max)]
_Count = Annotated[int, Meta(ge=0, le=10**6)]
_Few = Annotated[int, Meta(ge=0, le=10**5)]


@dataclass(frozen=True)
class NewtonSettings:
    """Settings of a Newton solve; the field names are those of `Model.set_solver_config`.

    Args:
        atol: a row has converged when the norm of its residual is below this.
        rtol: or when that norm, divided by the norm at the initial guess, is below this.
        miters: one more than the number of updates allowed (neml2's count).
        ls_type: the criterion by which the line search accepts a trial.
        ls_max_iters: one more than the number of trials allowed; 1 switches the line search off.
        ls_cutback: what the step length is divided by after a rejected trial.
        ls_c: slack of the acceptance criterion.
        substep_del_tol: in a substepped solve the relative test also asks that the last step is below this
            times the norm of the unknowns.
        chord_steps: whether a row may take a second step by the factors of a linearisation (row-wise mode only; neml2
            has no such setting). An update is then a linearisation with both its steps.
    """

    atol: _Tolerance = 1e-10
    rtol: _Tolerance = 1e-8
    miters: _Few = 25
    ls_type: LineSearch = "BACKTRACKING"
    ls_max_iters: Annotated[int, Meta(ge=0, le=10**4)] = 1
    ls_cutback: Annotated[float, Meta(gt=1.0, le=float_info.max)] = 2.0
    ls_c: _Tolerance = 1e-3
    substep_del_tol: _Tolerance = 1e-6
    chord_steps: bool = True

    @property
    def updates(self) -> int:
        """Number of updates allowed."""
        return max(self.miters - 1, 0)

    @property
    def cuts(self) -> int:
        """How often a step may be cut back."""
        return max(self.ls_max_iters - 2, 0)


@dataclass(frozen=True)
class KrylovSettings:
    """Settings of an iterative linear solve.

    Args:
        method: `gmres` or `bicgstab`.
        restart: number of directions after which GMRES starts afresh.
        max_its: number of matrix-vector products (GMRES) or iterations (BiCGStab) allowed.
        abs_tol: a row is done when its residual norm is below this.
        rel_tol: or when that norm divided by the norm of the right-hand side is below this.
        cache_strategy: when the preconditioner is set up: at each linear solve (`none`), once per Newton solve
            (`chord`), or after a linear solve that took more than `cache_max_its` iterations (`max_its`).
        cache_max_its: see `cache_strategy`.
        absolute_floor: whether a divisor below the machine epsilon counts as zero whatever the units, as in neml2's C++
            runtime; else one that is small beside the right-hand side does.
        together: whether a row takes part in all iterations of its batch, and the preconditioner is kept or set up for
            all rows alike, as in neml2's C++ runtime; else each row has its own number of iterations.
    """

    method: KrylovMethod = "gmres"
    restart: _Few = 40
    max_its: _Count = 1000
    abs_tol: _Tolerance = 0.0
    rel_tol: _Tolerance = 1e-4
    cache_strategy: CacheStrategy = "none"
    cache_max_its: _Count = 10
    absolute_floor: bool = False
    together: bool = True


# neml2's own counts are ints of 32 bits.
MOST = 2**31 - 1


_TOLERANCE = (float, lambda x: x >= 0, "a finite number, zero or more")
_COUNT = (int, lambda n: 0 <= n <= MOST, f"a whole number, zero or more, and {MOST} at most")
# Of each setting its type, what it must be besides, and that in words.
_RULES: dict[str, tuple[type, Callable[[Any], bool], str]] = {
    "atol": _TOLERANCE,
    "rtol": _TOLERANCE,
    "miters": _COUNT,
    "ls_type": (str, get_args(LineSearch).__contains__, "BACKTRACKING or STRONG_WOLFE"),
    "ls_max_iters": _COUNT,
    "ls_cutback": (float, lambda x: x > 1, "a finite number, more than 1"),
    "ls_c": _TOLERANCE,
    "substep_del_tol": _TOLERANCE,
    "chord_steps": (bool, lambda _: True, "True or False"),
}


def newton_settings(**values: Any) -> NewtonSettings:
    """Newton settings, checked, with counts as ints and all other numbers as floats."""
    checked = {}
    for name, value in values.items():
        kind, fits, wanted = _RULES[name]
        try:
            checked[name] = found = _read(value, kind)
        except TypeError as error:
            raise InputTypeError(f"{name} is {shown_value(value)}, expected {wanted}.") from error
        except (ValueError, OverflowError) as error:
            raise InputError(f"{name} is {shown_value(value)}, expected {wanted}.") from error
        if not fits(found):
            raise InputError(f"{name} is {shown_value(value)}, expected {wanted}.")
    return NewtonSettings(**checked)


def _read(value: Any, kind: type) -> Any:
    """A text or a truth value as it is, a finite number in its type; a whole one may be written as a float."""
    if kind in (bool, str) and isinstance(value, kind):
        return value
    if kind in (bool, str) or isinstance(value, (bool, str, bytes)):
        raise TypeError
    number = float(value)
    if not isfinite(number) or (kind is int and int(number) != value):
        raise ValueError
    return kind(number)


def changed_settings(present: NewtonSettings | None, changes: Mapping[str, Any], where: str) -> NewtonSettings:
    """Newton settings with some of them changed, checked; `present` is None for a model without implicit segments."""
    require_names(changes, _RULES, f"solver of {where}", "settings")
    if present is None:
        raise InputError(f"{where} has no implicit segment, so there is no solver to set.")
    return newton_settings(**{**vars(present), **changes})
