"""Autograd through `Points.update`: what is part of the graph, and what must be refused; see `test_points_forms.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from neml2_aoti_plugin import DerivativeNotCompiledError, InputError, InputTypeError, Points
from neml2_aoti_plugin.points._evaluation import attached
from point_cases import YIELD, N, begun, strains, unchanged

ONE = torch.tensor(1.0).double()


def followed(dimension: Any = 3) -> Tensor:
    """Strains that require grad."""
    return torch.from_numpy(strains(dimension=dimension)).requires_grad_()


def test_points_that_a_loss_leaves_out_take_no_part() -> None:
    """Which takes no tangent that was asked for."""
    points, limit, strain = begun("calibration", pairs=[]), torch.tensor(160.0).double().requires_grad_(), strains()
    given: dict[str, Any] = {"t": 1.0, "param_overrides": {YIELD: limit}}
    alone = points.update(strain=torch.from_numpy(strain[1:2]), points=[1], **given)
    (expected,) = torch.autograd.grad(alone.outputs["stress"].sum(), limit)
    points.revert()
    strain[0] = np.nan
    found = points.update(strain=torch.from_numpy(strain), **given)
    assert found.failed == [0] and found.tangent == {}
    (gradient,) = torch.autograd.grad(found.outputs["stress"][1].sum(), limit, retain_graph=True)
    assert torch.allclose(gradient, expected, rtol=1e-9)
    assert torch.autograd.grad(found.outputs["stress"].sum(), limit)[0].isnan()


def test_a_point_that_is_attempted_again_has_its_own_parameters_and_gradients() -> None:
    """One that has failed, from a guess and without, and with it the guess of the next update."""
    far, yields = strains(), torch.tensor([100.0, 300.0, 150.0, 200.0]).double()
    far[1] = np.nan
    points, found = begun("calibration"), list[tuple[Tensor, Tensor]]()
    for given, failed in ((strains(), []), (far, [1])):
        again = points.update(strain=given, t=1.0, param_overrides={YIELD: yields.numpy()})
        assert again.failed == failed
    for one in (points, begun("calibration")):
        strain, limit = followed(), yields.clone().requires_grad_()
        stress = one.update(strain=strain, t=1.0, param_overrides={YIELD: limit}).outputs["stress"]
        found.append((stress, *torch.autograd.grad(stress.sum(), (strain, limit))))
    for value, expected in zip(*found, strict=True):
        assert torch.allclose(value, expected, rtol=1e-6)


def test_the_state_and_the_tangent_are_no_part_of_the_graph() -> None:
    points = begun("calibration")
    found = points.update(strain=followed(), t=1.0)
    assert found.outputs["stress"].requires_grad and not found.tangent["stress"]["strain"].requires_grad
    points.commit()
    assert not any(value.requires_grad for value in points.state().values.values())
    later = points.update(strain=followed().detach(), t=2.0)
    assert not later.outputs["stress"].requires_grad
    # What is written to the results reaches neither the state nor, unseen, a gradient.
    with torch.no_grad():
        found.tangent["stress"]["strain"].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.outputs["stress"].sum().backward()


def numpy_with_a_parameter(points: Points) -> Any:
    points.model.get_parameter(YIELD).requires_grad_()
    try:
        return points.update(strain=strains(), t=1.0)
    finally:
        points.model.get_parameter(YIELD).requires_grad_(False)


def twice(points: Points) -> Any:
    strain = followed()
    (first,) = torch.autograd.grad(
        points.update(strain=strain, t=1.0).outputs["stress"].sum(), strain, create_graph=True
    )
    return torch.autograd.grad(first.sum(), strain)


def into_arrays(points: Points) -> Any:
    return points.update(strain=followed(), t=1.0, out={"stress": torch.zeros(N, 6).double()})


def transformed(points: Points) -> Any:
    return torch.func.grad(lambda x: points.update(strain=x, t=1.0).outputs["stress"].sum())(followed().detach())


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (numpy_with_a_parameter, InputError, f"'{YIELD}' requires grad, and what was given is of NumPy"),
        (into_arrays, InputError, "'strain' requires grad, and the arrays of out= are part of no graph"),
        (twice, DerivativeNotCompiledError, "asked for with create_graph=True"),
        (transformed, InputTypeError, "'strain' is a value inside torch.vmap or another transform of torch.func"),
    ],
)
def test_what_cannot_be_followed_is_refused(call: Callable[[Points], Any], error: type[Exception], words: str) -> None:
    points = begun("calibration")
    with unchanged(points), pytest.raises(error, match=words):
        call(points)


@pytest.mark.parametrize("dimension", [3, "plane stress"])
def test_gradients_that_were_not_compiled_are_refused_where_they_are_asked_for(dimension: Any) -> None:
    points, strain, time = begun(dimension=dimension), followed(dimension), ONE.clone().requires_grad_()
    found = points.update(strain=strain, t=1.0).outputs
    with pytest.raises(DerivativeNotCompiledError, match=r"d\(equivalent_plastic_strain\)/d\(strain\) was not.*-d equ"):
        torch.autograd.grad(found["equivalent_plastic_strain"].sum(), strain)
    assert torch.autograd.grad(found["stress"].sum(), strain)[0].isfinite().all()
    stress = points.update(strain=strain.detach(), t=time).outputs["stress"]
    with pytest.raises(DerivativeNotCompiledError, match=r"d\(stress\)/d\(t\) was not.*-d stress:t"):
        stress.sum().backward()


def test_derivatives_per_site_are_refused() -> None:
    # As many sites as points, so that the shapes alone would fit.
    values, blocks = torch.zeros(3, 3, 6).double(), {("y", "x"): torch.zeros(3, 3, 6, 6).double()}
    with pytest.raises(InputError, match="does not follow 'x' through Points, since its derivatives are per site"):
        attached({"y": values}, blocks, {"x": values[0].requires_grad_()}, lambda _: (3, 6), lambda _: None)
