"""`AOTIModel`, the HIT type: typed tensors in and out, and what neml2 and torch ask of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import neml2
import pytest
import torch
from neml2 import aoti, factory
from neml2.types import SR2, Scalar
from torch import nn

import references
from neml2_aoti_plugin import AOTIModel, ArtifactNotFoundError
from neml2_aoti_plugin._cli.target import find_target
from references import copied, difference, write_stub


def load(name: str, **options: Any) -> Any:
    case = references.case(name)
    return neml2.load_model(case.file, case.stub.model, **options)


def typed(name: str, rows: int | slice = slice(None)) -> dict[str, Any]:
    """Rows of a case as the HIT type takes them."""
    model = load(name)
    given = {n: x[rows] for n, x in references.case(name).rows().items()}
    return {n: model.input_spec[n](x, sub_batch_ndim=len(model.input_sub_batch[n])) for n, x in given.items()}


def assert_equal(found: tuple[Any, ...], wanted: tuple[Any, ...]) -> None:
    assert all(torch.equal(x.data, y.data) for x, y in zip(found, wanted, strict=True))


class TestLoading:
    def test_neml2_registers_the_plugins_class(self) -> None:
        model = load("elasticity")
        assert aoti.AOTIModel is AOTIModel is factory._registry["AOTIModel"] is type(model)
        assert isinstance(model, nn.Module) and list(model.children()) == []
        text = repr(model)
        assert text.startswith("AOTIModel(") and "strain -> stress" in text and "cpu/float64" in text

    def test_relative_path_is_against_the_stub(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        artifact, main = copied("elasticity", tmp_path / "compiled"), tmp_path / "inputs" / "main.i"
        monkeypatch.chdir(tmp_path)
        assert neml2.load_model("compiled/elasticity_aoti.i", "elasticity").artifact == artifact
        # And so it is where another file includes the stub.
        main.parent.mkdir()
        main.write_text("!include ../compiled/elasticity_aoti.i\n")
        for path in (main, Path("inputs/main.i")):
            assert neml2.load_model(path, "elasticity").artifact == find_target(path).artifact == artifact
        # What is beside the including file alone is found too, as before.
        moved = artifact.rename(main.with_name("elasticity"))
        assert neml2.load_model(main, "elasticity").artifact == moved

    # Settings that only what was given to neml2-compile could fill in do no harm.
    @pytest.mark.parametrize("more", ["", "[Settings]\n  example_batch_shape = '(${rows},)'\n[]\n"])
    def test_absolute_path(self, tmp_path: Path, more: str) -> None:
        artifact = references.case("elasticity").artifact
        assert neml2.load_model(write_stub(tmp_path / "stub.i", more, m=artifact), "m").artifact == artifact

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
        with torch.device("meta"):
            with pytest.raises(ArtifactNotFoundError, match=r"'meta'.*compiled leaves: cpu/float64"):
                load("elasticity")
            assert load("elasticity", device="cpu").device.type == "cpu"


class TestForward:
    @pytest.mark.parametrize("name", ["elasticity", "viscoplasticity", "composed", "cross_group", "substepping"])
    def test_of_one_row_has_no_batch(self, name: str) -> None:
        for value in load(name)(*typed(name, -1).values()):
            assert value.data.ndim == value.sub_batch_ndim + type(value).BASE_NDIM
            assert tuple(value.dynamic_batch_shape) == ()

    @pytest.mark.wide
    def test_takes_raw_tensors_and_a_mixture(self) -> None:
        model, raw, wrapped = load("composed"), references.case("composed").rows(), typed("composed")
        mixture = {name: raw[name] if k % 2 else x for k, (name, x) in enumerate(wrapped.items())}
        for inputs in (raw, mixture):
            assert_equal(model(*inputs.values()), model(*wrapped.values()))

    def test_value_without_batch_is_common_to_all_rows(self) -> None:
        model, inputs = load("viscoplasticity"), typed("viscoplasticity")
        inputs |= {"t": Scalar(torch.tensor(15.0).double()), "t~1": Scalar(torch.tensor(14.5).double())}
        found = model(*inputs.values())
        inputs["t~1"] = Scalar(torch.full((9,), 14.5, dtype=torch.float64))
        assert_equal(found, model(*inputs.values()))

    def test_extent_one_stands_for_all_sites(self) -> None:
        model, inputs = load("cross_group"), typed("cross_group")
        expected = model(*inputs.values())
        inputs["branch_strain"] = SR2(torch.zeros(6, dtype=torch.float64)).sub_batch.expand_at(3, 0)
        for value, wanted in zip(model(*inputs.values()), expected, strict=True):
            assert difference(value.data, wanted.data) < 1e-6


class TestDerivatives:
    def test_override_and_typed_cotangents(self) -> None:
        case = references.case("calibration")
        model, plain, rows, inputs = load("calibration"), case.load(tight=False), case.rows(), typed("calibration")
        override = {"residual.hardening.K": torch.tensor(2000.0, dtype=torch.float64)}
        found, wanted = model.param_jacobian(inputs, override), plain.param_jacobian(rows, override)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
        outputs = dict(zip(model.output_spec, model(*inputs.values()), strict=True))
        wanted_gradients = plain.param_vjp(rows, {n: x.data for n, x in outputs.items()})
        torch.testing.assert_close(model.param_vjp(inputs, outputs), wanted_gradients, rtol=0, atol=0)

    @pytest.mark.parametrize("by", ["param_overrides", "params"])
    def test_by_some_parameters(self, by: str) -> None:
        """By place, where neml2 gives the names, or by name."""
        rows, model, names = references.case("calibration").rows(), load("calibration"), ["residual.hardening.K"]
        _, blocks = model.param_jacobian(rows, **{by: names})
        _, every = model.param_jacobian(rows)
        some = {out: {n: row[n] for n in names} for out, row in every.items()}
        torch.testing.assert_close(blocks, some, rtol=0, atol=0)
        cotangents = {name: torch.ones_like(x.data) for name, x in model.call_by_name(rows).items()}
        assert list(model.param_vjp(rows, cotangents, **{by: names})) == names
