"""The Newton loops on equations written down here, whose roots are known: machine code, tensors, and lockstep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor

from equations import LOOPS, ROW_WISE, Equations, Loop, arctans, by_tensors, coupled, double_roots, square_roots
from hand_made_graphs import Handles, system_of
from neml2_aoti_plugin._solve.criteria import FINE
from neml2_aoti_plugin._solve.native import WantedDerivatives
from neml2_aoti_plugin._solve.outcome import Outcome, Solved
from neml2_aoti_plugin.settings import NewtonSettings

# Plain Newton's method; chord steps have tests of their own.
SETTINGS = NewtonSettings(atol=1e-6, rtol=1e-12, miters=60, ls_max_iters=1, chord_steps=False)
# Far from the root, Newton's method halves the iterate: each row of these needs some updates more than the one before.
SQUARES = torch.tensor([4.0, 9.0, 100.0, 1e4, 1e6, 1e8], dtype=torch.float64)

row_wise = pytest.mark.parametrize("solve", ROW_WISE.values(), ids=ROW_WISE)
every_loop = pytest.mark.parametrize("solve", LOOPS.values(), ids=LOOPS)


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).unsqueeze(-1)


def roots_of(solve: Loop, squares: Tensor, settings: NewtonSettings = SETTINGS) -> Solved:
    return solve(square_roots(), torch.ones(len(squares), 1, dtype=torch.float64), squares.unsqueeze(-1), settings)


def assert_solved(u: Tensor, squares: Tensor, settings: NewtonSettings = SETTINGS) -> None:
    """The last step leads as far below the limit of the residual as the criteria promise, but for rounding."""
    limit = (settings.rtol * (squares - 1.0).abs()).clamp(min=settings.atol)
    assert bool(((u * u - squares).abs() <= FINE * limit + 4e-16 * squares).all())


def newton(square: float, updates: int | None = None) -> tuple[int, float]:
    """Updates of the plain method until the test of the residual is met, or that many, and the last iterate."""
    u, k = 1.0, 0
    limit = max(SETTINGS.atol, SETTINGS.rtol * abs(square - 1.0))
    while k != updates and (updates is not None or abs(square - u * u) >= limit):
        u, k = u + (square - u * u) / (2.0 * u), k + 1
    return k, u


# -- when rows stop, and the last step --------------------------------------------------------------------------------


@row_wise
@pytest.mark.parametrize("copies", [1, 40])
def test_rows_stop_on_their_own_and_take_one_step_more(solve: Loop, copies: int) -> None:
    squares = SQUARES.repeat_interleave(copies)[torch.randperm(copies * len(SQUARES))]
    found = roots_of(solve, squares)
    assert found.statistics.all_converged
    assert_solved(found.unknowns[0].squeeze(-1), squares)
    assert found.statistics.iterations.tolist() == [newton(float(x))[0] for x in squares]
    assert len(set(found.statistics.iterations.tolist())) == len(SQUARES)
    assert torch.equal(found.statistics.norm0, (squares - 1.0).abs())


def test_rows_in_lockstep_take_as_many_updates_as_the_slowest() -> None:
    found = roots_of(LOOPS["lockstep"], SQUARES, replace(SETTINGS, rtol=0.0))
    assert found.statistics.iterations.tolist() == [newton(1e8)[0]] * 6
    torch.testing.assert_close(found.unknowns[0][:, 0], SQUARES.sqrt(), rtol=1e-14, atol=0.0)


@row_wise
def test_rows_that_are_done_cost_nothing(solve: Loop) -> None:
    equations = square_roots()
    # Of the first of them, the last step has a linearisation of its own.
    squares = SQUARES[1:]
    ones = torch.ones(len(squares), 1, dtype=torch.float64)
    found = solve(equations, ones, squares.unsqueeze(-1), SETTINGS)
    needed = sum(found.statistics.iterations.tolist())
    assert equations.jacobians == needed
    # A last step has a residual of its own; two of the rows are below the limit by so much that they take none.
    last = len(squares) - 2
    assert equations.residuals == needed + last + (len(squares) if solve is by_tensors else 0)


@row_wise
@pytest.mark.parametrize("rows", [1, 3, 200])
def test_last_step_has_its_own_jacobian_where_an_old_one_leads_too_short(solve: Loop, rows: int) -> None:
    roots = torch.linspace(0.0, 0.75, rows, dtype=torch.float64).unsqueeze(-1)
    found = solve(double_roots(), torch.ones_like(roots), roots, replace(SETTINGS, rtol=0.0))
    assert found.statistics.all_converged
    halved = found.statistics.iterations.unsqueeze(-1) + 1
    torch.testing.assert_close(found.unknowns[0] - roots, (1.0 - roots) * 0.5**halved, rtol=1e-6, atol=0.0)


def steepening(u: Tensor) -> Tensor:
    return u - 1.0 - 1e-8 * u * u + 1e4 * (u - 1.0).clamp(min=0.0)


def flattening(u: Tensor) -> Tensor:
    return u.atan() + 8.0 * (u + 10.0).clamp(max=0.0) + 1e8 * (u + 11.0).clamp(max=0.0) + u.clamp(min=0.0) ** 2


@row_wise
@pytest.mark.parametrize(
    ("f", "start", "settings", "updates", "most"),
    [
        # One step leads from 0 to 1, where 1e-8 is left; the slope is 1 on the way to 1, and 1e4 behind it.
        pytest.param(steepening, 0.0, SETTINGS, 1, 1.001e-8, id="by an old one"),
        # Two steps lead to -9.8, which meets the relative tolerance alone; the next one would lead to 133.
        *(
            pytest.param(flattening, -12.0, replace(SETTINGS, rtol=2e-8, chord_steps=on), 2, 2e-8, id=f"by a new {on}")
            for on in (False, True)
        ),
    ],
)
def test_no_last_step_lets_the_residual_grow(
    solve: Loop, f: Callable[[Tensor], Tensor], start: float, settings: NewtonSettings, updates: int, most: float
) -> None:
    def slope(u: Tensor, _: Tensor) -> Tensor:
        u = u.detach().requires_grad_()
        return torch.autograd.grad(f(u).sum(), u)[0].unsqueeze(-1)

    first = column(start, start, start)
    found = solve(Equations(lambda u, g: -f(u), slope), first, first, settings)
    assert found.statistics.all_converged and found.statistics.iterations.tolist() == [updates] * 3
    assert bool((f(found.unknowns[0]).abs() <= most * f(first).abs()).all())


@every_loop
def test_exact_zero_has_converged_whatever_the_tolerances(solve: Loop) -> None:
    found = solve(square_roots(), column(2.0), column(4.0), replace(SETTINGS, atol=0.0, rtol=0.0))
    assert found.statistics.all_converged and int(found.statistics.iterations[0]) == 0


@row_wise
def test_rows_at_their_root_are_left_alone(solve: Loop) -> None:
    g = SQUARES.unsqueeze(-1)
    u = torch.where(torch.arange(6).unsqueeze(-1) % 2 == 0, g.sqrt(), 1.0)
    found = solve(square_roots(), u, g, SETTINGS)
    assert found.statistics.iterations[::2].tolist() == [0, 0, 0]
    assert torch.equal(found.unknowns[0][::2], u[::2])
    assert found.statistics.all_converged


@every_loop
def test_no_rows(solve: Loop) -> None:
    none = torch.empty(0, 1, dtype=torch.float64)
    found = solve(square_roots(), none, none, SETTINGS)
    assert found.unknowns[0].shape == (0, 1) and found.statistics.all_converged


# -- rows that fail ---------------------------------------------------------------------------------------------------


@every_loop
def test_lost_rows_do_not_hold_up_the_others(solve: Loop) -> None:
    squares = SQUARES.repeat(50)
    squares[::7] = torch.nan
    squares[3] = -1.0  # has no root
    found = roots_of(solve, squares)
    good = squares > 0.0
    assert not found.statistics.all_converged
    assert found.statistics.converged.tolist() == good.tolist()
    torch.testing.assert_close(found.unknowns[0][good][:, 0], squares[good].sqrt(), rtol=1e-7, atol=0.0)
    assert (found.statistics.outcome[squares.isnan()] == Outcome.DIVERGED).all()
    if solve is not LOOPS["lockstep"]:
        assert_solved(found.unknowns[0][good].squeeze(-1), squares[good])
        assert (found.statistics.iterations[squares.isnan()] == 0).all()


@every_loop
@pytest.mark.parametrize("miters", [0, 1, 2, 4])
def test_rows_that_run_out_of_iterations(solve: Loop, miters: int) -> None:
    found = roots_of(solve, SQUARES, replace(SETTINGS, miters=miters))
    updates = max(miters - 1, 0)
    assert (found.statistics.outcome == Outcome.OUT_OF_ITERATIONS).all()
    assert (found.statistics.iterations == updates).all()
    u = torch.tensor([newton(x, updates)[1] for x in SQUARES.tolist()], dtype=torch.float64)
    torch.testing.assert_close(found.unknowns[0].squeeze(-1), u, rtol=1e-14, atol=0.0)
    torch.testing.assert_close(found.statistics.norm, (SQUARES - u * u).abs(), rtol=1e-13, atol=0.0)


@row_wise
def test_row_with_a_singular_jacobian_fails_by_that_name(solve: Loop) -> None:
    u = torch.ones(6, 1, dtype=torch.float64)
    u[2] = 0.0
    found = solve(square_roots(), u, SQUARES.unsqueeze(-1), SETTINGS)
    assert found.statistics.outcome.tolist() == [0, 0, int(Outcome.SINGULAR), 0, 0, 0]
    assert found.statistics.iterations[2] == 0 and found.unknowns[0][2] == 0.0
    others = torch.tensor([0, 1, 3, 4, 5])
    assert_solved(found.unknowns[0][others, 0], SQUARES[others])


@every_loop
@pytest.mark.parametrize("scale", [1e-150, 1.0, 1e150])
def test_norms_whose_squares_leave_the_range_of_a_double(solve: Loop, scale: float) -> None:
    squares = SQUARES * scale
    settings = replace(SETTINGS, atol=0.0, rtol=1e-9)
    u = torch.full((6, 1), scale**0.5, dtype=torch.float64)
    found = solve(square_roots(), u, squares.unsqueeze(-1), settings)
    assert found.statistics.all_converged
    torch.testing.assert_close(found.unknowns[0].squeeze(-1), squares.sqrt(), rtol=1e-9, atol=0.0)
    # The same problem in other units takes the same updates.
    assert found.statistics.iterations.tolist() == roots_of(solve, SQUARES, settings).statistics.iterations.tolist()


# -- line search and small steps --------------------------------------------------------------------------------------


def searched(settings: NewtonSettings, u: float) -> tuple[float, float]:
    """One update with line search on arctan, in plain Python: the iterate, and its step length."""
    b = -np.arctan(u)
    du = b * (1.0 + u * u)
    alpha = 1.0
    for _ in range(settings.ls_max_iters - 2):
        trial = np.arctan(u + alpha * du)
        slope = b * du if settings.ls_type == "BACKTRACKING" else b * b / 2.0
        if trial**2 <= max(b**2 - 2.0 * settings.ls_c * alpha * slope, settings.atol**2):
            break
        alpha /= settings.ls_cutback
    return float(u + alpha * du), alpha


@every_loop
@pytest.mark.parametrize("ls_type", ["BACKTRACKING", "STRONG_WOLFE"])
@pytest.mark.parametrize("ls_max_iters", [1, 2, 3, 12])
def test_line_search_of_each_row(solve: Loop, ls_type: Any, ls_max_iters: int) -> None:
    u = column(0.5, 1.3, 3.0, 20.0, -8.0)
    settings = NewtonSettings(1e-12, 0.0, 2, ls_type, ls_max_iters, ls_cutback=3.0, ls_c=0.2, chord_steps=False)
    found = solve(arctans(), u, torch.zeros_like(u), settings)
    expected = [searched(settings, float(x)) for x in u[:, 0]]
    torch.testing.assert_close(found.unknowns[0], column(*(x for x, _ in expected)), rtol=1e-13, atol=0.0)
    assert len({alpha for _, alpha in expected}) > 1 or ls_max_iters <= 2
    # Full steps diverge, and so do those that are not cut back enough.
    found = solve(arctans(), u, torch.zeros_like(u), replace(settings, miters=60, ls_c=1e-3))
    assert found.statistics.all_converged == (ls_max_iters == 12)


@every_loop
def test_small_steps_are_asked_for_where_they_are(solve: Loop) -> None:
    """Newton on u^2 from far off halves u, so the residual falls by 4 a step while the step stays as large as u."""
    settings = replace(SETTINGS, atol=1e-8, rtol=1e-3, substep_del_tol=1e-6)

    def updates(settings: NewtonSettings, **options: bool) -> int:
        found = solve(square_roots(), column(1e3), column(0.0), settings, **options)
        assert found.statistics.all_converged
        return int(found.statistics.iterations)

    assert updates(settings) == updates(replace(settings, substep_del_tol=10.0), small_steps=True) == 5
    assert updates(settings, small_steps=True) > 15


@row_wise
def test_line_search_goes_on_where_a_small_step_is_wanting(solve: Loop) -> None:
    """Full steps on arctan lead off for ever; beside an unknown in other units they meet the relative tolerance."""
    units = torch.tensor([1.0, 1e9], dtype=torch.float64)

    def residual(u: Tensor, g: Tensor) -> Tensor:
        return -units * torch.stack([u[:, 0].atan(), u[:, 1] - 1.0], -1)

    def jacobian(u: Tensor, g: Tensor) -> Tensor:
        return torch.diag_embed(units * torch.stack([1.0 / (1.0 + u[:, 0] ** 2), torch.ones(len(u))], -1))

    start = torch.tensor([[3.0, 0.0]], dtype=torch.float64)
    settings = replace(SETTINGS, atol=1e-12, rtol=2e-9, ls_max_iters=10)
    found = solve(Equations(residual, jacobian), start, start, settings, small_steps=True)
    assert found.statistics.all_converged
    assert abs(float(found.unknowns[0][0, 0])) < 1e-9


def test_rows_in_lockstep_that_have_converged_wait_for_nobody() -> None:
    """A zero step never satisfies STRONG_WOLFE; a row that rests must not keep the others in the line search."""
    cubic = Equations(lambda u, g: g - u**3 - u, lambda u, g: (3.0 * u * u + 1.0).unsqueeze(-1))
    settings = NewtonSettings(1e-30, 1e-2, 3, "STRONG_WOLFE", ls_max_iters=10, substep_del_tol=1.0)
    one_update = LOOPS["lockstep"](cubic, column(1.001, 2.2), column(2.0, 10.0), replace(settings, miters=2))
    assert one_update.statistics.converged.tolist() == [True, False]
    cubic.residuals = 0
    found = LOOPS["lockstep"](cubic, column(1.001, 2.2), column(2.0, 10.0), settings, small_steps=True)
    assert found.statistics.all_converged and found.statistics.iterations.tolist() == [2, 2]
    # Of two rows at the start and after each update.
    assert cubic.residuals == 2 * 3


# -- chord steps ------------------------------------------------------------------------------------------------------


@dataclass
class Traub:
    """Newton's method with chord steps on one equation, in plain Python."""

    f: Callable[[Any], Any]
    slope: Callable[[Any], Any]
    kept: int = 0
    taken_back: int = 0

    def updates(self, u: float, atol: float) -> tuple[int, float]:
        """Updates until the function is below a tolerance, and the last iterate."""
        for k in range(100):
            if abs(self.f(u)) < atol:
                return k, u
            slope, before = self.slope(u), abs(self.f(u))
            u -= self.f(u) / slope
            if atol <= abs(self.f(u)) <= 0.5 * before:
                further = u - self.f(u) / slope
                falls = abs(self.f(further)) < abs(self.f(u))
                self.kept, self.taken_back = self.kept + falls, self.taken_back + (not falls)
                u = further if falls else u
        raise AssertionError("no root")


@row_wise
@pytest.mark.parametrize("copies", [1, 40])
def test_chord_steps(solve: Loop, copies: int) -> None:
    expected = {}
    for square in SQUARES.tolist():
        method = Traub(lambda u, square=square: u * u - square, lambda u: 2.0 * u)  # type: ignore[misc]
        expected[square] = method.updates(1.0, SETTINGS.atol)[0]
        assert method.kept > 0 and expected[square] < newton(square)[0]
    squares = SQUARES.repeat_interleave(copies)[torch.randperm(copies * len(SQUARES))]
    settings = replace(SETTINGS, rtol=0.0, chord_steps=True)
    found = roots_of(solve, squares, settings)
    assert found.statistics.all_converged
    assert_solved(found.unknowns[0].squeeze(-1), squares, settings)
    assert found.statistics.iterations.tolist() == [expected[x] for x in squares.tolist()]


@row_wise
def test_chord_steps_that_let_the_residual_grow_are_taken_back(solve: Loop) -> None:
    """The slope is 1 at the initial guess 0 and 4.8 at the next one, 1, where the function is 0.4."""
    method = Traub(lambda u: ((3.0 * u - 2.6) * u + 1.0) * u - 1.0, lambda u: (9.0 * u - 5.2) * u + 1.0)
    expected, root = method.updates(0.0, 1e-6)
    assert method.taken_back > 0
    cubic = Equations(lambda u, g: -method.f(u), lambda u, g: method.slope(u).unsqueeze(-1))
    zero = torch.zeros(3, 1, dtype=torch.float64)
    found = solve(cubic, zero, zero, replace(SETTINGS, rtol=0.0, chord_steps=True))
    assert found.statistics.all_converged and found.statistics.iterations.tolist() == [expected] * 3
    torch.testing.assert_close(found.unknowns[0], torch.full_like(zero, root), rtol=1e-6, atol=0.0)


@row_wise
@pytest.mark.parametrize("ls_max_iters", [3, 12])
def test_no_chord_step_follows_a_step_that_was_cut_back(solve: Loop, ls_max_iters: int) -> None:
    """From beyond 1.39 the first step on arctan is cut back; from 0.8 it is not, and a chord step follows."""
    u = column(3.0, 20.0, 0.8)
    settings = NewtonSettings(atol=0.25, rtol=0.0, miters=2, ls_max_iters=ls_max_iters, ls_cutback=8.0)
    plain, chord = (solve(arctans(), u, torch.zeros_like(u), replace(settings, chord_steps=on)) for on in (False, True))
    assert torch.equal(plain.unknowns[0][:2], chord.unknowns[0][:2])
    assert plain.statistics.converged.tolist() == [False] * 3
    assert chord.statistics.converged.tolist() == [False, False, True]


# -- systems ----------------------------------------------------------------------------------------------------------


@every_loop
def test_coupled_rows_agree_with_scipy(solve: Loop) -> None:
    equations = coupled()
    g = 10.0 * torch.randn(40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    found = solve(equations, torch.zeros_like(g), g, replace(SETTINGS, ls_max_iters=10, chord_steps=True))
    assert found.statistics.all_converged
    for row in range(0, 40, 7):

        def residual(x: Any, row: int = row) -> Any:
            return -equations.residual(torch.from_numpy(x)[None], g[row : row + 1])[0].numpy()

        expected = scipy.optimize.root(residual, np.zeros(5), tol=1e-14)
        np.testing.assert_allclose(found.unknowns[0][row].numpy(), expected.x, rtol=1e-9, atol=1e-10)


@every_loop
@pytest.mark.parametrize("tolerance", [1e-6, 1e-8, 1e-10])
def test_bits_of_a_row_are_independent_of_the_rest_of_the_batch(solve: Loop, tolerance: float) -> None:
    settings = NewtonSettings(atol=tolerance, rtol=tolerance, ls_max_iters=6)
    # In lockstep, rows that rest when they have converged are asked for by the test of small steps.
    lockstep = solve is LOOPS["lockstep"]
    options = {"small_steps": True} if lockstep else {}
    generator = torch.Generator().manual_seed(6)
    g = torch.logspace(-3, 3, 65, dtype=torch.float64).unsqueeze(-1) * torch.randn(
        65, 5, dtype=torch.float64, generator=generator
    )
    together = solve(coupled(), torch.zeros_like(g), g, settings, **options)
    order = torch.randperm(65, generator=generator)
    shuffled = solve(coupled(), torch.zeros_like(g), g[order], settings, **options)
    assert together.statistics.all_converged
    assert torch.equal(shuffled.unknowns[0], together.unknowns[0][order])
    for row in range(65):
        alone = solve(coupled(), torch.zeros(1, 5, dtype=torch.float64), g[row : row + 1], settings, **options)
        assert torch.equal(alone.unknowns[0][0], together.unknowns[0][row])
        assert lockstep or int(alone.statistics.iterations) == int(together.statistics.iterations[row])


# -- derivatives by machine code --------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 7, 19, 30])
def test_derivatives_of_small_systems(n: int) -> None:
    """Of rows that are solved as they begin; one has a Jacobian without an inverse."""
    generator = torch.Generator().manual_seed(n)
    a = torch.randn(9, n, n, dtype=torch.float64, generator=generator) + 3.0 * torch.eye(n, dtype=torch.float64)
    b = torch.randn(9, n, 4, dtype=torch.float64, generator=generator)
    directions = torch.randn(9, 4, 2, dtype=torch.float64, generator=generator)
    a[5, 0] = 0.0
    # Which row it is.
    g = torch.arange(9.0, dtype=torch.float64)[:, None].expand(9, 4).contiguous()
    handles = Handles()
    system = system_of(
        handles,
        lambda u, g: [torch.zeros_like(u)],
        lambda u, g: [a[g[:, 0].long()], torch.zeros_like(u)],
        n,
        4,
        by_givens=lambda u, g: [b[g[:, 0].long()]],
    )
    good = torch.arange(9) != 5
    for wanted, right in (
        (WantedDerivatives([2, 0]), b[..., [2, 0]]),
        (WantedDerivatives(directions=directions), b @ directions),
        (WantedDerivatives(directions=directions[:1]), b @ directions[:1]),
    ):
        found = system.run(torch.zeros(9, n, dtype=torch.float64), g, NewtonSettings(), wanted=wanted).derivatives
        handles.require_none_left()
        assert found is not None
        torch.testing.assert_close(found[good], -torch.linalg.solve(a[good], right[good]), rtol=1e-10, atol=1e-12)
        assert bool(found[5].isnan().all())
    none = torch.empty(0, n, dtype=torch.float64)
    for wanted, columns in ((WantedDerivatives([1]), 1), (WantedDerivatives(directions=none.new_empty(0, 4, 3)), 3)):
        found = system.run(none, g[:0], NewtonSettings(), wanted=wanted).derivatives
        assert found is not None and found.shape == (0, n, columns)
