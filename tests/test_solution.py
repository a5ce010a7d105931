"""`Model.solve`: outcomes, rows whose results are not finite, derivatives of chosen pairs and with all their rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import references
from neml2_aoti_plugin import ConvergenceError, DerivativeNotCompiledError, InputTypeError, Model, UnknownNameError
from neml2_aoti_plugin.model import Outcome
from references import Tensors, difference

NOT_FINITE = int(Outcome.NOT_FINITE)


@pytest.mark.parametrize("name", ["elasticity", "viscoplasticity", "cross_group", "substepping", "calibration"])
def test_values_and_derivatives_come_of_one_evaluation(name: str, evaluations: list[dict[str, Any]]) -> None:
    case = references.case(name)
    states, batch = case.states, next(iter(case.states.values())).shape[:2]
    evaluations.clear()
    found = case.model.solve(states, jacobian=bool(case.model.derivative_pairs))
    assert len(evaluations) == 1
    assert found.converged.shape == found.iterations.shape == found.outcome.shape == batch


def test_all_rows_may_fail() -> None:
    case = references.case("viscoplasticity")
    rows = case.rows()
    rows["strain"] = torch.full_like(rows["strain"], torch.nan)
    found = case.model.solve(rows, jacobian=True)
    assert not found.converged.any()
    assert bool(found.outputs["stress"].isnan().all()) and bool(found.blocks["stress"]["strain"].isnan().all())


def test_outcome_tells_why() -> None:
    case = references.case("viscoplasticity")
    model, rows = case.load(), case.rows()
    model.set_solver_config(**{**case.newton, "miters": 2})
    rows["strain"] = 1.5 * rows["strain"]
    found = model.solve({name: x.reshape(3, 3, *x.shape[1:]) for name, x in rows.items()})
    assert found.outcome.shape == found.converged.shape == (3, 3) and found.blocks == {}
    assert bool((found.outcome == Outcome.OUT_OF_ITERATIONS).any())
    assert torch.equal(found.outcome == Outcome.CONVERGED, found.converged)
    assert Outcome.NOT_FINITE.words == "not finite"


# -- rows whose results are NaN or infinite, though no solve failed ----------------------------------------------------


@pytest.mark.parametrize("batch", [(), (1,), (6,), (2, 3)])
@pytest.mark.parametrize("expand", [True, False])
def test_row_of_an_explicit_model_fails_alone(batch: tuple[int, ...], expand: bool) -> None:
    model = references.case("elasticity").model
    strain = torch.rand((*batch, 6), dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    good = model.solve({"strain": strain}, jacobian=True, expand=expand)
    assert bool(good.converged.all())
    strain.view(-1, 6)[0, 2] = torch.nan
    found = model.solve({"strain": strain}, jacobian=True, expand=expand)
    assert found.converged.shape == found.outcome.shape == batch
    assert found.outcome.flatten()[0] == NOT_FINITE and found.outcome.count_nonzero() == 1
    assert torch.equal(found.converged, found.outcome == Outcome.CONVERGED)
    block, expected = found.blocks["stress"]["strain"], good.blocks["stress"]["strain"]
    pairs = [(found.outputs["stress"].view(-1, 6), good.outputs["stress"].view(-1, 6))]
    if expand or not batch:
        pairs.append((block.reshape(-1, 6, 6), expected.reshape(-1, 6, 6)))
    else:
        assert torch.equal(block, expected)
    for value, wanted in pairs:
        assert bool(value[0].isnan().all()) and torch.equal(value[1:], wanted[1:])
    # What does not solve gives NaN for NaN.
    for outputs in (model.forward({"strain": strain}), model.jacobian({"strain": strain})[0]):
        stress = outputs["stress"].view(-1, 6)
        assert bool(stress[0].isnan().all()) and torch.equal(stress[1:], pairs[0][1][1:])


@pytest.mark.parametrize("pairs", [None, [("stress", "strain")]])
def test_block_that_all_rows_share_fails_all(pairs: list[tuple[str, str]] | None) -> None:
    strain, nan = torch.zeros((4, 6), dtype=torch.float64), torch.tensor(torch.nan, dtype=torch.float64)
    model = references.case("promoted").model
    found = model.solve({"strain": strain}, {"promoted.E": nan}, pairs=pairs, expand=False)
    assert not found.converged.any() and bool((found.outcome == NOT_FINITE).all())


@pytest.mark.wide
class TestRates:
    """Rates divide by the step of time."""

    @pytest.fixture
    def opening(self) -> tuple[Model, Tensors]:
        """A cohesive zone with five points that open."""
        separation = torch.rand((5, 3), dtype=torch.float64, generator=torch.Generator().manual_seed(5))
        zeros = torch.zeros(5, dtype=torch.float64)
        before = {"separation~1": 0.5 * separation, "t~1": zeros, "damage~1": zeros.clone()}
        return references.case("cohesive").model, {"separation": separation, "t": zeros + 1.0, **before}

    def test_time_that_stands_still(self, opening: tuple[Model, Tensors]) -> None:
        model, rows = opening
        good = model.solve(rows, jacobian=True)
        rows["separation"][1, 2] = torch.nan
        rows["t~1"][3] = rows["t"][3]
        for found in (model.solve(rows), model.solve(rows, jacobian=True)):
            assert found.outcome.tolist() == [0, NOT_FINITE, 0, NOT_FINITE, 0]
            values = [(x, good.outputs[out]) for out, x in found.outputs.items()]
            values += [(x, good.blocks[out][by]) for out, row in found.blocks.items() for by, x in row.items()]
            for value, wanted in values:
                assert bool(value[[1, 3]].isnan().all()) and torch.equal(value[::2], wanted[::2])

    def test_derivative_fails_a_row_only_where_it_is_asked_for(self, opening: tuple[Model, Tensors]) -> None:
        model, rows = opening
        # The rate is 1e199 or so, and its derivative by time 1e399.
        rows["t"][2] = 1e-200
        assert bool(model.solve(rows).converged.all())
        assert bool(model.solve(rows, pairs=[("traction", "separation")]).converged.all())
        found = model.solve(rows, pairs=[("traction", "separation"), ("separation_rate", "t")])
        assert found.outcome.tolist() == [0, 0, NOT_FINITE, 0, 0]

    def test_explicit_segment_behind_a_solve_that_converged(self) -> None:
        model, rows = references.case("rates").model, references.case("rates").rows()
        good = model.solve(rows, jacobian=True)
        rows["t"] = rows["t"].clone()
        rows["t"][1] = rows["t~1"][1]
        others = torch.arange(len(rows["t"])) != 1
        for found in (model.solve(rows), model.solve(rows, jacobian=True)):
            assert found.outcome[1] == NOT_FINITE and found.outcome.count_nonzero() == 1
            assert bool(found.outputs["stress"][1].isnan().all())
            assert all(torch.equal(x[others], good.outputs[out][others]) for out, x in found.outputs.items())
        # A step of no length changes nothing, and has no rate.
        values = model.forward(rows)
        assert torch.equal(values["stress"][1], rows["stress~1"][1]) and bool(values["stress_rate"][1].isnan())
        with references.reported(
            ConvergenceError, "row 1: not finite", "'t' equals 't~1' in 1 of these rows"
        ) as raised:
            model.jacobian(rows)
        assert "better predictor" not in str(raised.value)


# -- which derivatives ------------------------------------------------------------------------------------------------


class TestPairs:
    @pytest.fixture
    def model(self) -> Model:
        return references.case("calibration").model

    @pytest.fixture
    def rows(self) -> Tensors:
        return references.case("calibration").rows()

    def test_chosen_alone(self, model: Model, rows: Tensors, evaluations: list[dict[str, Any]]) -> None:
        _, every = model.jacobian(rows)
        evaluations.clear()
        chosen = [("equivalent_plastic_strain", "strain"), ("stress", "t"), ("stress", "t")]
        for blocks in (model.jacobian(rows, pairs=chosen)[1], model.solve(rows, pairs=chosen).blocks):
            names = {out: list(row) for out, row in blocks.items()}
            assert names == {"equivalent_plastic_strain": ["strain"], "stress": ["t"]}
            assert all(difference(blocks[out][by], every[out][by], 1e-6) < 1e-9 for out, by in chosen)
        # Only what is needed is carried.
        assert [sorted(arguments["tangents"]) for arguments in evaluations] == [["strain", "t"]] * 2

    def test_none(self, model: Model, rows: Tensors) -> None:
        assert model.jacobian(rows, pairs=[])[1] == {} and model.solve(rows, pairs=()).blocks == {}

    @pytest.mark.parametrize("name", ["elasticity", "promoted"])
    def test_of_a_model_with_a_plan(self, name: str) -> None:
        case = references.case(name)
        rows = case.rows()
        outputs, blocks = case.model.jacobian(rows, pairs=[("stress", "strain")])
        assert list(blocks) == ["stress"] and list(blocks["stress"]) == ["strain"]
        assert torch.equal(outputs["stress"], case.model.forward(rows)["stress"])

    def test_refused(self, model: Model, rows: Tensors) -> None:
        with pytest.raises(UnknownNameError, match=r"unknown 'sress'.* mean 'stress'.* outputs are: stress"):
            model.jacobian(rows, pairs=[("sress", "strain")])
        with pytest.raises(UnknownNameError, match=r"unknown 'stress'.* inputs are: strain"):
            model.solve(rows, pairs=[("stress", "stress")])
        for wrong in (["stress:strain"], "stress", [("stress",)], [("stress", 1)]):
            with pytest.raises(InputTypeError, match=r"pairs hold .*expected pairs of names such as \('stress'"):
                model.jacobian(rows, pairs=wrong)  # type: ignore[arg-type]
        visco = references.case("viscoplasticity")
        with pytest.raises(DerivativeNotCompiledError, match=r"d\(stress\)/d\(t\) was not compiled.*-d stress:t"):
            visco.model.solve(visco.rows(), pairs=[("stress", "t")])

    def test_parameter_among_them_leads_to_its_own_call(self, model: Model, rows: Tensors) -> None:
        name = "residual.hardening.K"
        told = rf"'{name}' is a promoted parameter: call param_jacobian\(inputs, params=\['{name}'\]\)"
        with pytest.raises(UnknownNameError, match=told):
            model.jacobian(rows, pairs=[("stress", name)])
        with pytest.raises(UnknownNameError, match=told):
            model.jvp(rows, {name: rows["t"]})
        block = model.param_jacobian(rows, params=[name])[1]["stress"][name]
        # `solve` gives derivatives of both kinds in one evaluation.
        both = model.solve(rows, pairs=[("stress", name), ("stress", "strain")]).blocks["stress"]
        assert list(both) == [name, "strain"] and torch.equal(both[name], block)
        with pytest.raises(UnknownNameError, match=r"'strain' is an input: call jacobian"):
            model.param_jacobian(rows, params=["strain"])

    @pytest.mark.wide
    def test_model_without_derivatives(self) -> None:
        case = references.case("chaboche")
        with pytest.raises(DerivativeNotCompiledError, match="was compiled without derivatives"):
            case.model.solve(case.rows(), jacobian=True)
        assert case.model.solve(case.rows(), pairs=[]).blocks == {}


@pytest.mark.parametrize("batch", [(), (1,), (4,), (2, 3)])
def test_constant_block_is_given_once_or_for_each_row(batch: tuple[int, ...]) -> None:
    model = references.case("elasticity").model
    inputs = {"strain": torch.full((*batch, 6), 1e-3, dtype=torch.float64)}
    once = model.jacobian(inputs)[1]["stress"]["strain"]
    assert once.shape == (6, 6)
    for blocks in (model.jacobian(inputs, expand=True)[1], model.solve(inputs, jacobian=True).blocks):
        block = blocks["stress"]["strain"]
        assert block.is_contiguous() and torch.equal(block, once.expand(*batch, 6, 6))
    assert model.solve(inputs, jacobian=True, expand=False).blocks["stress"]["strain"].shape == (6, 6)


def test_block_of_a_model_that_iterates_has_its_rows_always() -> None:
    case = references.case("viscoplasticity")
    plain, expanded = case.model.jacobian(case.rows()), case.model.jacobian(case.rows(), expand=True)
    assert torch.equal(plain[1]["stress"]["strain"], expanded[1]["stress"]["strain"])


def test_digest_is_that_of_the_files() -> None:
    one, other = references.case("viscoplasticity"), references.case("calibration")
    assert one.load().digest == one.model.digest != other.model.digest
    assert len(one.model.digest) == 64
