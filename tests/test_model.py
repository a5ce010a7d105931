"""`Model`: what it tells about itself, its parameters, and the shapes it gives back."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import neml2_aoti_plugin
import references
from neml2_aoti_plugin import InputError, InputTypeError, Model, UnknownNameError
from references import Tensors, difference
from stubs.catalogue import CATALOGUE

SAME = 1e-12


@pytest.fixture
def promoted() -> Model:
    """A model of its own, whose parameters a test may change."""
    return references.case("promoted").load()


@pytest.fixture
def creep() -> Model:
    """An implicit model with promoted parameters in its residual."""
    return references.case("promoted_implicit").load()


def strains(*batch: int) -> Tensors:
    generator = torch.Generator().manual_seed(3)
    return {"strain": 1e-3 * torch.randn(*batch, 6, generator=generator, dtype=torch.float64)}


class TestWhatItTells:
    def test_names_in_order_with_shapes(self) -> None:
        model = references.case("viscoplasticity").model
        assert model.input_names == ["strain", "strain~1", "t", "t~1", "equivalent_plastic_strain~1", "stress~1"]
        assert model.output_names == ["stress", "equivalent_plastic_strain"]
        assert model.input_base_shapes == [[6], [6], [], [], [], [6]]
        assert model.output_base_shapes == [[6], []]
        assert list(model.inputs) == model.input_names and list(model.outputs) == model.output_names

    @pytest.mark.parametrize("name", CATALOGUE)
    def test_names_are_those_of_the_eager_model(self, name: str) -> None:
        case = references.case(name)
        eager = case.compiled_from
        assert [case.authored(n) for n in case.model.input_names] == list(eager.input_spec)
        assert [case.authored(n) for n in case.model.output_names] == list(eager.output_spec)
        spec = eager.input_spec | eager.output_spec
        for port, variable in (case.model.inputs | case.model.outputs).items():
            assert variable.type == spec[case.authored(port)].__name__
            assert variable.base_shape == tuple(spec[case.authored(port)].BASE_SHAPE)

    def test_sub_batch_shapes(self) -> None:
        inputs = references.case("cross_group").model.inputs
        assert {name: v.sub_batch_shape for name, v in inputs.items() if v.sub_batch_shape} == {
            "branch_strain": (3,),
            "branch_strain~1": (3,),
        }

    @pytest.mark.wide
    def test_device_and_dtype(self) -> None:
        model = references.case("elasticity").model
        assert (model.device, model.dtype) == (torch.device("cpu"), torch.float64)
        single = references.case("elasticity_float32").model
        assert (single.device, single.dtype) == (torch.device("cpu"), torch.float32)

    @pytest.mark.wide
    def test_compiled_pairs(self) -> None:
        assert references.case("viscoplasticity").model.derivative_pairs == [("stress", "strain")]
        assert references.case("chaboche").model.derivative_pairs == []
        promoted = references.case("promoted").model
        assert promoted.parameter_derivative_pairs == [("stress", "promoted.E"), ("stress", "promoted.nu")]
        renamed = references.case("renamed").model
        assert renamed.derivative_pairs == [("sigma", "eps")]
        assert renamed.parameter_derivative_pairs == [("sigma", "youngs_modulus")]

    def test_repr_names_artifact_leaf_and_variables(self) -> None:
        case = references.case("elasticity")
        assert repr(case.model) == f"Model({str(case.artifact)!r}, cpu/float64: strain -> stress)"

    @pytest.mark.parametrize("part", ["", "metadata.json", "cpu", "cpu/float64"])
    def test_artifact_may_be_named_by_any_path_into_it(self, part: str) -> None:
        case = references.case("elasticity")
        assert Model(case.artifact / part).artifact == case.artifact
        assert Model(str(case.artifact / part)).input_names == ["strain"]

    def test_it_is_the_model_of_neml2(self) -> None:
        from neml2 import aoti

        assert aoti.Model is Model is neml2_aoti_plugin.Model


class TestParameters:
    def test_values_and_base_shapes(self, promoted: Model) -> None:
        assert promoted.parameter_base_shapes == {"promoted.E": [], "promoted.nu": []}
        values = promoted.named_parameters()
        assert {name: float(value) for name, value in values.items()} == {"promoted.E": 71000.0, "promoted.nu": 0.33}
        assert all(value.dtype == torch.float64 and value.device.type == "cpu" for value in values.values())

    def test_without_promoted_ones_there_are_none(self) -> None:
        model = references.case("elasticity").model
        assert model.named_parameters() == {} and model.parameter_base_shapes == {}

    @pytest.mark.wide
    def test_change_in_place_takes_effect_in_a_residual(self, creep: Model) -> None:
        rows = references.case("promoted_implicit").rows()
        wanted = creep.forward(rows, {"residual.creep.eta": torch.tensor(1000.0, dtype=torch.float64)})
        creep.named_parameters()["residual.creep.eta"].fill_(1000.0)
        assert difference(creep.forward(rows)["stress"], wanted["stress"]) < SAME

    def test_entry_of_the_dict_is_not_the_models(self, promoted: Model) -> None:
        before = promoted.forward(strains(4))["stress"]
        promoted.named_parameters()["promoted.E"] = torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
        assert torch.equal(promoted.forward(strains(4))["stress"], before)

    @pytest.mark.parametrize(
        ("name", "value", "error", "words"),
        [
            ("E", 1.0, UnknownNameError, ["'E'", "promoted.E, promoted.nu", "neml2-compile"]),
            ("promoted.E", torch.tensor(1.0), InputTypeError, ["promoted.E", "torch.float32", "torch.float64"]),
            ("promoted.E", torch.tensor(1), InputTypeError, ["promoted.E", "torch.int64", "torch.float64"]),
            ("promoted.E", torch.ones((), device="meta", dtype=torch.float64), InputTypeError, ["meta", "cpu"]),
            ("promoted.E", "stiff", InputTypeError, ["promoted.E", "str"]),
            pytest.param("promoted.E", 10**400, InputError, ["promoted.E", "1329 bits", "torch.float64"], id="huge"),
            pytest.param("promoted.E", -(10**5000), InputError, ["promoted.E", "16610 bits"], id="unprintable"),
        ],
    )
    def test_set_parameter_checks(
        self, promoted: Model, name: str, value: Any, error: type[Exception], words: list[str]
    ) -> None:
        before = promoted.forward(strains(4))["stress"]
        with pytest.raises(error) as raised:
            promoted.set_parameter(name, value)
        assert all(word in str(raised.value) for word in words), str(raised.value)
        assert torch.equal(promoted.forward(strains(4))["stress"], before)
        for call in (promoted.forward, promoted.jacobian, promoted.solve):
            with pytest.raises(error):
                call(strains(4), {name: value})

    def test_number_that_only_a_float_can_hold(self, promoted: Model) -> None:
        promoted.set_parameter("promoted.E", 2**70)
        assert promoted.get_parameter("promoted.E").item() == 2.0**70

    def test_override_holds_for_one_call(self, promoted: Model) -> None:
        before = promoted.forward(strains(4))["stress"]
        doubled = promoted.forward(strains(4), {"promoted.E": torch.tensor(142000.0, dtype=torch.float64)})["stress"]
        assert difference(doubled, 2 * before) < SAME
        assert torch.equal(promoted.forward(strains(4))["stress"], before)
        assert float(promoted.named_parameters()["promoted.E"]) == 71000.0

    def test_override_broadcasts_with_the_inputs(self, promoted: Model) -> None:
        stiff = 71000.0 * torch.tensor([[1.0], [2.0]], dtype=torch.float64)
        found = promoted.forward(strains(4), {"promoted.E": stiff})["stress"]
        assert found.shape == (2, 4, 6)
        assert difference(found[1], 2 * found[0]) < SAME

    def test_override_alone_makes_a_batch(self, promoted: Model) -> None:
        values = 71000.0 * torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
        found = promoted.forward(strains(), {"promoted.E": values})["stress"]
        assert found.shape == (3, 6)
        assert difference(found[2], 3 * found[0]) < SAME


def flat(result: object, name: str = "") -> Tensors:
    """All tensors of a result, by their place in it."""
    if isinstance(result, Tensor):
        return {name: result}
    entries = result.items() if isinstance(result, dict) else enumerate(result)  # type: ignore[arg-type]
    found: Tensors = {}
    for key, value in entries:
        found.update(flat(value, f"{name}/{key}"))
    return found


class TestShapes:
    @pytest.mark.parametrize("batch", [(), (1,), (5,), (1, 1), (2, 3), (2, 1, 3), (0,), (2, 0)])
    @pytest.mark.parametrize("name", ["elasticity", "viscoplasticity", "composed", "cross_group", "substepping"])
    def test_outputs_have_the_callers_batch(self, name: str, batch: tuple[int, ...]) -> None:
        case = references.case(name)
        row = {n: x[-1] for n, x in case.rows().items()}
        inputs = {n: x.expand((*batch, *x.shape)) for n, x in row.items()}
        expected = case.model.forward(row)
        for out, value in case.model.forward(inputs).items():
            assert value.shape == (*batch, *expected[out].shape), out
            assert value.is_contiguous()
            assert difference(value, expected[out].expand(value.shape)) < SAME, out

    @pytest.mark.parametrize("batch", [(), (1,), (4,), (2, 3), (0,)])
    @pytest.mark.parametrize("name", ["promoted", "calibration", "composed"])
    def test_blocks_have_the_callers_batch(self, name: str, batch: tuple[int, ...]) -> None:
        case = references.case(name)
        inputs = {n: x[-1].expand((*batch, *x.shape[1:])) for n, x in case.rows().items()}
        outputs, blocks = case.model.jacobian(inputs)
        for out, row in blocks.items():
            for wrt, block in row.items():
                base = (*case.model.outputs[out].base_shape, *case.model.inputs[wrt].base_shape)
                assert block.shape == (*batch, *base), (out, wrt)
        if case.model.parameter_derivative_pairs:
            outputs, blocks = case.model.param_jacobian(inputs)
            for out, row in blocks.items():
                for block in row.values():
                    assert block.shape == outputs[out].shape, out

    @pytest.mark.parametrize(
        "view",
        [
            lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
            lambda x: torch.stack([x, x + 7.0], 1)[:, 0],
            lambda x: x.flip(0).flip(0)[::1],
            lambda x: torch.cat([x, x])[: len(x)],
        ],
        ids=["transposed", "strided", "flipped", "sliced"],
    )
    @pytest.mark.parametrize("name", ["elasticity", "viscoplasticity", "cross_group"])
    def test_layout_in_memory_does_not_matter(self, name: str, view: Callable[[Tensor], Tensor]) -> None:
        case = references.case(name)
        rows = case.rows()
        expected = case.model.forward(rows)
        for out, value in case.model.forward({n: view(x) for n, x in rows.items()}).items():
            assert torch.equal(value, expected[out]), out

    @pytest.mark.parametrize("name", ["elasticity", "promoted"])
    @pytest.mark.parametrize("form", ["plain", "one row", "grid", "transposed", "no rows", "a value per row"])
    def test_blocks_of_one_explicit_segment_are_those_that_seeds_give(self, name: str, form: str) -> None:
        model = references.case(name).model
        inputs = strains(2, 3) if form == "grid" else strains(4)
        if form == "one row":
            inputs = strains()
        elif form == "no rows":
            inputs = strains(0)
        elif form == "transposed":
            inputs = {"strain": strains(4)["strain"].T.contiguous().T}
        overrides = None
        if form == "a value per row" and name == "promoted":
            overrides = {"promoted.E": torch.tensor([1e4, 2e4, 3e4, 4e4], dtype=torch.float64)}
        for _ in range(2):
            outputs, blocks = model.jacobian(inputs, overrides)
            expected, (matrix,), batch = model.linearise(inputs, [("stress", "strain")], overrides)
            assert torch.equal(outputs["stress"], expected["stress"])
            block = blocks["stress"]["strain"]
            assert block.shape == ((6, 6) if name == "elasticity" else (*batch, 6, 6))
            assert block.is_contiguous() and torch.equal(block.expand(matrix.shape), matrix)

    def test_rows_of_many_sizes_in_turn(self) -> None:
        """What is known of a number of rows is forgotten in time, and learnt again."""
        model = references.case("elasticity").load()
        every = strains(100)
        expected, blocks = model.jacobian(OrderedDict(every))
        for rows in (*range(1, 101), 1, 50):
            part = {"strain": every["strain"][:rows]}
            assert torch.equal(model.forward(part)["stress"], expected["stress"][:rows])
            assert torch.equal(model.jacobian(part)[1]["stress"]["strain"], blocks["stress"]["strain"])

    def test_inputs_are_not_changed(self) -> None:
        for name in ("viscoplasticity", "calibration", "substepping"):
            case = references.case(name)
            rows = case.rows()
            kept = {n: x.clone() for n, x in rows.items()}
            case.model.forward(rows)
            assert all(torch.equal(rows[n], kept[n]) for n in rows), name

    @pytest.mark.parametrize("name", ["elasticity", "promoted", "calibration"])
    def test_results_are_the_callers_own(self, name: str) -> None:
        case = references.case(name)
        rows = case.rows()
        first = flat(case.model.jacobian(rows))
        kept = {n: x.clone() for n, x in first.items()}
        for x in first.values():
            x.zero_()
        assert all(torch.equal(value, kept[n]) for n, value in flat(case.model.jacobian(rows)).items())


class TestSolve:
    @pytest.mark.parametrize("batch", [(), (0,), (2, 1)])
    def test_of_any_batch(self, batch: tuple[int, ...]) -> None:
        case = references.case("viscoplasticity")
        solution = case.model.solve({n: x[-1].expand((*batch, *x.shape[1:])) for n, x in case.rows().items()})
        assert solution.converged.shape == solution.iterations.shape == solution.outcome.shape == batch
        assert bool(solution.converged.all()) and bool((solution.iterations > 0).all())


INF, NAN = float("inf"), float("nan")
WRONG_SETTINGS: dict[str, list[object]] = {
    "atol": [-1.0, "tight", INF, "1e-8", True],
    "rtol": [-1.0, NAN],
    "miters": [-1, 2.5, INF, NAN, 2**31, True, "5"],
    "ls_type": ["WOLFE"],
    "ls_max_iters": [-2, INF],
    "ls_cutback": [1.0, INF],
    "ls_c": [-1e-3, 1j],
    "substep_del_tol": [-1.0],
}


class TestSettings:
    @pytest.mark.parametrize(
        ("name", "value"), [(n, value) for n, values in WRONG_SETTINGS.items() for value in values]
    )
    def test_values_out_of_range_are_refused_by_name(self, name: str, value: object) -> None:
        case = references.case("viscoplasticity")
        model = case.load()
        with pytest.raises(InputError) as raised:
            model.set_solver_config(**{**case.newton, name: value})
        assert name in str(raised.value) and repr(value) in str(raised.value)
        with pytest.raises(InputError, match=f"{name} is "):
            case.load(solver={name: value})

    @pytest.mark.parametrize("name", ["atol", "miters", "ls_max_iters", "ls_cutback"])
    def test_huge_whole_numbers_are_refused_without_being_written_out(self, name: str) -> None:
        case = references.case("viscoplasticity")
        with pytest.raises(InputError, match=f"{name} is an int of 20001 bits, expected"):
            case.load().set_solver_config(**{**case.newton, name: 2**20000})

    @pytest.mark.parametrize("mode", ["rowwise", "lockstep"])
    def test_whole_numbers_may_be_floats(self, mode: str) -> None:
        case = references.case("viscoplasticity")
        whole, floats = (case.load(mode=mode) for _ in range(2))
        whole.set_solver_config(**{**case.newton, "miters": 30, "ls_max_iters": 8})
        floats.set_solver_config(**{**case.newton, "miters": 30.0, "ls_max_iters": torch.tensor(8.0)})
        expected = whole.solve(case.rows())
        for model in (floats, case.load(mode=mode, solver={**case.newton, "miters": 30.0, "ls_max_iters": 8.0})):
            found = model.solve(case.rows())
            assert torch.equal(found.iterations, expected.iterations)
            assert all(torch.equal(x, expected.outputs[n]) for n, x in found.outputs.items())

    @pytest.mark.parametrize("how", ["argument", "environment"])
    def test_unknown_mode_is_refused(self, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
        case = references.case("elasticity")
        options: dict[str, Any] = {"mode": "jump"} if how == "argument" else {}
        if how == "environment":
            monkeypatch.setenv("NEML2_AOTI_PLUGIN_MODE", "jump")
        with pytest.raises(InputError, match=r"'jump', expected one of rowwise, lockstep") as raised:
            Model(case.artifact, **options)
        assert ("NEML2_AOTI_PLUGIN_MODE" in str(raised.value)) == (how == "environment")
