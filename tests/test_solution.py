"""`Model.solve` with derivatives, and derivatives of chosen pairs, against `forward` and `jacobian`."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

import references
from neml2_aoti_plugin import (
    ConvergenceError,
    DerivativeNotCompiledError,
    InputTypeError,
    Model,
    UnknownNameError,
)
from neml2_aoti_plugin._program.implicit import ImplicitSegment
from neml2_aoti_plugin._program.program import Program
from neml2_aoti_plugin.model import Outcome
from references import Tensors, difference
from stubs.catalogue import CATALOGUE


def counted(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of every evaluation that programs make from now on."""
    seen: list[dict[str, Any]] = []
    evaluate = Program.evaluate

    def noted(self: Program, *arguments: Any, **options: Any) -> Any:
        seen.append(inspect.signature(evaluate).bind(self, *arguments, **options).arguments)
        return evaluate(self, *arguments, **options)

    monkeypatch.setattr(Program, "evaluate", noted)
    return seen


@pytest.mark.parametrize("name", CATALOGUE)
def test_one_evaluation_gives_what_forward_and_jacobian_give(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = references.case(name)
    model, states = case.model, case.states
    derived = bool(model.derivative_pairs)
    outputs, blocks = model.jacobian(states, expand=True) if derived else (model.forward(states), {})
    evaluations = counted(monkeypatch)
    found = model.solve(states, jacobian=derived)
    assert len(evaluations) == 1
    batch = next(iter(states.values())).shape[:2]
    assert found.converged.shape == found.iterations.shape == found.outcome.shape == batch
    assert found.converged.dtype == torch.bool and bool(found.converged.all()) and not found.outcome.any()
    assert bool((found.iterations > 0).any()) == (case.implicit is not None)
    assert list(found.outputs) == model.output_names
    assert all(torch.equal(found.outputs[out], value) for out, value in outputs.items())
    assert [(o, i) for o, row in found.blocks.items() for i in row] == [
        (o, i) for o, row in blocks.items() for i in row
    ]
    assert all(torch.equal(found.blocks[out][by], blocks[out][by]) for out, by in model.derivative_pairs)


@pytest.mark.parametrize("name", CATALOGUE)
def test_a_row_that_fails_is_nan_and_touches_no_other(name: str) -> None:
    case = references.case(name)
    model, rows = case.model, case.rows()
    derived = bool(model.derivative_pairs)
    expected = model.solve(rows, jacobian=derived)
    rows[case.driven] = rows[case.driven].clone()
    rows[case.driven][1] = torch.nan
    found = model.solve(rows, jacobian=derived)
    good = torch.arange(len(found.converged)) != 1
    assert torch.equal(found.converged, good)
    assert int(found.outcome[1]) != Outcome.CONVERGED and not found.outcome[good].any()
    assert torch.equal(found.iterations[good], expected.iterations[good])
    values = [(found.outputs[out], expected.outputs[out]) for out in model.output_names]
    values += [(found.blocks[out][by], expected.blocks[out][by]) for out, by in model.derivative_pairs]
    for value, wanted in values:
        assert bool(value[1].isnan().all())
        assert difference(value[good], wanted[good], float(wanted.abs().max())) < (1e-9 if derived else 1e-10)


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


def test_row_with_a_derivative_that_is_not_finite_fails_where_derivatives_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = references.case("viscoplasticity")
    model, rows = case.load(), case.rows()
    carry = ImplicitSegment.carry

    def spoiled(self: ImplicitSegment, *arguments: Any, **options: Any) -> Any:
        found = carry(self, *arguments, **options)
        for columns in found.values():
            for column in columns.values():
                assert column is not None
                column[2] = torch.nan
        return found

    monkeypatch.setattr(ImplicitSegment, "carry", spoiled)
    assert bool(model.solve(rows).converged.all())
    found = model.solve(rows, jacobian=True)
    assert (~found.converged).nonzero().tolist() == [[2]] and int(found.outcome[2]) == Outcome.NOT_FINITE
    assert bool(found.outputs["stress"][2].isnan().all())


class TestNotFinite:
    """Rows whose results are NaN or infinite, though no solve failed, against neighbours and the same rows alone."""

    @pytest.mark.parametrize("batch", [(), (1,), (6,), (2, 3)])
    @pytest.mark.parametrize("expand", [True, False])
    def test_row_of_an_explicit_model_fails_alone(self, batch: tuple[int, ...], expand: bool) -> None:
        model = references.case("elasticity").model
        strain = torch.rand((*batch, 6), dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        good = model.solve({"strain": strain}, jacobian=True, expand=expand)
        assert bool(good.converged.all())
        strain.view(-1, 6)[0, 2] = torch.nan
        found = model.solve({"strain": strain}, jacobian=True, expand=expand)
        assert found.converged.shape == found.outcome.shape == batch
        assert found.outcome.flatten()[0] == Outcome.NOT_FINITE and found.outcome.count_nonzero() == 1
        assert torch.equal(found.converged, found.outcome == Outcome.CONVERGED)
        stress = found.outputs["stress"].view(-1, 6)
        assert bool(stress[0].isnan().all())
        assert torch.equal(stress[1:], good.outputs["stress"].view(-1, 6)[1:])
        block, expected = found.blocks["stress"]["strain"], good.blocks["stress"]["strain"]
        if not expand and batch:
            assert torch.equal(block, expected)
        else:
            assert bool(block.reshape(-1, 6, 6)[0].isnan().all())
            assert torch.equal(block.reshape(-1, 6, 6)[1:], expected.reshape(-1, 6, 6)[1:])
        assert Outcome.NOT_FINITE.words == "not finite"

    def test_forward_and_jacobian_of_an_explicit_model_give_nan(self) -> None:
        model = references.case("elasticity").model
        strain = torch.full((3, 6), 1e-3, dtype=torch.float64)
        good = model.forward({"strain": strain})["stress"]
        strain[1] = torch.nan
        for found in (model.forward({"strain": strain}), model.jacobian({"strain": strain})[0]):
            assert bool(found["stress"][1].isnan().all()) and torch.equal(found["stress"][::2], good[::2])

    @pytest.mark.parametrize("pairs", [None, [("stress", "strain")]])
    def test_block_that_all_rows_share_fails_all(self, pairs: list[tuple[str, str]] | None) -> None:
        case = references.case("promoted")
        strain = torch.zeros((4, 6), dtype=torch.float64)
        found = case.model.solve(
            {"strain": strain}, {"promoted.E": torch.tensor(torch.nan, dtype=torch.float64)}, pairs=pairs, expand=False
        )
        assert not found.converged.any() and bool((found.outcome == Outcome.NOT_FINITE).all())

    @pytest.mark.wide
    def test_time_that_stands_still_under_a_rate(self) -> None:
        model, rows = self.opening()
        good = model.solve(rows, jacobian=True)
        rows["separation"][1, 2] = torch.nan
        rows["t~1"][3] = rows["t"][3]
        for found in (model.solve(rows), model.solve(rows, jacobian=True)):
            assert found.outcome.tolist() == [0, Outcome.NOT_FINITE, 0, Outcome.NOT_FINITE, 0]
            for out, value in found.outputs.items():
                assert bool(value[[1, 3]].isnan().all())
                assert torch.equal(value[::2], good.outputs[out][::2])
        for out, by in model.derivative_pairs:
            assert torch.equal(found.blocks[out][by][::2], good.blocks[out][by][::2])
            assert bool(found.blocks[out][by][[1, 3]].isnan().all())

    @pytest.mark.wide
    def test_derivative_fails_a_row_only_where_it_is_asked_for(self) -> None:
        model, rows = self.opening()
        # The rate is 1e199 or so, and its derivative by time 1e399.
        rows["t"][2] = 1e-200
        assert bool(model.solve(rows).converged.all())
        assert bool(model.solve(rows, pairs=[("traction", "separation")]).converged.all())
        found = model.solve(rows, pairs=[("traction", "separation"), ("separation_rate", "t")])
        assert found.outcome.tolist() == [0, 0, Outcome.NOT_FINITE, 0, 0]

    @pytest.mark.wide
    def test_explicit_segment_behind_a_solve_that_converged(self) -> None:
        case = references.case("rates")
        model, rows = case.model, case.rows()
        good = model.solve(rows, jacobian=True)
        assert bool(good.converged.all())
        rows["t"] = rows["t"].clone()
        rows["t"][1] = rows["t~1"][1]
        for found in (model.solve(rows), model.solve(rows, jacobian=True)):
            assert found.outcome[1] == Outcome.NOT_FINITE and found.outcome.count_nonzero() == 1
            assert bool(found.outputs["stress"][1].isnan().all())
            others = torch.arange(len(found.outcome)) != 1
            for out, value in found.outputs.items():
                assert torch.equal(value[others], good.outputs[out][others])
        # A step of no length changes nothing, and has no rate.
        values = model.forward(rows)
        assert torch.equal(values["stress"][1], rows["stress~1"][1]) and bool(values["stress_rate"][1].isnan())
        with pytest.raises(ConvergenceError, match=r"row 1: not finite"):
            model.jacobian(rows)

    def opening(self) -> tuple[Model, Tensors]:
        """A cohesive zone with five points that open."""
        n = 5
        separation = torch.rand((n, 3), dtype=torch.float64, generator=torch.Generator().manual_seed(5))
        zeros = torch.zeros(n, dtype=torch.float64)
        return references.case("cohesive").model, {
            "separation": separation,
            "separation~1": 0.5 * separation,
            "t": zeros + 1.0,
            "t~1": zeros,
            "damage~1": zeros.clone(),
        }


class TestPairs:
    @pytest.fixture
    def model(self) -> Model:
        return references.case("calibration").model

    @pytest.fixture
    def rows(self) -> Tensors:
        return references.case("calibration").rows()

    def test_chosen_alone(self, model: Model, rows: Tensors) -> None:
        _, every = model.jacobian(rows)
        chosen = [("equivalent_plastic_strain", "strain"), ("stress", "t"), ("stress", "t")]
        for blocks in (model.jacobian(rows, pairs=chosen)[1], model.solve(rows, pairs=chosen).blocks):
            assert {out: list(row) for out, row in blocks.items()} == {
                "equivalent_plastic_strain": ["strain"],
                "stress": ["t"],
            }
            for out, by in chosen:
                assert difference(blocks[out][by], every[out][by], 1e-6) < 1e-9

    def test_only_what_is_needed_is_carried(self, model: Model, rows: Tensors, monkeypatch: pytest.MonkeyPatch) -> None:
        seen = counted(monkeypatch)
        model.jacobian(rows, pairs=[("stress", "strain")])
        assert [list(arguments["tangents"]) for arguments in seen] == [["strain"]]

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


class TestExpand:
    @pytest.mark.parametrize("batch", [(), (1,), (4,), (2, 3)])
    def test_constant_block(self, batch: tuple[int, ...]) -> None:
        model = references.case("elasticity").model
        strain = torch.full((*batch, 6), 1e-3, dtype=torch.float64)
        _, once = model.jacobian({"strain": strain})
        _, each = model.jacobian({"strain": strain}, expand=True)
        solved = model.solve({"strain": strain}, jacobian=True)
        assert once["stress"]["strain"].shape == (6, 6)
        for block in (each["stress"]["strain"], solved.blocks["stress"]["strain"]):
            assert block.shape == (*batch, 6, 6) and block.is_contiguous()
            assert torch.equal(block, once["stress"]["strain"].expand(*batch, 6, 6))
        assert solved.converged.shape == solved.outcome.shape == batch
        assert model.solve({"strain": strain}, jacobian=True, expand=False).blocks["stress"]["strain"].shape == (6, 6)

    def test_of_a_model_that_iterates(self) -> None:
        case = references.case("viscoplasticity")
        rows = case.rows()
        plain, expanded = case.model.jacobian(rows), case.model.jacobian(rows, expand=True)
        assert torch.equal(plain[1]["stress"]["strain"], expanded[1]["stress"]["strain"])


def test_digest_is_that_of_the_files() -> None:
    one, other = references.case("viscoplasticity"), references.case("calibration")
    assert one.load().digest == one.model.digest != other.model.digest
    assert len(one.model.digest) == 64
