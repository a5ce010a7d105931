"""Bad input: each case gives one error that names the thing, what was expected and the cure, raw and from HIT."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from references import Tensors

Load = Callable[..., Any]


def load_raw(artifact: Path, **options: Any) -> Model:
    """The raw class on an artifact."""
    return Model(artifact, **options)


def load_hit(artifact: Path, **options: Any) -> Any:
    """The HIT type on an artifact, by a stub beside it."""
    stub = artifact.parent / "stub.i"
    if not artifact.parent.is_dir():
        artifact.parent.mkdir(parents=True)
    stub.write_text(f"[Models]\n  [m]\n    type = AOTIModel\n    artifact_path = '{artifact.name}'\n  []\n[]\n")
    return neml2.load_model(stub, "m", **options)


@pytest.fixture(params=[load_raw, load_hit], ids=["raw", "hit"])
def load(request: pytest.FixtureRequest) -> Load:
    found: Load = request.param
    return found


def refused(load: Load, artifact: Path, error: type[Exception], *words: str, **options: Any) -> str:
    """Load an artifact that must be refused with these words; give the message."""
    with pytest.raises(error) as raised:
        load(artifact, **options)
    text = str(raised.value)
    for word in words:
        assert word in text, f"{word!r} is not in: {text}"
    if load is load_hit:
        assert "[Models/m]" in text and str(artifact.parent / "stub.i") in text, text
    return text


def without(name: str) -> Callable[[Path], Path]:
    """What removes a file or folder of an artifact."""

    def remove(artifact: Path) -> Path:
        path = artifact / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
        return artifact

    return remove


# What is not there: what leads to the artifact, options of the load, and what the error must tell.
MISSING: dict[str, tuple[Callable[[Path], Path], dict[str, Any], list[str]]] = {
    "folder": (lambda a: a.with_name("elastic"), {}, ["elastic", "no such", "elasticity", "neml2-compile"]),
    "metadata": (without("metadata.json"), {}, ["metadata.json", "neml2-compile"]),
    "dtype": (Path, {"dtype": "float32"}, ["'cpu'", "'float32'", "cpu/float64", "--device cpu --dtype float32"]),
    "device": (Path, {"device": "cuda"}, ["'cuda'", "cpu/float64", "neml2-compile", "--device cuda"]),
    "leaf": (without("cpu"), {}, ["(none)", "neml2-compile"]),
    "package": (without("cpu/float64/elasticity.pt2"), {}, ["elasticity.pt2", "compile the model again"]),
}


class TestArtifact:
    @pytest.mark.parametrize("what", MISSING)
    def test_what_is_not_there_is_named(self, load: Load, artifact: Path, what: str) -> None:
        change, options, words = MISSING[what]
        refused(load, change(artifact), ArtifactNotFoundError, *words, **options)

    @pytest.mark.parametrize("device", ["gpu", "vulkan", "cuda:x"])
    def test_unknown_device(self, artifact: Path, device: str) -> None:
        refused(load_raw, artifact, InputError, device, "cpu, cuda", device=device)

    @pytest.mark.parametrize("dtype", ["double", "float16", torch.float16])
    def test_unknown_dtype(self, load: Load, artifact: Path, dtype: Any) -> None:
        refused(load, artifact, InputError, str(dtype).removeprefix("torch."), "float64, float32", dtype=dtype)


class TestMetadata:
    def edit(self, artifact: Path, change: Callable[[dict[str, Any]], Any]) -> None:
        file = artifact / "metadata.json"
        document = json.loads(file.read_text())
        change(document)
        file.write_text(json.dumps(document))

    @pytest.mark.parametrize("text", ["", "{", "[]", '"metadata"', '{"schema_version": 14'])
    def test_no_json_object(self, load: Load, artifact: Path, text: str) -> None:
        (artifact / "metadata.json").write_text(text)
        refused(load, artifact, ArtifactError, str(artifact / "metadata.json"), "JSON")

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
            (
                lambda d: d["segments"][0].update(package="../x.pt2"),
                ["segments[0].package", "is a str", "bare name of a .pt2"],
            ),
            (lambda d: d["segments"][0].update(inputs=["eps"]), ["eps"]),
            (
                lambda d: d["outputs"][0].update(name="@failed"),
                ["outputs[0].name is '@failed'", "begin with @", "another name in the source input"],
            ),
            (
                lambda d: d.update(boundary_aliases={"inputs": {"strain": "@step"}}),
                ["boundary_aliases.inputs.strain is '@step'", "begin with @"],
            ),
        ],
    )
    def test_damage_is_told_by_its_key(
        self, load: Load, artifact: Path, change: Callable[[dict[str, Any]], Any], words: list[str]
    ) -> None:
        self.edit(artifact, change)
        refused(load, artifact, ArtifactError, str(artifact / "metadata.json"), "neml2-compile", *words)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda d: d["inputs"].append(d["inputs"][0]), ["inputs", "'strain' twice"]),
            (lambda d: d["outputs"].append(d["outputs"][0]), ["outputs", "'stress' twice"]),
            (lambda d: d["parameters"].append(d["parameters"][0]), ["parameters", "'promoted.E' twice"]),
            (
                lambda d: d.update(boundary_aliases={"parameters": {"promoted.E": "promoted.nu"}}),
                ["'promoted.E' and 'promoted.nu', which are both called 'promoted.nu'"],
            ),
            (
                lambda d: d.update(boundary_aliases={"parameters": {"promoted.E": "promoted"}}),
                ["'promoted' is a parameter and a part of the name of another one, 'promoted.nu'"],
            ),
            (lambda d: d.update(boundary_aliases={"parameters": {"promoted.E": "a..b"}}), ["'a..b'", "empty"]),
        ],
    )
    def test_names_that_stand_for_two_things(
        self, load: Load, tmp_path: Path, change: Callable[[dict[str, Any]], Any], words: list[str]
    ) -> None:
        artifact = references.edited(references.case("promoted"), tmp_path, change)
        refused(load, artifact, ArtifactError, str(artifact / "metadata.json"), "neml2-compile", *words)

    def renamed(self, tmp_path: Path, name: str) -> Path:
        """An artifact whose parameter E has another name."""

        aliases = {"parameters": {"promoted.E": name}}
        return references.edited(references.case("promoted"), tmp_path, lambda d: d.update(boundary_aliases=aliases))

    @pytest.mark.parametrize(
        "name", ["_caller", "inputs", "mode", "training", "_parameters.E", "output_spec", "_declared"]
    )
    def test_parameter_of_the_name_of_an_attribute(self, load: Load, tmp_path: Path, name: str) -> None:
        artifact = self.renamed(tmp_path, name)
        refused(load, artifact, ArtifactError, str(artifact), f"parameter {name!r}", "--rename-parameter")

    def test_all_own_attributes_are_reserved(self) -> None:
        case = references.case("promoted")
        for found in (
            case.load(),
            neml2.load_model(case.file, case.stub.model),
            AOTIModel(case.artifact, declared={"x"}),
        ):
            own = {*vars(found), *found._modules} - {*vars(torch.nn.Module()), "promoted"}
            assert own <= RESERVED, own - RESERVED

    @pytest.mark.parametrize("name", ["forward", "device", "E"])
    def test_parameter_of_the_name_of_a_method(self, load: Load, tmp_path: Path, name: str) -> None:
        model = load(self.renamed(tmp_path, name))
        assert float(model.named_parameters()[name]) == 71000.0
        model.set_parameter(name, 1.0)
        assert float(model.state_dict()[name]) == 1.0

    def test_type_that_neml2_does_not_have(self, artifact: Path) -> None:
        self.edit(artifact, lambda d: d["inputs"][0].update(var_type="SR3"))
        refused(load_hit, artifact, ArtifactError, "'strain'", "'SR3'", "neml2")


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def good(name: str) -> Tensors:
    return {n: x.clone() for n, x in references.case(name).rows().items()}


# How to call a model, with what must be beside the inputs.
OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "forward": lambda m, x: m.forward(x),
    "solve": lambda m, x: m.solve(x),
    "jvp": lambda m, x: m.jvp(x, {}),
    "jacobian": lambda m, x: m.jacobian(x),
    "param_jacobian": lambda m, x: m.param_jacobian(x),
    "param_vjp": lambda m, x: m.param_vjp(
        x, {n: torch.ones(v.base_shape, dtype=m.dtype) for n, v in m.outputs.items()}
    ),
}


def but(name: str, change: Callable[[torch.Tensor], Any]) -> Callable[[Tensors], Any]:
    """What changes one input."""
    return lambda x: {**x, name: change(x[name])}


def called(old: str, new: str) -> Callable[[Tensors], Any]:
    """What gives an input another name."""
    return lambda x: {(new if name == old else name): value for name, value in x.items()}


ALL = "strain, strain~1, t, t~1, equivalent_plastic_strain~1, stress~1"
# What is wrong, the class of the error, and what the message must tell.
INPUTS: dict[str, tuple[Callable[[Tensors], Any], type[Exception], list[str]]] = {
    "unknown name": (lambda x: {**x, "strian": x["strain"]}, UnknownNameError, ["unknown 'strian'", ALL]),
    "missing input": (
        lambda x: {n: v for n, v in x.items() if n != "t~1"},
        UnknownNameError,
        ["missing 't~1'", "strain, strain~1, t, t~1"],
    ),
    "misspelt input": (called("t", "time"), UnknownNameError, ["missing 't'", "unknown 'time'"]),
    "no dict": (lambda x: list(x.values()), InputTypeError, ["list", "dict"]),
    "no tensor": (
        but("t", lambda _: 1.0),
        InputTypeError,
        ["'t'", "float", "torch.Tensor", "torch.as_tensor(value, dtype=torch.float64)"],
    ),
    "numpy array": (but("strain", lambda x: x.numpy()), InputTypeError, ["'strain'", "ndarray"]),
    "wrong base shape": (but("strain", lambda x: x[:, :5]), InputError, ["'strain'", "(9, 5)", "(*batch, 6)", "SR2"]),
    "components 3 x 3": (
        but("strain", lambda x: x.new_zeros(9, 3, 3)),
        InputError,
        ["'strain'", "(9, 3, 3)", "neml2_aoti_plugin.notation.convert(value, 'tensor', 'mandel')"],
    ),
    "base shape lost": (but("stress~1", lambda x: x[0, 0]), InputError, ["'stress~1'", "()", "6"]),
    "scalar with an axis too many": (
        but("t", lambda x: x[:, None].repeat(1, 6)),
        InputError,
        ["broadcast", "t [9, 6]"],
    ),
    "batches that do not broadcast": (but("strain", lambda x: x[:4]), InputError, ["broadcast", "strain [4]", "t [9]"]),
    "single precision": (
        but("strain", lambda x: x.float()),
        InputTypeError,
        ["'strain'", "torch.float32", "torch.float64", "strain.to(torch.float64)"],
    ),
    "whole numbers": (but("t", lambda x: x.long()), InputTypeError, ["'t'", "torch.int64", "torch.float64"]),
    "other device": (
        but("strain", lambda x: x.to("meta")),
        InputTypeError,
        ["'strain'", "meta", "cpu", "strain.to('cpu')"],
    ),
}


@contextmanager
def told(error: type[Exception], *words: str) -> Iterator[None]:
    """Require an error that tells these words."""
    with pytest.raises(error) as raised:
        yield
    for word in words:
        assert word in str(raised.value), f"{word!r} is not in: {raised.value}"


class TestRawInputs:
    @pytest.mark.parametrize("operation", OPERATIONS)
    @pytest.mark.parametrize("fault", INPUTS)
    def test_fault_is_told_by_every_operation(self, fault: str, operation: str) -> None:
        change, error, words = INPUTS[fault]
        with told(error, *words):
            OPERATIONS[operation](references.case("calibration").model, change(good("calibration")))

    @pytest.mark.parametrize("operation", [name for name in OPERATIONS if name != "solve"])
    def test_input_that_is_not_finite_is_named_by_every_operation(self, operation: str) -> None:
        rows = good("calibration")
        rows["t"].fill_(torch.nan)
        with told(ConvergenceError, "9 of 9 row", "'t' is not finite", "9 of these rows", "Give finite values"):
            OPERATIONS[operation](references.case("calibration").model, rows)

    def test_other_dtype_is_offered_only_where_it_was_compiled(self, tmp_path: Path) -> None:
        strain = {"strain": torch.zeros(6)}
        artifact = references.edited(references.case("elasticity"), tmp_path, lambda _: None)
        with pytest.raises(InputTypeError) as raised:
            Model(artifact).forward(strain)
        assert str(raised.value).endswith("Pass strain.to(torch.float64).")
        shutil.copytree(artifact / "cpu/float64", artifact / "cpu/float32")
        with pytest.raises(InputTypeError) as raised:
            Model(artifact).forward(strain)
        assert str(raised.value).endswith("Pass strain.to(torch.float64), or load the model with dtype='float32'.")
        with pytest.raises(InputTypeError, match=r"Pass strain\.to\(torch\.float64\)\.$"):
            Model(artifact).forward({"strain": torch.zeros(6, dtype=torch.float16)})

    @pytest.mark.parametrize(("take", "found"), [(slice(0, 2), "(6, 2, 6)"), (0, "(6, 6)")])
    def test_wrong_sub_batch(self, take: Any, found: str) -> None:
        inputs = good("cross_group")
        inputs["branch_strain~1"] = inputs["branch_strain~1"][:, take]
        with told(InputError, "'branch_strain~1'", found, "(*batch, 3, 6)", "sub-batch shape (3,)"):
            references.case("cross_group").model.forward(inputs)

    @pytest.mark.wide
    def test_renamed_input_by_its_old_name(self) -> None:
        model = references.case("renamed").model
        with told(UnknownNameError, "missing 'eps'", "'strain' was renamed to 'eps'"):
            model.forward({"strain": torch.zeros(6, dtype=torch.float64)})

    @pytest.mark.wide
    def test_double_precision_for_a_single_one(self) -> None:
        model = references.case("elasticity_float32").model
        with pytest.raises(InputTypeError, match=r"torch\.float64, expected torch\.float32"):
            model.forward({"strain": torch.zeros(6, dtype=torch.float64)})

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
    def test_tangents_and_cotangents(
        self, call: str, change: dict[str, Any], error: type[Exception], words: list[str]
    ) -> None:
        model, rows = references.case("calibration").model, good("calibration")
        given = {n: torch.ones_like(x) for n, x in model.forward(rows).items()} if call == "param_vjp" else {}
        given = {name: value for name, value in {**given, **change}.items() if value is not None}
        with told(error, *words):
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
    def test_overrides(self, operation: str, name: str, value: Any, error: type[Exception], words: list[str]) -> None:
        model = references.case("calibration").model
        with told(error, *words):
            getattr(model, operation)(good("calibration"), param_overrides={name: value})


@pytest.fixture(scope="module")
def model() -> Any:
    return neml2.load_model(references.case("elasticity").file, "elasticity")


@pytest.fixture(scope="module")
def sites() -> Any:
    return neml2.load_model(references.case("cross_group").file, "cross_group")


class TestTypedInputs:
    def test_sub_batch_axes_it_was_not_compiled_for(self, model: Any) -> None:
        with told(InputError, "'strain'", "(3,)", "compiled for none", "example_batch_shape", "strain = (2; 3)"):
            model(SR2(torch.zeros(4, 3, 6, dtype=torch.float64), sub_batch_ndim=1))

    @pytest.mark.parametrize(
        ("given", "words"),
        [
            ([Scalar(zeros(5, 6))], "'strain' is a Scalar, expected a SR2"),
            ([], "0 positional inputs given, expected 1: strain"),
            ([SR2(zeros(6))] * 2, "2 positional inputs given, expected 1: strain"),
            ([SR2(torch.zeros(6))], r"'strain' has dtype torch\.float32, expected torch\.float64"),
            ([SR2(zeros(6).to("meta"))], "'strain' is on device meta, expected cpu"),
            ([[0.0] * 6], "'strain' is a list"),
        ],
    )
    def test_other_types(self, model: Any, given: list[Any], words: str) -> None:
        with pytest.raises(InputTypeError, match=words):
            model(*given)

    @pytest.mark.parametrize("second", ["v2", "vh"])
    def test_second_derivatives_are_refused(self, model: Any, second: str) -> None:
        strain = SR2(torch.zeros(6, dtype=torch.float64))
        with pytest.raises(DerivativeNotCompiledError, match="first derivatives only"):
            model(strain, v={"strain": {"strain": strain}}, **{second: {"strain": {"strain": strain}}})

    def test_tangent_of_no_input(self, model: Any) -> None:
        strain = SR2(torch.zeros(6, dtype=torch.float64))
        with pytest.raises(UnknownNameError, match="strian"):
            model(strain, v={"strian": {"strain": strain}})

    @pytest.mark.parametrize("operation", ["jvp", "jacobian"])
    def test_derivative_calls_check_typed_inputs_too(self, model: Any, operation: str) -> None:
        more: tuple[dict[str, Any], ...] = ({},) if operation == "jvp" else ()
        with pytest.raises(InputError, match="compiled for none"):
            getattr(model, operation)(
                {"strain": SR2(torch.zeros(4, 3, 6, dtype=torch.float64), sub_batch_ndim=1)}, *more
            )
        with pytest.raises(InputTypeError, match="Scalar, expected a SR2"):
            getattr(model, operation)({"strain": Scalar(torch.zeros(5, 6, dtype=torch.float64))}, *more)

    def test_wrong_sub_batch_size(self, sites: Any) -> None:
        rows = good("cross_group")
        typed = [sites.input_spec[n](x, sub_batch_ndim=len(sites.input_sub_batch[n])) for n, x in rows.items()]
        where = list(rows).index("branch_strain~1")
        typed[where] = SR2(rows["branch_strain~1"][:, :2], sub_batch_ndim=1)
        with pytest.raises(InputError, match=r"'branch_strain~1' has sub-batch shape \(2,\), expected \(3,\)"):
            sites(*typed)
        typed[where] = SR2(rows["branch_strain~1"], sub_batch_ndim=2)
        with pytest.raises(InputError, match="'branch_strain~1'"):
            sites(*typed)
