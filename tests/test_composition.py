"""Compiled models as parts of neml2's own components, against the same components with eager parts throughout.

A stub has the name of the model that was compiled, so that blocks written behind either file take the one or the other.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import neml2
import pytest
import torch
from neml2.drivers.ModelUnitTest import ModelUnitTest
from neml2.eager._model import _EagerModel
from neml2.models.common.CoordinateDescentPredictor import CoordinateDescentPredictor
from neml2.models.common.ImplicitUpdate import ImplicitUpdate
from neml2.models.common.RateCondensation import RateCondensation
from neml2.models.resolver import DependencyResolver
from neml2.models.solid_mechanics.plasticity.Normality import Normality
from neml2.types import SR2, Scalar

import references
from neml2_aoti_plugin import AOTIModel, DerivativeNotCompiledError
from references import Case, Tensors, difference, flat

# A chain with the model in the middle; the strain for a given stress, by the law of the stress.
BLOCKS = """
[Models]
  [half]
    type = SR2LinearCombination
    from = 'twice'
    to = 'strain'
    weights = '0.5'
  []
  [size]
    type = SR2Invariant
    invariant_type = VONMISES
    tensor = 'stress'
    invariant = 'size_of_stress'
  []
  [chain]
    type = ComposedModel
    models = 'half {law} size'
    additional_outputs = 'stress'
  []
  [off_target]
    type = SR2LinearCombination
    from = 'stress target'
    to = 'strain_residual'
    weights = '1 -1'
  []
  [of_stress]
    type = ComposedModel
    models = '{law} off_target'
  []
  [inverse]
    type = ImplicitUpdate
    equation_system = 'inverse'
    solver = 'exact'
  []
[]
[EquationSystems]
  [inverse]
    type = NonlinearSystem
    model = 'of_stress'
    unknowns = 'strain'
  []
[]
[Solvers]
  [exact]
    type = Newton
    linear_solver = 'dense'
    abs_tol = 1e-11
    rel_tol = 1e-13
    max_its = 20
  []
  [dense]
    type = DenseLU
  []
[]
"""


def built(case: Case, file: Path, name: str, blocks: str = BLOCKS) -> Any:
    """A model in the blocks behind an input file, with the tolerances that its eager counterpart has in tests."""
    with references.default_dtype(torch.float64):
        model = neml2.load_input(file, post=[blocks.format(law=case.stub.model)]).get_model(name)
    references.tighten(model)
    for part in model.modules():
        if isinstance(part, AOTIModel) and case.implicit is not None:
            part.set_solver_config(**case.newton)
    return model


def tightened(name: str) -> Any:
    """A compiled model with the tolerances of its eager counterpart."""
    case = references.case(name)
    return built(case, case.file, case.stub.model)


def typed(model: Any, rows: Tensors) -> dict[str, Any]:
    more = {"twice": 2.0 * rows["strain"], "target": 1e5 * rows["strain"]}
    return {name: wrapper({**rows, **more}[name].clone()) for name, wrapper in model.input_spec.items()}


def plain(found: Any) -> Tensors:
    """All tensors of a result, raw."""
    if isinstance(found, dict):
        return flat({name: plain(value) for name, value in found.items()})
    return flat(found.data if hasattr(found, "data") else found)


def ones(model: Any, rows: Tensors) -> dict[str, Any]:
    outputs = model(*typed(model, rows).values())
    return {name: torch.ones_like(x.data) for name, x in zip(model.output_spec, outputs, strict=True)}


def once(name: str) -> str:
    """The name that a parameter of a compiled part has where the part is eager."""
    return name.replace("promoted.promoted.", "promoted.")


def gradients(model: Any, rows: Tensors) -> Tensors:
    model.requires_grad_()
    inputs = typed(model, rows)
    for value in inputs.values():
        value.data.requires_grad_()
    outputs = model(*inputs.values())
    generator = torch.Generator().manual_seed(4)
    weights = [torch.randn(x.data.shape, generator=generator, dtype=x.data.dtype) for x in outputs]
    torch.stack([(w * x.data).sum() for w, x in zip(weights, outputs, strict=True)]).sum().backward()
    found = {name: value.data.grad for name, value in inputs.items()} | {n: p.grad for n, p in model.named_parameters()}
    return {name: gradient for name, gradient in found.items() if gradient is not None}


CALLS: dict[str, Callable[[Any, Tensors, list[str]], Any]] = {
    "values": lambda m, x, _: dict(zip(m.output_spec, m(*typed(m, x).values()), strict=True)),
    "jacobian": lambda m, x, _: m.jacobian(typed(m, x))[1],
    "jvp": lambda m, x, _: m.jvp(typed(m, x), {n: type(v)(v.data + 1e-4) for n, v in typed(m, x).items()})[1],
    "autograd": lambda m, x, _: gradients(m, x),
    "param_jacobian": lambda m, x, names: m.param_jacobian(typed(m, x), names)[1],
    "param_vjp": lambda m, x, names: m.param_vjp(typed(m, x), ones(m, x), names),
}
COMPONENTS = [("promoted", "chain"), ("calibration", "chain"), ("promoted", "inverse")]


@pytest.mark.parametrize(("name", "component"), COMPONENTS)
@pytest.mark.parametrize("call", CALLS)
def test_component_with_a_compiled_part(name: str, component: str, call: str) -> None:
    case = references.case(name)
    compiled, eager = (built(case, file, component) for file in (case.file, case.stub.path))
    assert compiled.input_spec == eager.input_spec and compiled.output_spec == eager.output_spec
    # The parent finds the parameters of its part.
    parameters = dict(compiled.named_parameters())
    names = [name for name in parameters if f".{case.stub.model}." in f".{name}"]
    assert len(names) == 2 and all(compiled.get_parameter(name) is parameters[name] for name in names)
    found = CALLS[call](compiled, case.rows(), names)
    expected = CALLS[call](eager, case.rows(), [once(name) for name in names])
    if call == "values":
        assert {n: type(x) for n, x in found.items()} == {n: type(x) for n, x in expected.items()}
    expected = plain(expected)
    for key, value in plain(found).items():
        wanted = expected.pop(once(key)).expand(value.shape)
        assert difference(value, wanted, 1e-3 if call == "jacobian" else 0.0) < 1e-7, key
    # Of the eager part, autograd knows all parameters.
    assert not expected or call == "autograd"


# -- other components -------------------------------------------------------------------------------------------------


def test_predictor_of_an_implicit_update() -> None:
    """The compiled solution is the guess, from which eager Newton has nothing left to do."""
    case = references.case("viscoplasticity")
    eager, rows = case.eager, case.typed(case.rows())
    expected = eager(*(rows[name] for name in eager.input_spec))
    update = ImplicitUpdate(system=eager.system, solver=eager.solver, predictor=tightened("viscoplasticity"))
    found = update(*(rows[name] for name in update.input_spec))
    assert all(difference(a.data, b.data) < 1e-9 for a, b in zip(found, expected, strict=True))
    update.solver.miters, before = 1, update.solver.miters
    try:
        update(*(rows[name] for name in update.input_spec))
    finally:
        update.solver.miters = before


def descending(law: Any, rows: dict[str, Any]) -> Any:
    model = CoordinateDescentPredictor(rate_law=law, driving_force_input="strain_rate")
    small = Scalar(torch.full((), 1e-3, dtype=torch.float64))
    return model(*(rows.get(name, small) for name in model.input_spec))


def condensed(law: Any, rows: dict[str, Any]) -> Any:
    model = RateCondensation(model=law, rate="t", driving_force="equivalent_plastic_strain")
    # At zero time the increment of time is that back to where the step began, and no flow takes it up.
    rows = {**rows, "t~1": Scalar(-rows["t"].data + rows["t~1"].data)}
    return model(*(rows[name] for name in model.input_spec))


@pytest.mark.parametrize(("name", "component"), [("promoted_implicit", descending), ("calibration", condensed)])
def test_component_around_a_law(name: str, component: Callable[[Any, dict[str, Any]], Any]) -> None:
    case = references.case(name)
    found, expected = (component(law, case.typed(case.rows())) for law in (tightened(name), case.eager))
    for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (found, expected)), strict=True):
        assert isinstance(a, Scalar) and difference(a.data, b.data) < 1e-8


def test_normality_refuses_what_has_no_second_derivatives() -> None:
    with pytest.raises(TypeError, match="AOTIModel"):
        Normality(tightened("calibration"), "equivalent_plastic_strain", ["stress~1"], ["direction"])


def test_eager_runtime_of_neml2() -> None:
    """What neml2's C++ programs drive to evaluate models without compiling them."""
    case = references.case("promoted")
    host, rows = _EagerModel(str(case.file), case.stub.model), case.rows()
    assert host.parameter_base_shapes == {"promoted.promoted.E": [], "promoted.promoted.nu": []}
    for call in ("forward", "jacobian", "param_jacobian"):
        found, expected = (flat(getattr(model, call)(rows)) for model in (host, case.model))
        found = {key.replace("promoted.promoted.", "promoted."): x for key, x in found.items()}
        assert found.keys() == expected.keys()
        assert all(difference(x, expected[key].expand(x.shape)) < 1e-14 for key, x in found.items())


def test_provider_of_a_parameter() -> None:
    """The output of a compiled model as the parameter of an eager one."""
    blocks = """
    [Models]
      [scaled]
        type = ScalarLinearCombination
        from = 'x'
        to = 'y'
        weights = 'equivalent_plastic_strain'
      []
      [both]
        type = ComposedModel
        models = '{law} scaled'
        additional_outputs = 'equivalent_plastic_strain'
      []
    []
    """
    case = references.case("calibration")
    model, rows = built(case, case.file, "both", blocks), case.typed(case.rows())
    rows["x"] = Scalar(torch.full((9,), 3.0, dtype=torch.float64))
    outputs = dict(zip(model.output_spec, model(*(rows[name] for name in model.input_spec)), strict=True))
    assert difference(outputs["y"].data, 3.0 * outputs["equivalent_plastic_strain"].data) < 1e-14
    assert outputs["y"].data.abs().max().item() > 0


# -- what components ask of a part ------------------------------------------------------------------------------------


@pytest.fixture
def law() -> tuple[Any, Tensors, dict[str, Any]]:
    """A compiled model, and rows for it, raw and typed."""
    case = references.case("calibration")
    return tightened("calibration"), case.rows(), case.typed(case.rows())


def test_resolver(law: tuple[Any, Tensors, dict[str, Any]]) -> None:
    model, _, rows = law
    resolver = DependencyResolver()
    resolver.add_node(model)
    assert resolver.resolve() == [model]
    assert model.consumed_items == frozenset(model.input_spec) and model.output_priorities == {}
    assert model.provided_items == frozenset({"stress", "equivalent_plastic_strain"})
    assert model.iterable_export_form() is None and model.SUPPORTS_SECOND_ORDER is False
    found = model.call_by_name({**rows, "something_else": Scalar(torch.zeros((), dtype=torch.float64))})
    expected = model(*(rows[name] for name in model.input_spec))
    assert list(found) == list(model.output_spec)
    for value, wanted in zip(found.values(), expected, strict=True):
        assert type(value) is type(wanted) and torch.equal(value.data, wanted.data)
    with pytest.raises(KeyError, match="missing 'strain'"):
        model.call_by_name({name: x for name, x in rows.items() if name != "strain"})


@pytest.mark.parametrize("lead", [(), (4,), (2, 2)])
def test_tangent_with_leading_axes(law: tuple[Any, Tensors, dict[str, Any]], lead: tuple[int, ...]) -> None:
    model, raw, rows = law
    data = torch.randn(*lead, 9, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    axes: dict[str, Any] = {"k_ndim": len(lead), "k_state": ("full",) * len(lead), "k_pairing": (None,) * len(lead)}
    *_, v_out = model(*(rows[name] for name in model.input_spec), v={"strain": {"leaf": SR2(data, **axes)}, "t": {}})
    found = v_out["stress"]["leaf"]
    assert (found.k_ndim, type(found)) == (len(lead), SR2)
    expected = torch.einsum("boi,...bi->...bo", model.jacobian(raw)[1]["stress"]["strain"], data)
    assert difference(found.data, expected) < 1e-12


def test_tangents_of_two_inputs_of_one_leaf_add_up(law: tuple[Any, Tensors, dict[str, Any]]) -> None:
    model, raw, rows = law
    driven = ("strain", "strain~1", "t")
    arguments = [rows[name] for name in model.input_spec]
    *_, v_out = model(*arguments, v={name: {"leaf": rows[name]} for name in driven})
    for out, wanted in model.jvp(raw, {name: raw[name] for name in driven})[1].items():
        assert difference(v_out[out]["leaf"].data, wanted) < 1e-12


@pytest.mark.parametrize(
    ("name", "by", "pair"),
    [
        ("cross_group", "stress", "branch_strain:stress"),
        ("viscoplasticity", "strain", "equivalent_plastic_strain:strain"),
    ],
)
def test_pair_that_was_not_compiled_is_never_zero(name: str, by: str, pair: str) -> None:
    model, rows = tightened(name), references.case(name).typed(references.case(name).rows())
    with pytest.raises(DerivativeNotCompiledError, match=f"-d {pair}"):
        model(*(rows[n] for n in model.input_spec), v={by: {"leaf": rows[by]}})


# -- drivers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["elasticity", "calibration", "composed"])
def test_model_unit_test(name: str) -> None:
    case, model = references.case(name), tightened(name)
    inputs = {n: model.input_spec[n](x) for n, x in case.rows().items()}
    expected = {n: model.output_spec[n](x) for n, x in case.eager_forward(case.rows()).items()}
    tolerances = {"rtol": 1e-6, "atol": 1e-8, "derivative_rtol": 1e-8, "derivative_atol": 1e-6}
    report = ModelUnitTest(model, inputs, expected_outputs=expected, **tolerances).run()
    assert report.value_checks == len(expected)
    assert report.jvp_checks == len(expected) * len(inputs)


DRIVERS = """
[Tensors]
  [e]
    type = Python
    expr = 'SR2.fill(1e-3, 0, 0)'
  []
  [s]
    type = Python
    expr = 'SR2.fill(268.6, 109.7, 109.7)'
  []
  [final]
    type = Python
    expr = 'SR2(torch.tensor({stress}, dtype=torch.float64))'
  []
[]
[Drivers]
  [unit]
    type = ModelUnitTest
    model = 'elasticity'
    input_SR2_names = 'strain'
    input_SR2_values = 'e'
    output_SR2_names = 'stress'
    output_SR2_values = 's'
    value_rel_tol = 1e-3
  []
  [regression]
    type = TransientRegression
    driver = 'driver'
    reference = '{gold}'
  []
  [verification]
    type = Verification
    driver = 'driver'
    time_steps = '{last}'
    SR2_names = 'output.stress'
    SR2_values = 'final'
  []
[]
"""


@pytest.mark.parametrize("kind", ["unit", "regression", "verification"])
def test_drivers_of_a_file(kind: str, tmp_path: Path) -> None:
    driver, gold = references.case("elasticity").driver, tmp_path / "gold.pt"
    last = driver.nsteps - 1
    torch.save(dict(driver.result()), gold)
    more = DRIVERS.format(stress=driver.result_out[last]["stress"].data.tolist(), gold=gold, last=last)
    file = references.copied("elasticity", tmp_path).with_name("elasticity_aoti.i")
    file.write_text(file.read_text(encoding="utf-8") + more, encoding="utf-8")
    with references.default_dtype(torch.float64):
        if kind == "unit":
            report = ModelUnitTest.from_file(file).run()
            assert (report.value_checks, report.jvp_checks) == (1, 1)
        else:
            assert neml2.load_input(file).get_driver(kind).run()
