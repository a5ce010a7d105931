"""`AOTIModel`, the HIT type: typed tensors in and out, and what neml2 and torch ask of a model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import neml2
import pytest
import torch
from neml2.types import SR2, Scalar, TensorWrapper
from torch import nn

import references
from neml2_aoti_plugin import AOTIModel, ArtifactNotFoundError
from neml2_aoti_plugin._cli.target import find_target
from references import Case, difference


def load(name: str, **options: Any) -> Any:
    case = references.case(name)
    return neml2.load_model(case.file, case.stub.model, **options)


def typed(case: Case, batch_rank: int = 1) -> list[TensorWrapper]:
    """The case's rows (or its last one) as the HIT type takes them."""
    model = load(case.stub.name)
    rows = case.rows() if batch_rank else {n: x[-1] for n, x in case.rows().items()}
    return [model.input_spec[n](x, sub_batch_ndim=len(model.input_sub_batch[n])) for n, x in rows.items()]


class TestLoading:
    def test_neml2_registers_the_plugins_class(self) -> None:
        from neml2 import aoti
        from neml2.factory import _registry

        assert aoti.AOTIModel is AOTIModel is _registry["AOTIModel"]
        assert type(load("elasticity")) is AOTIModel

    def test_relative_path_is_against_the_stub(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = Path(shutil.copytree(references.case("elasticity").folder, tmp_path / "moved"))
        monkeypatch.chdir(tmp_path)
        model = neml2.load_model("moved/elasticity_aoti.i", "elasticity")
        assert model.artifact == folder / "elasticity"

    def test_a_stub_that_is_included_from_another_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = Path(shutil.copytree(references.case("elasticity").folder, tmp_path / "compiled"))
        (tmp_path / "inputs").mkdir()
        main = tmp_path / "inputs" / "main.i"
        main.write_text("!include ../compiled/elasticity_aoti.i\n")
        monkeypatch.chdir(tmp_path)
        for path in (main, Path("inputs/main.i")):
            assert neml2.load_model(path, "elasticity").artifact == folder / "elasticity"
            assert find_target(path).artifact == folder / "elasticity"
        # What is beside the including file alone is found too, as before.
        (tmp_path / "compiled" / "elasticity").rename(tmp_path / "inputs" / "elasticity")
        assert neml2.load_model(main, "elasticity").artifact == tmp_path / "inputs" / "elasticity"

    def test_absolute_path(self, tmp_path: Path) -> None:
        artifact = references.case("elasticity").artifact
        stub = tmp_path / "stub.i"
        stub.write_text(f"[Models]\n  [m]\n    type = AOTIModel\n    artifact_path = '{artifact}'\n  []\n[]\n")
        assert neml2.load_model(stub, "m").artifact == artifact

    def test_settings_by_what_was_given_to_neml2_compile_alone(self, tmp_path: Path) -> None:
        artifact = references.case("elasticity").artifact
        stub = tmp_path / "stub.i"
        stub.write_text(
            "[Settings]\n  example_batch_shape = '(${rows},)'\n[]\n"
            f"[Models]\n  [m]\n    type = AOTIModel\n    artifact_path = '{artifact}'\n  []\n[]\n"
        )
        assert neml2.load_model(stub, "m").artifact == artifact

    @pytest.mark.wide
    def test_dtype_is_the_one_compiled(self) -> None:
        assert load("elasticity_float32").dtype == torch.float32

    @pytest.mark.parametrize("options", [{}, {"dtype": "float64"}, {"dtype": torch.float64}])
    @pytest.mark.parametrize("device", [{}, {"device": "cpu"}, {"device": torch.device("cpu")}])
    def test_device_and_dtype_do_not_follow_torchs_default_dtype(self, options: Any, device: Any) -> None:
        with references.default_dtype(torch.float32):
            model = load("elasticity", **options, **device)
        assert (model.dtype, model.device.type) == (torch.float64, "cpu")

    def test_device_follows_torchs_default(self) -> None:
        torch.set_default_device("meta")
        try:
            with pytest.raises(ArtifactNotFoundError, match=r"'meta'.*compiled leaves: cpu/float64"):
                load("elasticity")
            assert load("elasticity", device="cpu").device.type == "cpu"
        finally:
            torch.set_default_device(None)

    def test_repr_names_what_it_is(self) -> None:
        text = repr(load("elasticity"))
        assert text.startswith("AOTIModel(") and "strain -> stress" in text and "cpu/float64" in text


class TestForward:
    @pytest.mark.parametrize("name", ["elasticity", "viscoplasticity", "composed", "cross_group", "substepping"])
    def test_of_one_row_has_no_batch(self, name: str) -> None:
        case = references.case(name)
        for value in load(name)(*typed(case, 0)):
            assert value.data.ndim == value.sub_batch_ndim + type(value).BASE_NDIM
            assert tuple(value.dynamic_batch_shape) == ()

    @pytest.mark.wide
    def test_takes_raw_tensors_and_a_mixture(self) -> None:
        case = references.case("composed")
        model = load("composed")
        expected = model(*typed(case))
        raw = list(case.rows().values())
        for inputs in (raw, [x if k % 2 else y for k, (x, y) in enumerate(zip(raw, typed(case), strict=True))]):
            for value, wanted in zip(model(*inputs), expected, strict=True):
                assert torch.equal(value.data, wanted.data)

    def test_value_without_batch_is_common_to_all_rows(self) -> None:
        case = references.case("viscoplasticity")
        model = load("viscoplasticity")
        inputs = typed(case)
        where = list(model.input_spec).index("t~1")
        inputs[list(model.input_spec).index("t")] = Scalar(torch.tensor(15.0, dtype=torch.float64))
        inputs[where] = Scalar(torch.tensor(14.5, dtype=torch.float64))
        found = model(*inputs)
        inputs[where] = Scalar(torch.full((9,), 14.5, dtype=torch.float64))
        for value, wanted in zip(found, model(*inputs), strict=True):
            assert torch.equal(value.data, wanted.data)

    def test_extent_one_stands_for_all_sites(self) -> None:
        case = references.case("cross_group")
        model = load("cross_group")
        inputs = typed(case)
        where = list(model.input_spec).index("branch_strain")
        inputs[where] = SR2(torch.zeros(6, dtype=torch.float64)).sub_batch.expand_at(3, 0)
        expected = model(*typed(case))
        for value, wanted in zip(model(*inputs), expected, strict=True):
            assert difference(value.data, wanted.data) < 1e-6


class TestDerivatives:
    def test_override_and_typed_cotangents(self) -> None:
        case = references.case("calibration")
        model, rows = load("calibration"), case.rows()
        inputs = dict(zip(model.input_spec, typed(case), strict=True))
        plain = case.load(tight=False)
        override = {"residual.hardening.K": torch.tensor(2000.0, dtype=torch.float64)}
        assert_same(model.param_jacobian(inputs, override), plain.param_jacobian(rows, override))
        outputs = dict(zip(model.output_spec, model(*inputs.values()), strict=True))
        assert_same(model.param_vjp(inputs, outputs), plain.param_vjp(rows, {n: x.data for n, x in outputs.items()}))

    @pytest.mark.parametrize("given", ["by place", "by name"])
    def test_by_some_parameters(self, given: str) -> None:
        rows, model = references.case("calibration").rows(), load("calibration")
        names = ["residual.hardening.K"]
        how: dict[str, Any] = {"param_overrides" if given == "by place" else "params": names}
        _, blocks = model.param_jacobian(rows, **how)
        _, every = model.param_jacobian(rows)
        assert all(list(row) == names for row in blocks.values()) and list(blocks) == list(every)
        assert_same(blocks, {out: {n: row[n] for n in names} for out, row in every.items()})
        cotangents = {name: torch.ones_like(x.data) for name, x in model.call_by_name(rows).items()}
        assert list(model.param_vjp(rows, cotangents, **how)) == names


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
        return
    assert len(found) == len(expected)
    for key in expected if isinstance(expected, dict) else range(len(expected)):
        assert_same(found[key], expected[key])


class TestAsAModule:
    def test_it_is_an_nn_module_without_parts(self) -> None:
        model = load("viscoplasticity")
        assert isinstance(model, nn.Module)
        assert list(model.children()) == []
