"""What neml2's C++ runtime gets wrong is right here, by the numbers of docs/differences.md.

What suites of their own ask of many cases is not asked here again: D01, D13, D14, D26 and D34 in test_bad_input.py, D02
in test_contract.py (a parameter for each row), D05 in test_operators.py, D08 and D16 in test_module.py, D12 in
test_ways.py (gradients by all inputs are those of the compiled blocks), D15 in test_rows.py, D27 in test_log.py, D30 in
test_model.py, D32 in test_hit.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import neml2
import pytest
import torch
from neml2.types import SR2

import references
from neml2_aoti_plugin import AOTIModel, ConvergenceError, DerivativeNotCompiledError, Model
from neml2_aoti_plugin._artifact.schema import DerivativePair
from neml2_aoti_plugin._program import explicit
from neml2_aoti_plugin._program.substepping import successor
from references import Tensors, difference, edited


def substepped(
    name: str, folder: Path, level: int, miters: int, more: Callable[[dict[str, Any]], object] = lambda metadata: None
) -> Model:
    """A model of the catalogue with substepping switched on, and so few iterations that large steps need it."""

    def edit(metadata: dict[str, Any]) -> None:
        for segment in metadata["segments"]:
            if segment["kind"] == "implicit":
                segment["max_substepping_level"] = level
        more(metadata)

    model = Model(edited(references.case(name), folder, edit))
    model.set_solver_config(**{**references.case(name).newton, "miters": miters})
    return model


def long_step() -> Tensors:
    """A step of the calibration stub that is so large that a few iterations are not enough for it."""
    rows = references.case("calibration").rows()
    rows["strain"] = rows["strain~1"] + 20.0 * (rows["strain"] - rows["strain~1"])
    return rows


def test_d03_substepping_starts_from_the_callers_guess(tmp_path: Path) -> None:
    """C++ drops the guess of a substepping build without predictor and starts from zero."""

    def without_predictor(metadata: dict[str, Any]) -> None:
        for segment in metadata["segments"]:
            unknowns = {v["name"] for g in segment["unknown_group_infos"] for v in g["per_var_info"]}
            for key in [k for k in segment if k.startswith("predictor")]:
                del segment[key]
        outputs = {v["name"]: v for v in metadata["outputs"]}
        metadata["inputs"] += [outputs[name] for name in sorted(unknowns)]

    case = references.case("substepping")
    started = Model(edited(case, tmp_path, without_predictor)).solve({**case.rows(), **case.model.forward(case.rows())})
    # Where one span is enough, a start from the solution leaves nothing to do.
    assert int(started.iterations.min()) <= 1
    assert bool(started.converged.any())


@pytest.mark.wide
def test_d04_substepping_with_a_predictor_that_reads_older_lags(tmp_path: Path) -> None:
    """C++ fails on every call when the predictor reads what the residual does not."""
    case = references.case("chaboche")
    rows = case.rows()
    whole = case.model.forward(rows)
    model = substepped("chaboche", tmp_path, level=6, miters=case.newton["miters"])
    for name, value in model.forward(rows).items():
        assert difference(value, whole[name]) < 1e-8, name
    few = substepped("chaboche", tmp_path / "few", level=8, miters=5).solve(rows)
    assert bool(few.converged.all())
    assert all(bool(value.isfinite().all()) for value in few.outputs.values())


def test_d06_parameter_derivatives_of_substepped_solves(tmp_path: Path) -> None:
    """C++ takes them from a single solve, which fails where substepping is needed."""
    case, rows = references.case("calibration"), long_step()
    whole = case.load()
    whole.set_solver_config(**{**case.newton, "miters": 4})
    with pytest.raises(ConvergenceError):
        whole.param_jacobian(rows)
    model = substepped("calibration", tmp_path, level=10, miters=4)
    _, blocks = model.param_jacobian(rows)
    for name, value in model.named_parameters().items():
        # Longer steps may lead to other cuts of the increment on one side.
        step = 1e-6 * float(value)
        ahead, behind = (model.forward(rows, {name: value + s}) for s in (step, -step))
        for out in ahead:
            slope = (ahead[out] - behind[out]) / (2.0 * step)
            assert difference(blocks[out][name], slope, float(slope.abs().max()) or 1.0) < 1e-5, (out, name)


class TestPartOfTheDerivativesOfASubsteppedModel:
    """C++ loses what leads through the state between substeps where only some derivatives were compiled."""

    def test_jacobian_is_that_of_all(self, tmp_path: Path) -> None:
        def by_strain_alone(metadata: dict[str, Any]) -> None:
            (segment,) = metadata["segments"]
            segment["jacobian_pairs"] = [
                {**pair, "output": i, "row_offset": 0, "col_offset": 0}
                for i, pair in enumerate(segment["jacobian_pairs"])
                if pair["in_var"] == "strain"
            ]
            metadata["derivatives"] = [["plastic_strain", "strain"]]

        case = references.case("substepping")
        model = Model(edited(case, tmp_path, by_strain_alone))
        model.set_solver_config(**case.newton)
        found, expected = (m.jacobian(case.rows())[1]["plastic_strain"]["strain"] for m in (model, case.model))
        assert difference(found, expected) < 1e-9

    def test_what_is_missing_is_told(self, tmp_path: Path) -> None:
        def without_givens(metadata: dict[str, Any]) -> None:
            (segment,) = metadata["segments"]
            for key in ("jacobian_given_package", "solve_ift_package", "input_sensitivity", "jacobian_pairs"):
                segment.pop(key, None)
            metadata["derivatives"] = []

        with pytest.raises(DerivativeNotCompiledError, match="-d :"):
            substepped("calibration", tmp_path, 10, 4, without_givens).param_jacobian(long_step())


def test_d07_declared_shapes_may_name_a_variable_inside_the_model() -> None:
    """C++'s shim knows the boundary's names only, and the driver refuses the file."""
    shapes = "[Settings]\n  [example_batch_shape]\n    inner_rate = '(2; 12)'\n  []\n[]\n"
    with references.default_dtype(torch.float64):
        assert neml2.load_input(references.case("elasticity").file, post=[shapes]).get_driver("driver").run()


def test_d10_cotangents_broadcast_and_only_those_of_compiled_pairs_are_needed() -> None:
    """C++ reads past an unbatched cotangent and demands all outputs'."""
    model, rows = references.case("promoted").model, references.case("promoted").rows()
    one = torch.linspace(1.0, 2.0, 6, dtype=torch.float64)
    full = model.param_vjp(rows, {"stress": one.expand(len(rows["strain"]), 6).contiguous()})
    for name, gradient in model.param_vjp(rows, {"stress": one}).items():
        assert difference(gradient, full[name]) < 1e-14


def test_d11_a_residual_whose_square_overflows_does_not_look_converged() -> None:
    """C++ divides by an infinite first norm, and calls the next iterate converged."""
    rows = references.case("viscoplasticity").rows()
    rows["strain"] = rows["strain"] * 1e160
    found = references.case("viscoplasticity").load().solve(rows)
    assert not bool(found.converged[rows["strain"].abs().amax(-1) > 1e150].any())


def test_d19_each_lag_takes_the_place_of_the_next_older_one() -> None:
    """C++ writes the new state into every lag of an unknown."""
    assert [successor(name) for name in ("x~1", "x~2", "x~3", "x")] == ["x", "x~1", "x~2", "x"]


@pytest.mark.parametrize(
    ("sites", "out_sites", "sum_of"),
    [((5, 4), (4,), "bsij,bsjm->bsim"), ((1, 1), (4,), "xyij,bsjm->bsim"), ((5, 4), (), "bsij,bsjm->bim")],
    ids=["site by site", "constant block with a site axis of one", "sum over sites"],
)
def test_d31_contraction_of_explicit_blocks_with_sites(
    sites: tuple[int, ...], out_sites: tuple[int, ...], sum_of: str
) -> None:
    """C++ returns undocumented shapes, and dies in jvp; no stub compiles such a pair, so the algebra is tested."""
    pair = DerivativePair(
        out="y", wrt="x", out_base_shape=(2,), wrt_base_shape=(3,), output=0, wrt_sub_batch_shape=(4,)
    )
    block = torch.rand(*sites, 2, 3, dtype=torch.float64)
    column = torch.rand(5, 12, 1, dtype=torch.float64)
    expected = torch.einsum(sum_of, block, column.reshape(5, 4, 3, 1)).reshape(5, -1, 1)
    assert difference(explicit.contract(block, pair, out_sites, column, "file"), expected) < 1e-14
    assert difference(explicit.contract(block, pair, out_sites, None, "file") @ column, expected) < 1e-14


def test_d33_a_plain_value_is_spread_over_the_sites() -> None:
    """C++'s shim fails to reshape it; eager neml2 spreads it."""
    case = references.case("cross_group")
    model, rows = AOTIModel(case.artifact), case.typed(case.rows())
    plain = torch.full((6,), 1e-4, dtype=torch.float64)
    spread = {**rows, "branch_strain~1": SR2(plain.expand(3, 6).contiguous(), sub_batch_ndim=1)}
    short = {**rows, "branch_strain~1": SR2(plain)}
    one, other = (model(*(given[name] for name in model.input_spec)) for given in (spread, short))
    assert all(torch.equal(x.data, y.data) for x, y in zip(one, other, strict=True))


@pytest.mark.wide
def test_float32_label_gives_right_numbers() -> None:
    """An artifact compiled for float32 holds float64 graphs; C++ reads float32 buffers as float64."""
    strain = torch.linspace(-1e-3, 1e-3, 12).reshape(2, 6)
    found = references.case("elasticity_float32").model.forward({"strain": strain})["stress"]
    expected = references.case("elasticity").model.forward({"strain": strain.double()})["stress"]
    assert found.dtype == torch.float32
    assert difference(found, expected) < 4.0 * math.ulp(1.0) * 2**29
