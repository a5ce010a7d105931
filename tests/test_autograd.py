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

import references
from neml2_aoti_plugin import DerivativeNotCompiledError, InputError, Model
from references import Tensors, difference

# Models all of whose derivatives were compiled.
DERIVED = ["elasticity", "promoted", "composed", "krylov", "calibration", "promoted_implicit", "renamed"]


def leaves(rows: Tensors) -> Tensors:
    return {name: x.detach().clone().requires_grad_() for name, x in rows.items()}


def weights(outputs: Tensors) -> Tensors:
    generator = torch.Generator().manual_seed(5)
    return {n: torch.randn(x.shape, generator=generator, dtype=x.dtype) for n, x in outputs.items()}


def weighted(outputs: Tensors) -> Tensor:
    w = weights(outputs)
    return torch.stack([(w[name] * x).sum() for name, x in outputs.items()]).sum()


class TestReverse:
    @pytest.mark.parametrize("name", DERIVED)
    def test_gradcheck(self, name: str) -> None:
        """Finite differences of the model itself, by inputs and parameters together, reverse and forward."""
        case = references.case(name)
        model, rows = case.load(), references.few(case)
        parameters = {n: p.detach().clone() for n, p in model.named_parameters().items()}
        scales = {n: references.size(x) for n, x in {**rows, **parameters}.items()}
        size = {n: references.size(x) for n, x in model.forward(rows).items()}

        def function(*scaled: Tensor) -> tuple[Tensor, ...]:
            values = {n: x * scales[n] for n, x in zip(scales, scaled, strict=True)}
            found = model.forward({n: values[n] for n in rows}, {n: values[n] for n in parameters})
            return tuple(x / size[n] for n, x in found.items())

        at = tuple((x / scales[n]).requires_grad_() for n, x in {**rows, **parameters}.items())
        assert gradcheck(function, at, eps=1e-5, atol=1e-5, rtol=1e-4, check_forward_ad=True, check_batched_grad=True)

    @pytest.mark.parametrize("strain_batch", [(), (1,), (4,), (2, 3)])
    @pytest.mark.parametrize("time_batch", [(), (3,)])
    def test_gradients_have_the_shapes_of_their_inputs(
        self, strain_batch: tuple[int, ...], time_batch: tuple[int, ...]
    ) -> None:
        if (strain_batch, time_batch) == ((4,), (3,)):
            strain_batch = (4, 1)
        case = references.case("calibration")
        row = {name: x[-1] for name, x in case.rows().items()}
        generator = torch.Generator().manual_seed(2)
        factors = 1.0 + 0.1 * torch.rand(*strain_batch, 1, generator=generator, dtype=torch.float64)
        row["strain"] = factors * row["strain"]
        row["t"] = row["t"].expand(time_batch)
        inputs = leaves(row)
        outputs = case.model.forward(inputs)
        weighted(outputs).backward()
        batch = torch.broadcast_shapes(strain_batch, time_batch)
        assert outputs["stress"].shape == (*batch, 6)
        # The same call with all inputs at the full batch; the gradient by a common value is the sum over it.
        ranks = {name: len(v.base_shape) for name, v in case.model.inputs.items()}
        wide = leaves({n: x.expand((*batch, *x.shape[x.ndim - ranks[n] :])) for n, x in row.items()})
        weighted(case.model.forward(wide)).backward()
        for name, x in inputs.items():
            expected = wide[name].grad
            assert expected is not None and x.grad is not None
            assert difference(x.grad, expected.sum_to_size(x.shape)) < 1e-12, name


class TestFrozen:
    def test_parameters_are_frozen_until_asked(self) -> None:
        model = references.case("calibration").load()
        assert not any(x.requires_grad for x in model.parameters())
        assert not any(x.requires_grad for x in model.forward(references.case("calibration").rows()).values())

    def test_no_grad_gives_no_graph(self) -> None:
        case = references.case("calibration")
        model = case.load().requires_grad_()
        with torch.no_grad():
            assert not any(x.requires_grad for x in model.forward(leaves(case.rows())).values())
        with torch.inference_mode():
            assert not any(x.requires_grad for x in model.forward(case.rows()).values())

    def test_change_in_place_between_forward_and_backward_does_not_disturb(self) -> None:
        case = references.case("calibration")
        model = case.load().requires_grad_()
        expected = model.param_vjp(case.rows(), weights(model.forward(case.rows())))
        loss = weighted(model.forward(case.rows()))
        for parameter in model.parameters():
            with torch.no_grad():
                parameter.mul_(2.0)
        loss.backward()
        for name, parameter in model.named_parameters().items():
            assert parameter.grad is not None and difference(parameter.grad, expected[name]) < 1e-12


class TestMissing:
    def test_pair_is_missed_in_backward_and_only_if_it_is_needed(self) -> None:
        case = references.case("viscoplasticity")
        rows = case.rows()
        rows["strain"] = rows["strain"].clone().requires_grad_()
        outputs = case.model.forward(rows)
        outputs["stress"].sum().backward(retain_graph=True)
        assert rows["strain"].grad is not None
        with pytest.raises(DerivativeNotCompiledError, match="-d equivalent_plastic_strain:strain"):
            outputs["equivalent_plastic_strain"].sum().backward()

    def test_parameter_is_missed_with_both_flags(self, tmp_path: Path) -> None:
        model = references.altered("promoted", tmp_path, parameter_derivatives=[]).requires_grad_()
        with pytest.raises(DerivativeNotCompiledError, match=r"-p promoted\.E .*-d stress:promoted\.E"):
            model.forward(references.case("promoted").rows())["stress"].sum().backward()

    def test_second_derivative_is_refused_and_never_zero(self) -> None:
        case = references.case("calibration")
        rows = leaves(references.few(case))
        outputs = case.model.forward(rows)
        (gradient,) = torch.autograd.grad(weighted(outputs), rows["strain"], create_graph=True)
        with pytest.raises(DerivativeNotCompiledError, match="first derivatives only"):
            gradient.sum().backward()

    def test_forward_over_reverse_is_not_zero_either(self) -> None:
        case = references.case("calibration")
        rows = references.few(case)

        def gradient(strain: Tensor) -> Tensor:
            found: Tensor = torch.func.grad(lambda e: case.model.forward({**rows, "strain": e})["stress"].sum())(strain)
            return found

        second = torch.func.jvp(gradient, (rows["strain"],), (torch.ones_like(rows["strain"]),))[1]
        assert bool(second.isnan().all())

    @pytest.mark.parametrize("name", ["elasticity", "calibration"])
    def test_forward_over_forward_is_not_zero_either(self, name: str) -> None:
        case = references.case(name)
        row = {n: x[-1] for n, x in case.rows().items()}

        def stress(strain: Tensor) -> Tensor:
            return case.model.forward({**row, "strain": strain})["stress"]

        strain, ones = row["strain"], torch.ones_like(row["strain"])
        once, twice = torch.func.jvp(lambda e: torch.func.jvp(stress, (e,), (ones,))[1], (strain,), (ones,))[:2]
        assert difference(once, case.model.jvp(row, {"strain": ones})[1]["stress"]) < 1e-12
        assert bool(twice.isnan().all())
        assert bool(torch.func.jacfwd(torch.func.jacfwd(stress))(strain).isnan().all())
        with pytest.raises(DerivativeNotCompiledError, match="first derivatives only"):
            torch.func.jacrev(torch.func.jacfwd(stress))(strain)

    def test_forward_over_forward_by_what_the_model_does_not_take(self) -> None:
        """An outer derivative that does not lead through the model is no second derivative of it."""
        case = references.case("calibration")
        row = {n: x[-1] for n, x in case.rows().items()}

        def scaled(factor: Tensor) -> Tensor:
            ones = torch.ones_like(row["strain"])
            stress = lambda e: case.model.forward({**row, "strain": e})["stress"]  # noqa: E731
            slope: Tensor = torch.func.jvp(stress, (row["strain"],), (ones,))[1]
            return factor * slope

        value, slope = torch.func.jvp(scaled, (torch.tensor(2.0),), (torch.tensor(1.0),))[:2]
        assert difference(2.0 * slope, value) < 1e-14

    def test_wrong_input_is_told_as_without_grad(self) -> None:
        model = references.case("elasticity").model
        with pytest.raises(InputError, match=r"'strain'.*\(5,\)"):
            model.forward({"strain": torch.zeros(5, dtype=torch.float64, requires_grad=True)})
        with pytest.raises(InputError, match="missing 'strain'"):
            model.forward({"strian": torch.zeros(6, dtype=torch.float64, requires_grad=True)})


class TestFunctional:
    def test_vmap_over_another_axis_and_over_some_inputs(self) -> None:
        case = references.case("calibration")
        rows = case.rows()
        strain = rows["strain"]
        rest = {n: x[0] for n, x in rows.items() if n != "strain"}
        expected = case.model.forward({**rest, "strain": strain})["stress"]
        found = torch.func.vmap(lambda e: case.model.forward({**rest, "strain": e})["stress"], in_dims=1)(strain.T)
        assert torch.equal(found, expected)
        # Behind a batch axis of its own, which only one of the inputs has.
        steps = rows["t"][:3, None]
        found = torch.func.vmap(lambda t: case.model.forward({**rest, "strain": strain, "t": t})["stress"])(steps)
        expected = case.model.forward({**rest, "strain": strain, "t": steps})["stress"]
        assert torch.equal(found, expected)

    @pytest.mark.parametrize("name", ["elasticity", "calibration", "cross_group"])
    def test_vmap_over_no_rows(self, name: str) -> None:
        case = references.case(name)
        found = torch.func.vmap(case.model.forward)({n: x[:0] for n, x in case.rows().items()})
        for out, value in case.model.forward(case.rows()).items():
            assert found[out].shape == (0, *value.shape[1:]), out

    def test_functional_call_takes_other_parameters(self) -> None:
        case = references.case("promoted")
        model, rows = case.load(), case.rows()
        other = {n: 1.1 * p.detach() for n, p in model.named_parameters().items()}

        def loss(parameters: Tensors) -> Tensor:
            return weighted(torch.func.functional_call(model, parameters, (rows,)))

        found = torch.func.grad(loss)(other)
        expected = model.param_vjp(rows, weights(model.forward(rows)), other)
        assert all(difference(found[n], expected[n]) < 1e-12 for n in other)


class TestTime:
    """Backpropagation through the time steps of a TransientDriver."""

    def drive(self, file: object, newton: dict[str, Any] | None) -> tuple[object, object]:
        driver = neml2.load_input(file).get_driver("driver")
        if newton:
            driver.model.set_solver_config(**newton)
        else:
            references.tighten(driver.model)
        driver.model.requires_grad_()
        driver.run()
        stresses = torch.stack([step["stress"].data for step in driver.result_out[1:]])
        generator = torch.Generator().manual_seed(8)
        (torch.randn(stresses.shape, generator=generator, dtype=stresses.dtype) * stresses).sum().backward()
        return driver.model, stresses

    def test_gradients_are_those_of_eager_neml2(self) -> None:
        case = references.case("calibration")
        compiled, found = self.drive(case.file, case.newton)
        with references.default_dtype(torch.float64):
            eager, expected = self.drive(case.stub.path, None)
        assert difference(found, expected) < 1e-9  # type: ignore[arg-type]
        wanted = dict(eager.named_parameters(recurse=True))  # type: ignore[attr-defined]
        assert len(compiled.named_parameters()) == 2  # type: ignore[attr-defined]
        for name, parameter in compiled.named_parameters().items():  # type: ignore[attr-defined]
            inside = next(n for n in wanted if n.endswith(name.removeprefix("residual.")))
            assert parameter.grad is not None and wanted[inside].grad is not None
            assert difference(parameter.grad, wanted[inside].grad) < 1e-7, name


def test_shared_model_is_not_changed_by_grads() -> None:
    model: Model = references.case("calibration").model
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
