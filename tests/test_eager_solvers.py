"""neml2's eager solves through the plugin: the entry points of its binding, and an implicit model."""

from __future__ import annotations

import contextlib
import inspect
import math
import re
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from typing import Any

import neml2
import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import neml2_aoti_plugin
from neml2_aoti_plugin import _log as log
from neml2_aoti_plugin._host import binding as eager
from neml2_aoti_plugin._solve import system as layout
from neml2_aoti_plugin._solve.system import Group
from neml2_aoti_plugin.errors import ConvergenceError, InputError
from neml2_aoti_plugin.settings import NewtonSettings
from stubs.catalogue import CATALOGUE
from test_newton import column

DENSE = [("dense", ())]
TIGHT = NewtonSettings(atol=1e-10, rtol=1e-12, miters=40)


def numbers(settings: NewtonSettings) -> tuple[Any, ...]:
    """The settings that neml2's entry points take; the others are of the row-wise mode."""
    return astuple(settings)[:8]


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

    def solve(self, u0: Tensor, settings: NewtonSettings = TIGHT, **options: Any) -> tuple[Tensor, int, list[str]]:
        u, converged, iterations, lines = eager.newton_solve_eager(
            self.residual, self.step, DENSE, DENSE, [u0], *numbers(settings), **options
        )
        assert converged is True
        return u[0], iterations, lines

    def solve_masked(self, u0: Tensor, settings: NewtonSettings = TIGHT) -> tuple[Tensor, Tensor, int]:
        u, mask, iterations = eager.newton_solve_eager_masked(
            self.residual, self.step, DENSE, DENSE, [u0], *numbers(settings)
        )
        assert isinstance(mask, Tensor) and mask.dtype == torch.bool
        return u[0], mask, iterations


def cubic(c: Tensor) -> Problem:
    return Problem(lambda u: u**3 + u, lambda u: 3 * u**2 + 1, c)


def cubic_root(c: Tensor) -> Tensor:
    """The real root of u^3 + u = c, by the hyperbolic form of Cardano's formula."""
    return 2 / math.sqrt(3) * torch.sinh(torch.asinh(1.5 * math.sqrt(3) * c) / 3)


C = column(0.1, 3.0, -30.0, 1000.0)
ONES = torch.ones_like(C)


class TestNewton:
    @pytest.mark.parametrize("batch", [(), (0,), (1,), (2, 3)])
    def test_any_batch_shape(self, batch: tuple[int, ...]) -> None:
        c = torch.linspace(-3, 4, math.prod(batch) * 2, dtype=torch.float64).reshape(*batch, 2)
        masked, mask, _ = cubic(c).solve_masked(torch.zeros_like(c))
        assert mask.shape == batch and mask.all()
        for u in (masked, cubic(c).solve(torch.zeros_like(c))[0]):
            torch.testing.assert_close(u, cubic_root(c))

    def test_a_guess_common_to_all_rows(self) -> None:
        zero = torch.zeros(1, dtype=torch.float64)
        torch.testing.assert_close(cubic(C).solve(zero)[0], cubic_root(C))
        u, mask, _ = cubic(C).solve_masked(zero, replace(TIGHT, miters=1))
        assert u.shape == C.shape and mask.shape == (4,)

    @settings(max_examples=30, deadline=None)
    @given(st.integers(0, 2**31), st.sampled_from(["BACKTRACKING", "STRONG_WOLFE"]), st.sampled_from([1, 6]))
    def test_systems_of_two_groups_agree_with_scipy(self, seed: int, ls_type: Any, ls_max_iters: int) -> None:
        """`M u + u^3 = c` with positive definite M has one root; the unknowns are a dense group and a block group."""
        generator = torch.Generator().manual_seed(seed)
        batch, n = 3, 10
        factor = torch.randn(batch, n, n, generator=generator, dtype=torch.float64)
        m = factor @ factor.mT / n + torch.eye(n, dtype=torch.float64)
        c = 10 * torch.randn(batch, n, generator=generator, dtype=torch.float64)
        groups = [("dense", ()), ("block", (4,))]

        def split(x: Tensor) -> list[Tensor]:
            return [x[:, :2], x[:, 2:].reshape(batch, 4, 2)]

        def flat(u: list[Tensor]) -> Tensor:
            return torch.cat([u[0], u[1].flatten(1)], 1)

        def residual(u: list[Tensor]) -> list[Tensor]:
            return split(c - (m @ flat(u).unsqueeze(-1)).squeeze(-1) - flat(u) ** 3)

        def step(u: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            b = residual(u)
            return split(torch.linalg.solve(m + torch.diag_embed(3 * flat(u) ** 2), flat(b))), b

        chosen = numbers(NewtonSettings(1e-11, 1e-13, 60, ls_type, ls_max_iters))
        found, *_ = eager.newton_solve_eager(residual, step, groups, groups, split(torch.zeros_like(c)), *chosen)
        for row in range(batch):
            expected = scipy.optimize.root(
                lambda x, row=row: m[row].numpy() @ x + x**3 - c[row].numpy(),
                np.zeros(n),
                jac=lambda x, row=row: m[row].numpy() + np.diag(3 * x**2),
                tol=1e-13,
            )
            # scipy gives up now and then, when no step is an improvement to the last bits.
            assume(expected.success)
            np.testing.assert_allclose(flat(found)[row].numpy(), expected.x, rtol=1e-9, atol=1e-11)

    def test_evaluations_of_a_solve(self) -> None:
        problem = cubic(C)
        _, iterations, _ = problem.solve(ONES)
        assert (problem.residuals, problem.steps) == (iterations + 1, iterations)
        at_root = cubic(C)
        u, iterations, _ = at_root.solve(cubic_root(C), replace(TIGHT, atol=1e-6))
        assert iterations == at_root.steps == 0 and torch.equal(u, cubic_root(C))

    @pytest.mark.parametrize("miters", [0, 1, 2, 3])
    def test_miters_is_one_more_than_the_updates(self, miters: int) -> None:
        problem = cubic(C)
        with pytest.raises(ConvergenceError, match=f"{miters} iterations.* = 1e-10.* = 1e-12.*time step"):
            problem.solve(ONES, replace(TIGHT, miters=miters))
        assert problem.steps == max(miters - 1, 0)

    def test_tests_are_strict(self) -> None:
        linear, zero = Problem(lambda u: u, torch.ones_like, column(0.25)), column(0.0)
        assert linear.solve(zero, replace(TIGHT, atol=0.25))[1] == 1
        assert linear.solve(zero, replace(TIGHT, atol=math.nextafter(0.25, 1)))[1] == 0

    def test_a_row_that_diverges_ends_the_solve_and_not_a_masked_one(self) -> None:
        c = C.clone()
        c[2] = math.nan
        with pytest.raises(ConvergenceError, match="diverged at iteration 0: non-finite"):
            cubic(c).solve(ONES)
        # r = sqrt(u) - c from where the first step leads to a negative u.
        root = Problem(torch.sqrt, lambda u: 0.5 / u.sqrt(), column(1.0, 0.1))
        with pytest.raises(ConvergenceError, match="diverged at iteration 1"):
            root.solve(column(4.0, 4.0))
        masked = cubic(c)
        u, mask, iterations = masked.solve_masked(ONES)
        assert mask.tolist() == [True, True, False, True] and iterations == masked.steps < TIGHT.miters - 1
        torch.testing.assert_close(u[mask], cubic_root(C[mask]))

    @pytest.mark.parametrize(("dtype", "huge"), [(torch.float32, 1e25), (torch.float64, 1e200)])
    def test_a_residual_whose_square_overflows(self, dtype: torch.dtype, huge: float) -> None:
        """Half the way per step: after one step the residual has halved, so it is far from converged."""
        c = torch.tensor([[huge, huge], [1.0, 1.0]], dtype=dtype)
        half = Problem(lambda u: u, lambda u: torch.full_like(u, 2.0), c)
        settings = NewtonSettings(atol=0.0, rtol=1e-4, miters=40, substep_del_tol=1.0)
        u, iterations, _ = half.solve(torch.zeros_like(c), settings)
        # 2^-14 < 1e-4 < 2^-13
        assert iterations == half.solve_masked(torch.zeros_like(c), settings)[2] == 14
        torch.testing.assert_close(u, c * (1 - 2.0**-14))

    def test_what_a_callable_raises_comes_through(self) -> None:
        with pytest.raises(ZeroDivisionError):
            eager.newton_solve_eager(lambda u: [u[0] * (1 // 0)], cubic(C).step, DENSE, DENSE, [C], *numbers(TIGHT))


def test_dot_products_over_groups_of_different_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    b, du = (torch.randn(5, 3, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    block, dense = (Group("block", (3,)),), (Group("dense"),)
    torch.testing.assert_close(layout.row_dots([b], [du], block, block), (b * du).sum((1, 2)))
    torch.testing.assert_close(layout.row_dots([b.flatten(1)], [du], dense, block), (b * du).sum((1, 2)))
    # A residual common to all rows beside a step for each.
    torch.testing.assert_close(layout.row_dots([b[0]], [du], block, block), (b[0] * du).sum((1, 2)))


class TestLog:
    @pytest.fixture
    def lines(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        collected: list[str] = []
        monkeypatch.setattr(log, "_sink", lambda level, line: collected.append(line.split("] ", 1)[1]))
        monkeypatch.setattr(log, "_in_force", {**dict.fromkeys(log.CHANNELS, 1), "newton": 3})
        return collected

    def test_of_a_solve(self, lines: list[str]) -> None:
        settings = NewtonSettings(atol=1e-10, rtol=1e-30, ls_max_iters=3)
        _, iterations, trace = cubic(column(2.0)).solve(column(0.0), settings, collect_log=True)
        trial = "  LS ITERATION {:3d}, min(alpha) = {:.6e}, max(||R||) = {:.6e}, min(||Rc||) = "
        expected = [
            "---- begin newton solve ----",
            "ITERATION   0, |R| = 2.000000e+00, |R0| = 2.000000e+00",
            # The full step goes to u = 2, r = 8 > 2; half of it to u = 1, r = 0.
            *(trial.format(1, 1.0, 8.0), trial.format(2, 0.5, 0.0)),
            "ITERATION   1, |R| = 0.000000e+00, |R0| = 2.000000e+00",
            f"converged (iters={iterations}, reason=both)",
            "---- end newton solve ----",
        ]
        assert [line[: len(start)] for line, start in zip(lines, expected, strict=True)] == expected
        assert trace == lines[1:-2]
        assert cubic(column(2.0)).solve(column(0.0), settings)[2] == []

    @pytest.mark.parametrize(
        ("c", "changes", "outcome"),
        [
            (C, {"atol": 1e-3, "rtol": 1e-30}, r"reason=abs_tol\)"),
            (C, {"atol": 1e-30, "rtol": 1e-6}, r"reason=rel_tol\)"),
            (C, {"atol": 1e-2, "rtol": 1e-5}, r"reason=both\)"),
            (C, {"atol": 1e10, "rtol": 1e-3}, r"converged at predictor \(iters=0, reason=abs_tol\)"),
            (C, {"miters": 2}, r"NOT converged \(max_iters=2, \|R\|=\d\.\d{6}e[+-]\d\d, \|R0\|=\d\.\d{6}e[+-]\d\d\)"),
            (C * math.nan, {}, r"diverged at iter 0 \(non-finite residual\)"),
        ],
    )
    def test_of_an_outcome(self, lines: list[str], c: Tensor, changes: dict[str, Any], outcome: str) -> None:
        with pytest.raises(ConvergenceError) if outcome.startswith(("NOT", "div")) else contextlib.nullcontext():
            cubic(c).solve(ONES, replace(TIGHT, **changes))
        assert re.search(outcome, lines[-2]), lines[-2]
        assert lines[-1] == "---- end newton solve ----"

    def test_of_a_masked_solve(self, lines: list[str]) -> None:
        """Its iterations only."""
        _, _, iterations = cubic(C).solve_masked(ONES)
        assert [line.partition(", ")[0] for line in lines] == [f"ITERATION {i:3d}" for i in range(iterations + 1)]


# -- an implicit model ------------------------------------------------------------------------------------------------


ELASTIC, POISSON, SOFTENING, REFERENCE, EXPONENT = 140000.0, 0.3, -4000.0, 900.0, 4.0
SHEAR = ELASTIC / 2 / (1 + POISSON)


def radial_return(strain: np.ndarray, old: np.ndarray, measure: float, dt: float) -> tuple[np.ndarray, float]:
    """One step of the creep law of stubs/krylov.i at one point: creep strain, in Mandel's notation, and its measure."""
    trial = 2 * SHEAR * (strain - old)
    trial[:3] -= trial[:3].mean()
    mises = np.sqrt(1.5 * trial @ trial)

    def gap(increment: float) -> float:
        driving = mises - 3 * SHEAR * increment - SOFTENING * (measure + increment)
        return float(increment - dt * (max(driving, 0.0) / REFERENCE) ** EXPONENT)

    increment = scipy.optimize.brentq(gap, 0.0, mises / (3 * SHEAR), xtol=1e-18, rtol=1e-14)
    return old + 1.5 * increment * trial / mises, measure + increment


NEWTON = "type = Newton\nlinear_solver = "
SEARCH = "type = NewtonWithLineSearch\nmax_linesearch_iterations = 6\nlinesearch_type = {}\nlinear_solver = "
BACKTRACKING, WOLFE = SEARCH.format("BACKTRACKING"), SEARCH.format("STRONG_WOLFE")


def load(solver: str, *overrides: str) -> Any:
    """The model of stubs/krylov.i with a solver `chosen`, which takes its linear solver from what is there."""
    blocks = (
        f"[Solvers]\n[chosen]\n{solver}\nabs_tol = 1e-12\nrel_tol = 1e-10\n[]\n"
        "[bicgstab]\ntype = BiCGStab\nrel_tol = 1e-6\nmax_its = 40\n[]\n"
        "[points]\ntype = JacobiPreconditioner\n[]\n[full]\ntype = FullPreconditioner\n[]\n[]"
    )
    chosen = ("Models/krylov/solver:=chosen", *overrides)
    return neml2.load_input(CATALOGUE["krylov"].path, post=[blocks], additional_args=chosen).get_model("krylov")


def state(rows: int = 5, sizes: tuple[float, ...] = (1.0,)) -> dict[str, Tensor]:
    """A step of points, whose strains are scaled."""
    generator = torch.Generator().manual_seed(0)
    strain = 1e-3 * torch.randn(rows, 6, generator=generator, dtype=torch.float64) * column(*sizes)
    old = 1e-4 * torch.randn(rows, 6, generator=generator, dtype=torch.float64)
    old[:, :3] -= old[:, :3].mean(-1, keepdim=True)
    measure = 2e-4 * torch.rand(rows, generator=generator, dtype=torch.float64)
    times = {"t": torch.full_like(measure, 5.0), "t~1": torch.full_like(measure, 3.0)}
    old_state = {"creep_strain~1": old, "creep_measure~1": measure}
    return {"strain": strain, **times, **old_state, "creep_strain": old.clone(), "creep_measure": measure.clone()}


# A point that converges in a step or two between two that need many.
HARD = (20.0, 1e-3, 30.0)


def call(model: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
    outputs = model(*(kind(values[name]) for name, kind in model.input_spec.items()))
    return {name: output.data for name, output in zip(model.output_spec, outputs, strict=True)}


def expected(values: dict[str, Tensor]) -> dict[str, Tensor]:
    old = (values[name].numpy() for name in ("strain", "creep_strain~1", "creep_measure~1"))
    points = [radial_return(*point) for point in zip(*old, (values["t"] - values["t~1"]).numpy(), strict=True)]
    strains, measures = zip(*points, strict=True)
    return {"creep_strain": torch.tensor(np.stack(strains)), "creep_measure": torch.tensor(np.stack(measures))}


def agree(found: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    torch.testing.assert_close(found, expected(values), rtol=1e-8, atol=1e-12)


def test_the_plugin_is_what_solves() -> None:
    from neml2.aoti import _aoti

    for name in ("newton_solve_eager", "newton_solve_eager_masked", "krylov_solve_eager", "krylov_solve_linear"):
        assert getattr(_aoti, name) is getattr(eager, name)
    assert neml2.log._store is log
    assert neml2.solvers.ConvergenceError is neml2_aoti_plugin.ConvergenceError is ConvergenceError


@pytest.mark.parametrize(
    ("solver", "overrides"),
    [
        (f"{NEWTON}lu", ()),
        (f"{BACKTRACKING}lu", ()),
        (f"{WOLFE}lu", ()),
        (f"{NEWTON}gmres", ()),
        (f"{NEWTON}gmres", ("Solvers/gmres/preconditioner=points",)),
        (f"{BACKTRACKING}preconditioned_gmres", ()),
        (f"{NEWTON}gmres", ("Solvers/gmres/preconditioner=full", "Solvers/gmres/cache_strategy=max_its")),
        (f"{NEWTON}bicgstab", ()),
        (f"{NEWTON}bicgstab", ("Solvers/bicgstab/preconditioner=points",)),
        (f"{WOLFE}bicgstab", ("Solvers/bicgstab/preconditioner=full",)),
    ],
)
def test_an_implicit_model(solver: str, overrides: tuple[str, ...]) -> None:
    values, model = state(), load(solver, *overrides)
    agree(call(model, values), values)
    # An initial guess common to all points.
    zero = torch.zeros((), dtype=torch.float64)
    agree(call(model, {**values, "creep_strain": zero.expand(6).clone(), "creep_measure": zero}), values)


@pytest.mark.parametrize("linear", ["lu", "tight_gmres", "bicgstab"])
def test_gradients_of_an_eager_solve(linear: str) -> None:
    """The adjoint solve is `krylov_solve_linear` where the sensitivity solver is iterative."""
    solver = f"Models/krylov/param_sensitivity_solver={linear}"
    model, values = load(f"{NEWTON}lu", solver, "Solvers/bicgstab/rel_tol:=1e-10"), state()
    strain = values["strain"].clone().requires_grad_()
    call(model, {**values, "strain": strain})["creep_measure"].sum().backward()
    assert strain.grad is not None
    for axis in (0, 4):
        step = torch.zeros(6, dtype=torch.float64)
        step[axis] = 1e-7
        ahead, behind = (expected({**values, "strain": values["strain"] + sign * step}) for sign in (1, -1))
        slope = (ahead["creep_measure"] - behind["creep_measure"]) / 2e-7
        torch.testing.assert_close(strain.grad[:, axis], slope, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("linear", ["lu", "gmres", "bicgstab"])
def test_too_few_iterations(linear: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NEML2_CAPTURE_SOLVE_FAILURE", raising=False)
    with pytest.raises(ConvergenceError) as caught:
        call(load(f"{NEWTON}{linear}\nmax_its = 4"), state(3, HARD))
    assert not hasattr(caught.value, "converged_mask")


def test_captured_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEML2_CAPTURE_SOLVE_FAILURE", "1")
    values = state(3, HARD)
    wanted = expected(values)
    values["creep_strain"][1] = wanted["creep_strain"][1]
    with pytest.raises(ConvergenceError) as caught:
        call(load(f"{NEWTON}lu\nmax_its = 6"), values)
    error: Any = caught.value
    assert error.converged_mask.tolist() == [False, True, False]
    found = {name: value.data for name, value in error.unknowns.items()}
    assert {name: x.shape for name, x in found.items()} == {name: x.shape for name, x in wanted.items()}
    one, other = ({name: x[1] for name, x in of.items()} for of in (found, wanted))
    torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)


# -- iterative linear solves ------------------------------------------------------------------------------------------


def krylov(**changes: Any) -> tuple[list[Tensor], bool, int, list[str]]:
    problem = cubic(column(2.0, 30.0))
    arguments: dict[str, Any] = {
        **{name: value for name, value in vars(TIGHT).items() if name != "chord_steps"},
        **{"unknown_layout": DENSE, "residual_layout": DENSE, "u0": [torch.zeros(1, dtype=torch.float64)]},
        **{"precond_setup_fn": None, "precond_apply_fn": None, "residual_fn": problem.residual},
        "matvec_fn": lambda u, v: [(3 * u[0] ** 2 + 1) * v[0]],
    }
    return eager.krylov_solve_eager(**{**arguments, **changes})


@pytest.mark.parametrize("method", ["gmres", "bicgstab"])
def test_krylov_entry_points(method: str) -> None:
    u, converged, _, _ = krylov(method=method)
    assert converged is True
    torch.testing.assert_close(u[0], column(1.0, 3.0))
    ones = torch.ones(2, 3, dtype=torch.float64)
    torch.testing.assert_close(eager.krylov_solve_linear(lambda v: 4 * v, ones, method=method), ones / 4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"u0": []}, "0 group"),
        ({"ls_type": "WOLFE"}, "BACKTRACKING or STRONG_WOLFE"),
        ({"unknown_layout": [("sparse", [])]}, "dense, block"),
        ({"method": "cg"}, "gmres, bicgstab"),
        ({"cache_strategy": "always"}, "none, chord, max_its"),
        ({"restart": 0}, "restart"),
    ],
)
def test_settings_that_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        krylov(**change)
    assert isinstance(caught.value, RuntimeError)


def test_a_linear_solve_that_does_not_converge_only_warns(capfd: pytest.CaptureFixture[str]) -> None:
    rotation = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    eager.krylov_solve_linear(lambda v: v @ rotation, torch.ones(1, 2, dtype=torch.float64), max_its=1)
    assert "linear solve NOT converged (iters=1, 1 element(s) at max_its)" in capfd.readouterr().err


def test_signatures_are_those_of_the_binding() -> None:
    """Names, order and defaults as neml2 3.1.0 documents them."""
    newton = (
        "unknown_layout residual_layout u0 atol rtol miters ls_type ls_max_iters ls_cutback ls_c substep_del_tol=1e-06"
    )
    linear = "method='gmres' restart=40 max_its=1000 abs_tol=0.0 rel_tol=0.0001"
    signatures: dict[Callable[..., Any], str] = {
        eager.newton_solve_eager: f"residual_fn step_fn {newton} collect_log=False",
        eager.newton_solve_eager_masked: f"residual_fn step_fn {newton}",
        eager.krylov_solve_eager: (
            f"residual_fn matvec_fn precond_setup_fn precond_apply_fn {newton} collect_log=False "
            f"{linear} cache_strategy='none' cache_max_its=10"
        ),
        eager.krylov_solve_linear: f"matvec_fn b {linear}",
    }
    for function, wanted in signatures.items():
        parameters = inspect.signature(function).parameters.values()
        found = [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters]
        assert found == wanted.split()
