"""Newton in lockstep: roots known in closed form or from scipy, counts, failures, masks, line search, logs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from functools import partial
from typing import Literal, TypeAlias

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from neml2_aoti_plugin import _log as log
from neml2_aoti_plugin._host.binding import newton_solve_eager, newton_solve_eager_masked
from neml2_aoti_plugin._solve import system as layout
from neml2_aoti_plugin._solve.system import Group
from neml2_aoti_plugin.errors import ConvergenceError
from neml2_aoti_plugin.settings import NewtonSettings

DENSE = [("dense", ())]
# The settings that neml2's entry points take; the others are of the row-wise mode.
NATIVE_SETTINGS = 8
TIGHT = NewtonSettings(atol=1e-10, rtol=1e-12, miters=40)


LineSearch: TypeAlias = Literal["BACKTRACKING", "STRONG_WOLFE"]


@dataclass
class Problem:
    """A residual and its derivative, entry by entry: `r(u) = f(u) - c`; it counts what it evaluates."""

    f: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    c: Tensor
    residuals: int = 0
    steps: int = 0

    def residual(self, u: list[Tensor]) -> list[Tensor]:
        self.residuals += 1
        return [self.c - self.f(u[0])]

    def step(self, u: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        self.steps += 1
        b = self.c - self.f(u[0])
        return [b / self.slope(u[0])], [b]

    def solve(self, u0: Tensor, settings: NewtonSettings, trace: list[str] | None = None) -> tuple[Tensor, int]:
        solve = partial(newton_solve_eager, collect_log=trace is not None)
        u, converged, iterations, lines = solve(
            self.residual, self.step, DENSE, DENSE, [u0], *astuple(settings)[:NATIVE_SETTINGS]
        )
        assert converged
        if trace is not None:
            trace.extend(lines)
        return u[0], iterations

    def solve_masked(self, u0: Tensor, settings: NewtonSettings) -> tuple[Tensor, Tensor, int]:
        u, mask, iterations = newton_solve_eager_masked(
            self.residual, self.step, DENSE, DENSE, [u0], *astuple(settings)[:NATIVE_SETTINGS]
        )
        return u[0], mask, iterations


def cubic(c: Tensor) -> Problem:
    return Problem(lambda u: u**3 + u, lambda u: 3 * u**2 + 1, c)


def cubic_root(c: Tensor) -> Tensor:
    """The real root of u^3 + u = c, by the hyperbolic form of Cardano's formula."""
    return 2 / math.sqrt(3) * torch.sinh(torch.asinh(1.5 * math.sqrt(3) * c) / 3)


def steps_alone(c: float, u: float, settings: NewtonSettings) -> int:
    """How many updates the cubic takes by itself, in plain Python."""
    norm0 = abs(c - u**3 - u)
    for i in range(settings.miters):
        norm = abs(c - u**3 - u)
        if norm < settings.atol or norm / norm0 < settings.rtol:
            return i
        u += (c - u**3 - u) / (3 * u**2 + 1)
    raise AssertionError("the cubic converges")


C = torch.tensor([[0.1], [3.0], [-30.0], [1000.0]], dtype=torch.float64)


def test_a_closed_form_and_the_count_of_the_slowest_row() -> None:
    problem = cubic(C)
    u, iterations = problem.solve(torch.ones_like(C), TIGHT)
    torch.testing.assert_close(u, cubic_root(C), rtol=1e-12, atol=0)
    assert iterations == max(steps_alone(c, 1.0, TIGHT) for c in C[:, 0].tolist())
    assert (problem.residuals, problem.steps) == (iterations + 1, iterations)


@pytest.mark.parametrize("batch", [(), (0,), (1,), (2, 3)])
def test_any_batch_shape(batch: tuple[int, ...]) -> None:
    c = torch.linspace(-3, 4, math.prod(batch) * 2, dtype=torch.float64).reshape(*batch, 2)
    u, _ = cubic(c).solve(torch.zeros_like(c), TIGHT)
    assert u.shape == c.shape
    torch.testing.assert_close(u, cubic_root(c))
    u, mask, _ = cubic(c).solve_masked(torch.zeros_like(c), TIGHT)
    assert mask.shape == batch and mask.all()
    torch.testing.assert_close(u, cubic_root(c))


def test_a_guess_common_to_all_rows() -> None:
    u, _ = cubic(C).solve(torch.zeros(1, dtype=torch.float64), TIGHT)
    torch.testing.assert_close(u, cubic_root(C))
    u, mask, _ = cubic(C).solve_masked(torch.zeros(1, dtype=torch.float64), replace(TIGHT, miters=1))
    assert u.shape == C.shape and mask.shape == (4,)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(["BACKTRACKING", "STRONG_WOLFE"]), st.sampled_from([1, 6]))
def test_systems_of_two_groups_agree_with_scipy(seed: int, ls_type: LineSearch, ls_max_iters: int) -> None:
    """`M u + u^3 = c` with positive definite M has one root; the unknowns are a dense group and a block group."""
    generator = torch.Generator().manual_seed(seed)
    batch, dense, sites, per_site = 3, 2, 4, 2
    n = dense + sites * per_site
    factor = torch.randn(batch, n, n, generator=generator, dtype=torch.float64)
    m = factor @ factor.mT / n + torch.eye(n, dtype=torch.float64)
    c = 10 * torch.randn(batch, n, generator=generator, dtype=torch.float64)
    groups = [("dense", ()), ("block", (sites,))]

    def split(x: Tensor) -> list[Tensor]:
        return [x[:, :dense], x[:, dense:].reshape(batch, sites, per_site)]

    def residual(u: list[Tensor]) -> list[Tensor]:
        flat = torch.cat([u[0], u[1].flatten(1)], 1)
        return split(c - (m @ flat.unsqueeze(-1)).squeeze(-1) - flat**3)

    def step(u: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        flat = torch.cat([u[0], u[1].flatten(1)], 1)
        b = residual(u)
        return split(torch.linalg.solve(m + torch.diag_embed(3 * flat**2), torch.cat([b[0], b[1].flatten(1)], 1))), b

    chosen = NewtonSettings(1e-11, 1e-13, 60, ls_type, ls_max_iters)
    u, *_ = newton_solve_eager(residual, step, groups, groups, split(torch.zeros_like(c)), *astuple(chosen))
    found = torch.cat([u[0], u[1].flatten(1)], 1)
    for row in range(batch):
        expected = scipy.optimize.root(
            lambda x, row=row: m[row].numpy() @ x + x**3 - c[row].numpy(),
            np.zeros(n),
            jac=lambda x, row=row: m[row].numpy() + np.diag(3 * x**2),
            tol=1e-13,
        )
        # scipy gives up now and then, when no step is an improvement to the last bits.
        assume(expected.success)
        np.testing.assert_allclose(found[row].numpy(), expected.x, rtol=1e-9, atol=1e-11)


def test_converged_at_the_initial_guess() -> None:
    problem = cubic(C)
    guess = cubic_root(C)
    u, iterations = problem.solve(guess, replace(TIGHT, atol=1e-6))
    assert iterations == 0 and problem.steps == 0
    assert torch.equal(u, guess)


@pytest.mark.parametrize("miters", [0, 1, 2, 3])
def test_miters_is_one_more_than_the_updates(miters: int) -> None:
    problem = cubic(C)
    with pytest.raises(ConvergenceError, match=f"{miters} iterations") as caught:
        problem.solve(torch.ones_like(C), replace(TIGHT, miters=miters))
    assert problem.steps == max(miters - 1, 0)
    assert "1e-10" in str(caught.value) and "1e-12" in str(caught.value)
    assert "time step" in str(caught.value)


def test_tests_are_strict() -> None:
    linear = Problem(lambda u: u, torch.ones_like, torch.full((1, 1), 0.25, dtype=torch.float64))
    zero = torch.zeros(1, 1, dtype=torch.float64)
    assert linear.solve(zero, replace(TIGHT, atol=0.25))[1] == 1
    assert linear.solve(zero, replace(TIGHT, atol=math.nextafter(0.25, 1)))[1] == 0


def test_a_row_that_diverges_ends_the_solve() -> None:
    c = C.clone()
    c[2] = math.nan
    with pytest.raises(ConvergenceError, match="diverged at iteration 0: non-finite"):
        cubic(c).solve(torch.ones_like(c), TIGHT)
    # r = sqrt(u) - c from where the first step leads to a negative u.
    root = Problem(torch.sqrt, lambda u: 0.5 / u.sqrt(), torch.tensor([[1.0], [0.1]], dtype=torch.float64))
    with pytest.raises(ConvergenceError, match="diverged at iteration 1"):
        root.solve(torch.full((2, 1), 4.0, dtype=torch.float64), TIGHT)


@pytest.mark.parametrize(("dtype", "huge"), [(torch.float32, 1e25), (torch.float64, 1e200)])
def test_a_residual_whose_square_overflows(dtype: torch.dtype, huge: float) -> None:
    """Half the way per step: after one step the residual has halved, so it is far from converged."""
    c = torch.tensor([[huge, huge], [1.0, 1.0]], dtype=dtype)
    settings = NewtonSettings(atol=0.0, rtol=1e-4, miters=40)
    half = Problem(lambda u: u, lambda u: torch.full_like(u, 2.0), c)
    u, iterations = half.solve(torch.zeros_like(c), settings)
    assert iterations == 14  # 2^-14 < 1e-4 < 2^-13
    torch.testing.assert_close(u, c * (1 - 2.0**-14))
    half = Problem(lambda u: u, lambda u: torch.full_like(u, 2.0), c)
    u, mask, iterations = half.solve_masked(torch.zeros_like(c), replace(settings, substep_del_tol=1.0))
    assert mask.all() and iterations == 14


def test_norms_neither_overflow_nor_vanish() -> None:
    groups = (Group("dense"), Group("block", (2,)))
    one = torch.tensor([[3.0], [0.0], [3e200], [3e-200], [math.nan], [math.inf]], dtype=torch.float64)
    two = torch.tensor([4.0, 0.0, 4e200, 4e-200, 1.0, 1.0], dtype=torch.float64).reshape(6, 1, 1)
    norms = layout.row_norms([one, two * torch.tensor([[1.0], [0.0]])], groups)
    assert norms[:4].tolist() == pytest.approx([5.0, 0.0, 5e200, 5e-200], rel=1e-14)
    assert not norms[4:].isfinite().any()


def test_dot_products_over_groups_of_different_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    b, du = (torch.randn(5, 3, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    block, dense = (Group("block", (3,)),), (Group("dense"),)
    expected = torch.tensor([np.dot(x.ravel(), y.ravel()) for x, y in zip(b.numpy(), du.numpy(), strict=True)])
    torch.testing.assert_close(layout.row_dots([b], [du], block, block), expected)
    torch.testing.assert_close(layout.row_dots([b.flatten(1)], [du], dense, block), expected)
    # A residual common to all rows beside a step for each.
    expected = torch.tensor([np.dot(b[0].numpy().ravel(), y.ravel()) for y in du.numpy()])
    torch.testing.assert_close(layout.row_dots([b[0]], [du], block, block), expected)


def test_masked_rows_are_as_if_alone() -> None:
    generator = torch.Generator().manual_seed(1)
    c = torch.randn(20, 2, generator=generator, dtype=torch.float64) * torch.logspace(-1, 4, 20).unsqueeze(-1)
    c[4], c[9, 1] = math.nan, math.inf
    settings = replace(TIGHT, miters=9)
    for chosen in (settings, replace(settings, ls_max_iters=4), replace(settings, ls_type="STRONG_WOLFE")):
        u, mask, iterations = cubic(c).solve_masked(torch.zeros_like(c), chosen)
        assert 0 < mask.sum() < 18, "some rows must fail, some not"
        assert iterations == 8
        torch.testing.assert_close(u[mask], cubic_root(c[mask]), rtol=1e-10, atol=1e-10)
        for row in range(20):
            alone, converged, _ = cubic(c[row : row + 1]).solve_masked(torch.zeros(1, 2, dtype=torch.float64), chosen)
            assert bool(converged) == bool(mask[row])
            if converged:
                assert torch.equal(alone[0], u[row])


def test_masked_relative_test_asks_for_a_small_step() -> None:
    """Newton on u^2 from far off halves u, so the residual falls by 4 a step while the step stays as large as u."""
    settings = NewtonSettings(atol=1e-8, rtol=1e-3, miters=60, substep_del_tol=1e-6)
    square = Problem(lambda u: u * u, lambda u: 2 * u, torch.zeros(1, 1, dtype=torch.float64))
    start = torch.full((1, 1), 1e3, dtype=torch.float64)
    assert square.solve(start, settings)[1] == 5
    u, mask, iterations = square.solve_masked(start, settings)
    assert mask.all() and iterations > 15 and u.item() ** 2 < 1e-8
    assert square.solve_masked(start, replace(settings, substep_del_tol=10.0))[2] == 5


def test_masked_stops_when_no_row_can_go_on() -> None:
    c = torch.tensor([[1.0], [math.nan]], dtype=torch.float64)
    problem = cubic(c)
    _, mask, iterations = problem.solve_masked(torch.ones_like(c), TIGHT)
    assert mask.tolist() == [True, False]
    assert iterations == problem.steps == steps_alone(1.0, 1.0, replace(TIGHT, rtol=0.0))


@pytest.mark.parametrize("ls_type", ["BACKTRACKING", "STRONG_WOLFE"])
def test_line_search_saves_a_solve_that_diverges(ls_type: LineSearch) -> None:
    """Newton on arctan diverges from beyond 1.39."""
    arctan = Problem(torch.atan, lambda u: 1 / (1 + u * u), torch.zeros(2, 1, dtype=torch.float64))
    start = torch.tensor([[0.5], [3.0]], dtype=torch.float64)
    with pytest.raises(ConvergenceError):
        arctan.solve(start, TIGHT)
    u, _ = arctan.solve(start, replace(TIGHT, ls_type=ls_type, ls_max_iters=8))
    assert u.abs().max() < 1e-10


def trials(settings: NewtonSettings, c: float, u: float) -> tuple[float, float]:
    """One Newton step with line search on the cubic, in plain Python: the new u and its step length."""
    b = c - u**3 - u
    du = b / (3 * u**2 + 1)
    alpha = 1.0
    for k in range(1, settings.ls_max_iters):
        trial = c - (u + alpha * du) ** 3 - (u + alpha * du)
        slope = b * du if settings.ls_type == "BACKTRACKING" else b * b / 2
        if trial**2 <= max(b**2 - 2 * settings.ls_c * alpha * slope, settings.atol**2):
            break
        if k < settings.ls_max_iters - 1:
            alpha /= settings.ls_cutback
    return u + alpha * du, alpha


@pytest.mark.parametrize("ls_type", ["BACKTRACKING", "STRONG_WOLFE"])
@pytest.mark.parametrize("ls_max_iters", [2, 3, 5, 12])
def test_line_search_of_each_row(ls_type: LineSearch, ls_max_iters: int) -> None:
    settings = NewtonSettings(ls_type=ls_type, ls_max_iters=ls_max_iters, ls_cutback=3.0, ls_c=0.2)
    problem = cubic(C)
    # One update, whatever it leads to.
    u, _, iterations = problem.solve_masked(torch.full_like(C, 0.05), replace(settings, miters=2))
    expected = [trials(settings, c, 0.05) for c in C[:, 0].tolist()]
    assert len({alpha for _, alpha in expected}) > 1 or ls_max_iters == 2
    assert iterations == 1
    torch.testing.assert_close(u[:, 0], torch.tensor([x for x, _ in expected], dtype=torch.float64))


def test_rows_that_have_converged_wait_for_nobody() -> None:
    """A zero step never satisfies STRONG_WOLFE; a row that rests must not keep the others in the line search."""
    problem = cubic(C[:2])
    start = torch.cat([1.001 * cubic_root(C[:1]), torch.full((1, 1), 1.1, dtype=torch.float64)])
    settings = NewtonSettings(
        atol=1e-30, rtol=1e-2, miters=3, ls_type="STRONG_WOLFE", ls_max_iters=10, substep_del_tol=1.0
    )
    _, mask, iterations = problem.solve_masked(start, replace(settings, miters=2))
    assert mask.tolist() == [True, False] and iterations == 1
    problem.residuals = 0
    _, mask, iterations = problem.solve_masked(start, settings)
    assert mask.tolist() == [True, True] and iterations == 2
    assert problem.residuals == 3


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    collected: list[str] = []
    monkeypatch.setattr(log, "_sink", lambda level, line: collected.append(line.split("] ", 1)[1]))
    monkeypatch.setattr(log, "_in_force", {**dict.fromkeys(log.CHANNELS, 1), "newton": 3})
    return collected


def test_log_of_a_solve(lines: list[str]) -> None:
    trace: list[str] = []
    c = torch.tensor([[2.0]], dtype=torch.float64)
    settings = NewtonSettings(atol=1e-10, rtol=1e-30, ls_max_iters=3)
    cubic(c).solve(torch.zeros_like(c), settings, trace=trace)
    assert lines[0] == "---- begin newton solve ----" and lines[-1] == "---- end newton solve ----"
    assert lines[-2] == f"converged (iters={len(lines) // 2 - 2}, reason=both)"
    assert lines[1] == "ITERATION   0, |R| = 2.000000e+00, |R0| = 2.000000e+00"
    # The full step goes to u = 2, r = 8 > 2; half of it to u = 1, r = 0.
    assert lines[2].startswith(
        "  LS ITERATION   1, min(alpha) = 1.000000e+00, max(||R||) = 8.000000e+00, min(||Rc||) = "
    )
    assert lines[3].startswith(
        "  LS ITERATION   2, min(alpha) = 5.000000e-01, max(||R||) = 0.000000e+00, min(||Rc||) = "
    )
    assert lines[4] == "ITERATION   1, |R| = 0.000000e+00, |R0| = 2.000000e+00"
    assert trace == lines[1:-2]


@pytest.mark.parametrize(
    ("settings", "outcome"),
    [
        (replace(TIGHT, atol=1e-3, rtol=1e-30), r"reason=abs_tol\)"),
        (replace(TIGHT, atol=1e-30, rtol=1e-6), r"reason=rel_tol\)"),
        (replace(TIGHT, atol=1e-2, rtol=1e-5), r"reason=both\)"),
        (replace(TIGHT, atol=1e10, rtol=1e-3), r"converged at predictor \(iters=0, reason=abs_tol\)"),
        (
            replace(TIGHT, miters=2),
            r"NOT converged \(max_iters=2, \|R\|=\d\.\d{6}e[+-]\d\d, \|R0\|=\d\.\d{6}e[+-]\d\d\)",
        ),
    ],
)
def test_outcomes_in_the_log(lines: list[str], settings: NewtonSettings, outcome: str) -> None:
    try:
        cubic(C).solve(torch.ones_like(C), settings)
    except ConvergenceError:
        assert settings.miters == 2
    assert re.search(outcome, lines[-2]), lines[-2]
    assert lines[-1] == "---- end newton solve ----"


def test_log_of_a_divergence(lines: list[str]) -> None:
    with pytest.raises(ConvergenceError):
        cubic(torch.full((1, 1), math.nan)).solve(torch.zeros(1, 1), TIGHT)
    assert lines[-2:] == ["diverged at iter 0 (non-finite residual)", "---- end newton solve ----"]


def test_masked_solves_log_their_iterations_only(lines: list[str]) -> None:
    _, _, iterations = cubic(C).solve_masked(torch.ones_like(C), TIGHT)
    assert len(lines) == iterations + 1
    assert all(line.startswith(f"ITERATION {i:3d}, |R| = ") for i, line in enumerate(lines))


def test_what_a_callable_raises_comes_through() -> None:
    def residual(u: list[Tensor]) -> list[Tensor]:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        newton_solve_eager(residual, cubic(C).step, DENSE, DENSE, [C], *astuple(TIGHT))
