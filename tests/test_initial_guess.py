"""An initial guess from the caller: an unknown by name, beside the inputs, in every call that takes inputs by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import neml2
import pytest
import torch
from neml2.types import SR2, Scalar
from torch import Tensor

import references
from neml2_aoti_plugin import ArtifactError, InputError, InputTypeError, Model, UnknownNameError
from neml2_aoti_plugin._solve.machine_code import CHOICE as VARIABLE
from references import Tensors, caller_of, difference, flat

UNKNOWNS = ["stress", "equivalent_plastic_strain"]
ONES = {"stress": torch.ones(6, dtype=torch.float64), "equivalent_plastic_strain": torch.ones((), dtype=torch.float64)}

# Calls that take inputs by name.
CALLS: dict[str, Callable[[Any, Tensors], Any]] = {
    "forward": lambda m, x: m.forward(x),
    "solve": lambda m, x: m.solve(x).outputs,
    "jvp": lambda m, x: m.jvp(x, {"strain": ONES["stress"]}),
    "jacobian": lambda m, x: m.jacobian(x),
    "param_jacobian": lambda m, x: m.param_jacobian(x),
    "param_vjp": lambda m, x: m.param_vjp(x, ONES),
    "linearise": lambda m, x: m.linearise(x, [("stress", "strain")])[:2],
}
every_call = pytest.mark.parametrize("name", CALLS)


def zeros(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(shape, **{"dtype": torch.float64, **options})


@pytest.fixture
def model() -> Model:
    return references.case("calibration").model


@pytest.fixture
def typed() -> Any:
    return neml2.load_model(references.case("calibration").file, "viscoplasticity")


@pytest.fixture
def rows() -> Tensors:
    return {n: x.clone() for n, x in references.case("calibration").rows().items()}


@pytest.fixture
def solution(model: Model, rows: Tensors) -> Tensors:
    return model.forward(rows)


# -- taken ------------------------------------------------------------------------------------------------------------


def test_model_tells_which(model: Model) -> None:
    assert list(model.initial_guesses) == UNKNOWNS
    assert [v.base_shape for v in model.initial_guesses.values()] == [(6,), ()]
    assert not set(UNKNOWNS) & set(model.input_names) and not set(UNKNOWNS) & set(model.inputs)
    assert references.case("elasticity").model.initial_guesses == {}


@pytest.mark.wide
def test_unknown_that_is_an_input_is_no_other() -> None:
    # Without a predictor neml2-compile makes the initial guesses inputs.
    krylov = references.case("krylov").model
    assert {"creep_strain", "creep_measure"} <= set(krylov.input_names) and krylov.initial_guesses == {}


@pytest.mark.parametrize(
    ("kind", "name"),
    [*(("raw", name) for name in CALLS), *(("typed", n) for n in ("jvp", "jacobian", "param_jacobian", "param_vjp"))],
)
def test_it_reaches_the_program_and_results_do_not_depend_on_it(
    typed: Any, rows: Tensors, solution: Tensors, kind: str, name: str, evaluations: list[dict[str, Any]]
) -> None:
    model = typed if kind == "typed" else references.case("calibration").model
    expected = flat(CALLS[name](model, rows))
    evaluations.clear()
    stress = SR2(solution["stress"]) if kind == "typed" and name.startswith("param") else solution["stress"]
    found = flat(CALLS[name](model, {**rows, "stress": stress}))
    state = evaluations[0]["state"]
    assert torch.equal(state["stress"], solution["stress"]) and set(state) == {*rows, "stress"}
    for each in (found, flat(CALLS[name](model, {**rows, **solution}))):
        assert list(each) == list(expected)
        assert all(difference(each[key], value) < (1e-8 if kind == "raw" else 1e-6) for key, value in expected.items())


@pytest.mark.parametrize("mode", ["rowwise", "lockstep"])
@pytest.mark.parametrize("name", ["calibration", "viscoplasticity"])
def test_it_saves_iterations(name: str, mode: str) -> None:
    model, rows = references.case(name).load(mode=mode), references.case(name).rows()
    rows["strain"] = 1.5 * rows["strain"]
    cold = model.solve(rows)
    assert int(cold.iterations.min()) >= 4
    warm = model.solve({**rows, **cold.outputs})
    assert bool(warm.converged.all()) and int(warm.iterations.max()) == 0
    assert all(torch.equal(x, cold.outputs[n]) for n, x in warm.outputs.items())
    # One that is near, as the last iterate of a finite-element program is.
    for distance, most in ((1e-6, 2), (1e-3, 3)):
        near = model.solve({**rows, **{n: x * (1 + distance) for n, x in cold.outputs.items()}})
        assert int(near.iterations.max()) <= most


def test_result_is_not_the_callers_tensor(model: Model, rows: Tensors, solution: Tensors) -> None:
    kept = {n: x.clone() for n, x in solution.items()}
    for value in model.forward({**rows, **solution}).values():
        value.zero_()
    assert all(torch.equal(x, kept[n]) for n, x in solution.items())


def test_batches_broadcast(model: Model, rows: Tensors, evaluations: list[dict[str, Any]]) -> None:
    model.forward({**rows, "stress": 3.0 * ONES["stress"]})
    assert torch.equal(evaluations[0]["state"]["stress"], torch.full((9, 6), 3.0, dtype=torch.float64))
    row = {name: x[-1] for name, x in rows.items()}
    assert model.forward({**row, "stress": zeros(2, 3, 6)})["stress"].shape == (2, 3, 6)


def test_name_is_that_of_the_boundary(tmp_path: Path, rows: Tensors, solution: Tensors) -> None:
    model = references.altered("calibration", tmp_path, boundary_aliases={"outputs": {"stress": "sigma"}})
    assert list(model.initial_guesses) == ["sigma", "equivalent_plastic_strain"]
    found = model.forward({**rows, "sigma": solution["stress"]})
    assert difference(found["sigma"], solution["stress"]) < 1e-6
    with pytest.raises(UnknownNameError, match=r"unknown 'stress'.*initial guesses it also takes: sigma"):
        model.forward({**rows, "stress": solution["stress"]})


def test_unknown_that_is_no_output_goes_by_its_authored_name(tmp_path: Path, rows: Tensors) -> None:
    def hide(metadata: dict[str, Any]) -> None:
        metadata["outputs"] = [v for v in metadata["outputs"] if v["name"] == "stress"]
        for key in ("derivatives", "parameter_derivatives"):
            metadata[key] = [pair for pair in metadata[key] if pair[0] == "stress"]

    model = Model(references.edited(references.case("calibration"), tmp_path, hide))
    assert model.output_names == ["stress"] and list(model.initial_guesses) == UNKNOWNS
    model.forward({**rows, "equivalent_plastic_strain": zeros()})


# -- refused ----------------------------------------------------------------------------------------------------------


@every_call
@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (zeros(9, 5), InputError, ["initial guess 'stress'", "(9, 5)", "(*batch, 6)"]),
        (torch.zeros(9, 6), InputTypeError, ["initial guess 'stress'", "torch.float32", "torch.float64"]),
        (zeros(9, 6, device="meta"), InputTypeError, ["initial guess 'stress'", "meta"]),
        (zeros(4, 6), InputError, ["broadcast", "stress [4]", "strain [9]"]),
        (zeros(9, 6) * torch.nan, InputError, ["initial guess 'stress'", "54 of 54"]),
        (ONES["stress"] * torch.inf, InputError, ["initial guess 'stress'", "not finite"]),
        ([0.0] * 6, InputTypeError, ["initial guess 'stress'", "list"]),
    ],
)
def test_wrong_ones_are_refused_by_their_own_words(
    model: Model, rows: Tensors, name: str, value: Any, error: type[Exception], words: list[str]
) -> None:
    with references.reported(error, *words):
        CALLS[name](model, {**rows, "stress": value})


def test_other_names_are_refused_with_a_list_of_those_that_may_be_given(model: Model, rows: Tensors) -> None:
    told = "unknown 'strian'.", "The inputs are: strain, strain~1,", f"it also takes: {', '.join(UNKNOWNS)}."
    with references.reported(UnknownNameError, *told):
        model.forward({**rows, "stress": zeros(6), "strian": rows["strain"]})
    with references.reported(UnknownNameError, "unknown 'stress'") as raised:
        references.case("elasticity").model.forward({"strain": zeros(6), "stress": zeros(6)})
    assert "initial guess" not in str(raised.value)
    del rows["t"]
    with references.reported(UnknownNameError, "missing 't'"):
        model.forward({**rows, "stress": zeros(6)})


def test_a_predictor_of_another_model_is_refused_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "torch")
    case = references.case("viscoplasticity")
    model = case.load()
    segment = caller_of(model).program.implicit[0]
    file = segment.spec.predictor.file
    predictor = segment.graphs[file]

    class OneMore:
        file = predictor.file

        def __call__(self, *arguments: Any) -> Any:
            outputs = predictor(*arguments)
            return [*outputs, outputs[0]]

    monkeypatch.setitem(segment.graphs, file, OneMore())
    with pytest.raises(ArtifactError, match=r"predictor\.pt2: predictor returned 3 outputs, expected 2\. The package"):
        model.forward(case.rows())


# -- typed ------------------------------------------------------------------------------------------------------------


def test_typed_by_name(typed: Any, rows: Tensors, solution: Tensors, evaluations: list[dict[str, Any]]) -> None:
    state = {name: typed.input_spec[name](x) for name, x in rows.items()}
    expected = typed.call_by_name(state)
    evaluations.clear()
    found = typed.call_by_name({**state, "stress": SR2(solution["stress"]), "something": Scalar(rows["t"])})
    assert torch.equal(evaluations[0]["state"]["stress"], solution["stress"])
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert type(found[name]) is type(value) and difference(found[name].data, value.data) < 1e-6


def test_typed_wrong_ones(typed: Any, rows: Tensors) -> None:
    with pytest.raises(InputError, match=r"initial guess 'stress' has shape \(9,\)"):
        typed.call_by_name({**rows, "stress": Scalar(rows["t"])})
    with pytest.raises(InputError, match="initial guess 'stress' has sub-batch shape"):
        typed.jacobian({**rows, "stress": SR2(zeros(9, 3, 6), sub_batch_ndim=1)})


# -- derivatives ------------------------------------------------------------------------------------------------------


def test_autograd_gives_it_no_gradient(model: Model, rows: Tensors, solution: Tensors) -> None:
    first = solution["stress"].clone().requires_grad_()
    # It alone asks for no derivative.
    assert not any(x.requires_grad for x in model.forward({**rows, "stress": first}).values())
    strain = rows["strain"].requires_grad_()
    model.forward({**rows, "stress": first})["stress"].sum().backward()
    (wanted,) = torch.autograd.grad(model.forward(rows)["stress"].sum(), strain)
    assert first.grad is None and strain.grad is not None
    assert difference(strain.grad, wanted) < 1e-8


@pytest.mark.parametrize("mapped", [True, False])
def test_vmap(model: Model, rows: Tensors, solution: Tensors, mapped: bool) -> None:
    first = solution["stress"] if mapped else solution["stress"][0]
    over = torch.func.vmap(lambda row, x: model.forward({**row, "stress": x}), in_dims=(0, 0 if mapped else None))
    found = over(rows, first)
    for name, value in model.forward({**rows, "stress": first}).items():
        assert torch.equal(found[name], value), name
    # Over initial guesses only.
    row = {name: x[-1] for name, x in rows.items()}
    starts = torch.stack([zeros(6), ONES["stress"]])
    stresses = torch.func.vmap(lambda x: model.forward({**row, "stress": x})["stress"])(starts)
    assert stresses.shape == (2, 6) and difference(stresses, model.forward(row)["stress"].expand(2, 6)) < 1e-6


@pytest.mark.parametrize("transform", [torch.func.jacfwd, torch.func.jacrev])
def test_transforms(model: Model, rows: Tensors, solution: Tensors, transform: Any) -> None:
    row, first = ({name: x[-1] for name, x in of.items()} for of in (rows, solution))

    def stress(strain: Tensor, start: Tensor) -> Tensor:
        return model.forward({**row, "strain": strain, "stress": start})["stress"]

    by_strain, by_start = transform(stress, argnums=(0, 1))(row["strain"], first["stress"])
    assert difference(by_strain, model.jacobian(row)[1]["stress"]["strain"]) < 1e-8
    assert not by_start.any()
    assert not transform(stress, argnums=1)(row["strain"], first["stress"]).any()
