"""Equations written down here, whose roots are known, and the three loops that solve them row by row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hand_made_graphs import Handles, system_of
from neml2_aoti_plugin._solve.outcome import Solved
from neml2_aoti_plugin._solve.system import Group, Groups, Linearisation, System
from neml2_aoti_plugin._solve.tensors import solve_in_lockstep, solve_rows
from neml2_aoti_plugin.settings import NewtonSettings

Loop = Callable[..., Solved]


@dataclass
class Equations:
    """`-r(u, g)`, `(rows, n)`, and `dr/du`, `(rows, n, n)`; counts the different rows that were evaluated.

    Machine code fills the rows of a call up to whole vectors by copies of the first one.
    """

    residual: Callable[[Tensor, Tensor], Tensor]
    jacobian: Callable[[Tensor, Tensor], Tensor]
    residuals: int = 0
    jacobians: int = 0

    def b(self, u: Tensor, g: Tensor) -> list[Tensor]:
        self.residuals += different(u, g)
        return [self.residual(u, g)]

    def linearised(self, u: Tensor, g: Tensor) -> list[Tensor]:
        self.jacobians += different(u, g)
        return [self.jacobian(u, g), self.residual(u, g)]


def different(u: Tensor, g: Tensor) -> int:
    """How many different rows there are."""
    return len(torch.cat([u, g], 1).unique(dim=0))


def square_roots() -> Equations:
    """`u^2 = g`."""
    return Equations(lambda u, g: g - u * u, lambda u, g: 2.0 * u.unsqueeze(-1))


def double_roots() -> Equations:
    """`(u - g)^2 = 0`, where Newton's method halves the distance in each step, and no more."""
    return Equations(lambda u, g: -((u - g) ** 2), lambda u, g: 2.0 * (u - g).unsqueeze(-1))


def arctans() -> Equations:
    """`arctan(u) = 0`, where Newton's method diverges from beyond 1.39."""
    return Equations(lambda u, g: -torch.atan(u), lambda u, g: (1.0 / (1.0 + u * u)).unsqueeze(-1))


def coupled() -> Equations:
    """`M u + u^3 = g` for five unknowns with a fixed positive definite `M`; one root for each `g`."""
    factor = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    m = factor @ factor.T / 5 + torch.eye(5, dtype=torch.float64)
    # Row by row, in a fixed order: a product of matrices may round a row by its place.
    return Equations(
        lambda u, g: g - (m * u.unsqueeze(-2)).cumsum(-1)[..., -1] - u**3,
        lambda u, g: m + torch.diag_embed(3.0 * u * u),
    )


# -- the loops --------------------------------------------------------------------------------------------------------


@dataclass
class Factored:
    a: Tensor
    reusable: bool = True

    def solve(self, b: Groups) -> Groups:
        x, _ = torch.linalg.solve_ex(self.a, b[0].unsqueeze(-1))
        singular = (torch.linalg.lu_factor_ex(self.a).info != 0)[:, None]
        return [x.squeeze(-1).masked_fill(singular, torch.nan)]

    def take(self, rows: Tensor) -> Linearisation:
        return Factored(self.a[rows])


@dataclass
class Bound:
    equations: Equations
    g: Tensor

    def residual(self, u: Groups) -> Groups:
        return self.equations.b(u[0], self.g)

    def linearise(self, u: Groups) -> tuple[Groups, Linearisation]:
        a, b = self.equations.linearised(u[0], self.g)
        return [b], Factored(a)

    def take(self, rows: Tensor) -> System:
        return Bound(self.equations, self.g[rows])


def by_machine_code(
    equations: Equations,
    u: Tensor,
    g: Tensor,
    settings: NewtonSettings,
    listener: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> Solved:
    """Also sees that every handle is deleted, and that the lines of the log are those of the tensors' loop."""
    handles = Handles()
    system = system_of(handles, equations.b, equations.linearised, u.shape[1], g.shape[1])
    lines: list[str] = []
    found = system.solve(u, g, settings, **options, listener=lines.append)
    handles.require_none_left()
    for line in lines:
        listener(line)
    # What is one equation has the same bits in both; several are eliminated in another order.
    if u.shape[1] == 1:
        right: list[str] = []
        by_tensors(replace(equations), u, g, settings, **options, listener=right.append)
        if settings.ls_max_iters == 2:
            # Its one trial stands in any case: tensors do not compute what would be accepted.
            lines, right = ([line.partition(", min(||Rc||)")[0] for line in each] for each in (lines, right))
        # The largest norm of trials of which one is NaN is that of the others, or NaN.
        assert lines == right or "nan" in "".join(right)
    return found


def by_tensors(
    equations: Equations, u: Tensor, g: Tensor, settings: NewtonSettings, *, loop: Any = solve_rows, **options: Any
) -> Solved:
    layout = (Group("dense"),)
    found: Solved = loop(
        lambda rows: Bound(equations, g if rows is None else g[rows]), [u], (layout, layout), settings, **options
    )
    return found


def in_lockstep(*arguments: Any, **options: Any) -> Solved:
    return by_tensors(*arguments, loop=solve_in_lockstep, **options)


ROW_WISE: dict[str, Loop] = {"machine code": by_machine_code, "tensors": by_tensors}
LOOPS: dict[str, Loop] = {**ROW_WISE, "lockstep": in_lockstep}
