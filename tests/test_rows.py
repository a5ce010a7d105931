"""Rows that fail: which ones, alone, by name and in words; rows in lockstep, and in blocks."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import references
from attacks.children import run
from neml2_aoti_plugin import ConvergenceError, InputError, Model
from neml2_aoti_plugin._program.implicit import ImplicitSegment
from neml2_aoti_plugin._program.sensitivity import Sensitivity
from neml2_aoti_plugin.model import Outcome
from neml2_aoti_plugin.model import _outcomes as outcomes
from neml2_aoti_plugin.model._outcomes import GivenTensors, reasons
from references import Tensors, difference
from stubs.catalogue import CATALOGUE, EXPLICIT

IMPLICIT = [name for name, stub in CATALOGUE.items() if stub.model not in EXPLICIT]
CAPTURE = "NEML2_CAPTURE_SOLVE_FAILURE"
ADVICE = "Try a better predictor"
NAN, INF = torch.nan, torch.inf

both_modes = pytest.mark.parametrize("mode", ["rowwise", "lockstep"])


def failure(model: Model, inputs: Tensors, *words: str, **options: Any) -> Any:
    """The error of a call in which rows fail, which says these words."""
    with references.reported(ConvergenceError, *words) as raised:
        model.forward(inputs, **options)
    return raised.value


# -- a row fails alone ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, NAN) for name in CATALOGUE]
    + [(name, value) for name in ("viscoplasticity", "composed", "krylov") for value in (INF, -INF, 1e300)],
)
def test_a_row_that_fails_is_nan_touches_no_other_and_is_told(name: str, value: float) -> None:
    case = references.case(name)
    model, rows, derived = case.model, case.rows(), bool(case.model.derivative_pairs)
    expected = model.solve(rows, jacobian=derived)
    tensors = (n for n, v in model.inputs.items() if v.type == "SR2" and "~" not in n and n != "control")
    variable = next(tensors, case.driven)
    rows[variable] = rows[variable].clone()
    rows[variable][1] = value
    found = model.solve(rows, jacobian=derived)
    good = torch.arange(len(found.converged)) != 1
    assert torch.equal(found.converged, good)
    assert int(found.outcome[1]) != Outcome.CONVERGED and not found.outcome[good].any()
    assert torch.equal(found.iterations[good], expected.iterations[good])
    pairs = [(found.outputs[out], expected.outputs[out]) for out in model.output_names]
    pairs += [(found.blocks[out][by], expected.blocks[out][by]) for out, by in model.derivative_pairs]
    for of, wanted in pairs:
        assert bool(of[1].isnan().all())
        assert difference(of[good], wanted[good], float(wanted.abs().max())) < (1e-9 if derived else 1e-10)
    if name in IMPLICIT:
        settings = case.newton
        told = (f"1 of {len(good)} row", "row 1:", f"{settings['atol']:.1e}", f"miters={settings['miters']}")
        failure(model, rows, *told)


@pytest.mark.wide
def test_a_step_that_cannot_be_solved_fails_alone() -> None:
    case = references.case("chaboche")
    rows, model = case.rows(), case.load()
    # Twenty per cent strain in one step.
    rows["strain"] = rows["strain"].index_add(0, torch.tensor([2]), torch.full((1, 6), 0.2, dtype=torch.float64))
    model.set_solver_config(**{**case.newton, "miters": 8})
    found = model.solve(rows)
    assert found.converged.tolist() == [True, True, False, True, True, True]
    # Seven, and seven more without chord steps.
    assert int(found.iterations[2]) == 14


def test_a_row_whose_derivatives_are_not_finite_fails_where_they_are_asked_for(
    implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = references.case("viscoplasticity")
    model, rows, carry = case.load(), case.rows(), Sensitivity.carry

    def spoiled(*arguments: Any, **options: Any) -> Any:
        found = carry(*arguments, **options)
        for columns in found.values():
            for column in columns.values():
                assert column is not None
                column[2] = NAN
        return found

    monkeypatch.setattr(Sensitivity, "carry", spoiled)
    assert bool(model.solve(rows).converged.all())
    found = model.solve(rows, jacobian=True)
    assert (~found.converged).nonzero().tolist() == [[2]] and int(found.outcome[2]) == Outcome.NOT_FINITE
    assert bool(found.outputs["stress"][2].isnan().all())
    with pytest.raises(ConvergenceError, match=r"1 of 9 row\(s\)[\s\S]*row 2: not finite"):
        model.jacobian(rows)


DIVERGING = """
import sys
import torch
from neml2_aoti_plugin import ConvergenceError, Model

model = Model(sys.argv[1], mode=sys.argv[2])
given = {n: torch.zeros(v.natural_shape, dtype=torch.float64) for n, v in model.inputs.items()}
first = model.input_names[0]
x = torch.zeros(8, *model.inputs[first].natural_shape, dtype=torch.float64)
x[1], x[2], x[3], x[4], x[5] = 0.5, torch.nan, 1e200, 1e12, torch.inf
given |= {first: x, "t": torch.ones((), dtype=torch.float64)}
print(model.solve(given).converged.tolist())
for call in (model.forward, model.jacobian):
    try:
        call(given)
    except ConvergenceError as error:
        print(type(error).__name__)
"""


@pytest.mark.processes
@both_modes
@pytest.mark.parametrize("name", ["viscoplasticity", "cross_group"])
def test_rows_that_diverge_print_nothing(name: str, mode: str, implementation: str) -> None:
    # What it prints on either stream comes back.
    out = run(DIVERGING, references.case(name).artifact, mode, NEML2_AOTI_PLUGIN_KERNELS=implementation)
    solved, *errors = out.splitlines()
    assert "True" in solved and "False" in solved
    assert errors == ["ConvergenceError", "ConvergenceError"]


# -- lockstep and blocks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", IMPLICIT)
def test_lockstep_agrees_with_rowwise(name: str) -> None:
    case = references.case(name)
    rows, model = case.rows(), case.load(mode="lockstep")
    expected = case.model.forward(rows)
    for out, value in model.forward(rows).items():
        assert difference(value, expected[out]) < (1e-6 if name == "bicgstab" else 1e-9), out
    # Rows share the number of iterations, but for those of subincrements.
    assert name == "substepping" or len(model.solve(rows).iterations.unique()) == 1


def test_lockstep_can_be_chosen_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEML2_AOTI_PLUGIN_MODE", "lockstep")
    case = references.case("viscoplasticity")
    assert case.load().mode == "lockstep"
    assert case.load(mode="rowwise").mode == "rowwise"


def test_rows_of_a_block_may_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    case = references.case("viscoplasticity")
    rows = {name: torch.cat([x] * 3) for name, x in case.rows().items()}
    whole = case.load().forward(rows)
    monkeypatch.setenv("NEML2_AOTI_PLUGIN_BLOCK_ROWS", "2")
    model = case.load()
    sizes: list[int] = []
    solve = ImplicitSegment.solve

    def seen(self: ImplicitSegment, state: Tensors, values: Any, rows: int, *rest: Any, **options: Any) -> Any:
        sizes.append(rows)
        return solve(self, state, values, rows, *rest, **options)

    monkeypatch.setattr(ImplicitSegment, "solve", seen)
    cut = model.forward(rows)
    # Of whole vectors.
    assert sum(sizes) == len(rows["t"]) and max(sizes) == 16 and len(sizes) > 1
    assert all(difference(cut[out], value) < 1e-10 for out, value in whole.items())


@pytest.mark.parametrize("wrong", ["0", "-1", "many", "1.5"])
def test_rows_of_a_block_that_are_no_number_are_refused(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEML2_AOTI_PLUGIN_BLOCK_ROWS", wrong)
    with pytest.raises(InputError, match=f"NEML2_AOTI_PLUGIN_BLOCK_ROWS is '{wrong}'"):
        references.case("viscoplasticity").load()


# -- what an error tells ----------------------------------------------------------------------------------------------


@pytest.fixture(params=["rowwise", "lockstep"])
def model(request: pytest.FixtureRequest) -> Model:
    return references.case("calibration").load(mode=request.param)


@pytest.fixture
def grid() -> Tensors:
    """Rows of two axes."""
    return {n: x.clone() for n, x in references.case("calibration").states.items()}


def test_mask_rows_and_outcomes_are_always_there(model: Model, grid: Tensors, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CAPTURE, raising=False)
    grid["strain"][0, 1, 2] = grid["strain"][-1, -1, 0] = NAN
    error, solution = failure(model, grid, "row [0, 1]: diverged"), model.solve(grid)
    mask, rows = error.converged_mask, error.rows
    assert mask.dtype == torch.bool and rows.dtype == torch.int64
    assert rows.tolist() == [1, mask.numel() - 1] == (~mask).flatten().nonzero().squeeze(-1).tolist()
    assert torch.equal(mask, solution.converged) and torch.equal(mask, error.outcome == Outcome.CONVERGED)
    assert torch.equal(error.outcome, solution.outcome)
    row = {n: x[0, 0] for n, x in grid.items()}
    error = failure(model, {**row, "t": torch.tensor(INF, dtype=torch.float64)})
    assert error.converged_mask.shape == () and error.rows.tolist() == [0]


def test_input_that_is_not_finite_is_named(model: Model, grid: Tensors) -> None:
    grid["strain"][0, 1, 2] = INF
    grid["t"][0, 1] = grid["t"][1, 0] = NAN
    told = [
        f"{name} is not finite (NaN or infinite) in {n} of these rows." for name, n in (("'strain'", 1), ("'t'", 2))
    ]
    text = str(failure(model, grid, *told, "Model.solve"))
    assert "'stress~1'" not in text and ADVICE not in text


@pytest.mark.parametrize("whole", [True, False])
def test_parameter_that_is_not_finite_is_named(model: Model, grid: Tensors, whole: bool) -> None:
    rows, name = {n: x[0] for n, x in grid.items()}, "residual.hardening.K"
    values = torch.full_like(rows["t"], 1000.0)
    values[-1] = NAN
    count = len(values) if whole else 1
    told = f"{name!r} is not finite (NaN or infinite) in {count} of these rows"
    error = failure(model, rows, told, param_overrides={name: values[-1] if whole else values})
    assert ADVICE not in str(error)


def test_rows_that_fail_for_other_reasons_keep_the_advice(grid: Tensors) -> None:
    case = references.case("calibration")
    model = case.load()
    model.set_solver_config(**{**case.newton, "miters": 1})
    assert "finite" not in str(failure(model, grid, ADVICE)).split("[")[-1]
    grid["strain"][0, 1] = NAN
    failure(model, grid, "'strain' is not finite (NaN or infinite) in 1 of these rows.", ADVICE)


def test_step_of_no_length_is_named() -> None:
    outcome = torch.tensor([Outcome.CONVERGED, Outcome.NOT_FINITE, Outcome.DIVERGED, Outcome.OUT_OF_ITERATIONS])
    before = torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    given = {"t": torch.ones_like(before), "t~1": before, "strain": torch.zeros(4, 6, dtype=torch.float64)}
    # The second failed otherwise, and the third with a step of some length.
    assert reasons(outcome, GivenTensors(given, {})) == [
        "'t' equals 't~1' in 1 of these rows: rates divide by a step of no length. Give a later time.",
        f"{ADVICE}, a line search, or reduce the time step.",
    ]


@pytest.mark.wide
def test_norms_iterations_and_tolerances_are_told_of_the_first_few() -> None:
    case = references.case("chaboche")
    model = case.load()
    model.set_solver_config(**{**case.newton, "atol": 3e-11, "rtol": 2e-13, "miters": 2})
    rows = {n: torch.cat([x, x]) for n, x in case.rows().items()}
    text = str(failure(model, rows, "of 12 row", "... and", "miters=2", "atol=3.0e-11", "rtol=2.0e-13"))
    listed = re.findall(r"row (\d+): .*iteration 2, \|R\| = (\S+), \|R0\| = (\S+)", text)
    assert len(listed) == 5
    assert [int(row) for row, _, _ in listed] == sorted(int(row) for row, _, _ in listed)
    assert all(float(norm) > 3e-11 and float(norm0) > 0 for _, norm, norm0 in listed)


@pytest.mark.wide
class TestSegments:
    """Rows that fail in different segments of one model, in one error."""

    @pytest.fixture
    def rows(self) -> Tensors:
        return {name: value.clone() for name, value in references.case("rates").rows().items()}

    def test_each_row_tells_its_own(self, rows: Tensors) -> None:
        rows["stress~1"][1] = rows["wear~1"][2] = NAN
        failure(
            references.case("rates").load(tight=False),
            rows,
            "2 of 9 row(s) failed",
            "(miters=30, atol=1.0e-09, rtol=1.0e-11, segments 0, 1)",
            "row 1: diverged in segment 0 at iteration 0",
            "row 2: diverged in segment 1 at iteration",
            *("'stress~1' is not finite", "'wear~1' is not finite"),
        )

    def test_one_alone_is_told_once(self, rows: Tensors) -> None:
        rows["wear~1"][2] = NAN
        told = "rtol=1.0e-11, segment 1)", "row 2: diverged at iteration"
        failure(references.case("rates").load(tight=False), rows, *told)


def test_rows_that_do_not_fail_are_not_looked_at(grid: Tensors, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outcomes, "reasons", lambda *_, **__: pytest.fail("looked at a good call"))
    references.case("calibration").model.forward(grid)


# -- what a failed solve is captured of -------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["", "0", "false", " No ", "OFF", None])
def test_nothing_is_captured_unless_asked_for(
    value: str | None, grid: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(CAPTURE, raising=False)
    if value is not None:
        monkeypatch.setenv(CAPTURE, value)
    grid["strain"][0, 1] = NAN
    assert not hasattr(failure(references.case("calibration").model, grid), "unknowns")


@both_modes
@pytest.mark.parametrize("name", ["viscoplasticity", "composed", "krylov", "cross_group", "substepping"])
def test_mask_and_iterates_are_captured(name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CAPTURE, "1")
    case = references.case(name)
    states = {n: x.clone() for n, x in case.states.items()}
    states[case.driven][0, 1] = NAN
    error = failure(case.load(mode=mode), states)
    mask: Tensor = error.converged_mask
    assert mask.dtype == torch.bool and mask.shape == states[case.driven].shape[:2]
    assert not bool(mask[0, 1])
    assert set(error.unknowns) == set(case.implicit.system.unknown_names)
    outputs = case.model.solve(case.states).outputs
    for unknown, value in error.unknowns.items():
        assert value.shape == outputs[unknown].shape, unknown
        scale = float(outputs[unknown].abs().max())
        assert difference(value[mask], outputs[unknown][mask], scale) < 1e-8, unknown
    lost = mask.numel() - int(mask.sum())
    # The mask is that of the first try, before the step was cut.
    assert lost > 1 if name == "substepping" else lost == 1
