"""What a solve that fails tells: which rows, and what was given to them that is not finite."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import references
from neml2_aoti_plugin import ConvergenceError, Model
from neml2_aoti_plugin.model import Outcome
from neml2_aoti_plugin.model._outcomes import Given, reasons
from references import Tensors

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
    from neml2_aoti_plugin.model import _outcomes as module

    monkeypatch.setattr(module, "reasons", lambda *_, **__: pytest.fail("looked at a good call"))
    references.case("calibration").model.forward(grid)
