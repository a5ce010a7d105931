"""The Newton loop on systems written down here, whose roots are known in closed form, with both implementations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor

from hand_made_graphs import system_of
from neml2_aoti_plugin._solve.criteria import FINE
from neml2_aoti_plugin._solve.native import Derivatives
from neml2_aoti_plugin._solve.outcome import Listener, Outcome, Solved
from neml2_aoti_plugin._solve.system import Group, Groups, Linearisation, System
from neml2_aoti_plugin._solve.tensors import solve_rows
from neml2_aoti_plugin.settings import NewtonSettings

# Plain Newton's method; chord steps have tests of their own.
SETTINGS = NewtonSettings(atol=1e-6, rtol=1e-12, miters=60, ls_max_iters=1, chord_steps=False)
# Far from the root, Newton's method halves the iterate: each row of these needs some updates more than the one before.
SQUARES = torch.tensor([4.0, 9.0, 100.0, 1e4, 1e6, 1e8], dtype=torch.float64)


@dataclass
class Equations:
    """`r(u, g) = 0` row by row, with the Jacobian; counts the different rows that were evaluated.

    Machine code fills the rows of a call up to whole vectors by copies of the first one.
    """

    # `-r`, `(rows, n)`.
    residual: Callable[[Tensor, Tensor], Tensor]
    # `dr/du`, `(rows, n, n)`.
    jacobian: Callable[[Tensor, Tensor], Tensor]
    residuals: int = 0
    jacobians: int = 0

    def b(self, u: Tensor, g: Tensor) -> Tensor:
        self.residuals += different(u, g)
        return self.residual(u, g)

    def linearised(self, u: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        self.jacobians += different(u, g)
        return self.residual(u, g), self.jacobian(u, g)


def different(u: Tensor, g: Tensor) -> int:
    """How many different rows there are."""
    return len(torch.cat([u, g], 1).unique(dim=0))


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
        return [self.equations.b(u[0], self.g)]

    def linearise(self, u: Groups) -> tuple[Groups, Linearisation]:
        b, a = self.equations.linearised(u[0], self.g)
        return [b], Factored(a)

    def take(self, rows: Tensor) -> System:
        return Bound(self.equations, self.g[rows])


def by_machine_code(
    equations: Equations,
    u: Tensor,
    g: Tensor,
    settings: NewtonSettings,
    listener: Listener | None = None,
    **options: bool,
) -> Solved:
    system, handles, *_ = system_of(
        lambda u, g: [equations.b(u, g)],
        lambda u, g: equations.linearised(u, g)[::-1],
        u.shape[1],
        g.shape[1],
    )
    found = system.solve(u, g, [], settings, listener=listener, **options)
    assert not handles.alive and not handles.strays
    return found


def by_tensors(
    equations: Equations,
    u: Tensor,
    g: Tensor,
    settings: NewtonSettings,
    listener: Listener | None = None,
    **options: bool,
) -> Solved:
    layout = (Group("dense"),)
    whole = Bound(equations, g)

    def system(rows: Tensor | None) -> System:
        return whole if rows is None else whole.take(rows)

    return solve_rows(system, [u], (layout, layout), settings, listener=listener, **options)


IMPLEMENTATIONS = {"machine code": by_machine_code, "tensors": by_tensors}
Implementation = Callable[..., Solved]


@pytest.fixture(params=IMPLEMENTATIONS)
def solve(request: pytest.FixtureRequest) -> Implementation:
    found: Implementation = IMPLEMENTATIONS[request.param]
    return found


def square_roots() -> Equations:
    """`u^2 = g`."""
    return Equations(lambda u, g: g - u * u, lambda u, g: 2.0 * u.unsqueeze(-1))


def double_roots() -> Equations:
    """`(u - g)^2 = 0`, where Newton's method halves the distance in each step, and no more."""
    return Equations(lambda u, g: -((u - g) ** 2), lambda u, g: 2.0 * (u - g).unsqueeze(-1))


def coupled() -> Equations:
    """`M u + u^3 = g` with a fixed positive definite `M`; one root for each `g`."""
    factor = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    m = factor @ factor.T / 5 + torch.eye(5, dtype=torch.float64)
    # Row by row, in a fixed order: a product of matrices may round a row by its place.
    return Equations(
        lambda u, g: g - (m * u.unsqueeze(-2)).cumsum(-1)[..., -1] - u**3,
        lambda u, g: m + torch.diag_embed(3.0 * u * u),
    )


def roots_of(solve: Implementation, squares: Tensor, settings: NewtonSettings = SETTINGS) -> Solved:
    return solve(square_roots(), torch.ones(len(squares), 1, dtype=torch.float64), squares.unsqueeze(-1), settings)


def assert_solved(u: Tensor, squares: Tensor, settings: NewtonSettings = SETTINGS) -> None:
    """The last step leads as far below the limit of the residual as the criteria promise, but for rounding."""
    limit = (settings.rtol * (squares - 1.0).abs()).clamp(min=settings.atol)
    assert bool(((u * u - squares).abs() <= FINE * limit + 4e-16 * squares).all())


def updates(square: float) -> int:
    """Updates until the test of the residual is met."""
    u, k = 1.0, 0
    while abs(square - u * u) >= max(SETTINGS.atol, SETTINGS.rtol * abs(square - 1.0)):
        u, k = u + (square - u * u) / (2.0 * u), k + 1
    return k


@pytest.mark.parametrize("copies", [1, 40])
def test_rows_stop_on_their_own_and_take_one_step_more(solve: Implementation, copies: int) -> None:
    squares = SQUARES.repeat_interleave(copies)[torch.randperm(copies * len(SQUARES))]
    found = roots_of(solve, squares)
    assert found.statistics.all_converged
    assert_solved(found.unknowns[0].squeeze(-1), squares)
    assert found.statistics.iterations.tolist() == [updates(float(x)) for x in squares]
    assert len(set(found.statistics.iterations.tolist())) == len(SQUARES)
    assert torch.equal(found.statistics.norm0, (squares - 1.0).abs())


def test_rows_that_are_done_cost_nothing(solve: Implementation) -> None:
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


@pytest.mark.parametrize("rows", [1, 3, 200])
def test_last_step_has_its_own_jacobian_where_an_old_one_leads_too_short(solve: Implementation, rows: int) -> None:
    roots = torch.linspace(0.0, 0.75, rows, dtype=torch.float64).unsqueeze(-1)
    found = solve(double_roots(), torch.ones_like(roots), roots, replace(SETTINGS, rtol=0.0))
    assert found.statistics.all_converged
    halved = found.statistics.iterations.unsqueeze(-1) + 1
    torch.testing.assert_close(found.unknowns[0] - roots, (1.0 - roots) * 0.5**halved, rtol=1e-6, atol=0.0)


def test_no_last_step_by_an_old_jacobian_lets_the_residual_grow(solve: Implementation) -> None:
    """One step leads from 0 to 1, where 1e-8 is left; the slope is 1 on the way to 1, and 1e4 behind it."""

    def f(u: Tensor) -> Tensor:
        return u - 1.0 - 1e-8 * u * u + 1e4 * (u - 1.0).clamp(min=0.0)

    steepens = Equations(lambda u, g: -f(u), lambda u, g: (1.0 - 2e-8 * u + 1e4 * (u > 1.0)).unsqueeze(-1))
    zero = torch.zeros(3, 1, dtype=torch.float64)
    found = solve(steepens, zero, zero, SETTINGS)
    assert found.statistics.all_converged and found.statistics.iterations.tolist() == [1, 1, 1]
    assert bool((f(found.unknowns[0]).abs() <= 1.001e-8).all())


@pytest.mark.parametrize("chord_steps", [False, True])
def test_no_last_step_by_a_new_jacobian_lets_the_residual_grow(solve: Implementation, chord_steps: bool) -> None:
    """Two steps lead to -9.8, which meets the relative tolerance alone; the next one would lead to 133."""

    def f(u: Tensor) -> Tensor:
        return u.atan() + 8.0 * (u + 10.0).clamp(max=0.0) + 1e8 * (u + 11.0).clamp(max=0.0) + u.clamp(min=0.0) ** 2

    def slope(u: Tensor) -> Tensor:
        return 1.0 / (1.0 + u * u) + 8.0 * (u < -10.0) + 1e8 * (u < -11.0) + 2.0 * u.clamp(min=0.0)

    flattens = Equations(lambda u, g: -f(u), lambda u, g: slope(u).unsqueeze(-1))
    start = torch.full((3, 1), -12.0, dtype=torch.float64)
    found = solve(flattens, start, start, replace(SETTINGS, rtol=2e-8, chord_steps=chord_steps))
    assert found.statistics.all_converged and found.statistics.iterations.tolist() == [2, 2, 2]
    assert bool((f(found.unknowns[0]).abs() <= 2e-8 * f(start).abs()).all())


def test_lost_rows_do_not_hold_up_the_others(solve: Implementation) -> None:
    squares = SQUARES.repeat(50)
    squares[::7] = torch.nan
    squares[3] = -1.0  # has no root
    found = roots_of(solve, squares)
    good = squares > 0.0
    assert not found.statistics.all_converged
    assert found.statistics.converged.tolist() == good.tolist()
    assert_solved(found.unknowns[0][good].squeeze(-1), squares[good])
    outcome = found.statistics.outcome
    assert (outcome[squares.isnan()] == Outcome.DIVERGED).all()
    assert (found.statistics.iterations[squares.isnan()] == 0).all()


@pytest.mark.parametrize("miters", [0, 1, 2, 4])
def test_rows_that_run_out_of_iterations(solve: Implementation, miters: int) -> None:
    found = roots_of(solve, SQUARES, replace(SETTINGS, miters=miters))
    assert (found.statistics.outcome == Outcome.OUT_OF_ITERATIONS).all()
    assert (found.statistics.iterations == max(miters - 1, 0)).all()
    u = torch.ones_like(SQUARES)
    for _ in range(max(miters - 1, 0)):
        u = u + (SQUARES - u * u) / (2.0 * u)
    torch.testing.assert_close(found.unknowns[0].squeeze(-1), u, rtol=1e-14, atol=0.0)
    torch.testing.assert_close(found.statistics.norm, (SQUARES - u * u).abs(), rtol=1e-13, atol=0.0)


def test_row_with_a_singular_jacobian_fails_by_that_name(solve: Implementation) -> None:
    g = SQUARES.unsqueeze(-1)
    u = torch.ones_like(g)
    u[2] = 0.0
    found = solve(square_roots(), u, g, SETTINGS)
    assert found.statistics.outcome.tolist() == [0, 0, int(Outcome.SINGULAR), 0, 0, 0]
    assert found.statistics.iterations[2] == 0 and found.unknowns[0][2] == 0.0
    others = torch.tensor([0, 1, 3, 4, 5])
    assert_solved(found.unknowns[0][others, 0], SQUARES[others])


def test_rows_at_their_root_are_left_alone(solve: Implementation) -> None:
    g = SQUARES.unsqueeze(-1)
    u = torch.where(torch.arange(6).unsqueeze(-1) % 2 == 0, g.sqrt(), 1.0)
    found = solve(square_roots(), u, g, SETTINGS)
    assert found.statistics.iterations[::2].tolist() == [0, 0, 0]
    assert torch.equal(found.unknowns[0][::2], u[::2])
    assert found.statistics.all_converged


def test_exact_zero_has_converged_whatever_the_tolerances(solve: Implementation) -> None:
    g = torch.tensor([[4.0]], dtype=torch.float64)
    found = solve(square_roots(), g.sqrt(), g, replace(SETTINGS, atol=0.0, rtol=0.0))
    assert found.statistics.all_converged and int(found.statistics.iterations[0]) == 0


def test_no_rows(solve: Implementation) -> None:
    none = torch.empty(0, 1, dtype=torch.float64)
    found = solve(square_roots(), none, none, SETTINGS)
    assert found.unknowns[0].shape == (0, 1) and found.statistics.all_converged


@pytest.mark.parametrize("scale", [1e-150, 1.0, 1e150])
def test_norms_whose_squares_leave_the_range_of_a_double(solve: Implementation, scale: float) -> None:
    squares = SQUARES * scale
    settings = replace(SETTINGS, atol=0.0, rtol=1e-9)
    u = torch.full((6, 1), scale**0.5, dtype=torch.float64)
    found = solve(square_roots(), u, squares.unsqueeze(-1), settings)
    assert found.statistics.all_converged
    torch.testing.assert_close(found.unknowns[0].squeeze(-1), squares.sqrt(), rtol=1e-13, atol=0.0)
    # The same problem in other units takes the same updates.
    assert found.statistics.iterations.tolist() == roots_of(solve, SQUARES, settings).statistics.iterations.tolist()


@pytest.mark.parametrize("ls_type", ["BACKTRACKING", "STRONG_WOLFE"])
@pytest.mark.parametrize("ls_max_iters", [2, 3, 12])
def test_line_search_of_each_row(solve: Implementation, ls_type: Any, ls_max_iters: int) -> None:
    """Newton's method on arctan diverges from beyond 1.39; the steps are checked against plain Python."""
    arctan = Equations(lambda u, g: -torch.atan(u), lambda u, g: (1.0 / (1.0 + u * u)).unsqueeze(-1))
    u = torch.tensor([[0.5], [1.3], [3.0], [20.0], [-8.0]], dtype=torch.float64)
    settings = NewtonSettings(
        atol=1e-12, rtol=0.0, miters=2, ls_type=ls_type, ls_max_iters=ls_max_iters, ls_cutback=3.0, ls_c=0.2
    )
    settings = replace(settings, chord_steps=False)
    found = solve(arctan, u, torch.zeros_like(u), settings)
    expected = [_one_update(settings, float(x)) for x in u[:, 0]]
    torch.testing.assert_close(
        found.unknowns[0][:, 0], torch.tensor([x for x, _ in expected], dtype=torch.float64), rtol=1e-13, atol=0.0
    )
    assert len({alpha for _, alpha in expected}) > 1 or ls_max_iters == 2
    found = solve(arctan, u, torch.zeros_like(u), replace(settings, miters=60, ls_c=1e-3))
    assert found.statistics.all_converged == (ls_max_iters == 12)


def _one_update(settings: NewtonSettings, u: float) -> tuple[float, float]:
    b = -np.arctan(u)
    du = b * (1.0 + u * u)
    alpha = 1.0
    for _ in range(settings.ls_max_iters - 2):
        trial = np.arctan(u + alpha * du)
        slope = b * du if settings.ls_type == "BACKTRACKING" else b * b / 2.0
        if trial**2 <= b**2 - 2.0 * settings.ls_c * alpha * slope:
            break
        alpha /= settings.ls_cutback
    return float(u + alpha * du), alpha


def test_small_steps_are_asked_for_where_they_are(solve: Implementation) -> None:
    """Newton on u^2 from far off halves u, so the residual falls by 4 a step while the step stays as large as u."""
    settings = replace(SETTINGS, atol=1e-8, rtol=1e-3, substep_del_tol=1e-6)
    start, zero = torch.full((1, 1), 1e3, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    assert int(solve(square_roots(), start, zero, settings).statistics.iterations) == 5
    found = solve(square_roots(), start, zero, settings, small_steps=True)
    assert found.statistics.all_converged and int(found.statistics.iterations) > 15
    loose = replace(settings, substep_del_tol=10.0)
    assert int(solve(square_roots(), start, zero, loose, small_steps=True).statistics.iterations) == 5


def test_line_search_goes_on_where_a_small_step_is_wanting(solve: Implementation) -> None:
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


@pytest.mark.parametrize("copies", [1, 40])
def test_chord_steps(solve: Implementation, copies: int) -> None:
    expected = {}
    for square in SQUARES.tolist():
        method = Traub(lambda u, square=square: u * u - square, lambda u: 2.0 * u)  # type: ignore[misc]
        expected[square] = method.updates(1.0, SETTINGS.atol)[0]
        assert method.kept > 0 and expected[square] < updates(square)
    squares = SQUARES.repeat_interleave(copies)[torch.randperm(copies * len(SQUARES))]
    settings = replace(SETTINGS, rtol=0.0, chord_steps=True)
    found = roots_of(solve, squares, settings)
    assert found.statistics.all_converged
    assert_solved(found.unknowns[0].squeeze(-1), squares, settings)
    assert found.statistics.iterations.tolist() == [expected[x] for x in squares.tolist()]


def test_chord_steps_that_let_the_residual_grow_are_taken_back(solve: Implementation) -> None:
    """The slope is 1 at the initial guess 0 and 4.8 at the next one, 1, where the function is 0.4."""
    method = Traub(lambda u: ((3.0 * u - 2.6) * u + 1.0) * u - 1.0, lambda u: (9.0 * u - 5.2) * u + 1.0)
    expected, root = method.updates(0.0, 1e-6)
    assert method.taken_back > 0
    cubic = Equations(lambda u, g: -method.f(u), lambda u, g: method.slope(u).unsqueeze(-1))
    zero = torch.zeros(3, 1, dtype=torch.float64)
    found = solve(cubic, zero, zero, replace(SETTINGS, rtol=0.0, chord_steps=True))
    assert found.statistics.all_converged and found.statistics.iterations.tolist() == [expected] * 3
    torch.testing.assert_close(found.unknowns[0], torch.full_like(zero, root), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("ls_max_iters", [3, 12])
def test_no_chord_step_follows_a_step_that_was_cut_back(solve: Implementation, ls_max_iters: int) -> None:
    """From beyond 1.39 the first step on arctan is cut back; from 0.8 it is not, and a chord step follows."""
    arctan = Equations(lambda u, g: -torch.atan(u), lambda u, g: (1.0 / (1.0 + u * u)).unsqueeze(-1))
    u = torch.tensor([[3.0], [20.0], [0.8]], dtype=torch.float64)
    settings = NewtonSettings(atol=0.25, rtol=0.0, miters=2, ls_max_iters=ls_max_iters, ls_cutback=8.0)
    plain, chord = (solve(arctan, u, torch.zeros_like(u), replace(settings, chord_steps=on)) for on in (False, True))
    assert torch.equal(plain.unknowns[0][:2], chord.unknowns[0][:2])
    assert plain.statistics.converged.tolist() == [False] * 3
    assert chord.statistics.converged.tolist() == [False, False, True]


def test_coupled_rows_agree_with_scipy(solve: Implementation) -> None:
    equations = coupled()
    g = 10.0 * torch.randn(40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    found = solve(equations, torch.zeros_like(g), g, replace(SETTINGS, ls_max_iters=10, chord_steps=True))
    assert found.statistics.all_converged
    for row in range(0, 40, 7):

        def residual(x: Any, row: int = row) -> Any:
            return -equations.residual(torch.from_numpy(x)[None], g[row : row + 1])[0].numpy()

        expected = scipy.optimize.root(residual, np.zeros(5), tol=1e-14)
        np.testing.assert_allclose(found.unknowns[0][row].numpy(), expected.x, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("tolerance", [1e-6, 1e-8, 1e-10])
def test_bits_of_a_row_are_independent_of_the_rest_of_the_batch(solve: Implementation, tolerance: float) -> None:
    settings = NewtonSettings(atol=tolerance, rtol=tolerance, ls_max_iters=6)
    generator = torch.Generator().manual_seed(6)
    g = torch.logspace(-3, 3, 65, dtype=torch.float64).unsqueeze(-1) * torch.randn(
        65, 5, dtype=torch.float64, generator=generator
    )
    together = solve(coupled(), torch.zeros_like(g), g, settings)
    order = torch.randperm(65, generator=generator)
    shuffled = solve(coupled(), torch.zeros_like(g), g[order], settings)
    assert torch.equal(shuffled.unknowns[0], together.unknowns[0][order])
    for row in range(65):
        alone = solve(coupled(), torch.zeros(1, 5, dtype=torch.float64), g[row : row + 1], settings)
        assert torch.equal(alone.unknowns[0][0], together.unknowns[0][row])
        assert int(alone.statistics.iterations) == int(together.statistics.iterations[row])


@pytest.mark.parametrize("n", [1, 2, 7, 19, 30])
def test_derivatives_of_small_systems(n: int) -> None:
    """Of rows that are solved as they begin; one has a Jacobian without an inverse."""
    generator = torch.Generator().manual_seed(n)
    a = torch.randn(9, n, n, dtype=torch.float64, generator=generator) + 3.0 * torch.eye(n, dtype=torch.float64)
    b = torch.randn(9, n, 4, dtype=torch.float64, generator=generator)
    directions = torch.randn(9, 4, 2, dtype=torch.float64, generator=generator)
    a[5, 0] = 0.0
    g = torch.arange(9.0, dtype=torch.float64)[:, None].expand(9, 4).contiguous()

    def of_rows(x: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda u, g: x[g[:, 0].long()]

    system, handles, *_ = system_of(
        lambda u, g: [torch.zeros_like(u)],
        lambda u, g: [of_rows(a)(u, g), torch.zeros_like(u)],
        n,
        4,
        by_givens=lambda u, g: [of_rows(b)(u, g)],
    )
    for wanted, right in (
        (Derivatives([2, 0]), b[..., [2, 0]]),
        (Derivatives(directions=directions), b @ directions),
        (Derivatives(directions=directions[:1]), b @ directions[:1]),
    ):
        found = system.run(torch.zeros(9, n, dtype=torch.float64), g, [], NewtonSettings(), wanted=wanted).derivatives
        assert found is not None and not handles.alive and not handles.strays
        good = torch.arange(9) != 5
        torch.testing.assert_close(found[good], -torch.linalg.solve(a[good], right[good]), rtol=1e-10, atol=1e-12)
        assert bool(found[5].isnan().all())


def test_derivatives_of_no_rows() -> None:
    system, *_ = system_of(lambda u, g: [u], lambda u, g: [u.unsqueeze(-1), u], 1, 2, by_givens=lambda u, g: [g])
    none = torch.empty(0, 1, dtype=torch.float64)
    for wanted, columns in ((Derivatives([1]), 1), (Derivatives(directions=none.new_empty(0, 2, 3)), 3)):
        found = system.run(none, none.expand(0, 2), [], NewtonSettings(), wanted=wanted).derivatives
        assert found is not None and found.shape == (0, 1, columns)
