"""torch differentiates and maps compiled models: reverse and forward mode, functional transforms, many time steps.

References are finite differences by torch's gradcheck, and eager neml2's own autograd. That torch's transforms give
what the model's own operations give, test_ways.py asks of every model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import neml2
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.func import grad, jacfwd, jacrev, jvp, vmap

import references
from neml2_aoti_plugin import DerivativeNotCompiledError, Model
from references import Case, Tensors, difference

# Models all of whose derivatives were compiled.
DERIVED = ["elasticity", "promoted", "composed", "krylov", "calibration", "promoted_implicit", "renamed"]
FIRST_ONLY = "first derivatives only"


@pytest.fixture
def case() -> Case:
    return references.case("calibration")


@pytest.fixture
def row(case: Case) -> Tensors:
    return {n: x[-1] for n, x in case.rows().items()}


def leaves(rows: Tensors) -> Tensors:
    return {name: x.detach().clone().requires_grad_() for name, x in rows.items()}


def weights(outputs: Tensors) -> Tensors:
    generator = torch.Generator().manual_seed(5)
    return {n: torch.randn(x.shape, generator=generator, dtype=x.dtype) for n, x in outputs.items()}


def weighted(outputs: Tensors) -> Tensor:
    w = weights(outputs)
    return torch.stack([(w[name] * x).sum() for name, x in outputs.items()]).sum()


@pytest.mark.parametrize("name", DERIVED)
def test_gradcheck(name: str) -> None:
    """Finite differences of the model itself, by inputs and parameters together, reverse and forward."""
    case = references.case(name)
    model, rows = case.load(), references.few(case)
    given = {**rows, **{n: p.detach().clone() for n, p in model.named_parameters().items()}}
    scales = {n: references.size(x) for n, x in given.items()}
    size = {n: references.size(x) for n, x in model.forward(rows).items()}

    def function(*scaled: Tensor) -> tuple[Tensor, ...]:
        values = {n: x * scales[n] for n, x in zip(scales, scaled, strict=True)}
        found = model.forward({n: values[n] for n in rows}, {n: x for n, x in values.items() if n not in rows})
        return tuple(x / size[n] for n, x in found.items())

    at = tuple((x / scales[n]).requires_grad_() for n, x in given.items())
    assert gradcheck(function, at, eps=1e-5, atol=1e-5, rtol=1e-4, check_forward_ad=True, check_batched_grad=True)


@pytest.mark.parametrize(
    ("strain_batch", "time_batch"),
    [*((batch, ()) for batch in ((), (1,), (4,), (2, 3))), *((batch, (3,)) for batch in ((), (1,), (4, 1), (2, 3)))],
)
def test_gradients_have_the_shapes_of_their_inputs(
    case: Case, row: Tensors, strain_batch: tuple[int, ...], time_batch: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(2)
    factors = 1.0 + 0.1 * torch.rand(*strain_batch, 1, generator=generator, dtype=torch.float64)
    row |= {"strain": factors * row["strain"], "t": row["t"].expand(time_batch)}
    inputs, batch = leaves(row), torch.broadcast_shapes(strain_batch, time_batch)
    outputs = case.model.forward(inputs)
    weighted(outputs).backward()
    assert outputs["stress"].shape == (*batch, 6)
    # The same call with all inputs at the full batch; the gradient by a common value is the sum over it.
    ranks = {name: len(v.base_shape) for name, v in case.model.inputs.items()}
    wide = leaves({n: x.expand((*batch, *x.shape[x.ndim - ranks[n] :])) for n, x in row.items()})
    weighted(case.model.forward(wide)).backward()
    for name, x in inputs.items():
        expected = wide[name].grad
        assert expected is not None and x.grad is not None
        assert difference(x.grad, expected.sum_to_size(x.shape)) < 1e-12, name


def test_parameters_are_frozen_until_asked_and_no_grad_gives_no_graph(case: Case) -> None:
    def asks(model: Model, rows: Tensors) -> bool:
        return any(x.requires_grad for x in model.forward(rows).values())

    model = case.load()
    assert not any(x.requires_grad for x in model.parameters()) and not asks(model, case.rows())
    assert asks(model.requires_grad_(), case.rows())
    with torch.no_grad():
        assert not asks(model, leaves(case.rows()))
    with torch.inference_mode():
        assert not asks(model, case.rows())


def test_change_in_place_between_forward_and_backward_does_not_disturb(case: Case) -> None:
    model = case.load().requires_grad_()
    expected = model.param_vjp(case.rows(), weights(model.forward(case.rows())))
    loss = weighted(model.forward(case.rows()))
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.mul_(2.0)
    loss.backward()
    for name, parameter in model.named_parameters().items():
        assert parameter.grad is not None and difference(parameter.grad, expected[name]) < 1e-12


# -- what is missing --------------------------------------------------------------------------------------------------


def test_pair_is_missed_in_backward_and_only_if_it_is_needed() -> None:
    case = references.case("viscoplasticity")
    rows = case.rows()
    rows["strain"] = rows["strain"].clone().requires_grad_()
    outputs = case.model.forward(rows)
    outputs["stress"].sum().backward(retain_graph=True)
    assert rows["strain"].grad is not None
    with pytest.raises(DerivativeNotCompiledError, match="-d equivalent_plastic_strain:strain"):
        outputs["equivalent_plastic_strain"].sum().backward()


def test_parameter_is_missed_with_both_flags(tmp_path: Path) -> None:
    model = references.altered("promoted", tmp_path, parameter_derivatives=[]).requires_grad_()
    with pytest.raises(DerivativeNotCompiledError, match=r"-p promoted\.E .*-d stress:promoted\.E"):
        model.forward(references.case("promoted").rows())["stress"].sum().backward()


def test_second_derivative_is_refused_and_never_zero(case: Case) -> None:
    rows = leaves(references.few(case))
    (gradient,) = torch.autograd.grad(weighted(case.model.forward(rows)), rows["strain"], create_graph=True)
    with pytest.raises(DerivativeNotCompiledError, match=FIRST_ONLY):
        gradient.sum().backward()
    # Forward over reverse.
    first = grad(lambda e: case.model.forward({**references.few(case), "strain": e})["stress"].sum())
    strain = references.few(case)["strain"]
    assert bool(jvp(first, (strain,), (torch.ones_like(strain),))[1].isnan().all())


@pytest.mark.parametrize("name", ["elasticity", "calibration"])
def test_forward_over_forward_is_not_zero_either(name: str) -> None:
    case = references.case(name)
    row = {n: x[-1] for n, x in case.rows().items()}

    def stress(strain: Tensor) -> Tensor:
        return case.model.forward({**row, "strain": strain})["stress"]

    strain, ones = row["strain"], torch.ones_like(row["strain"])
    once, twice = jvp(lambda e: jvp(stress, (e,), (ones,))[1], (strain,), (ones,))[:2]
    assert difference(once, case.model.jvp(row, {"strain": ones})[1]["stress"]) < 1e-12
    assert bool(twice.isnan().all())
    assert bool(jacfwd(jacfwd(stress))(strain).isnan().all())
    with pytest.raises(DerivativeNotCompiledError, match=FIRST_ONLY):
        jacrev(jacfwd(stress))(strain)


def test_forward_over_forward_by_what_the_model_does_not_take(case: Case, row: Tensors) -> None:
    """An outer derivative that does not lead through the model is no second derivative of it."""
    ones = torch.ones_like(row["strain"])

    def scaled(factor: Tensor) -> Tensor:
        slope: Tensor = jvp(lambda e: case.model.forward({**row, "strain": e})["stress"], (row["strain"],), (ones,))[1]
        return factor * slope

    value, slope = jvp(scaled, (torch.tensor(2.0),), (torch.tensor(1.0),))[:2]
    assert difference(2.0 * slope, value) < 1e-14


# -- transforms -------------------------------------------------------------------------------------------------------


def test_vmap_over_another_axis_and_over_some_inputs(case: Case) -> None:
    rows = case.rows()
    strain, rest = rows["strain"], {n: x[0] for n, x in rows.items() if n != "strain"}

    def stress(**given: Tensor) -> Tensor:
        return case.model.forward({**rest, "strain": strain, **given})["stress"]

    found = vmap(lambda e: stress(strain=e), in_dims=1)(strain.T)
    assert torch.equal(found, stress())
    # Behind a batch axis of its own, which only one of the inputs has.
    steps = rows["t"][:3, None]
    assert torch.equal(vmap(lambda t: stress(t=t))(steps), stress(t=steps))


@pytest.mark.parametrize("name", ["elasticity", "calibration", "cross_group"])
def test_vmap_over_no_rows(name: str) -> None:
    case = references.case(name)
    found = vmap(case.model.forward)({n: x[:0] for n, x in case.rows().items()})
    for out, value in case.model.forward(case.rows()).items():
        assert found[out].shape == (0, *value.shape[1:]), out


def test_functional_call_takes_other_parameters() -> None:
    model, rows = references.case("promoted").load(), references.case("promoted").rows()
    other = {n: 1.1 * p.detach() for n, p in model.named_parameters().items()}
    found = grad(lambda parameters: weighted(torch.func.functional_call(model, parameters, (rows,))))(other)
    expected = model.param_vjp(rows, weights(model.forward(rows)), other)
    assert all(difference(found[n], expected[n]) < 1e-12 for n in other)


def test_gradients_through_time_steps_are_those_of_eager_neml2(case: Case) -> None:
    """Backpropagation through the steps of a TransientDriver."""

    def drive(file: Path) -> tuple[dict[str, Any], Tensor]:
        with references.default_dtype(torch.float64):
            driver = neml2.load_input(file).get_driver("driver")
        if file == case.file:
            driver.model.set_solver_config(**case.newton)
        references.tighten(driver.model)
        driver.model.requires_grad_()
        driver.run()
        stresses = torch.stack([step["stress"].data for step in driver.result_out[1:]])
        generator = torch.Generator().manual_seed(8)
        (torch.randn(stresses.shape, generator=generator, dtype=stresses.dtype) * stresses).sum().backward()
        return dict(driver.model.named_parameters(recurse=True)), stresses

    (found, stresses), (wanted, expected) = drive(case.file), drive(case.stub.path)
    assert difference(stresses, expected) < 1e-9
    assert len(found) == 2
    for name, parameter in found.items():
        inside = next(n for n in wanted if n.endswith(name.removeprefix("residual.")))
        assert parameter.grad is not None and wanted[inside].grad is not None
        assert difference(parameter.grad, wanted[inside].grad) < 1e-7, name
