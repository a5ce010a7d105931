"""Each row of a batch is its own problem: neighbours do not matter, and a failing row does not stop the others."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from neml2.solvers import ConvergenceError
from torch import Tensor

import references
from neml2_aoti_plugin import Model
from neml2_aoti_plugin._program.implicit import ImplicitSegment
from neml2_aoti_plugin.errors import InputError
from neml2_aoti_plugin.model import Outcome
from neml2_aoti_plugin.model import _outcomes as outcomes
from neml2_aoti_plugin.model._outcomes import Given, reasons
from references import Case, Tensors, difference
from stubs.catalogue import CATALOGUE, EXPLICIT

IMPLICIT = [name for name, stub in CATALOGUE.items() if stub.model not in EXPLICIT]
# Solves by matrix products of other sizes differ in the last bits; the iterations damp that.
SOLO = 1e-10
CAPTURE = "NEML2_CAPTURE_SOLVE_FAILURE"


def with_row(rows: Tensors, name: str, k: int, value: float | Tensor) -> Tensors:
    """The rows, with one input of one row replaced."""
    changed = {n: x.clone() for n, x in rows.items()}
    changed[name][k] = value
    return changed


def not_a_number(case: Case, k: int = 1) -> tuple[Tensors, Tensors]:
    """Rows of a case, and the same with one that is NaN in the first input."""
    rows = case.rows()
    return rows, with_row(rows, case.driven, k, torch.nan)


@pytest.mark.parametrize("name", CATALOGUE)
def test_row_is_the_same_alone_and_in_a_batch(name: str) -> None:
    case = references.case(name)
    rows = case.rows()
    together = case.model.forward(rows)
    for k in range(next(iter(rows.values())).shape[0]):
        alone = case.model.forward({n: x[k] for n, x in rows.items()})
        for out, value in alone.items():
            scale = float(together[out].abs().max())
            tolerance = SOLO if case.dtype == torch.float64 else 1e-6
            assert difference(together[out][k], value, scale) < tolerance, (out, k)


@pytest.mark.wide
def test_step_that_cannot_be_solved_fails_alone() -> None:
    case = references.case("chaboche")
    rows = case.rows()
    # Twenty per cent strain in one step.
    broken = with_row(rows, "strain", 2, rows["strain"][2] + 0.2)
    model = case.load()
    model.set_solver_config(**{**case.newton, "miters": 8})
    found = model.solve(broken)
    assert found.converged.tolist() == [True, True, False, True, True, True]
    # Seven, and seven more without chord steps.
    assert int(found.iterations[2]) == 14


class TestError:
    @pytest.mark.parametrize("name", IMPLICIT)
    def test_forward_tells_how_many_and_which(self, name: str) -> None:
        case = references.case(name)
        _, broken = not_a_number(case)
        with pytest.raises(ConvergenceError) as raised:
            case.model.forward(broken)
        text = str(raised.value)
        total = next(iter(broken.values())).shape[0]
        assert f"1 of {total} row" in text
        assert "row 1:" in text
        assert f"{case.newton['atol']:.1e}" in text and f"miters={case.newton['miters']}" in text

    @pytest.mark.wide
    def test_tells_norms_iterations_and_tolerances_of_the_first_few(self) -> None:
        case = references.case("chaboche")
        model = case.load()
        model.set_solver_config(**{**case.newton, "atol": 3e-11, "rtol": 2e-13, "miters": 2})
        rows = {n: x.repeat(2, *(1,) * (x.ndim - 1)) for n, x in case.rows().items()}
        with pytest.raises(ConvergenceError) as raised:
            model.forward(rows)
        text = str(raised.value)
        assert "of 12 row" in text and "... and" in text
        assert "miters=2" in text and "atol=3.0e-11" in text and "rtol=2.0e-13" in text
        listed = re.findall(r"row (\d+): .*iteration 2, \|R\| = (\S+), \|R0\| = (\S+)", text)
        assert len(listed) == 5
        assert [int(row) for row, _, _ in listed] == sorted(int(row) for row, _, _ in listed)
        assert all(float(norm) > 3e-11 and float(norm0) > 0 for _, norm, norm0 in listed)

    def test_names_places_in_a_batch_of_two_axes(self) -> None:
        case = references.case("viscoplasticity")
        states = {n: x.clone() for n, x in case.states.items()}
        states["strain"][2, 1, 0] = torch.nan
        with pytest.raises(ConvergenceError, match=r"row \[2, 1\]: diverged"):
            case.model.forward(states)


class TestCapture:
    def failure(self, case: Case, model: Model | None = None) -> Exception:
        states = {n: x.clone() for n, x in case.states.items()}
        states[case.driven][0, 1] = torch.nan
        with pytest.raises(ConvergenceError) as raised:
            (model or case.model).forward(states)
        error: Exception = raised.value
        return error

    @pytest.mark.parametrize("value", ["", "0", "false", " No ", "OFF", None])
    def test_is_off_unless_asked_for(self, value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv(CAPTURE, raising=False)
        if value is not None:
            monkeypatch.setenv(CAPTURE, value)
        error = self.failure(references.case("viscoplasticity"))
        assert not hasattr(error, "unknowns")

    @pytest.mark.parametrize("mode", ["rowwise", "lockstep"])
    @pytest.mark.parametrize("name", ["viscoplasticity", "composed", "krylov", "cross_group", "substepping"])
    def test_attaches_mask_and_iterates(self, name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(CAPTURE, "1")
        case = references.case(name)
        error = self.failure(case, case.load(mode=mode))
        batch = tuple(next(iter(case.states.values())).shape[:2])
        mask: Tensor = error.converged_mask  # type: ignore[attr-defined]
        unknowns: Tensors = error.unknowns  # type: ignore[attr-defined]
        assert mask.dtype == torch.bool and mask.shape == batch
        assert not bool(mask[0, 1])
        assert set(unknowns) == set(case.implicit.system.unknown_names)
        outputs = case.model.solve(case.states).outputs
        for unknown, value in unknowns.items():
            assert value.shape == outputs[unknown].shape, unknown
            scale = float(outputs[unknown].abs().max())
            assert difference(value[mask], outputs[unknown][mask], scale) < 1e-8, unknown
        if name == "substepping":
            # The mask is that of the first try, before the step was cut.
            assert mask.sum() < mask.numel() - 1
        else:
            assert int(mask.sum()) == mask.numel() - 1


class TestLockstep:
    @pytest.mark.parametrize("name", IMPLICIT)
    def test_agrees_with_rowwise(self, name: str) -> None:
        case = references.case(name)
        rows = case.rows()
        expected = case.model.forward(rows)
        model = case.load(mode="lockstep")
        for out, value in model.forward(rows).items():
            tolerance = 1e-6 if name == "bicgstab" else 1e-9
            assert difference(value, expected[out]) < tolerance, out
        # Rows share the number of iterations, but for those of subincrements.
        assert name == "substepping" or len(model.solve(rows).iterations.unique()) == 1

    def test_can_be_chosen_by_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("NEML2_AOTI_PLUGIN_MODE", "lockstep")
        case = references.case("viscoplasticity")
        assert case.load().mode == "lockstep"
        assert case.load(mode="rowwise").mode == "rowwise"


def test_rows_of_a_block_may_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    case = references.case("viscoplasticity")
    rows = {name: torch.cat([x] * 3) for name, x in case.rows().items()}
    whole = case.load().forward(rows)
    monkeypatch.setenv("NEML2_AOTI_PLUGIN_BLOCK_ROWS", "2")
    model = case.load()
    sizes: list[int] = []
    solve = ImplicitSegment.solve

    def seen(self: ImplicitSegment, state: Tensors, values: Any, rows: int, *rest: Any, **options: Any) -> Any:
        sizes.append(rows)
        return solve(self, state, values, rows, *rest, **options)

    monkeypatch.setattr(ImplicitSegment, "solve", seen)
    cut = model.forward(rows)
    # Of whole vectors.
    assert sum(sizes) == len(rows["t"]) and max(sizes) == 16 and len(sizes) > 1
    for out, value in whole.items():
        assert difference(cut[out], value) < SOLO
    for wrong in ("0", "-1", "many", "1.5"):
        monkeypatch.setenv("NEML2_AOTI_PLUGIN_BLOCK_ROWS", wrong)
        with pytest.raises(InputError, match=f"NEML2_AOTI_PLUGIN_BLOCK_ROWS is '{wrong}'"):
            case.load()


# -- what an error tells -----------------------------------------------------------------------------------------------


ADVICE = "Try a better predictor"


@pytest.fixture(params=["rowwise", "lockstep"])
def model(request: pytest.FixtureRequest) -> Model:
    return references.case("calibration").load(mode=request.param)


@pytest.fixture
def grid() -> Tensors:
    """Rows of two axes."""
    return {n: x.clone() for n, x in references.case("calibration").states.items()}


def failure(model: Model, inputs: Tensors, **options: Any) -> Any:
    with pytest.raises(ConvergenceError) as raised:
        model.forward(inputs, **options)
    return raised.value


def test_mask_and_rows_are_always_there(model: Model, grid: Tensors, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NEML2_CAPTURE_SOLVE_FAILURE", raising=False)
    grid["strain"][0, 1, 2] = torch.nan
    grid["strain"][-1, -1] = torch.nan
    error = failure(model, grid)
    batch = tuple(grid["strain"].shape[:2])
    mask, rows = error.converged_mask, error.rows
    assert mask.dtype == torch.bool and tuple(mask.shape) == batch
    assert rows.dtype == torch.int64 and rows.tolist() == [1, batch[0] * batch[1] - 1]
    assert (~mask).flatten().nonzero().squeeze(-1).tolist() == rows.tolist()
    assert torch.equal(mask, model.solve(grid).converged)
    assert not hasattr(error, "unknowns")


def test_mask_of_one_row_has_no_axis(model: Model, grid: Tensors) -> None:
    row = {n: x[0, 0] for n, x in grid.items()}
    error = failure(model, {**row, "t": torch.tensor(torch.inf, dtype=torch.float64)})
    assert error.converged_mask.shape == () and error.rows.tolist() == [0]


def test_input_that_is_not_finite_is_named(model: Model, grid: Tensors) -> None:
    grid["strain"][0, 1, 2] = torch.inf
    grid["t"][0, 1] = torch.nan
    grid["t"][1, 0] = torch.nan
    text = str(failure(model, grid))
    assert "'strain' is not finite (NaN or infinite) in 1 of these rows." in text
    assert "'t' is not finite (NaN or infinite) in 2 of these rows." in text
    assert "'stress~1'" not in text and ADVICE not in text and "Model.solve" in text


@pytest.mark.parametrize("whole", [True, False])
def test_parameter_that_is_not_finite_is_named(model: Model, grid: Tensors, whole: bool) -> None:
    name = "residual.hardening.K"
    value = torch.tensor(torch.nan, dtype=torch.float64)
    rows = {n: x[0] for n, x in grid.items()}
    count = len(rows["t"])
    if not whole:
        value = torch.full((count,), 1000.0, dtype=torch.float64)
        value[-1] = torch.nan
    error = failure(model, rows, param_overrides={name: value})
    assert f"{name!r} is not finite (NaN or infinite) in {count if whole else 1} of these rows" in str(error)
    assert ADVICE not in str(error)


def test_rows_that_fail_for_other_reasons_keep_the_advice(grid: Tensors) -> None:
    case = references.case("calibration")
    model = case.load()
    model.set_solver_config(**{**case.newton, "miters": 1})
    assert "finite" not in str(failure(model, grid)).split("[")[-1]
    assert ADVICE in str(failure(model, grid))
    grid["strain"][0, 1] = torch.nan
    text = str(failure(model, grid))
    assert "'strain' is not finite (NaN or infinite) in 1 of these rows." in text and ADVICE in text


def test_outcome_of_each_row_is_there(model: Model, grid: Tensors) -> None:
    grid["strain"][0, 1, 2] = torch.nan
    error = failure(model, grid)
    assert torch.equal(error.outcome, model.solve(grid).outcome)
    assert torch.equal(error.outcome == Outcome.CONVERGED, error.converged_mask)


def test_step_of_no_length_is_named() -> None:
    case = references.case("calibration")
    rows = case.rows()
    outcome = torch.tensor([Outcome.CONVERGED, Outcome.NOT_FINITE, Outcome.DIVERGED, Outcome.OUT_OF_ITERATIONS])
    time = torch.tensor([1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    given = {"t": time, "t~1": torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64), "strain": rows["strain"][:4]}
    found = reasons(outcome, Given(given, {}))
    assert found[0] == ("'t' equals 't~1' in 1 of these rows: rates divide by a step of no length. Give a later time.")
    # The second failed otherwise, and the third with a step of some length.
    assert found[1:] == [f"{ADVICE}, a line search, or reduce the time step."]


@pytest.mark.wide
class TestSegments:
    """Rows that fail in different segments of one model, in one error."""

    @pytest.fixture
    def rows(self) -> Tensors:
        return {name: value.clone() for name, value in references.case("rates").rows().items()}

    @pytest.fixture
    def model(self) -> Model:
        return references.case("rates").load(tight=False)

    def test_each_row_tells_its_own(self, model: Model, rows: Tensors) -> None:
        rows["stress~1"][1] = torch.nan
        rows["wear~1"][2] = torch.nan
        text = str(failure(model, rows))
        assert "2 of 9 row(s) failed" in text and "(miters=30, atol=1.0e-09, rtol=1.0e-11, segments 0, 1)" in text
        assert "row 1: diverged in segment 0 at iteration 0" in text
        assert "row 2: diverged in segment 1 at iteration" in text
        assert "'stress~1' is not finite" in text and "'wear~1' is not finite" in text

    def test_one_alone_is_told_once(self, model: Model, rows: Tensors) -> None:
        rows["wear~1"][2] = torch.nan
        text = str(failure(model, rows))
        assert "rtol=1.0e-11, segment 1)" in text and "row 2: diverged at iteration" in text

    def test_derivative_where_time_stands_still(self, model: Model, rows: Tensors) -> None:
        rows["t~1"][1] = rows["t"][1]
        with pytest.raises(ConvergenceError, match=r"row 1: not finite") as raised:
            model.jacobian(rows)
        assert "'t' equals 't~1' in 1 of these rows" in str(raised.value) and ADVICE not in str(raised.value)


def test_rows_that_do_not_fail_are_not_looked_at(grid: Tensors, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outcomes, "reasons", lambda *_, **__: pytest.fail("looked at a good call"))
    references.case("calibration").model.forward(grid)
