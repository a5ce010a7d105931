"""Bad input: each case gives one error that names the thing, what was expected and the cure, raw and from HIT."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import neml2
import pytest
import torch
from neml2.types import SR2, Scalar

import references
from neml2_aoti_plugin import (
    AOTIModel,
    ArtifactError,
    ArtifactNotFoundError,
    ConvergenceError,
    DerivativeNotCompiledError,
    InputError,
    InputTypeError,
    Model,
    UnknownNameError,
)
from neml2_aoti_plugin.model._parameters import RESERVED
from references import Tensors, change_json, reported, write_stub


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def refused(artifact: Path, error: type[Exception], *words: str, **options: Any) -> None:
    """Require these words of the error of the class on an artifact, and of that of the HIT type by a stub beside it."""
    with reported(error, *words):
        Model(artifact, **options)
    stub = write_stub(artifact.with_name("stub.i"), m=artifact.name)
    with reported(error, *words, "[Models/m]", str(stub)):
        neml2.load_model(stub, "m", **options)


# -- artifacts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gone", "options", "words"),
    [
        (".", {}, ["elasticity", "no such", "neml2-compile"]),
        ("metadata.json", {}, ["metadata.json", "neml2-compile"]),
        ("", {"dtype": "float32"}, ["'cpu'", "'float32'", "cpu/float64", "--device cpu --dtype float32"]),
        ("", {"device": "cuda"}, ["'cuda'", "cpu/float64", "neml2-compile", "--device cuda"]),
        ("cpu", {}, ["(none)", "neml2-compile"]),
        ("cpu/float64/elasticity.pt2", {}, ["elasticity.pt2", "compile the model again"]),
    ],
)
def test_what_is_not_there_is_named(artifact: Path, gone: str, options: dict[str, Any], words: list[str]) -> None:
    if gone:
        (artifact / gone).rename(artifact.parent.with_name("gone"))
    refused(artifact, ArtifactNotFoundError, *words, **options)


def test_an_artifact_of_a_like_name_is_offered(artifact: Path) -> None:
    refused(artifact.with_name("elastic"), ArtifactNotFoundError, "elastic", "no such", "elasticity")


@pytest.mark.parametrize("device", ["gpu", "vulkan", "cuda:x"])
def test_unknown_device(artifact: Path, device: str) -> None:
    with reported(InputError, device, "cpu, cuda"):
        Model(artifact, device)


@pytest.mark.parametrize("dtype", ["double", "float16", torch.float16])
def test_unknown_dtype(artifact: Path, dtype: Any) -> None:
    refused(artifact, InputError, str(dtype).removeprefix("torch."), "float64, float32", dtype=dtype)


@pytest.mark.parametrize("text", ["", "{", "[]", '"metadata"', '{"schema_version": 14'])
def test_metadata_that_is_no_json_object(artifact: Path, text: str) -> None:
    (artifact / "metadata.json").write_text(text)
    refused(artifact, ArtifactError, str(artifact / "metadata.json"), "JSON")


def called(**aliases: str) -> Callable[[dict[str, Any]], Any]:
    """What gives parameters other names."""
    names = {f"promoted.{parameter}": name for parameter, name in aliases.items()}
    return lambda document: document.update(boundary_aliases={"parameters": names})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.pop("inputs"), ["'inputs'"]),
        (lambda d: d.pop("segments"), ["'segments'"]),
        (lambda d: d.update(segments=[]), ["segments", "at least one"]),
        (lambda d: d.update(type="plain"), ["type", "is a str", "composed"]),
        (lambda d: d["inputs"][0].pop("name"), ["inputs[0]", "'name'"]),
        (lambda d: d["inputs"][0].update(base_shape=[-6]), ["inputs[0].base_shape", "-6"]),
        (lambda d: d["inputs"][0].update(base_shape="six"), ["inputs[0].base_shape", "is a str", "list"]),
        (lambda d: d["segments"][0].update(kind="magic"), ["segments[0].kind", "is a str", "forward, implicit"]),
        (lambda d: d["segments"][0].update(package="../x.pt2"), ["segments[0].package", "bare name of a .pt2"]),
        (lambda d: d["segments"][0].update(inputs=["eps"]), ["eps"]),
        (lambda d: d["outputs"][0].update(name="@failed"), ["outputs[0].name is '@failed'", "in the source input"]),
        (lambda d: d.update(boundary_aliases={"inputs": {"strain": "@step"}}), ["inputs.strain is '@step'", "with @"]),
        # Names that stand for two things.
        (lambda d: d["inputs"].append(d["inputs"][0]), ["inputs", "'strain' twice"]),
        (lambda d: d["outputs"].append(d["outputs"][0]), ["outputs", "'stress' twice"]),
        (lambda d: d["parameters"].append(d["parameters"][0]), ["parameters", "'promoted.E' twice"]),
        (called(E="promoted.nu"), ["'promoted.E' and 'promoted.nu', which are both called 'promoted.nu'"]),
        (called(E="promoted"), ["'promoted' is a parameter and a part of the name of another one, 'promoted.nu'"]),
        (called(E="a..b"), ["'a..b'", "empty"]),
    ],
)
def test_damaged_metadata_is_reported_by_its_key(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], words: list[str]
) -> None:
    artifact = references.edited(references.case("promoted"), tmp_path, change)
    refused(artifact, ArtifactError, str(artifact / "metadata.json"), "neml2-compile", *words)


@pytest.mark.parametrize("name", ["_caller", "inputs", "mode", "training", "_parameters.E", "output_spec", "_declared"])
def test_a_parameter_of_the_name_of_an_attribute(tmp_path: Path, name: str) -> None:
    artifact = references.edited(references.case("promoted"), tmp_path, called(E=name))
    refused(artifact, ArtifactError, str(artifact), f"parameter {name!r}", "--rename-parameter")


def test_all_own_attributes_are_reserved() -> None:
    case = references.case("promoted")
    hit = neml2.load_model(case.file, case.stub.model)
    for found in (case.load(), hit, AOTIModel(case.artifact, declared={"x"})):
        own = {*vars(found), *found._modules} - {*vars(torch.nn.Module()), "promoted"}
        assert own <= RESERVED, own - RESERVED


@pytest.mark.parametrize("name", ["forward", "device", "E"])
def test_a_parameter_of_the_name_of_a_method(tmp_path: Path, name: str) -> None:
    artifact = references.edited(references.case("promoted"), tmp_path, called(E=name))
    for model in (Model(artifact), neml2.load_model(write_stub(tmp_path / "stub.i", m=artifact), "m")):
        assert float(model.named_parameters()[name]) == 71000.0
        model.set_parameter(name, 1.0)
        assert float(model.state_dict()[name]) == 1.0


def test_a_type_that_neml2_does_not_have(artifact: Path) -> None:
    change_json(artifact / "metadata.json", lambda d: d["inputs"][0].update(var_type="SR3"))
    with reported(ArtifactError, "'strain'", "'SR3'", "neml2", "[Models/elasticity]"):
        neml2.load_model(artifact.with_name("elasticity_aoti.i"), "elasticity")


# -- raw inputs --------------------------------------------------------------------------------------------------------


def good(name: str = "calibration") -> Tensors:
    return {n: x.clone() for n, x in references.case(name).rows().items()}


def cotangents(model: Model) -> Tensors:
    return {n: torch.ones(v.base_shape, dtype=model.dtype) for n, v in model.outputs.items()}


# How to call a model, with what must be beside the inputs.
OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "forward": lambda m, x: m.forward(x),
    "solve": lambda m, x: m.solve(x),
    "jvp": lambda m, x: m.jvp(x, {}),
    "jacobian": lambda m, x: m.jacobian(x),
    "param_jacobian": lambda m, x: m.param_jacobian(x),
    "param_vjp": lambda m, x: m.param_vjp(x, cotangents(m)),
}

ALL = "strain, strain~1, t, t~1, equivalent_plastic_strain~1, stress~1"


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda x: {**x, "strian": x["strain"]}, UnknownNameError, ["unknown 'strian'", ALL]),
        (lambda x: {n: v for n, v in x.items() if n != "t~1"}, UnknownNameError, ["missing 't~1'", "strain, strain~1"]),
        (
            lambda x: {"time" if n == "t" else n: v for n, v in x.items()},
            UnknownNameError,
            ["missing 't'", "unknown 'time'"],
        ),
        (lambda x: list(x.values()), InputTypeError, ["list", "dict"]),
        ({"t": lambda _: 1.0}, InputTypeError, ["'t'", "float", "torch.as_tensor(value, dtype=torch.float64)"]),
        ({"strain": lambda x: x.numpy()}, InputTypeError, ["'strain'", "ndarray"]),
        ({"strain": lambda x: x[:, :5]}, InputError, ["'strain'", "(9, 5)", "(*batch, 6)", "SR2"]),
        ({"strain": lambda x: x.new_zeros(9, 3, 3)}, InputError, ["(9, 3, 3)", "convert(value, 'tensor', 'mandel')"]),
        ({"stress~1": lambda x: x[0, 0]}, InputError, ["'stress~1'", "()", "6"]),
        ({"t": lambda x: x[:, None].repeat(1, 6)}, InputError, ["broadcast", "t [9, 6]"]),
        ({"strain": lambda x: x[:4]}, InputError, ["broadcast", "strain [4]", "t [9]"]),
        ({"strain": lambda x: x.float()}, InputTypeError, ["'strain'", "torch.float32", "strain.to(torch.float64)"]),
        ({"t": lambda x: x.long()}, InputTypeError, ["'t'", "torch.int64", "torch.float64"]),
        ({"strain": lambda x: x.to("meta")}, InputTypeError, ["'strain'", "meta", "cpu", "strain.to('cpu')"]),
    ],
)
def test_a_fault_is_reported_by_every_operation(
    change: Any, error: type[Exception], words: list[str], operation: str
) -> None:
    rows = good()
    given = change(rows) if callable(change) else {**rows, **{n: make(rows[n]) for n, make in change.items()}}
    with reported(error, *words):
        OPERATIONS[operation](references.case("calibration").model, given)


@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name != "solve"])
def test_input_that_is_not_finite_is_named_by_every_operation(operation: str) -> None:
    rows = good()
    rows["t"].fill_(torch.nan)
    with reported(ConvergenceError, "9 of 9 row", "'t' is not finite", "9 of these rows", "Give finite values"):
        OPERATIONS[operation](references.case("calibration").model, rows)


def test_another_dtype_is_offered_only_where_it_was_compiled(artifact: Path) -> None:
    strain, cure = {"strain": torch.zeros(6)}, r"Pass strain\.to\(torch\.float64\)"
    with pytest.raises(InputTypeError, match=rf"{cure}\.$"):
        Model(artifact).forward(strain)
    shutil.copytree(artifact / "cpu/float64", artifact / "cpu/float32")
    with pytest.raises(InputTypeError, match=rf"{cure}, or load the model with dtype='float32'\.$"):
        Model(artifact).forward(strain)
    with pytest.raises(InputTypeError, match=rf"{cure}\.$"):
        Model(artifact).forward({"strain": strain["strain"].half()})


@pytest.mark.parametrize(("take", "found"), [(slice(0, 2), "(6, 2, 6)"), (0, "(6, 6)")])
def test_a_wrong_sub_batch(take: Any, found: str) -> None:
    inputs = good("cross_group")
    inputs["branch_strain~1"] = inputs["branch_strain~1"][:, take]
    with reported(InputError, "'branch_strain~1'", found, "(*batch, 3, 6)", "sub-batch shape (3,)"):
        references.case("cross_group").model.forward(inputs)


@pytest.mark.wide
def test_a_renamed_input_by_its_old_name_and_double_precision_for_a_single_one() -> None:
    with reported(UnknownNameError, "missing 'eps'", "'strain' was renamed to 'eps'"):
        references.case("renamed").model.forward({"strain": zeros(6)})
    with reported(InputTypeError, "torch.float64, expected torch.float32"):
        references.case("elasticity_float32").model.forward({"strain": zeros(6)})


@pytest.mark.parametrize(
    ("call", "change", "error", "words"),
    [
        ("jvp", {"strian": zeros(6)}, UnknownNameError, ["strian", "strain, strain~1"]),
        ("jvp", {"strain": zeros(5)}, InputError, ["'strain'", "(5,)", "6", "tangent"]),
        ("jvp", {"strain": torch.zeros(6)}, InputTypeError, ["tangent 'strain'", "torch.float32"]),
        ("jvp", {"strain": zeros(4, 6)}, InputError, ["tangent 'strain'", "[4]", "[9]"]),
        ("jvp", {"strain": zeros(6).to("meta")}, InputTypeError, ["meta", "cpu"]),
        ("jvp", {"strain": 1.0}, InputTypeError, ["tangent 'strain'", "float"]),
        ("param_vjp", {"stress": None}, UnknownNameError, ["missing 'stress'"]),
        ("param_vjp", {"strain": zeros(9, 6)}, UnknownNameError, ["strain", "stress"]),
        ("param_vjp", {"stress": torch.zeros(9, 6)}, InputTypeError, ["cotangent 'stress'", "torch.float32"]),
        ("param_vjp", {"stress": zeros(4, 6)}, InputError, ["cotangent 'stress'", "(4, 6)", "(9, 6)"]),
        ("param_vjp", {"stress": zeros(9, 5)}, InputError, ["cotangent 'stress'", "(9, 5)"]),
        ("param_vjp", {"stress": zeros(9, 6).to("meta")}, InputTypeError, ["meta", "cpu"]),
    ],
)
def test_tangents_and_cotangents(call: str, change: dict[str, Any], error: type[Exception], words: list[str]) -> None:
    model, rows = references.case("calibration").model, good()
    given = {n: torch.ones_like(x) for n, x in model.forward(rows).items()} if call == "param_vjp" else {}
    given = {name: value for name, value in {**given, **change}.items() if value is not None}
    with reported(error, *words):
        getattr(model, call)(rows, given)


@pytest.mark.parametrize("operation", ["forward", "solve", "jacobian", "param_jacobian"])
@pytest.mark.parametrize(
    ("name", "value", "error", "words"),
    [
        ("K", zeros(), UnknownNameError, ["'K'", "residual.hardening.K"]),
        ("residual.hardening.K", torch.tensor(1.0), InputTypeError, ["residual.hardening.K", "torch.float32"]),
        ("residual.hardening.K", zeros(4), InputError, ["broadcast", "[4]"]),
        ("residual.hardening.K", zeros().to("meta"), InputTypeError, ["meta"]),
    ],
)
def test_overrides(operation: str, name: str, value: Any, error: type[Exception], words: list[str]) -> None:
    with reported(error, *words):
        getattr(references.case("calibration").model, operation)(good(), param_overrides={name: value})


# -- typed inputs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Any:
    return neml2.load_model(references.case("elasticity").file, "elasticity")


SITES = SR2(zeros(4, 3, 6), sub_batch_ndim=1)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ([Scalar(zeros(5, 6))], InputTypeError, ["'strain' is a Scalar, expected a SR2"]),
        ([], InputTypeError, ["0 positional inputs given, expected 1: strain"]),
        ([SR2(zeros(6))] * 2, InputTypeError, ["2 positional inputs given, expected 1: strain"]),
        ([SR2(torch.zeros(6))], InputTypeError, ["'strain' has dtype torch.float32, expected torch.float64"]),
        ([SR2(zeros(6).to("meta"))], InputTypeError, ["'strain' is on device meta, expected cpu"]),
        ([[0.0] * 6], InputTypeError, ["'strain' is a list"]),
        ([SITES], InputError, ["'strain'", "(3,)", "compiled for none", "example_batch_shape", "strain = (2; 3)"]),
    ],
)
def test_other_types(model: Any, given: list[Any], error: type[Exception], words: list[str]) -> None:
    with reported(error, *words):
        model(*given)


def test_directions_that_a_typed_call_does_not_take(model: Any) -> None:
    strain = SR2(zeros(6))
    for second in ("v2", "vh"):
        with pytest.raises(DerivativeNotCompiledError, match="first derivatives only"):
            model(strain, v={"strain": {"strain": strain}}, **{second: {"strain": {"strain": strain}}})
    with pytest.raises(UnknownNameError, match="strian"):
        model(strain, v={"strian": {"strain": strain}})


@pytest.mark.parametrize("operation", ["jvp", "jacobian"])
def test_derivative_calls_check_typed_inputs_too(model: Any, operation: str) -> None:
    with pytest.raises(InputError, match="compiled for none"):
        OPERATIONS[operation](model, {"strain": SITES})
    with pytest.raises(InputTypeError, match="Scalar, expected a SR2"):
        OPERATIONS[operation](model, {"strain": Scalar(zeros(5, 6))})


def test_a_wrong_sub_batch_size() -> None:
    sites, rows = neml2.load_model(references.case("cross_group").file, "cross_group"), good("cross_group")
    typed = {n: sites.input_spec[n](x, sub_batch_ndim=len(sites.input_sub_batch[n])) for n, x in rows.items()}
    typed["branch_strain~1"] = SR2(rows["branch_strain~1"][:, :2], sub_batch_ndim=1)
    with reported(InputError, "'branch_strain~1' has sub-batch shape (2,), expected (3,)"):
        sites(*typed.values())
    typed["branch_strain~1"] = SR2(rows["branch_strain~1"], sub_batch_ndim=2)
    with reported(InputError, "'branch_strain~1'"):
        sites(*typed.values())
