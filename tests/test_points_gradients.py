"""Autograd through `Points.update`: against differences of its results, `Model.forward`, and what must be refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import references
from neml2_aoti_plugin import DerivativeNotCompiledError, InputError, InputTypeError, Points
from neml2_aoti_plugin.notation import convert
from neml2_aoti_plugin.points._evaluation import attached

YIELD, HARDENING = "residual.overstress.sy", "residual.hardening.K"
DIMENSIONS: tuple[Any, ...] = (3, "plane strain", "plane stress", "axisymmetric")
N = 4


def points_of(name: str = "calibration", n: int = N, **options: Any) -> Points:
    points = Points(references.case(name).model, n, **options)
    points.initial()
    return points


def strains(seed: int, size: float, notation: Any = "mandel", dimension: Any = 3) -> Tensor:
    """Symmetric tensors as a caller writes them."""
    found = size * np.random.default_rng(seed).normal(size=(N, 6))
    if dimension == 3 or notation == "tensor":
        # The last axis has no shears in a body of revolution.
        found[:, 3:5] *= dimension == 3
        whole = convert(found, "mandel", "voigt strain" if notation == "voigt" else notation)
        return torch.from_numpy(whole[:, :2, :2] if dimension in ("plane strain", "plane stress") else whole)
    return torch.from_numpy(found[:, : 4 if dimension == "axisymmetric" else 3])


@pytest.mark.parametrize("dimension", DIMENSIONS)
@pytest.mark.parametrize("notation", ["mandel", "voigt", "tensor"])
def test_gradients_are_those_of_the_results(notation: Any, dimension: Any) -> None:
    """Central differences of a loss, by values for each point and by values for all, in the second step of a path."""
    points = points_of(notation=notation, dimension=dimension, pairs=[])
    points.update(strain=strains(1, 4e-3, notation, dimension), t=1.0)
    points.commit()
    at: dict[str, Tensor] = {
        "strain": strains(1, 7e-3, notation, dimension),
        "t": torch.tensor(2.0).double(),
        YIELD: torch.tensor([150.0, 160.0, 170.0, 180.0]).double(),
        HARDENING: torch.tensor(1500.0).double(),
    }
    weights: dict[str, Tensor] = {}

    def loss(values: dict[str, Tensor]) -> Tensor:
        given = {name: values[name] for name in ("strain", "t")}
        found = points.update(given, param_overrides={name: values[name] for name in (YIELD, HARDENING)})
        assert not found.failed and found.tangent == {}
        for name, value in found.outputs.items():
            weights.setdefault(name, torch.from_numpy(np.random.default_rng(7).normal(size=value.shape)))
        stress, plastic = found.outputs["stress"], found.outputs["equivalent_plastic_strain"]
        found_loss: Tensor = (weights["stress"] * stress**2).sum()
        found_loss += 1e6 * (weights["equivalent_plastic_strain"] * plastic).sum()
        return found_loss

    leaves = {name: value.clone().requires_grad_() for name, value in at.items()}
    loss(leaves).backward()
    for name, size in (("strain", 1e-7), ("t", 1e-4), (YIELD, 1e-2), (HARDENING, 1.0)):
        along = strains(9, 1.0, notation, dimension) if name == "strain" else torch.ones_like(at[name])
        with torch.no_grad():
            up, down = (float(loss({**at, name: at[name] + sign * size * along})) for sign in (1.0, -1.0))
        gradient = leaves[name].grad
        assert gradient is not None and gradient.shape == at[name].shape
        assert float((gradient * along).sum()) == pytest.approx((up - down) / (2 * size), rel=2e-5)


def test_gradients_are_those_of_the_model() -> None:
    model = references.case("calibration").load()
    model.requires_grad_()
    points, strain = Points(model, N), strains(1, 5e-3).requires_grad_()
    points.initial()
    points.update(strain=strain, t=1.0).outputs["stress"].square().sum().backward()
    zero = torch.zeros(()).double()
    state = {name: torch.zeros(model.inputs[name].base_shape).double() for name in points.kept}
    inputs = {**state, "strain": strain.detach().clone().requires_grad_(), "t": zero + 1.0}
    names = [name for name in model.named_parameters()]
    expected = torch.autograd.grad(
        model.forward(inputs)["stress"].square().sum(), [inputs["strain"], *map(model.get_parameter, names)]
    )
    for value, gradient in zip([strain, *map(model.get_parameter, names)], expected, strict=True):
        assert value.grad is not None and torch.allclose(value.grad, gradient, rtol=1e-9)


@pytest.mark.parametrize("dimension", [3, "plane stress"])
def test_a_part_of_the_points_with_parameters_of_each(dimension: Any) -> None:
    model = references.case("promoted").load()
    model.set_parameter("promoted.E", torch.tensor([1e5, 2e5, 3e5, 4e5]).double())
    young = model.get_parameter("promoted.E").requires_grad_()
    points, strain = Points(model, N, dimension=dimension), strains(1, 1e-3, dimension=dimension)
    found = points.update(strain=strain[[2, 0]], points=[2, 0]).outputs["stress"]
    found.sum().backward()
    # The stress is proportional to the modulus.
    expected = torch.zeros(N).double()
    expected[[2, 0]] = found.detach().sum(-1) / young.detach()[[2, 0]]
    assert young.grad is not None and torch.allclose(young.grad, expected, rtol=1e-10)


def test_points_that_a_loss_leaves_out_take_no_part() -> None:
    points, limit = points_of(), torch.tensor(160.0).double().requires_grad_()
    strain = strains(1, 5e-3)
    whole = points.update(strain=strain[1:2], t=1.0, points=[1], param_overrides={YIELD: limit})
    (expected,) = torch.autograd.grad(whole.outputs["stress"].sum(), limit)
    points.revert()
    strain[0] = torch.nan
    found = points.update(strain=strain, t=1.0, param_overrides={YIELD: limit})
    assert found.failed == [0]
    (gradient,) = torch.autograd.grad(found.outputs["stress"][1].sum(), limit, retain_graph=True)
    assert torch.allclose(gradient, expected, rtol=1e-9)
    assert torch.autograd.grad(found.outputs["stress"].sum(), limit)[0].isnan()


def test_a_point_that_is_attempted_again() -> None:
    points, expected = points_of(), points_of()
    strain, far = strains(1, 5e-3), strains(1, 5e-3)
    far[1] = torch.nan
    points.update(strain=far, t=1.0)
    found: list[Any] = []
    for one in (points, expected):
        leaf = strain.clone().requires_grad_()
        one.update(strain=leaf, t=1.0).outputs["stress"].sum().backward()
        found.append(leaf.grad)
    assert torch.allclose(found[0], found[1], rtol=1e-6)


def test_the_state_and_the_tangent_are_no_part_of_the_graph() -> None:
    points, strain = points_of(), strains(1, 5e-3).requires_grad_()
    found = points.update(strain=strain, t=1.0)
    assert found.outputs["stress"].requires_grad and not found.tangent["stress"]["strain"].requires_grad
    points.commit()
    assert not any(value.requires_grad for value in points.state().values.values())
    later = points.update(strain=strains(2, 5e-3), t=2.0)
    assert not later.outputs["stress"].requires_grad
    # What is written to the results reaches neither the state nor, unseen, a gradient.
    with torch.no_grad():
        found.tangent["stress"]["strain"].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.outputs["stress"].sum().backward()


def numpy_with_a_parameter(points: Points) -> Any:
    points.model.get_parameter(YIELD).requires_grad_()
    try:
        return points.update(strain=strains(1, 1e-3).numpy(), t=1.0)
    finally:
        points.model.get_parameter(YIELD).requires_grad_(False)


def twice(points: Points) -> Any:
    strain = strains(1, 5e-3).requires_grad_()
    stress = points.update(strain=strain, t=1.0).outputs["stress"]
    (first,) = torch.autograd.grad(stress.sum(), strain, create_graph=True)
    return torch.autograd.grad(first.sum(), strain)


FOLLOWED: list[tuple[Callable[[Points], Any], type[Exception], str]] = [
    (numpy_with_a_parameter, InputError, f"'{YIELD}' requires grad, and what was given is of NumPy"),
    (
        lambda p: p.update(strain=strains(1, 1e-3).requires_grad_(), t=1.0, out={"stress": torch.zeros(N, 6).double()}),
        InputError,
        "'strain' requires grad, and the arrays of out= are part of no graph",
    ),
    (twice, DerivativeNotCompiledError, "asked for with create_graph=True"),
    (
        lambda p: torch.func.grad(lambda x: p.update(strain=x, t=1.0).outputs["stress"].sum())(strains(1, 1e-3)),
        InputTypeError,
        "'strain' is a value inside torch.vmap or another transform of torch.func",
    ),
]


@pytest.mark.parametrize(("call", "error", "words"), FOLLOWED)
def test_what_cannot_be_followed_is_refused(call: Callable[[Points], Any], error: type[Exception], words: str) -> None:
    points = points_of()
    before = points.state()
    with pytest.raises(error, match=words):
        call(points)
    assert all(torch.equal(points.state().values[name], value) for name, value in before.values.items())


@pytest.mark.parametrize("dimension", [3, "plane stress"])
def test_gradients_that_were_not_compiled_are_refused_where_they_are_asked_for(dimension: Any) -> None:
    points = points_of("viscoplasticity", dimension=dimension)
    strain, time = strains(1, 5e-3, dimension=dimension).requires_grad_(), torch.tensor(1.0).double().requires_grad_()
    found = points.update(strain=strain, t=1.0).outputs
    with pytest.raises(DerivativeNotCompiledError, match=r"d\(equivalent_plastic_strain\)/d\(strain\) was not.*-d equ"):
        torch.autograd.grad(found["equivalent_plastic_strain"].sum(), strain)
    assert torch.autograd.grad(found["stress"].sum(), strain)[0].isfinite().all()
    stress = points.update(strain=strain.detach(), t=time).outputs["stress"]
    with pytest.raises(DerivativeNotCompiledError, match=r"d\(stress\)/d\(t\) was not.*-d stress:t"):
        stress.sum().backward()


def test_in_plane_stress_a_gradient_takes_others(tmp_path: Path) -> None:
    model = references.altered(
        "calibration", tmp_path, derivatives=[["stress", "strain"], ["equivalent_plastic_strain", "t"]]
    )
    points, time = Points(model, N, dimension="plane stress"), torch.tensor(1.0).double().requires_grad_()
    points.initial()
    found = points.update(strain=strains(1, 5e-3, dimension="plane stress"), t=time).outputs
    with pytest.raises(
        DerivativeNotCompiledError, match=r"in plane stress d\(equiv.*takes d\(equiv.*\)/d\(strain\) too"
    ):
        found["equivalent_plastic_strain"].sum().backward()


def test_derivatives_per_site_are_refused() -> None:
    # As many sites as points, so that the shapes alone would fit.
    values, blocks = torch.zeros(3, 3, 6).double(), {("y", "x"): torch.zeros(3, 3, 6, 6).double()}
    with pytest.raises(InputError, match="does not follow 'x' through Points, since its derivatives are per site"):
        attached({"y": values}, blocks, {"x": values[0].requires_grad_()}, lambda _: (3, 6), lambda out, by: None)
