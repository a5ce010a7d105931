"""A column in the place of one value per row: the two broadcast against each other, and the caller is told."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import neml2
import pytest
import torch
from neml2.types import Scalar

import references
from neml2_aoti_plugin import Model
from references import Tensors


@pytest.fixture(autouse=True)
def _each_time() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        yield


@pytest.fixture
def model() -> Model:
    return references.case("calibration").model


@pytest.fixture
def rows() -> Tensors:
    """One row, four times, so that any mixture of them is one that converges."""
    return {n: x[-1:].repeat(4, *(1,) * (x.ndim - 1)) for n, x in references.case("calibration").rows().items()}


def test_column_is_told_with_names_shapes_and_cure(model: Model, rows: Tensors) -> None:
    with pytest.warns(UserWarning) as caught:
        found = model.forward({**rows, "t": rows["t"][:, None]})
    (warning,) = caught
    text = str(warning.message)
    for word in ("'t' has the batch shape (4, 1)", "'strain' (4,)", "to (4, 4)", "t.reshape((4, *base))", "grid"):
        assert word in text, text
    assert warning.filename == __file__
    assert found["stress"].shape == (4, 4, 6)


@pytest.mark.parametrize("name", ["solve", "jacobian", "param_jacobian", "forward with grad"])
def test_every_call_tells(model: Model, rows: Tensors, name: str) -> None:
    given = {**rows, "t": rows["t"][:, None]}
    if name == "forward with grad":
        given["strain"] = given["strain"].clone().requires_grad_()
    with pytest.warns(UserWarning, match=r"'t' has the batch shape \(4, 1\)") as caught:
        getattr(model, name.partition(" ")[0])(given)
    assert caught[0].filename == __file__


def test_parameter_and_vector(model: Model, rows: Tensors) -> None:
    name = "residual.hardening.K"
    column = torch.full((4, 1), 1000.0, dtype=torch.float64)
    with pytest.warns(UserWarning, match=rf"'{name}' has the batch shape \(4, 1\)"):
        model.forward(rows, {name: column})
    with pytest.warns(UserWarning, match=r"'strain' has the batch shape \(4, 1\)"):
        model.forward({**rows, "strain": rows["strain"][:, None]})


def test_typed(rows: Tensors) -> None:
    case = references.case("calibration")
    typed = neml2.load_model(case.file, case.stub.model)
    given = {n: typed.input_spec[n](x) for n, x in rows.items()}
    with pytest.warns(UserWarning, match="'t' has the batch shape") as caught:
        typed(*{**given, "t": Scalar(rows["t"][:, None])}.values())
    assert caught[0].filename == __file__


def test_once_for_each_place(model: Model, rows: Tensors) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            model.forward({**rows, "t": rows["t"][:, None]})
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("strain", "time"),
    [((4,), ()), ((4,), (1,)), ((4,), (3, 1)), ((3, 4), (4,)), ((1, 4), (4, 1)), ((2, 4), (2, 1)), ((1,), (1, 1))],
)
def test_other_broadcasts_are_not(model: Model, rows: Tensors, strain: tuple[int, ...], time: tuple[int, ...]) -> None:
    row = {n: x[0] for n, x in rows.items()}
    given = {**row, "strain": row["strain"].expand(*strain, 6), "t": row["t"].expand(time)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.forward(given)["stress"].shape[:-1] == torch.broadcast_shapes(strain, time)
