"""A column in the place of one value per row: the two broadcast against each other, and the caller is warned."""

from __future__ import annotations

import warnings
from typing import Any

import neml2
import pytest
import torch

import references
from references import Tensors

CASE, HARDENING = "calibration", "residual.hardening.K"


@pytest.fixture
def rows() -> Tensors:
    """One row, four times, so that any mixture of them is one that converges."""
    return {n: x[-1:].repeat(4, *(1,) * (x.ndim - 1)) for n, x in references.case(CASE).rows().items()}


def with_grad(given: Tensors) -> Any:
    return references.case(CASE).model.forward({**given, "strain": given["strain"].clone().requires_grad_()})


def typed(given: Tensors) -> Any:
    case = references.case(CASE)
    model = neml2.load_model(case.file, case.stub.model)
    return model(*(wrapper(given[name]) for name, wrapper in model.input_spec.items()))


@pytest.mark.parametrize("call", ["forward", "solve", "jacobian", "param_jacobian", with_grad, typed])
def test_every_call_warns_with_names_shapes_and_cure(call: Any, rows: Tensors) -> None:
    called = getattr(references.case(CASE).model, call) if isinstance(call, str) else call
    with pytest.warns(UserWarning, match=r"'t' has the batch shape \(4, 1\)") as caught:
        warnings.simplefilter("always")
        called({**rows, "t": rows["t"][:, None]})
    assert caught[0].filename == __file__
    for word in ("'strain' (4,)", "to (4, 4)", "t.reshape((4, *base))", "grid"):
        assert word in str(caught[0].message)


def test_parameter_and_vector(rows: Tensors) -> None:
    model = references.case(CASE).model
    with pytest.warns(UserWarning, match=rf"'{HARDENING}' has the batch shape \(4, 1\)"):
        model.forward(rows, {HARDENING: torch.full((4, 1), 1000.0, dtype=torch.float64)})
    with pytest.warns(UserWarning, match=r"'strain' has the batch shape \(4, 1\)"):
        assert model.forward({**rows, "strain": rows["strain"][:, None]})["stress"].shape == (4, 4, 6)


def test_once_for_each_place(rows: Tensors) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            references.case(CASE).model.forward({**rows, "t": rows["t"][:, None]})
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("strain", "time"),
    [((4,), ()), ((4,), (1,)), ((4,), (3, 1)), ((3, 4), (4,)), ((1, 4), (4, 1)), ((2, 4), (2, 1)), ((1,), (1, 1))],
)
def test_other_broadcasts_are_not(rows: Tensors, strain: tuple[int, ...], time: tuple[int, ...]) -> None:
    row = {n: x[0] for n, x in rows.items()}
    given = {**row, "strain": row["strain"].expand(*strain, 6), "t": row["t"].expand(time)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = references.case(CASE).model.forward(given)["stress"]
    assert found.shape[:-1] == torch.broadcast_shapes(strain, time)
