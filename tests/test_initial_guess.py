"""An initial guess from the caller: an unknown by name, beside the inputs, in every call that takes inputs by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import neml2
import pytest
import torch
from neml2.types import SR2, Scalar
from torch import Tensor

import references
from neml2_aoti_plugin import InputError, InputTypeError, Model, UnknownNameError
from references import Tensors, caller_of, difference

UNKNOWNS = ["stress", "equivalent_plastic_strain"]

Call = Callable[[Any, Tensors], Any]

# Calls that take inputs by name, and give a tuple of dicts of tensors.
CALLS: dict[str, Call] = {
    "forward": lambda m, x: (m.forward(x),),
    "solve": lambda m, x: (m.solve(x).outputs,),
    "jvp": lambda m, x: m.jvp(x, {"strain": torch.ones(6, dtype=torch.float64)}),
    "jacobian": lambda m, x: (m.jacobian(x)[0], m.jacobian(x)[1]["stress"]),
    "param_jacobian": lambda m, x: (m.param_jacobian(x)[0], m.param_jacobian(x)[1]["stress"]),
    "param_vjp": lambda m, x: (
        m.param_vjp(x, {n: torch.ones(v.base_shape, dtype=torch.float64) for n, v in outputs_of(m).items()}),
    ),
    "linearise": lambda m, x: (m.linearise(x, [("stress", "strain")])[0],),
}


def outputs_of(model: Any) -> dict[str, Any]:
    found: dict[str, Any] = model.outputs
    return found


@pytest.fixture
def model() -> Model:
    return references.case("calibration").model


@pytest.fixture
def rows() -> Tensors:
    return {n: x.clone() for n, x in references.case("calibration").rows().items()}


@pytest.fixture
def solution(model: Model, rows: Tensors) -> Tensors:
    return model.forward(rows)


def seen_by_the_program(model: Model, call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> Tensors:
    """What a call hands to the program as state."""
    states: list[Tensors] = []
    evaluate = caller_of(model).program.evaluate

    def noted(state: Tensors, *rest: Any, **options: Any) -> Any:
        states.append(dict(state))
        return evaluate(state, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(caller_of(model).program, "evaluate", noted)
        call()
    (state,) = states[:1]
    return state


class TestTaken:
    def test_model_tells_which(self, model: Model) -> None:
        assert list(model.initial_guesses) == UNKNOWNS
        assert [v.base_shape for v in model.initial_guesses.values()] == [(6,), ()]
        assert not set(UNKNOWNS) & set(model.input_names) and not set(UNKNOWNS) & set(model.inputs)
        assert references.case("elasticity").model.initial_guesses == {}

    @pytest.mark.wide
    def test_unknown_that_is_an_input_is_no_other(self) -> None:
        # Without a predictor neml2-compile makes the initial guesses inputs.
        krylov = references.case("krylov").model
        assert {"creep_strain", "creep_measure"} <= set(krylov.input_names) and krylov.initial_guesses == {}

    @pytest.mark.parametrize("name", CALLS)
    def test_results_do_not_depend_on_it(self, model: Model, rows: Tensors, solution: Tensors, name: str) -> None:
        expected = CALLS[name](model, rows)
        for found, wanted in zip(CALLS[name](model, {**rows, **solution}), expected, strict=True):
            assert list(found) == list(wanted)
            for key, value in wanted.items():
                assert difference(found[key], value) < 1e-8, key

    @pytest.mark.parametrize("name", CALLS)
    def test_it_reaches_the_program(
        self, model: Model, rows: Tensors, solution: Tensors, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        given = {**rows, "stress": solution["stress"]}
        state = seen_by_the_program(model, lambda: CALLS[name](model, given), monkeypatch)
        assert torch.equal(state["stress"], solution["stress"])
        assert set(state) == {*model.input_names, "stress"}

    @pytest.mark.parametrize("mode", ["rowwise", "lockstep"])
    @pytest.mark.parametrize("name", ["calibration", "viscoplasticity"])
    def test_it_saves_iterations(self, name: str, mode: str) -> None:
        case = references.case(name)
        model, rows = case.load(mode=mode), case.rows()
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

    def test_result_is_not_the_callers_tensor(self, model: Model, rows: Tensors, solution: Tensors) -> None:
        kept = {n: x.clone() for n, x in solution.items()}
        for value in model.forward({**rows, **solution}).values():
            value.zero_()
        assert all(torch.equal(x, kept[n]) for n, x in solution.items())

    def test_batches_broadcast(self, model: Model, rows: Tensors, monkeypatch: pytest.MonkeyPatch) -> None:
        first = torch.full((6,), 3.0, dtype=torch.float64)
        state = seen_by_the_program(model, lambda: model.forward({**rows, "stress": first}), monkeypatch)
        assert torch.equal(state["stress"], first.expand(9, 6))
        row = {name: x[-1] for name, x in rows.items()}
        assert model.forward({**row, "stress": torch.zeros(2, 3, 6, dtype=torch.float64)})["stress"].shape == (2, 3, 6)

    def test_name_is_that_of_the_boundary(self, tmp_path: Any, rows: Tensors, solution: Tensors) -> None:
        model = references.altered("calibration", tmp_path, boundary_aliases={"outputs": {"stress": "sigma"}})
        assert list(model.initial_guesses) == ["sigma", "equivalent_plastic_strain"]
        found = model.forward({**rows, "sigma": solution["stress"]})
        assert difference(found["sigma"], solution["stress"]) < 1e-6
        with pytest.raises(UnknownNameError, match=r"unknown 'stress'.*initial guesses it also takes: sigma"):
            model.forward({**rows, "stress": solution["stress"]})

    def test_unknown_that_is_no_output_goes_by_its_authored_name(self, tmp_path: Any, rows: Tensors) -> None:
        def hide(metadata: dict[str, Any]) -> None:
            metadata["outputs"] = [v for v in metadata["outputs"] if v["name"] == "stress"]
            for key in ("derivatives", "parameter_derivatives"):
                metadata[key] = [pair for pair in metadata[key] if pair[0] == "stress"]

        model = Model(references.edited(references.case("calibration"), tmp_path, hide))
        assert model.output_names == ["stress"] and list(model.initial_guesses) == UNKNOWNS
        model.forward({**rows, "equivalent_plastic_strain": torch.zeros((), dtype=torch.float64)})


class TestRefused:
    @pytest.mark.parametrize("name", CALLS)
    @pytest.mark.parametrize(
        ("value", "error", "words"),
        [
            (torch.zeros(9, 5, dtype=torch.float64), InputError, ["initial guess 'stress'", "(9, 5)", "(*batch, 6)"]),
            (torch.zeros(9, 6), InputTypeError, ["initial guess 'stress'", "torch.float32", "torch.float64"]),
            (torch.zeros(9, 6, dtype=torch.float64, device="meta"), InputTypeError, ["initial guess 'stress'", "meta"]),
            (torch.zeros(4, 6, dtype=torch.float64), InputError, ["broadcast", "stress [4]", "strain [9]"]),
            (torch.full((9, 6), torch.nan, dtype=torch.float64), InputError, ["initial guess 'stress'", "54 of 54"]),
            (torch.full((6,), torch.inf, dtype=torch.float64), InputError, ["initial guess 'stress'", "not finite"]),
            ([0.0] * 6, InputTypeError, ["initial guess 'stress'", "list"]),
        ],
    )
    def test_by_its_own_words(
        self, model: Model, rows: Tensors, name: str, value: Any, error: type[Exception], words: list[str]
    ) -> None:
        with pytest.raises(error) as raised:
            CALLS[name](model, {**rows, "stress": value})
        assert all(word in str(raised.value) for word in words), str(raised.value)

    def test_other_names_with_a_list_of_those_that_may_be_given(self, model: Model, rows: Tensors) -> None:
        with pytest.raises(UnknownNameError) as raised:
            model.forward({**rows, "stress": torch.zeros(6, dtype=torch.float64), "strian": rows["strain"]})
        text = str(raised.value)
        assert "unknown 'strian'." in text and "The inputs are: strain, strain~1," in text
        assert f"As initial guesses it also takes: {', '.join(UNKNOWNS)}." in text

    def test_all_where_there_is_no_unknown(self) -> None:
        strain = torch.zeros(6, dtype=torch.float64)
        with pytest.raises(UnknownNameError) as raised:
            references.case("elasticity").model.forward({"strain": strain, "stress": strain})
        assert "unknown 'stress'" in str(raised.value) and "iterates" not in str(raised.value)

    def test_missing_input_is_told_all_the_same(self, model: Model, rows: Tensors, solution: Tensors) -> None:
        del rows["t"]
        with pytest.raises(UnknownNameError, match="missing 't'"):
            model.forward({**rows, "stress": solution["stress"]})


class TestTyped:
    @pytest.fixture
    def typed(self) -> Any:
        case = references.case("calibration")
        return neml2.load_model(case.file, case.stub.model)

    def test_by_name(self, typed: Any, rows: Tensors, solution: Tensors, monkeypatch: pytest.MonkeyPatch) -> None:
        state = {name: typed.input_spec[name](x) for name, x in rows.items()}
        expected = typed.call_by_name(state)
        given = {**state, "stress": SR2(solution["stress"]), "something": Scalar(rows["t"])}
        seen = seen_by_the_program(typed, lambda: typed.call_by_name(given), monkeypatch)
        assert torch.equal(seen["stress"], solution["stress"])
        found = typed.call_by_name(given)
        assert list(found) == list(expected)
        for name, value in expected.items():
            assert type(found[name]) is type(value) and difference(found[name].data, value.data) < 1e-6

    @pytest.mark.parametrize("name", ["jvp", "jacobian", "param_jacobian", "param_vjp"])
    def test_derivative_calls(self, typed: Any, rows: Tensors, solution: Tensors, name: str) -> None:
        expected = CALLS[name](typed, rows)
        given = {**rows, "stress": SR2(solution["stress"])} if name.startswith("param") else {**rows, **solution}
        for found, wanted in zip(CALLS[name](typed, given), expected, strict=True):
            for key, value in wanted.items():
                assert difference(found[key], value) < 1e-6, key

    def test_wrong_ones(self, typed: Any, rows: Tensors) -> None:
        with pytest.raises(InputError, match=r"initial guess 'stress' has shape \(9,\)"):
            typed.call_by_name({**rows, "stress": Scalar(rows["t"])})
        with pytest.raises(InputError, match="initial guess 'stress' has sub-batch shape"):
            typed.jacobian({**rows, "stress": SR2(torch.zeros(9, 3, 6, dtype=torch.float64), sub_batch_ndim=1)})


class TestDerivatives:
    def test_autograd_gives_it_no_gradient(self, model: Model, rows: Tensors, solution: Tensors) -> None:
        rows["strain"].requires_grad_()
        first = solution["stress"].clone().requires_grad_()
        model.forward({**rows, "stress": first})["stress"].sum().backward()
        (wanted,) = torch.autograd.grad(model.forward(rows)["stress"].sum(), rows["strain"])
        found = rows["strain"].grad
        assert first.grad is None
        assert found is not None
        assert difference(found, wanted) < 1e-8

    def test_it_alone_asks_for_no_derivative(self, model: Model, rows: Tensors, solution: Tensors) -> None:
        found = model.forward({**rows, "stress": solution["stress"].clone().requires_grad_()})
        assert not any(x.requires_grad for x in found.values())

    @pytest.mark.parametrize("mapped", [True, False])
    def test_vmap(self, model: Model, rows: Tensors, solution: Tensors, mapped: bool) -> None:
        first = solution["stress"] if mapped else solution["stress"][0]
        found = torch.func.vmap(lambda row, x: model.forward({**row, "stress": x}), in_dims=(0, 0 if mapped else None))(
            rows, first
        )
        for name, value in model.forward({**rows, "stress": first}).items():
            assert torch.equal(found[name], value), name

    def test_vmap_over_initial_guesses_only(self, model: Model, rows: Tensors) -> None:
        row = {name: x[-1] for name, x in rows.items()}
        starts = torch.stack([torch.zeros(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64)])
        found = torch.func.vmap(lambda x: model.forward({**row, "stress": x})["stress"])(starts)
        assert found.shape == (2, 6) and difference(found, model.forward(row)["stress"].expand(2, 6)) < 1e-6

    def test_transforms(self, model: Model, rows: Tensors, solution: Tensors) -> None:
        row, first = ({name: x[-1] for name, x in of.items()} for of in (rows, solution))

        def stress(strain: Tensor, start: Tensor) -> Tensor:
            return model.forward({**row, "strain": strain, "stress": start})["stress"]

        expected = model.jacobian(row)[1]["stress"]["strain"]
        for transform in (torch.func.jacfwd, torch.func.jacrev):
            by_strain, by_start = transform(stress, argnums=(0, 1))(row["strain"], first["stress"])
            assert difference(by_strain, expected) < 1e-8
            assert not by_start.any()
            assert not transform(stress, argnums=1)(row["strain"], first["stress"]).any()
