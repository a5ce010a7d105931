"""GMRES and BiCGStab on flat batches, and the Newton step made of them, against numpy and scipy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from neml2_aoti_plugin import _log as log
from neml2_aoti_plugin._host.binding import CallableProducts
from neml2_aoti_plugin._solve.krylov import KrylovSystem, bicgstab, gmres, solve_linear
from neml2_aoti_plugin._solve.system import Group
from neml2_aoti_plugin.errors import AOTIError
from neml2_aoti_plugin.settings import KrylovSettings

GMRES, BICGSTAB = KrylovSettings("gmres", rel_tol=1e-11), KrylovSettings("bicgstab", rel_tol=1e-11)
both_methods = pytest.mark.parametrize("tight", [GMRES, BICGSTAB], ids=lambda s: s.method)
SEEDS = st.integers(0, 2**31)


class Matrix:
    """Products with a batch of matrices, counted."""

    def __init__(self, a: Tensor) -> None:
        self.a = a
        self.products = 0

    def __call__(self, v: Tensor) -> Tensor:
        self.products += 1
        return torch.matmul(self.a, v.unsqueeze(-1)).squeeze(-1)


def system(rows: int, n: int, seed: int = 0, spread: float = 0.3) -> tuple[Tensor, Tensor]:
    """Matrices whose eigenvalues lie around 1, and right-hand sides."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows, n, n, generator=generator, dtype=torch.float64) / n**0.5
    b = torch.randn(rows, n, generator=generator, dtype=torch.float64)
    return torch.eye(n, dtype=torch.float64) + spread * noise, b


# -- one solve --------------------------------------------------------------------------------------------------------


@both_methods
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 25), SEEDS, st.floats(0.0, 0.5))
def test_solutions(tight: KrylovSettings, rows: int, n: int, seed: int, spread: float) -> None:
    a, b = system(rows, n, seed, spread)
    solution = solve_linear(Matrix(a), b, tight)
    assert solution.done.all()
    torch.testing.assert_close(solution.x, torch.linalg.solve(a, b), rtol=1e-7, atol=1e-8)


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.integers(1, 8))
def test_gmres_leaves_the_least_residual_of_its_space(seed: int, directions: int) -> None:
    a, b = system(2, 9, seed, 1.0)
    x = gmres(Matrix(a), b, KrylovSettings(max_its=directions, rel_tol=0.0)).x
    for matrix, rhs, found in zip(a.numpy(), b.numpy(), x.numpy(), strict=True):
        space, _ = np.linalg.qr(np.stack([np.linalg.matrix_power(matrix, k) @ rhs for k in range(directions)], 1))
        weights, *_ = np.linalg.lstsq(matrix @ space, rhs, rcond=None)
        np.testing.assert_allclose(found, space @ weights, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("cycles", [1, 2, 3, 6])
def test_gmres_restarts_as_scipy_does(cycles: int) -> None:
    a, b = system(1, 30, spread=0.9)
    x = gmres(Matrix(a), b, KrylovSettings(restart=4, max_its=4 * cycles, rel_tol=1e-14)).x
    expected, _ = scipy.sparse.linalg.gmres(a[0].numpy(), b[0].numpy(), restart=4, maxiter=cycles, rtol=1e-14)
    np.testing.assert_allclose(x[0].numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("preconditioned", [False, True])
def test_bicgstab_takes_the_iterates_of_scipy(preconditioned: bool) -> None:
    a, b = system(1, 12, seed=3)
    a = a * torch.linspace(1, 5, 12, dtype=torch.float64).unsqueeze(-1)
    diagonal = a[0].diagonal()
    minv = (lambda r: r / diagonal) if preconditioned else None
    scaling = scipy.sparse.diags(1 / diagonal.numpy()) if preconditioned else None
    expected: list[np.ndarray] = []
    scipy.sparse.linalg.bicgstab(
        a[0].numpy(), b[0].numpy(), M=scaling, maxiter=4, rtol=1e-14, callback=lambda x: expected.append(x.copy())
    )
    for iterations, x in enumerate(expected, 1):
        mine = bicgstab(Matrix(a), b, KrylovSettings("bicgstab", max_its=iterations, rel_tol=1e-14), minv)
        assert mine.iterations == iterations
        np.testing.assert_allclose(mine.x[0].numpy(), x, rtol=1e-9)


@both_methods
@pytest.mark.parametrize("unit", [1e-140, 1e-30, 1e-12, 1.0, 1e12, 1e140])
def test_units_of_the_right_hand_side_do_not_matter(tight: KrylovSettings, unit: float) -> None:
    a, b = system(3, 8)
    expected = solve_linear(Matrix(a), b, tight)
    solution = solve_linear(Matrix(a), b * unit, tight)
    assert solution.done.all() and solution.iterations == expected.iterations
    torch.testing.assert_close(solution.x / unit, expected.x, rtol=1e-9, atol=1e-11)


@both_methods
def test_a_strain_in_float32(tight: KrylovSettings) -> None:
    a, b = (x.float() for x in system(3, 6))
    solution = solve_linear(Matrix(a), 1e-9 * b, replace(tight, rel_tol=1e-4))
    assert solution.done.all()
    torch.testing.assert_close(1e9 * Matrix(a)(solution.x), b, rtol=0.0, atol=2e-3)


@both_methods
def test_a_zero_right_hand_side_and_no_rows(tight: KrylovSettings) -> None:
    a, b = system(3, 5)
    b[1] = 0
    solution = solve_linear(Matrix(a), b, tight)
    assert solution.done.all() and not solution.x[1].any()
    matvec = Matrix(a)
    solution = solve_linear(matvec, torch.zeros_like(b), tight)
    assert solution.iterations == matvec.products == 0 and not solution.x.any()
    solution = solve_linear(Matrix(a[:0]), b[:0], tight)
    assert solution.x.shape == (0, 5) and solution.iterations == 0


@both_methods
def test_absolute_tolerance(tight: KrylovSettings) -> None:
    a, b = system(2, 10)
    solution = solve_linear(Matrix(a), b, replace(tight, rel_tol=0.0, abs_tol=1e-3))
    left = (b - Matrix(a)(solution.x)).norm(dim=-1)
    assert solution.done.all() and (left < 1.1e-3).all() and (left > 1e-9).any()


@both_methods
def test_a_row_is_not_spoilt_by_others_that_go_on_or_become_nan(tight: KrylovSettings) -> None:
    a, b = system(3, 30, spread=0.6)
    a[0] = 2 * torch.eye(30)
    expected = solve_linear(Matrix(a[:2]), b[:2], replace(tight, rel_tol=1e-8))
    assert expected.iterations > 5
    torch.testing.assert_close(expected.x[0], b[0] / 2)
    a[2, 0, 0] = torch.nan
    solution = solve_linear(Matrix(a), b, replace(tight, rel_tol=1e-8))
    assert solution.done.tolist() == [True, True, False] and solution.iterations == expected.iterations
    torch.testing.assert_close(solution.x[:2], expected.x)


@both_methods
@pytest.mark.parametrize("max_its", [0, 1, 5, 7])
def test_the_budget_is_kept(tight: KrylovSettings, max_its: int) -> None:
    a, b = system(2, 40, spread=0.9)
    solution = solve_linear(Matrix(a), b, replace(tight, max_its=max_its, restart=3))
    assert solution.iterations == max_its and not solution.done.any()
    matvec = Matrix(a)
    solve_linear(matvec, b, replace(tight, max_its=max_its, restart=40))
    assert matvec.products == max_its * (1 if tight.method == "gmres" else 2)


def test_gmres_takes_no_product_to_confirm_and_makes_room_for_more_directions() -> None:
    twice = Matrix(2 * torch.eye(4, dtype=torch.float64).unsqueeze(0))
    solution = gmres(twice, torch.ones(1, 4, dtype=torch.float64), KrylovSettings())
    assert (solution.iterations, twice.products) == (1, 1)
    torch.testing.assert_close(solution.x, torch.full((1, 4), 0.5, dtype=torch.float64))
    # There is room for 16 at first.
    a, b = system(2, 60, spread=0.9)
    solution = gmres(Matrix(a), b, KrylovSettings(restart=60, max_its=60, rel_tol=1e-10))
    assert solution.iterations > 16
    torch.testing.assert_close(Matrix(a)(solution.x), b, rtol=0.0, atol=1e-8)


@pytest.mark.parametrize("stiffness", [1.0, 1e6])
@both_methods
def test_preconditioner(tight: KrylovSettings, stiffness: float) -> None:
    """The inverse itself: one iteration, also where it is so small that `M^-1 b` is far below `b`."""
    a, b = system(3, 10)
    a = a * stiffness
    solution = solve_linear(Matrix(a), b, replace(tight, rel_tol=1e-4), Matrix(torch.linalg.inv(a)))
    assert solution.iterations == 1
    torch.testing.assert_close(solution.x, torch.linalg.solve(a, b), rtol=1e-8, atol=1e-12)


def test_log(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(log, "_sink", lambda level, line: lines.append(f"{level}: {line.split('] ', 1)[1]}"))
    monkeypatch.setattr(log, "_in_force", {**dict.fromkeys(log.CHANNELS, 1), "linear": 3})
    a, b = system(3, 20, spread=0.6)
    solution = solve_linear(Matrix(a), b, KrylovSettings())
    assert len(lines) == solution.iterations + 1
    assert lines[0].startswith("debug:   krylov iter=1 max|r|=")
    assert " max|r|/|b|=" in lines[0]
    assert lines[-1] == f"info: linear solve: iters={solution.iterations}, converged"
    lines.clear()
    solve_linear(Matrix(a), b, KrylovSettings("bicgstab", max_its=2))
    assert [line.split("=")[0] for line in lines[:2]] == ["debug:   krylov iter"] * 2
    assert lines[2] == "warning: linear solve NOT converged (iters=2, 3 element(s) at max_its)"


# -- Newton steps -----------------------------------------------------------------------------------------------------


DENSE = Group("dense")


class Nonlinear:
    """`r(u) = M u + u^3 - c` in groups of the given widths, with every kind of evaluation counted."""

    def __init__(self, rows: int, widths: Sequence[int]) -> None:
        self.widths = list(widths)
        self.m, self.c = system(rows, sum(widths))
        self.count: Counter[str] = Counter()

    def split(self, x: Tensor) -> list[Tensor]:
        return list(x.split(self.widths, -1))

    def join(self, groups: Sequence[Tensor]) -> Tensor:
        return torch.cat([x.expand(len(self.c), -1) for x in groups], -1)

    def jacobian(self, u: Sequence[Tensor]) -> Tensor:
        return self.m + torch.diag_embed(3 * self.join(u) ** 2)

    def residual(self, u: list[Tensor]) -> list[Tensor]:
        self.count["residual"] += 1
        flat = self.join(u)
        return self.split(self.c - Matrix(self.m)(flat) - flat**3)

    def matvec(self, u: list[Tensor], v: list[Tensor]) -> list[Tensor]:
        self.count["matvec"] += 1
        assert all(x.is_contiguous() for x in v)
        return self.split(Matrix(self.jacobian(u))(self.join(v)))

    def setup(self, u: list[Tensor]) -> list[Tensor]:
        self.count["setup"] += 1
        return [self.jacobian(u).diagonal(dim1=-2, dim2=-1).clone()]

    def system(self, settings: KrylovSettings, preconditioned: bool = True) -> KrylovSystem:
        layout = (DENSE,) * len(self.widths)
        both = (self.setup, lambda state, r: r / state[0]) if preconditioned else (None, None)
        return KrylovSystem(CallableProducts(self.residual, self.matvec, *both), settings, (layout, layout))


def step(of: KrylovSystem, u: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The Newton step at `u`, and `b = -r` there."""
    b, linearisation = of.linearise(u)
    return linearisation.solve(b), b


@pytest.mark.parametrize("widths", [(5,), (2, 3)])
@pytest.mark.parametrize("preconditioned", [False, True])
@both_methods
def test_step(tight: KrylovSettings, preconditioned: bool, widths: tuple[int, ...]) -> None:
    problem = Nonlinear(4, widths)
    for u in (problem.split(problem.c), [torch.zeros(k, dtype=torch.float64) for k in widths]):
        newton = problem.system(tight, preconditioned)
        b = newton.residual(u)
        du, b_again = step(newton, u)
        assert b_again is b and problem.count["residual"] == 1
        assert [x.shape for x in du] == [(4, k) for k in widths]
        expected = torch.linalg.solve(problem.jacobian(u), problem.join(b))
        torch.testing.assert_close(problem.join(du), expected)
        step(newton, [x.clone() for x in u])
        assert problem.count["residual"] == 2, "unknowns that it has not seen are evaluated"
        problem.count.clear()


@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_step_with_a_batch_of_any_rank(batch: tuple[int, ...]) -> None:
    a, b = system(6, 3)
    a, b = (x[0] if not batch else x.reshape(*batch, *x.shape[1:]) for x in (a, b))
    products = CallableProducts(lambda u: [b], lambda u, v: [Matrix(a)(v[0])], None, None)
    start = torch.zeros(3, dtype=torch.float64)
    du, _ = step(KrylovSystem(products, GMRES, ((DENSE,), (DENSE,))), [start])
    torch.testing.assert_close(du[0], torch.linalg.solve(a, b))


@pytest.mark.parametrize(
    ("strategy", "cache_max_its", "setups"), [("none", 0, 4), ("chord", 0, 1), ("max_its", 0, 4), ("max_its", 99, 1)]
)
def test_how_long_a_preconditioner_is_kept(strategy: Any, cache_max_its: int, setups: int) -> None:
    problem = Nonlinear(2, (4,))
    newton = problem.system(replace(GMRES, cache_strategy=strategy, cache_max_its=cache_max_its))
    for _ in range(4):
        step(newton, problem.split(problem.c))
    assert problem.count["setup"] == setups


def test_a_preconditioner_is_set_up_again_after_a_slow_solve() -> None:
    problem = Nonlinear(2, (4,))
    newton = problem.system(replace(GMRES, rel_tol=1e-3, cache_strategy="max_its", cache_max_its=3))
    slow, setups = True, 0
    for scale in (0.0, 0.0, 3.0, 3.0, 3.0):
        before = problem.count["matvec"]
        step(newton, problem.split(scale * problem.c))
        assert (problem.count["setup"] > setups) == slow
        slow, setups = problem.count["matvec"] - before > 3, problem.count["setup"]
    assert 1 < setups < 4


def test_block_groups_are_refused() -> None:
    with pytest.raises(AOTIError, match="direct linear solver"):
        KrylovSystem(
            CallableProducts(lambda u: u, lambda u, v: v, None, None), GMRES, ((Group("block", (3,)),), (DENSE,))
        )
