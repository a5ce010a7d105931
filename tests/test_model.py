"""`Model`: what it tells about itself, and its parameters; blocks of one explicit segment.

That batches of any shape and tensors of any layout are taken, and results are the caller's, test_ways.py asks of all.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch

import neml2_aoti_plugin
import references
from neml2_aoti_plugin import InputError, InputTypeError, Model, UnknownNameError
from references import Tensors, difference
from stubs.catalogue import CATALOGUE

SAME = 1e-12
E = "promoted.E"


@pytest.fixture
def promoted() -> Model:
    """A model of its own, whose parameters a test may change."""
    return references.case("promoted").load()


def strains(*batch: int) -> Tensors:
    generator = torch.Generator().manual_seed(3)
    return {"strain": 1e-3 * torch.randn(*batch, 6, generator=generator, dtype=torch.float64)}


# -- what it tells ----------------------------------------------------------------------------------------------------


def test_names_in_order_with_shapes() -> None:
    model = references.case("viscoplasticity").model
    assert model.input_names == ["strain", "strain~1", "t", "t~1", "equivalent_plastic_strain~1", "stress~1"]
    assert model.output_names == ["stress", "equivalent_plastic_strain"]
    assert model.input_base_shapes == [[6], [6], [], [], [], [6]]
    assert model.output_base_shapes == [[6], []]
    assert list(model.inputs) == model.input_names and list(model.outputs) == model.output_names
    sites = {name: v.sub_batch_shape for name, v in references.case("cross_group").model.inputs.items()}
    with_sites = {name: shape for name, shape in sites.items() if shape}
    assert with_sites == {"branch_strain": (3,), "branch_strain~1": (3,)}


@pytest.mark.parametrize("name", CATALOGUE)
def test_names_and_types_are_those_of_the_eager_model(name: str) -> None:
    case = references.case(name)
    eager = case.compiled_from
    assert [case.authored(n) for n in case.model.input_names] == list(eager.input_spec)
    assert [case.authored(n) for n in case.model.output_names] == list(eager.output_spec)
    spec = eager.input_spec | eager.output_spec
    for port, variable in (case.model.inputs | case.model.outputs).items():
        assert variable.type == spec[case.authored(port)].__name__
        assert variable.base_shape == tuple(spec[case.authored(port)].BASE_SHAPE)


@pytest.mark.wide
def test_device_dtype_and_compiled_pairs() -> None:
    for name, dtype in (("elasticity", torch.float64), ("elasticity_float32", torch.float32)):
        model = references.case(name).model
        assert (model.device, model.dtype) == (torch.device("cpu"), dtype)
    assert references.case("viscoplasticity").model.derivative_pairs == [("stress", "strain")]
    assert references.case("chaboche").model.derivative_pairs == []
    promoted = references.case("promoted").model
    assert promoted.parameter_derivative_pairs == [("stress", "promoted.E"), ("stress", "promoted.nu")]
    renamed = references.case("renamed").model
    assert renamed.derivative_pairs == [("sigma", "eps")]
    assert renamed.parameter_derivative_pairs == [("sigma", "youngs_modulus")]


@pytest.mark.parametrize("part", ["", "metadata.json", "cpu", "cpu/float64"])
def test_artifact_may_be_named_by_any_path_into_it(part: str) -> None:
    case = references.case("elasticity")
    assert Model(str(case.artifact / part)).input_names == ["strain"]
    model = Model(case.artifact / part)
    assert model.artifact == case.artifact
    assert repr(model) == f"Model({str(case.artifact)!r}, cpu/float64: strain -> stress)"


def test_it_is_the_model_of_neml2() -> None:
    from neml2 import aoti

    assert aoti.Model is Model is neml2_aoti_plugin.Model


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_unknown_mode_is_refused(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"mode": "jump"} if how == "argument" else {}
    if how == "environment":
        monkeypatch.setenv("NEML2_AOTI_PLUGIN_MODE", "jump")
    with pytest.raises(InputError, match=r"'jump', expected one of rowwise, lockstep") as raised:
        Model(references.case("elasticity").artifact, **options)
    assert ("NEML2_AOTI_PLUGIN_MODE" in str(raised.value)) == (how == "environment")


# -- parameters -------------------------------------------------------------------------------------------------------


def test_values_and_base_shapes_of_parameters(promoted: Model) -> None:
    assert promoted.parameter_base_shapes == {"promoted.E": [], "promoted.nu": []}
    values = promoted.named_parameters()
    assert {name: float(value) for name, value in values.items()} == {"promoted.E": 71000.0, "promoted.nu": 0.33}
    assert all(value.dtype == torch.float64 and value.device.type == "cpu" for value in values.values())
    without = references.case("elasticity").model
    assert without.named_parameters() == {} and without.parameter_base_shapes == {}


@pytest.mark.wide
def test_change_in_place_takes_effect_in_a_residual() -> None:
    rows, creep = references.case("promoted_implicit").rows(), references.case("promoted_implicit").load()
    wanted = creep.forward(rows, {"residual.creep.eta": torch.tensor(1000.0, dtype=torch.float64)})
    creep.named_parameters()["residual.creep.eta"].fill_(1000.0)
    assert difference(creep.forward(rows)["stress"], wanted["stress"]) < SAME


def test_entry_of_the_dict_is_not_the_models(promoted: Model) -> None:
    before = promoted.forward(strains(4))["stress"]
    promoted.named_parameters()[E] = torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    assert torch.equal(promoted.forward(strains(4))["stress"], before)


@pytest.mark.parametrize(
    ("name", "value", "error", "words"),
    [
        ("E", 1.0, UnknownNameError, ["'E'", "promoted.E, promoted.nu", "neml2-compile"]),
        (E, torch.tensor(1.0), InputTypeError, [E, "torch.float32", "torch.float64"]),
        (E, torch.tensor(1), InputTypeError, [E, "torch.int64", "torch.float64"]),
        (E, torch.ones((), device="meta", dtype=torch.float64), InputTypeError, ["meta", "cpu"]),
        (E, "stiff", InputTypeError, [E, "str"]),
        pytest.param(E, 10**400, InputError, [E, "1329 bits", "torch.float64"], id="huge"),
        pytest.param(E, -(10**5000), InputError, [E, "16610 bits"], id="unprintable"),
    ],
)
def test_values_of_parameters_are_checked(
    promoted: Model, name: str, value: Any, error: type[Exception], words: list[str]
) -> None:
    before = promoted.forward(strains(4))["stress"]
    with references.reported(error, *words):
        promoted.set_parameter(name, value)
    assert torch.equal(promoted.forward(strains(4))["stress"], before)
    for call in (promoted.forward, promoted.jacobian, promoted.solve):
        with pytest.raises(error):
            call(strains(4), {name: value})


def test_number_that_only_a_float_can_hold(promoted: Model) -> None:
    promoted.set_parameter(E, 2**70)
    assert promoted.get_parameter(E).item() == 2.0**70


@pytest.mark.parametrize(
    ("rows", "factors", "batch"),
    [((4,), [2.0], (4,)), ((4,), [[1.0], [2.0]], (2, 4)), ((), [1.0, 2.0, 3.0], (3,))],
    ids=["one value", "broadcast with the inputs", "alone make a batch"],
)
def test_override_holds_for_one_call(
    promoted: Model, rows: tuple[int, ...], factors: list[Any], batch: tuple[int, ...]
) -> None:
    before = promoted.forward(strains(*rows))["stress"]
    values = torch.tensor(factors, dtype=torch.float64)
    found = promoted.forward(strains(*rows), {E: 71000.0 * (values if len(factors) > 1 else values[0])})["stress"]
    assert found.shape == (*batch, 6)
    assert difference(found, (values.unsqueeze(-1) * before).expand(*batch, 6)) < SAME
    assert torch.equal(promoted.forward(strains(*rows))["stress"], before)
    assert float(promoted.named_parameters()[E]) == 71000.0


@pytest.mark.parametrize("shape", [(), (4,)])
def test_the_caller_keeps_its_own_tensor(promoted: Model, shape: tuple[int, ...]) -> None:
    """neml2's C++ runtime keeps the caller's, so that a later change of it changes the model."""
    value = torch.full(shape, 1.5e5, dtype=torch.float64)
    promoted.set_parameter(E, value)
    before = promoted.forward(strains(4))["stress"]
    value.fill_(1.0)
    assert torch.equal(promoted.forward(strains(4))["stress"], before)


# -- one explicit segment ---------------------------------------------------------------------------------------------


FORMS: dict[str, Tensors] = {
    "plain": strains(4),
    "one row": strains(),
    "grid": strains(2, 3),
    "no rows": strains(0),
    "transposed": {"strain": strains(4)["strain"].T.contiguous().T},
    "a value per row": strains(4),
}


@pytest.mark.parametrize("name", ["elasticity", "promoted"])
@pytest.mark.parametrize("form", FORMS)
def test_blocks_of_one_explicit_segment_are_those_that_seeds_give(name: str, form: str) -> None:
    model, inputs = references.case(name).model, FORMS[form]
    overrides = None
    if form == "a value per row" and name == "promoted":
        overrides = {E: torch.tensor([1e4, 2e4, 3e4, 4e4], dtype=torch.float64)}
    for _ in range(2):
        outputs, blocks = model.jacobian(inputs, overrides)
        expected, (matrix,), batch = model.linearise(inputs, [("stress", "strain")], overrides)
        assert torch.equal(outputs["stress"], expected["stress"])
        block = blocks["stress"]["strain"]
        assert block.shape == ((6, 6) if name == "elasticity" else (*batch, 6, 6))
        assert block.is_contiguous() and torch.equal(block.expand(matrix.shape), matrix)


def test_rows_of_many_sizes_in_turn() -> None:
    """What is known of a number of rows is forgotten in time, and learnt again."""
    model = references.case("elasticity").load()
    every = strains(100)
    expected, blocks = model.jacobian(OrderedDict(every))
    for rows in (*range(1, 101), 1, 50):
        part = {"strain": every["strain"][:rows]}
        assert torch.equal(model.forward(part)["stress"], expected["stress"][:rows])
        assert torch.equal(model.jacobian(part)[1]["stress"]["strain"], blocks["stress"]["strain"])


def test_outputs_are_not_the_callers_own_tensors() -> None:
    """neml2's C++ runtime returns the guess itself where nothing was left to do."""
    model = references.case("cross_group").load()
    inputs = {name: torch.zeros(2, *v.natural_shape, dtype=torch.float64) for name, v in model.inputs.items()}
    inputs["t"] += 1.0
    given = {value.data_ptr() for value in inputs.values()}
    assert all(value.data_ptr() not in given for value in model.forward(inputs).values())
