"""Compiled models as parts of neml2's own components, against the same components with eager parts throughout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import neml2
import pytest
import torch
from neml2.drivers.ModelUnitTest import ModelUnitTest
from neml2.eager._model import _EagerModel
from neml2.models.common.ComposedModel import ComposedModel
from neml2.models.common.CoordinateDescentPredictor import CoordinateDescentPredictor
from neml2.models.common.ImplicitUpdate import ImplicitUpdate
from neml2.models.common.RateCondensation import RateCondensation
from neml2.models.resolver import DependencyResolver
from neml2.models.solid_mechanics.plasticity.Normality import Normality
from neml2.types import SR2, Scalar
from torch import Tensor

import references
from neml2_aoti_plugin import DerivativeNotCompiledError
from references import Tensors, difference

PARTS = """
[Models]
  [half]
    type = SR2LinearCombination
    from = 'twice'
    to = 'strain'
    weights = '0.5'
  []
  [mises]
    type = SR2Invariant
    invariant_type = VONMISES
    tensor = 'stress'
    invariant = 'mises'
  []
  [balance]
    type = SR2LinearCombination
    from = 'stress target'
    to = 'strain_residual'
    weights = '1 -1'
  []
  [elastic]
    type = LinearIsotropicElasticity
    strain = 'strain'
    stress = 'stress'
    coefficients = '71000 0.33'
    coefficient_types = 'YOUNGS_MODULUS POISSONS_RATIO'
  []
  [compiled]
    type = AOTIModel
    artifact_path = '{artifact}'
  []
  [residual]
    type = ComposedModel
    models = '{elastic} balance'
  []
  [inverse]
    type = ImplicitUpdate
    equation_system = 'system'
    solver = 'newton'
    {predictor}
  []
[]

[EquationSystems]
  [system]
    type = NonlinearSystem
    model = 'residual'
    unknowns = 'strain'
  []
[]

[Solvers]
  [newton]
    type = Newton
    linear_solver = 'lu'
    abs_tol = 1e-11
    rel_tol = 1e-13
    max_its = 20
  []
  [lu]
    type = DenseLU
  []
[]
"""


def load_part(tmp_path: Path, name: str, *, elastic: str = "elastic", predictor: str = "") -> Any:
    file = tmp_path / f"{elastic}.i"
    artifact = references.case("promoted").artifact
    file.write_text(PARTS.format(artifact=artifact, elastic=elastic, predictor=predictor), encoding="utf-8")
    with references.default_dtype(torch.float64):
        return neml2.load_model(file, name)


def tightened(name: str) -> Any:
    """A compiled model with the tolerances of its eager counterpart."""
    case = references.case(name)
    model = neml2.load_model(case.file, case.stub.model)
    if case.implicit is not None:
        model.set_solver_config(**case.newton)
    return model


def chain(tmp_path: Path, part: Any) -> Any:
    return ComposedModel([load_part(tmp_path, "half"), part, load_part(tmp_path, "mises")], ["stress"])


def typed(model: Any, rows: Tensors) -> dict[str, Any]:
    inputs = {**rows, "twice": 2.0 * rows["strain"]}
    return {name: wrapper(inputs[name].clone()) for name, wrapper in model.input_spec.items()}


@pytest.fixture(params=["promoted", "calibration"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Any, Tensors]:
    """A chain with a compiled part, the same with an eager one, and inputs."""
    case = references.case(request.param)
    return chain(tmp_path, tightened(request.param)), chain(tmp_path, case.eager), case.rows()


class TestComposedModel:
    def test_interface_is_that_of_an_eager_model(self, pair: tuple[Any, Any, Tensors]) -> None:
        compiled, eager, _ = pair
        assert compiled.input_spec == eager.input_spec and compiled.output_spec == eager.output_spec

    def test_values(self, pair: tuple[Any, Any, Tensors]) -> None:
        compiled, eager, rows = pair
        for found, expected in zip(
            compiled(*typed(compiled, rows).values()), eager(*typed(eager, rows).values()), strict=True
        ):
            assert type(found) is type(expected)
            assert difference(found.data, expected.data) < 1e-9

    def test_derivatives_by_the_chain_rule(self, pair: tuple[Any, Any, Tensors]) -> None:
        compiled, eager, rows = pair
        _, found = compiled.jacobian(typed(compiled, rows))
        _, expected = eager.jacobian(typed(eager, rows))
        for out, row in expected.items():
            for wrt, block in row.items():
                assert difference(found[out][wrt].data, block.data, 1e-3) < 1e-7, (out, wrt)

    def test_jvp(self, pair: tuple[Any, Any, Tensors]) -> None:
        compiled, eager, rows = pair
        tangents = {
            name: wrapper(x.data + 1e-4)
            for (name, wrapper), x in zip(eager.input_spec.items(), typed(eager, rows).values(), strict=True)
        }
        _, found = compiled.jvp(typed(compiled, rows), tangents)
        _, expected = eager.jvp(typed(eager, rows), tangents)
        for out, along in expected.items():
            assert difference(found[out].data, along.data) < 1e-7, out

    def test_autograd_by_inputs_and_parameters(self, pair: tuple[Any, Any, Tensors]) -> None:
        compiled, eager, rows = pair
        found, expected = gradients(compiled, rows), gradients(eager, rows)
        assert promoted_ones(found) == promoted_ones(dict(compiled.named_parameters())) != []
        for name, gradient in found.items():
            wanted = expected[name.replace("promoted.promoted.", "promoted.")]
            assert difference(gradient, wanted) < 1e-7, name

    def test_derivatives_by_parameters(self, pair: tuple[Any, Any, Tensors]) -> None:
        compiled, eager, rows = pair
        names = promoted_ones(dict(compiled.named_parameters()))
        inside = [name.replace("promoted.promoted.", "promoted.") for name in names]
        outputs, found = compiled.param_jacobian(typed(compiled, rows))
        _, expected = eager.param_jacobian(typed(eager, rows), inside)
        cotangents = {name: torch.ones_like(x) for name, x in outputs.items()}
        gradients = compiled.param_vjp(typed(compiled, rows), cotangents)
        wanted = eager.param_vjp(typed(eager, rows), cotangents, inside)
        for name, eagers in zip(names, inside, strict=True):
            assert difference(gradients[name], wanted[eagers]) < 1e-7, name
            for out, row in expected.items():
                assert difference(found[out][name], row[eagers]) < 1e-7, (out, name)

    def test_parameters_are_found_by_the_parent(self, pair: tuple[Any, Any, Tensors]) -> None:
        compiled, _, _ = pair
        names = promoted_ones(dict(compiled.named_parameters()))
        assert len(names) == 2
        assert all(compiled.get_parameter(name) is dict(compiled.named_parameters())[name] for name in names)


def promoted_ones(parameters: dict[str, Any]) -> list[str]:
    """Those parameters of a chain that are of its compiled part."""
    return [name for name in parameters if name.startswith(("promoted.", "viscoplasticity."))]


def gradients(model: Any, rows: Tensors) -> Tensors:
    model.requires_grad_()
    model.zero_grad()
    inputs = typed(model, rows)
    for value in inputs.values():
        value.data.requires_grad_()
    outputs = model(*inputs.values())
    generator = torch.Generator().manual_seed(4)
    torch.stack(
        [(torch.randn(x.data.shape, generator=generator, dtype=x.data.dtype) * x.data).sum() for x in outputs]
    ).sum().backward()
    found = {name: value.data.grad for name, value in inputs.items() if value.data.grad is not None}
    found.update({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
    return found


class TestImplicitUpdate:
    """A compiled rate law in the residual of eager Newton: strain for a given stress, by the law of the stress."""

    @pytest.fixture
    def target(self) -> Tensor:
        generator = torch.Generator().manual_seed(6)
        return 100.0 * torch.randn(5, 6, generator=generator, dtype=torch.float64)

    def inputs(self, model: Any, target: Tensor) -> list[Any]:
        given = {"target": SR2(target.clone()), "strain": SR2(torch.zeros_like(target))}
        return [given[name] for name in model.input_spec]

    def test_values_and_derivatives(self, tmp_path: Path, target: Tensor) -> None:
        compiled = load_part(tmp_path, "inverse", elastic="compiled")
        eager = load_part(tmp_path, "inverse")
        (found,) = compiled(*self.inputs(compiled, target))
        (expected,) = eager(*self.inputs(eager, target))
        assert difference(found.data, expected.data) < 1e-12
        names = list(eager.input_spec)
        _, blocks = compiled.jacobian(dict(zip(names, self.inputs(eager, target), strict=True)))
        _, wanted = eager.jacobian(dict(zip(names, self.inputs(eager, target), strict=True)))
        assert difference(blocks["strain"]["target"].data, wanted["strain"]["target"].data) < 1e-12

    def test_autograd(self, tmp_path: Path, target: Tensor) -> None:
        found = {}
        for part in ("compiled", "elastic"):
            model = load_part(tmp_path, "inverse", elastic=part).requires_grad_()
            inputs = dict(zip(model.input_spec, self.inputs(model, target), strict=True))
            inputs["target"].data.requires_grad_()
            (strain,) = model(*inputs.values())
            (strain.data * target).sum().backward()
            by_name = {name.rpartition(".")[2]: p.grad for name, p in model.named_parameters()}
            found[part] = {**by_name, "target": inputs["target"].data.grad}
        assert set(found["compiled"]) == set(found["elastic"]) > {"E", "nu", "target"}
        for name, gradient in found["compiled"].items():
            assert difference(gradient, found["elastic"][name]) < 1e-10, name

    def test_compiled_predictor(self, tmp_path: Path) -> None:
        """The compiled solution is the guess, from which eager Newton has nothing left to do."""
        case = references.case("viscoplasticity")
        eager = case.eager
        rows = case.typed(case.rows())
        names = list(eager.input_spec)
        expected = eager(*(rows[name] for name in names))
        update = ImplicitUpdate(system=eager.system, solver=eager.solver, predictor=tightened("viscoplasticity"))
        found = update(*(rows[name] for name in update.input_spec))
        for a, b in zip(found, expected, strict=True):
            assert difference(a.data, b.data) < 1e-9
        update.solver.miters, before = 1, update.solver.miters
        try:
            update(*(rows[name] for name in update.input_spec))
        finally:
            update.solver.miters = before


@pytest.mark.wide
def test_coordinate_descent_predictor() -> None:
    case = references.case("promoted_implicit")
    found = []
    rows = {name: Scalar(x) for name, x in case.rows().items()}
    for law in (tightened("promoted_implicit"), case.eager):
        descent = CoordinateDescentPredictor(rate_law=law, driving_force_input="strain_rate")
        values = {
            **rows,
            **{n: Scalar(torch.full((), 1e-3, dtype=torch.float64)) for n in descent.input_spec if n not in rows},
        }
        result = descent(*(values[name] for name in descent.input_spec))
        found.append((result[0] if isinstance(result, tuple) else result).data)
    assert difference(found[0], found[1]) < 1e-9


def test_normality_refuses_what_has_no_second_derivatives() -> None:
    with pytest.raises(TypeError, match="AOTIModel"):
        Normality(tightened("calibration"), "equivalent_plastic_strain", ["stress~1"], ["direction"])


def test_eager_runtime_of_neml2() -> None:
    """What neml2's C++ programs drive to evaluate models without compiling them."""
    case = references.case("promoted")
    host = _EagerModel(str(case.file), case.stub.model)
    rows = case.rows()
    assert host.parameter_base_shapes == {"promoted.promoted.E": [], "promoted.promoted.nu": []}
    assert difference(host.forward(rows)["stress"], case.model.forward(rows)["stress"]) < 1e-14
    _, found = host.jacobian(rows)
    _, expected = case.model.jacobian(rows)
    assert difference(found["stress"]["strain"], expected["stress"]["strain"].expand(len(rows["strain"]), 6, 6)) < 1e-14
    _, by_parameters = host.param_jacobian(rows)
    _, wanted = case.model.param_jacobian(rows)
    for name, block in wanted["stress"].items():
        assert difference(by_parameters["stress"][f"promoted.{name}"], block) < 1e-14


def test_rate_condensation() -> None:
    case = references.case("calibration")
    rows = case.typed(case.rows())
    found = []
    for path in (tightened("calibration"), case.eager):
        condensed = RateCondensation(model=path, rate="t", driving_force="equivalent_plastic_strain")
        # At zero time the increment of time is that back to where the step began, and no flow takes it up.
        values = {**rows, "t~1": Scalar(-rows["t"].data + rows["t~1"].data)}
        found.append(condensed(*(values[name] for name in condensed.input_spec)))
    for a, b in zip(*found, strict=True):
        assert isinstance(a, Scalar) and difference(a.data, b.data) < 1e-8


def test_provider_of_a_parameter(tmp_path: Path) -> None:
    """The output of a compiled model as the parameter of an eager one."""
    case = references.case("calibration")
    text = """
[Models]
  [law]
    type = AOTIModel
    artifact_path = '{artifact}'
  []
  [scaled]
    type = ScalarLinearCombination
    from = 'x'
    to = 'y'
    weights = 'equivalent_plastic_strain'
  []
  [both]
    type = ComposedModel
    models = 'law scaled'
    additional_outputs = 'equivalent_plastic_strain'
  []
[]
"""
    file = tmp_path / "provider.i"
    file.write_text(text.format(artifact=case.artifact), encoding="utf-8")
    model = neml2.load_model(file, "both")
    rows = case.typed(case.rows())
    rows["x"] = Scalar(torch.full((9,), 3.0, dtype=torch.float64))
    outputs = dict(zip(model.output_spec, model(*(rows[name] for name in model.input_spec)), strict=True))
    assert difference(outputs["y"].data, 3.0 * outputs["equivalent_plastic_strain"].data) < 1e-14
    assert outputs["y"].data.abs().max().item() > 0


class TestResolver:
    def test_priorities_and_items(self) -> None:
        model = tightened("calibration")
        resolver = DependencyResolver()
        resolver.add_node(model)
        assert resolver.resolve() == [model]
        assert model.consumed_items == frozenset(model.input_spec) and model.output_priorities == {}
        assert model.provided_items == frozenset({"stress", "equivalent_plastic_strain"})
        assert model.iterable_export_form() is None and model.SUPPORTS_SECOND_ORDER is False

    def test_call_by_name(self) -> None:
        case = references.case("calibration")
        model = tightened("calibration")
        rows = case.typed(case.rows())
        found = model.call_by_name({**rows, "something_else": Scalar(torch.zeros((), dtype=torch.float64))})
        expected = model(*(rows[name] for name in model.input_spec))
        assert list(found) == list(model.output_spec)
        for value, wanted in zip(found.values(), expected, strict=True):
            assert type(value) is type(wanted) and torch.equal(value.data, wanted.data)
        with pytest.raises(KeyError, match="missing 'strain'"):
            model.call_by_name({name: x for name, x in rows.items() if name != "strain"})


class TestChainRule:
    def test_leading_axes_of_any_number(self) -> None:
        case = references.case("calibration")
        model = tightened("calibration")
        rows = case.typed(case.rows())
        _, blocks = model.jacobian(case.rows())
        seeds = torch.randn(4, 9, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        arguments = [rows[name] for name in model.input_spec]
        for lead in ((), (4,), (2, 2)):
            data = seeds[0] if not lead else seeds.reshape(*lead, 9, 6)
            axes: dict[str, Any] = {"k_ndim": len(lead), "k_state": ("full",) * len(lead)}
            tangent = SR2(data, **axes, k_pairing=(None,) * len(lead))
            *_, v_out = model(*arguments, v={"strain": {"leaf": tangent}, "t": {}})
            found = v_out["stress"]["leaf"]
            assert (found.k_ndim, type(found)) == (len(lead), SR2)
            expected = torch.einsum("boi,...bi->...bo", blocks["stress"]["strain"], data)
            assert difference(found.data, expected) < 1e-12

    def test_two_inputs_of_one_leaf_add_up(self) -> None:
        case = references.case("calibration")
        model = tightened("calibration")
        rows = case.typed(case.rows())
        arguments = [rows[name] for name in model.input_spec]
        direction = {name: {"leaf": rows[name]} for name in ("strain", "strain~1", "t")}
        *_, v_out = model(*arguments, v=direction)
        expected = model.jvp(case.rows(), {name: case.rows()[name] for name in direction})[1]
        for out, wanted in expected.items():
            assert difference(v_out[out]["leaf"].data, wanted) < 1e-12

    def test_sub_batch(self) -> None:
        case = references.case("cross_group")
        model = tightened("cross_group")
        rows = case.typed(case.rows())
        with pytest.raises(DerivativeNotCompiledError, match="-d branch_strain:stress"):
            model(*(rows[name] for name in model.input_spec), v={"stress": {"leaf": rows["stress"]}})

    def test_pair_that_was_not_compiled_is_never_zero(self) -> None:
        case = references.case("viscoplasticity")
        model = tightened("viscoplasticity")
        rows = case.typed(case.rows())
        with pytest.raises(DerivativeNotCompiledError, match="-d equivalent_plastic_strain:strain"):
            model(*(rows[name] for name in model.input_spec), v={"strain": {"strain": rows["strain"]}})


class TestDrivers:
    @pytest.mark.parametrize("name", ["elasticity", "calibration", "composed"])
    def test_model_unit_test(self, name: str) -> None:
        case = references.case(name)
        model = tightened(name)
        inputs = {n: model.input_spec[n](x) for n, x in case.rows().items()}
        expected = {n: model.output_spec[n](x) for n, x in case.eager_forward(case.rows()).items()}
        report = ModelUnitTest(
            model, inputs, expected_outputs=expected, rtol=1e-6, atol=1e-8, derivative_rtol=1e-8, derivative_atol=1e-6
        ).run()
        assert report.value_checks == len(expected)
        assert report.jvp_checks == len(expected) * len(inputs)

    def test_model_unit_test_from_a_file(self, tmp_path: Path) -> None:
        case = references.case("elasticity")
        file = tmp_path / "unit.i"
        file.write_text(
            "[Tensors]\n  [e]\n    type = Python\n    expr = 'SR2.fill(1e-3, 0, 0)'\n  []\n"
            "  [s]\n    type = Python\n    expr = 'SR2.fill(268.6, 109.7, 109.7)'\n  []\n[]\n"
            "[Drivers]\n  [unit]\n    type = ModelUnitTest\n    model = 'm'\n    input_SR2_names = 'strain'\n"
            "    input_SR2_values = 'e'\n    output_SR2_names = 'stress'\n    output_SR2_values = 's'\n"
            "    value_rel_tol = 1e-3\n  []\n[]\n"
            f"[Models]\n  [m]\n    type = AOTIModel\n    artifact_path = '{case.artifact}'\n  []\n[]\n",
            encoding="utf-8",
        )
        with references.default_dtype(torch.float64):
            report = ModelUnitTest.from_file(file).run()
        assert (report.value_checks, report.jvp_checks) == (1, 1)

    def test_regression_and_verification(self, tmp_path: Path) -> None:
        case = references.case("calibration")
        text = case.file.read_text(encoding="utf-8").replace(
            f"artifact_path = '{case.stub.model}'", f"artifact_path = '{case.artifact}'"
        )
        driver = neml2.load_input(case.file).get_driver("driver")
        driver.run()
        last = driver.nsteps - 1
        numbers = ", ".join(repr(float(x)) for x in driver.result_out[last]["stress"].data.flatten())
        torch.save({k: v for k, v in driver.result().items()}, tmp_path / "gold.pt")
        more = (
            f"\n[Tensors]\n  [final]\n    type = Python\n    expr = 'SR2(torch.tensor([{numbers}], "
            f"dtype=torch.float64).reshape(3, 6))'\n  []\n[]\n"
            "[Drivers]\n  [regression]\n    type = TransientRegression\n    driver = 'driver'\n"
            "    reference = 'gold.pt'\n  []\n"
            f"  [verification]\n    type = Verification\n    driver = 'driver'\n    time_steps = '{last}'\n"
            "    SR2_names = 'output.stress'\n    SR2_values = 'final'\n  []\n[]\n"
        )
        file = tmp_path / "run.i"
        file.write_text(text + more, encoding="utf-8")
        loaded = neml2.load_input(file)
        for name in ("regression", "verification"):
            assert loaded.get_driver(name).run(), name
