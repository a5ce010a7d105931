"""What a solve that fails tells: which rows, and what was given to them that is not finite."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import references
from neml2_aoti_plugin import ConvergenceError, Model
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


def test_rows_that_do_not_fail_are_not_looked_at(grid: Tensors, monkeypatch: pytest.MonkeyPatch) -> None:
    from neml2_aoti_plugin.model import failure as module

    monkeypatch.setattr(module, "not_finite", lambda *_: pytest.fail("looked at a good call"))
    references.case("calibration").model.forward(grid)
