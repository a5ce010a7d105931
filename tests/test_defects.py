"""What neml2's C++ runtime gets wrong is right here, by the numbers of docs/differences.md.

What suites of their own ask of many cases is not asked here again: D01, D13, D14, D26 and D34 in test_bad_input.py, D08
and D16 in test_module.py, D12 in test_ways.py (gradients by all inputs are those of the compiled blocks), D15 in
test_rows.py, D27 in test_log.py, D32 in test_hit.py.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import neml2
import pytest
import torch
from neml2.solvers import ConvergenceError
from neml2.types import SR2

import references
from neml2_aoti_plugin import (
    AOTIModel,
    DerivativeNotCompiledError,
    Model,
)
from neml2_aoti_plugin._artifact.schema import Pair
from neml2_aoti_plugin._program import explicit
from neml2_aoti_plugin._program.substepping import successor
from references import Tensors, caller_of, difference, edited


def rows_of(name: str) -> Tensors:
    return references.case(name).rows()


def substepped(name: str, folder: Path, level: int, miters: int) -> Model:
    """A model of the catalogue with substepping switched on, and so few iterations that large steps need it."""

    def edit(metadata: dict[str, Any]) -> None:
        for segment in metadata["segments"]:
            if segment["kind"] == "implicit":
                segment["max_substepping_level"] = level

    model = Model(edited(references.case(name), folder, edit))
    settings = references.case(name).newton
    model.set_solver_config(**{**settings, "miters": miters})
    return model


@pytest.mark.wide
@pytest.mark.parametrize("operation", ["forward", "jacobian", "param_jacobian"])
def test_d02_a_parameter_per_row_in_a_residual_is_each_rows_own(operation: str) -> None:
    """C++ solves all rows with the first row's value."""
    model = references.case("promoted_implicit").load()
    rows = rows_of("promoted_implicit")
    count = len(rows["t"])
    name = "residual.creep.eta"
    values = model.named_parameters()[name] * torch.linspace(0.8, 1.2, count, dtype=torch.float64)
    together = getattr(model, operation)(rows, {name: values})
    for k in range(count):
        alone = getattr(model, operation)({n: x[k] for n, x in rows.items()}, {name: values[k]})
        if operation == "forward":
            assert difference(together["stress"][k], alone["stress"]) < 1e-10
            continue
        for wrt, block in alone[1]["stress"].items():
            assert difference(together[1]["stress"][wrt][k], block) < 1e-8


def test_d03_substepping_starts_from_the_callers_guess(tmp_path: Path) -> None:
    """C++ drops the guess of a substepping build without predictor and starts from zero."""
    case = references.case("substepping")

    def without_predictor(metadata: dict[str, Any]) -> None:
        for segment in metadata["segments"]:
            unknowns = {v["name"] for g in segment["unknown_group_infos"] for v in g["per_var_info"]}
            for key in [k for k in segment if k.startswith("predictor")]:
                del segment[key]
        outputs = {v["name"]: v for v in metadata["outputs"]}
        metadata["inputs"] += [outputs[name] for name in sorted(unknowns)]

    model = Model(edited(case, tmp_path, without_predictor))
    rows = case.rows()
    solution = case.model.forward(rows)
    started = model.solve({**rows, **solution})
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


def test_d05_one_singular_row_is_that_rows_failure() -> None:
    """C++ raises for the whole batch, without a word of singularity, and no step can be cut."""
    case = references.case("viscoplasticity")
    graph = caller_of(case.load()).program.implicit[0].graphs.solve
    assert graph is not None
    generator = torch.Generator().manual_seed(5)
    a = torch.eye(7, dtype=torch.float64) + 0.1 * torch.rand(4, 7, 7, dtype=torch.float64, generator=generator)
    b = torch.rand(4, 7, dtype=torch.float64, generator=generator)
    a[2, 3] = 0.0
    (found,) = graph([a, b])
    assert not bool(found[2].isfinite().any())
    good = [0, 1, 3]
    assert difference(found[good], torch.linalg.solve(a[good], b[good])) < 1e-12


def test_d06_parameter_derivatives_of_substepped_solves(tmp_path: Path) -> None:
    """C++ takes them from a single solve, which fails where substepping is needed."""
    case = references.case("calibration")
    few = 4
    rows = case.rows()
    # A step so large that a few iterations are not enough for it.
    rows["strain"] = rows["strain~1"] + 20.0 * (rows["strain"] - rows["strain~1"])
    whole = case.load()
    whole.set_solver_config(**{**case.newton, "miters": few})
    with pytest.raises(ConvergenceError):
        whole.param_jacobian(rows)
    model = substepped("calibration", tmp_path, level=10, miters=few)
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
        case = references.case("substepping")

        def by_strain_alone(metadata: dict[str, Any]) -> None:
            (segment,) = metadata["segments"]
            segment["jacobian_pairs"] = [
                {**pair, "output": i, "row_offset": 0, "col_offset": 0}
                for i, pair in enumerate(segment["jacobian_pairs"])
                if pair["in_var"] == "strain"
            ]
            metadata["derivatives"] = [["plastic_strain", "strain"]]

        model = Model(edited(case, tmp_path, by_strain_alone))
        model.set_solver_config(**case.newton)
        rows = case.rows()
        (found,), (expected,) = (
            [blocks["plastic_strain"]["strain"]] for blocks in (m.jacobian(rows)[1] for m in (model, case.model))
        )
        assert difference(found, expected) < 1e-9

    def test_what_is_missing_is_told(self, tmp_path: Path) -> None:
        case = references.case("calibration")

        def without_givens(metadata: dict[str, Any]) -> None:
            (segment,) = metadata["segments"]
            segment["max_substepping_level"] = 10
            for key in ("jacobian_given_package", "solve_ift_package", "input_sensitivity", "jacobian_pairs"):
                segment.pop(key, None)
            metadata["derivatives"] = []

        model = Model(edited(case, tmp_path, without_givens))
        model.set_solver_config(**{**case.newton, "miters": 4})
        rows = case.rows()
        rows["strain"] = rows["strain~1"] + 20.0 * (rows["strain"] - rows["strain~1"])
        with pytest.raises(DerivativeNotCompiledError, match="-d :"):
            model.param_jacobian(rows)


def test_outputs_are_not_the_callers_own_tensors() -> None:
    """C++ returns the guess itself where nothing was left to do."""
    model = references.case("cross_group").load()
    inputs = {name: torch.zeros(2, *v.natural_shape, dtype=torch.float64) for name, v in model.inputs.items()}
    inputs["t"] += 1.0
    given = {value.data_ptr() for value in inputs.values()}
    assert all(value.data_ptr() not in given for value in model.forward(inputs).values())


def test_d07_declared_shapes_may_name_a_variable_inside_the_model(tmp_path: Path) -> None:
    """C++'s shim knows the boundary's names only, and the driver refuses the file."""
    case = references.case("elasticity")
    stub = tmp_path / case.file.name
    text = case.file.read_text(encoding="utf-8").replace("'elasticity'\n  []", f"'{case.artifact}'\n  []")
    stub.write_text(
        "[Settings]\n  [example_batch_shape]\n    inner_rate = '(2; 12)'\n  []\n[]\n" + text, encoding="utf-8"
    )
    with references.default_dtype(torch.float64):
        try:
            driver = neml2.load_input(stub).get_driver("driver")
        except ValueError as error:
            pytest.fail(f"the declaration was refused: {error}")
    assert driver.run()


def test_d10_cotangents_broadcast_and_only_those_of_compiled_pairs_are_needed() -> None:
    """C++ reads past an unbatched cotangent and demands all outputs'."""
    model = references.case("promoted").model
    rows = rows_of("promoted")
    one = torch.linspace(1.0, 2.0, 6, dtype=torch.float64)
    full = one.expand(len(rows["strain"]), 6).contiguous()
    for name, gradient in model.param_vjp(rows, {"stress": one}).items():
        assert difference(gradient, model.param_vjp(rows, {"stress": full})[name]) < 1e-14


def test_d11_a_residual_whose_square_overflows_does_not_look_converged() -> None:
    """C++ divides by an infinite first norm, and calls the next iterate converged."""
    case = references.case("viscoplasticity")
    rows = rows_of("viscoplasticity")
    rows["strain"] = rows["strain"] * 1e160
    found = case.load().solve(rows)
    assert not bool(found.converged[rows["strain"].abs().amax(-1) > 1e150].any())


def test_d19_each_lag_takes_the_place_of_the_next_older_one() -> None:
    """C++ writes the new state into every lag of an unknown."""
    assert [successor(name) for name in ("x~1", "x~2", "x~3", "x")] == ["x", "x~1", "x~2", "x"]


def test_d30_the_caller_keeps_its_own_tensor() -> None:
    """C++ keeps the caller's tensor, so that a later change of it changes the model."""
    model = references.case("promoted").load()
    rows = rows_of("promoted")
    value = torch.tensor(1.5e5, dtype=torch.float64)
    model.set_parameter("promoted.E", value)
    before = model.forward(rows)["stress"]
    value.fill_(1.0)
    assert torch.equal(model.forward(rows)["stress"], before)


class TestD31SubBatchedForwardBlocks:
    """C++ returns undocumented shapes, and dies in jvp; no stub compiles such a pair, so the algebra is tested."""

    pair = Pair(out="y", wrt="x", out_base_shape=(2,), wrt_base_shape=(3,), output=0, wrt_sub_batch_shape=(4,))

    @pytest.mark.parametrize(
        ("sites", "out_sites", "sum_of"),
        [((5, 4), (4,), "bsij,bsjm->bsim"), ((1, 1), (4,), "xyij,bsjm->bsim"), ((5, 4), (), "bsij,bsjm->bim")],
        ids=["site by site", "constant block with a site axis of one", "sum over sites"],
    )
    def test_contraction(self, sites: tuple[int, ...], out_sites: tuple[int, ...], sum_of: str) -> None:
        block = torch.rand(*sites, 2, 3, dtype=torch.float64)
        column = torch.rand(5, 12, 1, dtype=torch.float64)
        expected = torch.einsum(sum_of, block, column.reshape(5, 4, 3, 1)).reshape(5, -1, 1)
        assert difference(explicit.contract(block, self.pair, out_sites, column, "file"), expected) < 1e-14
        whole = explicit.contract(block, self.pair, out_sites, None, "file")
        assert difference(whole @ column, expected) < 1e-14


def test_d33_a_plain_value_is_spread_over_the_sites() -> None:
    """C++'s shim fails to reshape it; eager neml2 spreads it."""
    case = references.case("cross_group")
    model = AOTIModel(case.artifact)
    rows = case.rows()
    plain = torch.full((6,), 1e-4, dtype=torch.float64)

    def typed(name: str, value: torch.Tensor) -> Any:
        return model.input_spec[name](value, sub_batch_ndim=len(model.input_sub_batch[name]))

    arguments = {name: typed(name, x) for name, x in rows.items()}
    spread = {**arguments, "branch_strain~1": typed("branch_strain~1", plain.expand(3, 6))}
    short = {**arguments, "branch_strain~1": SR2(plain)}
    for one, other in zip(model(*spread.values()), model(*short.values()), strict=True):
        assert torch.equal(one.data, other.data)


@pytest.mark.wide
def test_float32_label_gives_right_numbers() -> None:
    """An artifact compiled for float32 holds float64 graphs; C++ reads float32 buffers as float64."""
    labelled, plain = references.case("elasticity_float32").model, references.case("elasticity").model
    strain = torch.linspace(-1e-3, 1e-3, 12).reshape(2, 6)
    found = labelled.forward({"strain": strain.to(torch.float32)})["stress"]
    expected = plain.forward({"strain": strain.to(torch.float32).to(torch.float64)})["stress"]
    assert found.dtype == torch.float32
    assert difference(found, expected) < 4.0 * math.ulp(1.0) * 2**29
