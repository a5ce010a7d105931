"""neml2's eager solves through the plugin: an implicit model against a radial return, and the entry points."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor

import neml2_aoti_plugin
from neml2_aoti_plugin import _log as log
from neml2_aoti_plugin._host import binding as eager
from neml2_aoti_plugin.errors import ConvergenceError, InputError
from stubs.catalogue import CATALOGUE

neml2 = pytest.importorskip("neml2")

ELASTIC, POISSON, SOFTENING, REFERENCE, EXPONENT = 140000.0, 0.3, -4000.0, 900.0, 4.0
SHEAR = ELASTIC / 2 / (1 + POISSON)


def radial_return(strain: np.ndarray, old: np.ndarray, measure: float, dt: float) -> tuple[np.ndarray, float]:
    """One step of the creep law of stubs/krylov.i at one point, as one equation for the increment of the measure.

    Args:
        strain: total strain, Mandel notation, `(6,)`.
        old: creep strain before the step, `(6,)`.
        measure: creep measure before the step.
        dt: length of the step.

    Returns:
        Creep strain and creep measure after the step.
    """
    trial = 2 * SHEAR * (strain - old)
    trial[:3] -= trial[:3].mean()
    mises = np.sqrt(1.5 * trial @ trial)

    def gap(increment: float) -> float:
        driving = mises - 3 * SHEAR * increment - SOFTENING * (measure + increment)
        return float(increment - dt * (max(driving, 0.0) / REFERENCE) ** EXPONENT)

    increment = scipy.optimize.brentq(gap, 0.0, mises / (3 * SHEAR), xtol=1e-18, rtol=1e-14)
    return old + 1.5 * increment * trial / mises, measure + increment


def load(solver: str, *overrides: str) -> Any:
    """The model of stubs/krylov.i with a solver `chosen`, which takes its linear solver from what is there."""
    blocks = (
        f"[Solvers]\n[chosen]\n{solver}\nabs_tol = 1e-12\nrel_tol = 1e-10\n[]\n"
        "[bicgstab]\ntype = BiCGStab\nrel_tol = 1e-6\nmax_its = 40\n[]\n"
        "[points]\ntype = JacobiPreconditioner\n[]\n[full]\ntype = FullPreconditioner\n[]\n[]"
    )
    chosen = ("Models/krylov/solver:=chosen", *overrides)
    return neml2.load_input(CATALOGUE["krylov"].path, post=[blocks], additional_args=chosen).get_model("krylov")


def state(rows: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    strain = 1e-3 * torch.randn(rows, 6, generator=generator, dtype=torch.float64)
    old = 1e-4 * torch.randn(rows, 6, generator=generator, dtype=torch.float64)
    old[:, :3] -= old[:, :3].mean(-1, keepdim=True)
    measure = 2e-4 * torch.rand(rows, generator=generator, dtype=torch.float64)
    return {
        "strain": strain,
        "t": torch.full((rows,), 5.0, dtype=torch.float64),
        "t~1": torch.full((rows,), 3.0, dtype=torch.float64),
        "creep_strain": old.clone(),
        "creep_measure": measure.clone(),
        "creep_strain~1": old,
        "creep_measure~1": measure,
    }


def call(model: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
    outputs = model(*(kind(values[name]) for name, kind in model.input_spec.items()))
    return {name: output.data for name, output in zip(model.output_spec, outputs, strict=True)}


def expected(values: dict[str, Tensor]) -> dict[str, Tensor]:
    dt = values["t"] - values["t~1"]
    points = [
        radial_return(
            values["strain"][row].numpy(),
            values["creep_strain~1"][row].numpy(),
            values["creep_measure~1"][row].item(),
            dt[row].item(),
        )
        for row in range(len(dt))
    ]
    return {
        "creep_strain": torch.tensor(np.stack([strain for strain, _ in points])),
        "creep_measure": torch.tensor([measure for _, measure in points], dtype=torch.float64),
    }


def agree(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-8, atol=1e-12)


def test_the_plugin_is_what_solves() -> None:
    from neml2.aoti import _aoti

    for name in ("newton_solve_eager", "newton_solve_eager_masked", "krylov_solve_eager", "krylov_solve_linear"):
        assert getattr(_aoti, name) is getattr(eager, name)
    assert neml2.log._store is log
    assert neml2.solvers.ConvergenceError is neml2_aoti_plugin.ConvergenceError is ConvergenceError


NEWTON = "type = Newton"
SEARCH = "type = NewtonWithLineSearch\nmax_linesearch_iterations = 6\nlinesearch_type = "


@pytest.mark.parametrize(
    ("solver", "overrides"),
    [
        (f"{NEWTON}\nlinear_solver = lu", ()),
        (f"{SEARCH}BACKTRACKING\nlinear_solver = lu", ()),
        (f"{SEARCH}STRONG_WOLFE\nlinear_solver = lu", ()),
        (f"{NEWTON}\nlinear_solver = gmres", ()),
        (f"{NEWTON}\nlinear_solver = gmres", ("Solvers/gmres/preconditioner=points",)),
        (f"{SEARCH}BACKTRACKING\nlinear_solver = preconditioned_gmres", ()),
        (
            f"{NEWTON}\nlinear_solver = gmres",
            ("Solvers/gmres/preconditioner=full", "Solvers/gmres/cache_strategy=max_its"),
        ),
        (f"{NEWTON}\nlinear_solver = bicgstab", ()),
        (f"{NEWTON}\nlinear_solver = bicgstab", ("Solvers/bicgstab/preconditioner=points",)),
        (f"{SEARCH}STRONG_WOLFE\nlinear_solver = bicgstab", ("Solvers/bicgstab/preconditioner=full",)),
    ],
)
def test_an_implicit_model(solver: str, overrides: tuple[str, ...]) -> None:
    values = state()
    agree(call(load(solver, *overrides), values), expected(values))


def test_a_guess_common_to_all_points() -> None:
    values = state()
    guess = {"creep_strain": torch.zeros(6, dtype=torch.float64), "creep_measure": torch.zeros((), dtype=torch.float64)}
    for linear in ("lu", "gmres"):
        agree(call(load(f"{NEWTON}\nlinear_solver = {linear}"), {**values, **guess}), expected(values))


@pytest.mark.parametrize("linear", ["lu", "tight_gmres", "bicgstab"])
def test_gradients_of_an_eager_solve(linear: str) -> None:
    """The adjoint solve is `krylov_solve_linear` where the sensitivity solver is iterative."""
    model = load(
        f"{NEWTON}\nlinear_solver = lu",
        f"Models/krylov/param_sensitivity_solver={linear}",
        "Solvers/bicgstab/rel_tol:=1e-10",
    )
    values = state()
    strain = values["strain"].clone().requires_grad_()
    call(model, {**values, "strain": strain})["creep_measure"].sum().backward()
    assert strain.grad is not None
    for axis in (0, 4):
        step = torch.zeros(6, dtype=torch.float64)
        step[axis] = 1e-7
        ahead, behind = (expected({**values, "strain": values["strain"] + sign * step}) for sign in (1, -1))
        slope = (ahead["creep_measure"] - behind["creep_measure"]) / 2e-7
        torch.testing.assert_close(strain.grad[:, axis], slope, rtol=1e-5, atol=1e-9)


def hard_state() -> dict[str, Tensor]:
    """A point that converges in a step or two between two that need many."""
    values = state(3)
    values["strain"] = values["strain"] * torch.tensor([[20.0], [1e-3], [30.0]])
    return values


@pytest.mark.parametrize("linear", ["lu", "gmres", "bicgstab"])
def test_too_few_iterations(linear: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NEML2_CAPTURE_SOLVE_FAILURE", raising=False)
    with pytest.raises(neml2.solvers.ConvergenceError) as caught:
        call(load(f"{NEWTON}\nlinear_solver = {linear}\nmax_its = 4"), hard_state())
    assert not hasattr(caught.value, "converged_mask")


def test_captured_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEML2_CAPTURE_SOLVE_FAILURE", "1")
    values = hard_state()
    values["creep_strain"][1] = expected(values)["creep_strain"][1]
    with pytest.raises(neml2.solvers.ConvergenceError) as caught:
        call(load(f"{NEWTON}\nlinear_solver = lu\nmax_its = 6"), values)
    error: Any = caught.value
    assert error.converged_mask.tolist() == [False, True, False]
    assert error.unknowns.keys() == {"creep_strain", "creep_measure"}
    wanted = expected(values)
    for name, value in error.unknowns.items():
        assert value.data.shape == wanted[name].shape
        torch.testing.assert_close(value.data[1], wanted[name][1], rtol=1e-8, atol=1e-12)


C = torch.tensor([[2.0], [30.0]], dtype=torch.float64)
COMMON: dict[str, Any] = {
    "unknown_layout": [("dense", [])],
    "residual_layout": [("dense", [])],
    "u0": [torch.zeros(1, dtype=torch.float64)],
    "atol": 1e-10,
    "rtol": 1e-8,
    "miters": 25,
    "ls_type": "BACKTRACKING",
    "ls_max_iters": 1,
    "ls_cutback": 2.0,
    "ls_c": 1e-3,
    "residual_fn": lambda u: [C - u[0] ** 3 - u[0]],
}


def step_fn(u: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    b = C - u[0] ** 3 - u[0]
    return [b / (3 * u[0] ** 2 + 1)], [b]


KRYLOV: dict[str, Any] = {
    **COMMON,
    "matvec_fn": lambda u, v: [(3 * u[0] ** 2 + 1) * v[0]],
    "precond_setup_fn": None,
    "precond_apply_fn": None,
}


def test_newton_entry_points() -> None:
    u, converged, iterations, lines = eager.newton_solve_eager(step_fn=step_fn, **COMMON)
    assert converged is True and lines == []
    torch.testing.assert_close(u[0], torch.tensor([[1.0], [3.0]], dtype=torch.float64))
    _, _, _, lines = eager.newton_solve_eager(step_fn=step_fn, **COMMON, collect_log=True)
    assert [line[:13] for line in lines] == [f"ITERATION {i:3d}" for i in range(iterations + 1)]
    u, mask, _ = eager.newton_solve_eager_masked(step_fn=step_fn, **{**COMMON, "miters": 8})
    assert mask.tolist() == [True, False]
    assert isinstance(mask, Tensor) and mask.dtype == torch.bool
    assert u[0][0].item() == pytest.approx(1.0)
    with pytest.raises(ConvergenceError):
        eager.newton_solve_eager(step_fn=step_fn, **{**COMMON, "miters": 8})


def test_krylov_entry_points() -> None:
    for method in ("gmres", "bicgstab"):
        u, converged, _, _ = eager.krylov_solve_eager(**KRYLOV, method=method)
        assert converged is True
        torch.testing.assert_close(u[0], torch.tensor([[1.0], [3.0]], dtype=torch.float64))
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
        eager.krylov_solve_eager(**{**KRYLOV, **change})
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
