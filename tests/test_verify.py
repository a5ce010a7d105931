"""`verify`: it passes what is right, finds what is wrong, and says where it compared nothing."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import references
from neml2_aoti_plugin import InputError
from neml2_aoti_plugin import _cli as cli
from neml2_aoti_plugin._workbench import differences
from neml2_aoti_plugin._workbench.comparison import scale_of
from neml2_aoti_plugin._workbench.drive import run as drive
from neml2_aoti_plugin._workbench.evaluation import Where
from neml2_aoti_plugin._workbench.golden import read_golden
from neml2_aoti_plugin._workbench.points import random_points, read_points
from neml2_aoti_plugin._workbench.result_files import read_result
from neml2_aoti_plugin._workbench.target import Target, find_target
from neml2_aoti_plugin._workbench.verify import Wanted, verify
from neml2_aoti_plugin.model import Model
from stubs.build import QUICK, compiled
from stubs.catalogue import CATALOGUE


def stub_of(name: str) -> Target:
    return find_target(references.case(name).file)


def source_of(name: str) -> Path:
    return CATALOGUE[name].path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any]]:
    status = cli.main(["verify", *map(str, arguments), "--json"])
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert document["status"] == status
    return status, document


# -- against the source --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["elasticity", "viscoplasticity", "promoted", "calibration", "cross_group", "composed", "crystal"]
)
def test_what_is_right_passes(name: str) -> None:
    report = verify(stub_of(name), Wanted(against=source_of(name), where=Where(rows=4)))
    model = references.case(name).model
    pairs = [*model.derivative_pairs, *model.parameter_derivative_pairs]
    compared = [c.quantity for c in report.comparisons]
    assert report.passed and report.rows == 8 and report.not_converged == 0
    assert compared[: len(model.outputs)] == list(model.outputs)
    told = [*compared, *(text.partition(": ")[0] for text in report.not_compared)]
    assert sorted(told) == sorted([*model.outputs, *(f"d({out})/d({by})" for out, by in pairs)])
    assert all(c.worst < 1e-7 and c.reference == "source" for c in report.comparisons)


def test_another_source_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = source_of("elasticity").read_text()
    before = next(line for line in text.splitlines() if "coefficients =" in line)
    youngs = before.partition("'")[2].split()[0]
    other = tmp_path / "other.i"
    other.write_text(text.replace(before, before.replace(youngs, str(1.001 * float(youngs)))))
    status, document = run(capsys, references.case("elasticity").file, "--against", other)
    assert status == 1 and document["error"] is None
    errors = {c["quantity"]: c["worst"] for c in document["result"]["comparisons"]}
    # All of it is stiffer by one part in a thousand.
    assert errors == pytest.approx({"stress": 1e-3 / 1.001, "d(stress)/d(strain)": 1e-3 / 1.001}, rel=1e-6)


def test_numbers_that_only_the_compiled_model_has_not_finite_fail(tmp_path: Path) -> None:
    """At a strain of 1e304 the stress of steel overflows, in its source as well; that of a soft model does not."""
    points = tmp_path / "points.npz"
    np.savez(points, strain=np.outer([1e304, 1e-3, 0.0], np.ones(6)))
    soft = tmp_path / "soft.i"
    soft.write_text(source_of("elasticity").read_text().replace("205000", "0.5"))
    for source, passed in ((source_of("elasticity"), True), (soft, False)):
        report = verify(stub_of("elasticity"), Wanted(against=source, where=Where(points=points)))
        finite = next(c for c in report.comparisons if c.quantity == "finite numbers")
        assert (report.not_converged, finite.rows, finite.worst_row, finite.passed) == (1, 1, 0, passed)
        assert report.passed is passed


def test_bad_sources(tmp_path: Path) -> None:
    target = stub_of("elasticity")
    for source, name, said in (
        (tmp_path / "gone.i", None, "no such file"),
        (source_of("elasticity"), "nothing", r"no block \[Models/nothing\]; in \[Models\] there are: elasticity"),
        (references.case("elasticity").file, None, "is compiled itself"),
        (source_of("viscoplasticity"), "hooke", "is not what was compiled"),
    ):
        with pytest.raises(InputError, match=said):
            verify(target, Wanted(against=source, source_model=name))
    binary = tmp_path / "binary.i"
    binary.write_bytes(b"\x00\xff[Models]\n")
    with pytest.raises(InputError, match=r"binary\.i"):
        verify(target, Wanted(against=binary))


MORE = """
[Models]
  [{leaf}]
    type = LinearIsotropicElasticity
    strain = 'strain'
    stress = 'stress'
    coefficients = '{coefficients}'
    coefficient_types = 'YOUNGS_MODULUS POISSONS_RATIO'
  []
  [volume]
    type = SR2Invariant
    invariant_type = I1
    tensor = 'strain'
    invariant = 'volume'
  []
  [more]
    type = ComposedModel
    models = '{leaf} volume'
  []
[]
"""


def more(path: Path, leaf: str) -> Path:
    """A source of the stub `promoted` that gives a quantity more, which depends on no parameter."""
    line = next(line for line in source_of("promoted").read_text().splitlines() if "coefficients =" in line)
    path.write_text(MORE.format(leaf=leaf, coefficients=line.split("'")[1]))
    return path


def test_an_output_that_depends_on_no_parameter_does_not_end_the_comparison(tmp_path: Path) -> None:
    source = more(tmp_path / "more.i", "promoted")
    report = verify(stub_of("promoted"), Wanted(against=source, source_model="more", where=Where(rows=4)))
    compared = {c.quantity: (c.reference, c.passed) for c in report.comparisons}
    names = ("stress", "d(stress)/d(strain)", "d(stress)/d(promoted.E)", "d(stress)/d(promoted.nu)")
    assert report.passed and compared == dict.fromkeys(names, ("source", True))


def test_a_derivative_that_the_source_does_not_give_is_told_and_compared_otherwise(tmp_path: Path) -> None:
    source = more(tmp_path / "more.i", "hooke")
    report = verify(stub_of("promoted"), Wanted(against=source, source_model="more", where=Where(rows=4)))
    assert report.passed and report.not_compared == tuple(
        f"d(stress)/d(promoted.{name}) with the source: it has no parameter of that name" for name in ("E", "nu")
    )
    assert [c.reference for c in report.comparisons] == ["source", "source", "differences", "differences"]


@pytest.mark.parametrize(
    "shape", ["(-1, 1) * torch.ones(6)", "(-1, 1, 1, 1) * torch.ones(2, 3, 6)", "(-1, 1, 1) * torch.ones(1, 6)"]
)
def test_drivers_with_any_number_of_batch_axes(shape: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stub = copy("elasticity", tmp_path)
    before = re.search(r"\(-1, 1, 1\) \* torch\.tensor\(.*?\]\]\)", stub.read_text())
    assert before is not None
    stub.write_text(stub.read_text().replace(before[0], shape))
    source = source_of("elasticity")
    points = 10 * (6 if "2, 3" in shape else 1)
    report = verify(find_target(stub), Wanted(against=source, where=Where(rows=100)))
    assert report.passed and report.rows == points + 100
    assert cli.main(["bench", str(stub), "--rows", "1,7", "--seconds", "0", "--json"]) == 0
    assert [m["rows"] for m in json.loads(capsys.readouterr().out)["result"]["measurements"]] == [1, 7]


def test_pictures_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stub = copy("elasticity", tmp_path)
    for command, more in (("verify", ["--rows", "2"]), ("bench", ["--rows", "1,2", "--seconds", "0"])):
        picture = tmp_path / f"{command}.svg"
        assert cli.main([command, str(stub), *more, "--plot", str(picture)]) == 0
        assert capsys.readouterr().out.rstrip().endswith(f"written: {picture}") and picture.is_file()
        assert cli.main([command, str(stub), *more, "--plot", str(picture), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["result"]["picture"] == str(picture)
        assert cli.main([command, str(stub), *more, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["result"]["picture"] is None


# x moves by (2 a + k) dt in a step: told by a sum alone, or by a solve for x. k depends on nothing.
CONSTANT = """
[Tensors]
  [times]
    type = Python
    expr = 'Scalar(torch.linspace(0.0, 2.0, 5, dtype=torch.float64))'
  []
  [values]
    type = Python
    expr = 'Scalar(torch.arange(15, dtype=torch.float64).reshape(5, 3))'
  []
[]
[Drivers]
  [driver]
    type = TransientDriver
    model = 'law'
    prescribed_time = 'times'
    prescribed_Scalar_names = 'a'
    prescribed_Scalar_values = 'values'
  []
[]
[Models]
  [rate]
    type = ScalarLinearCombination
    from = 'a k'
    to = 'x_rate'
    weights = '2 1'
  []
  [constant]
    type = ScalarConstantParameter
    value = 4
    parameter = 'k'
  []
  [step]
    type = ScalarBackwardEulerTimeIntegration
    variable = 'x'
  []
  [residual]
    type = ComposedModel
    models = 'rate step'
  []
  [update]
    type = ImplicitUpdate
    equation_system = 'system'
    solver = 'newton'
  []
  [law]
    type = ComposedModel
    models = 'constant LAST'
    additional_outputs = 'k'
  []
[]
[EquationSystems]
  [system]
    type = NonlinearSystem
    model = 'residual'
    unknowns = 'x'
  []
[]
[Solvers]
  [newton]
    type = Newton
    linear_solver = 'lu'
  []
  [lu]
    type = DenseLU
  []
[]
"""


@pytest.mark.wide
@pytest.mark.parametrize(("last", "out"), [("rate", "x_rate"), ("update", "x")])
def test_an_output_that_depends_on_no_input_is_the_same_in_all_rows(last: str, out: str, tmp_path: Path) -> None:
    """Graphs give it without rows. It feeds later segments, and is one of the outputs."""
    source = tmp_path / "law.i"
    source.write_text(CONSTANT.replace("LAST", last))
    command = [str(Path(sys.executable).with_name("neml2-compile")), str(source), "--driver", "driver", "-q"]
    pairs = ["-d", f"{out}:a", "-d", "k:a", "--output-dir", str(tmp_path)]
    subprocess.run([*command, *pairs], env={**os.environ, **QUICK}, check=True)
    model = Model(tmp_path / "law")
    for batch in ((), (1,), (3,), (2, 3)):
        a = torch.arange(float(math.prod(batch)), dtype=torch.float64).reshape(batch)
        dt = torch.full_like(a, 0.5 if last == "update" else 1.0)
        inputs = {"a": a} if last == "rate" else {"a": a, "x": 0 * a, "x~1": 0 * a, "t": dt, "t~1": 0 * a}
        wanted = {out: (2 * a + 4) * dt, "k": torch.full_like(a, 4.0)}
        for found in (model(inputs), model(inputs), model.solve(inputs).outputs, model.jvp(inputs, {"a": a})[0]):
            assert found.keys() == wanted.keys()
            assert all(torch.allclose(found[name], value, rtol=1e-12) for name, value in wanted.items())
            assert all(found[name].shape == value.shape for name, value in wanted.items())
        blocks = model.jacobian(inputs, expand=True)[1]
        assert torch.allclose(blocks[out]["a"], 2 * dt) and torch.equal(blocks["k"]["a"], 0 * a)
        along = model.jvp(inputs, {"a": a})[1]
        assert torch.allclose(along[out], 2 * a * dt) and torch.equal(along["k"], 0 * a)
    for name, path in (("compiled", tmp_path / "law_aoti.i"), ("eager", source)):
        drive(path, "driver", values={}, out=tmp_path / f"{name}.npz")
    (ours,), (eager,) = (read_result(tmp_path / f"{name}.npz") for name in ("compiled", "eager"))
    assert ours.types == eager.types
    for name, values in eager.series.items():
        np.testing.assert_allclose(ours.series[name], np.broadcast_to(values, ours.series[name].shape), rtol=1e-12)
    report = verify(find_target(tmp_path / "law_aoti.i"), Wanted(against=source))
    assert report.passed and {c.reference for c in report.comparisons} == {"source"} and not report.not_compared


def test_a_zero_derivative_by_an_input_that_is_zero_everywhere_is_no_error() -> None:
    rounding = torch.full((2,), 1e-12, dtype=torch.float64)
    assert scale_of(rounding, torch.ones(2), torch.zeros(2)) > 1e6 * 1e-12


# -- against finite differences ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["elasticity", "viscoplasticity", "calibration", "composed", "substepping"])
def test_differences_are_the_compiled_derivatives(name: str) -> None:
    report = verify(stub_of(name), Wanted(where=Where(rows=4)))
    assert report.passed and report.not_compared == (
        "values: no source (--against INPUT.i) and no golden file (--golden FILE)",
    )
    assert {c.reference for c in report.comparisons} == {"differences"}
    assert all(c.rows > 0 and c.worst < 1e-6 for c in report.comparisons)


@pytest.mark.wide
def test_differences_of_a_model_in_single_precision() -> None:
    report = verify(stub_of("elasticity_float32"), Wanted(where=Where(rows=4)))
    (compared,) = report.comparisons
    assert report.passed and compared.left_out == 0 and compared.worst < 2e-4


def test_differences_against_a_closed_form() -> None:
    """The stiffness of isotropic elasticity: 2 mu I + lambda 1 x 1, in Mandel notation."""
    model = Model(compiled("promoted") / "promoted")
    E, nu = (float(model.named_parameters()[f"promoted.{name}"]) for name in ("E", "nu"))
    mu, lam = E / (2 * (1 + nu)), E * nu / ((1 + nu) * (1 - 2 * nu))
    ones = torch.tensor([1.0, 1, 1, 0, 0, 0], dtype=torch.float64)
    stiffness = 2 * mu * torch.eye(6, dtype=torch.float64) + lam * torch.outer(ones, ones)
    strain = 1e-3 * torch.randn(3, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = differences.by_input(model, {"strain": strain}, "strain", ["stress"])["stress"]
    assert found.smooth.all()
    assert (found.block - stiffness).abs().max() < 1e-9 * E
    by_modulus = differences.by_parameter(model, {"strain": strain}, "promoted.E", ["stress"])["stress"]
    assert torch.allclose(by_modulus.block, strain @ stiffness / E, rtol=1e-9, atol=1e-12)


def test_kinks_are_left_out() -> None:
    """Of y = |x| + x^2: smooth away from zero; the kink is found where it is, and where a step reaches it."""
    x = torch.tensor([[1.0], [-0.5], [0.0], [3e-5]], dtype=torch.float64)

    def evaluate(moved: torch.Tensor, times: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        return {"y": moved.abs() + moved**2}, torch.ones(len(moved), dtype=torch.bool)

    found = differences.central(x, (1,), ["y"], evaluate)["y"]
    assert found.smooth.tolist() == [True, True, False, False]
    assert torch.allclose(found.block[:2, 0, 0], torch.tensor([3.0, -2.0], dtype=torch.float64), rtol=1e-9)


# -- golden files --------------------------------------------------------------------------------------------------


def copy(name: str, folder: Path) -> Path:
    shutil.copytree(compiled(name), folder, dirs_exist_ok=True)
    return folder / f"{CATALOGUE[name].model}_aoti.i"


def test_a_golden_file_is_found_beside_the_artifact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stub = copy("viscoplasticity", tmp_path)
    golden = tmp_path / "viscoplasticity.golden.safetensors"
    assert run(capsys, stub, "--record", golden, "--rows", 3)[0] == 0
    status, document = run(capsys, tmp_path / "viscoplasticity")
    assert status == 0 and document["result"]["points"] == golden.name
    assert [(c["quantity"], c["reference"], c["worst"]) for c in document["result"]["comparisons"]] == [
        ("stress", "golden", 0.0),
        ("equivalent_plastic_strain", "golden", 0.0),
        ("d(stress)/d(strain)", "golden", 0.0),
    ]


def test_a_failure_is_not_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stub, record = copy("elasticity", tmp_path), tmp_path / "elasticity.golden.safetensors"
    arguments = (stub, "--record", record, "--rows", 2)
    assert run(capsys, *arguments, "--difference-rtol", 0)[0] == 1 and not record.exists()
    status, document = run(capsys, *arguments)
    assert status == 0 and document["result"]["recorded"] == str(record) and record.exists()
    # Recorded anew, it is not compared with itself; and what is asked for goes before it.
    assert "golden" not in {c["reference"] for c in run(capsys, *arguments)[1]["result"]["comparisons"]}
    asked = run(capsys, stub, "--driver", "driver")[1]["result"]
    assert {c["reference"] for c in asked["comparisons"]} == {"differences"}


def test_another_model_at_golden_points_fails(tmp_path: Path) -> None:
    stub = copy("promoted", tmp_path)
    golden = tmp_path / "soft.safetensors"
    verify(find_target(stub), Wanted(where=Where(rows=3)), record=golden)
    document = json.loads((tmp_path / "promoted/metadata.json").read_text())
    document["parameters"][0]["values"][0] *= 1.01
    (tmp_path / "promoted/metadata.json").write_text(json.dumps(document))
    report = verify(find_target(stub), Wanted(golden=golden))
    failed = [c for c in report.comparisons if not c.passed]
    assert not report.passed and "stress" in [c.quantity for c in failed]
    assert next(c for c in failed if c.quantity == "stress").worst == pytest.approx(0.01, rel=0.5)


def test_bad_golden_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other, params = tmp_path / "other.safetensors", tmp_path / "params.safetensors"
    verify(stub_of("elasticity"), Wanted(where=Where(rows=2)), record=other)
    Model(compiled("promoted") / "promoted").save_parameters(params)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(other.read_bytes()[:-8])
    target = references.case("viscoplasticity").file
    for file, said in (
        (other, "is of another model ('elasticity'), not of 'viscoplasticity'"),
        (params, "is not a golden file"),
        (damaged, "is not a golden file"),
        (tmp_path / "gone.safetensors", "cannot be read"),
        (tmp_path, "cannot be read"),
    ):
        assert cli.main(["verify", str(target), "--golden", str(file)]) == 2
        assert said in (told := capsys.readouterr().err) and "Traceback" not in told
    model = Model(compiled("elasticity") / "elasticity")
    assert read_golden(other, model, "elasticity").points.rows == 4


# -- points --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".npz", ".pt", ".safetensors"])
def test_points_of_a_file(suffix: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = Model(compiled("elasticity") / "elasticity")
    strain = torch.arange(12.0, dtype=torch.float64).reshape(2, 6)
    file = tmp_path / f"points{suffix}"
    if suffix == ".npz":
        np.savez(file, strain=strain.numpy())
    elif suffix == ".pt":
        torch.save({"strain": strain}, file)
    else:
        save_file({"strain": strain}, file)
    assert torch.equal(read_points(file, model).inputs["strain"], strain)


def test_bad_points(tmp_path: Path) -> None:
    model = Model(compiled("elasticity") / "elasticity")
    wrong = tmp_path / "wrong.npz"
    np.savez(wrong, strain=np.zeros((2, 5)))
    with pytest.raises(InputError, match=r"'strain' has shape \(2, 5\), expected \(rows, 6\)"):
        read_points(wrong, model)
    np.savez(wrong, stress=np.zeros((2, 6)))
    with pytest.raises(InputError, match="has no strain; the model's inputs are strain, and the file has stress"):
        read_points(wrong, model)
    (tmp_path / "text.pt").write_text("no tensors")
    with pytest.raises(InputError, match="is not a file with a tensor per input"):
        read_points(tmp_path / "text.pt", model)
    with pytest.raises(InputError, match="no input stress"):
        random_points(model, 2, 0, {"stress": 1.0})


def test_what_cannot_be_written_is_told_ahead(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stub = copy("elasticity", tmp_path)
    for arguments, said in (
        (["--plot", tmp_path / "a.bmp"], "expected one of .png, .svg, .pdf"),
        (["--plot", tmp_path / "none" / "a.png"], "cannot be written"),
        (["--record", tmp_path], "is a folder"),
        (["--points", stub], "expected one of .npz, .pt, .safetensors"),
        (["--driver", "drivr"], "in [Drivers] there are: driver"),
    ):
        before = sorted(tmp_path.rglob("*"))
        assert cli.main(["verify", str(stub), *map(str, arguments)]) == 2
        assert said in capsys.readouterr().err
        assert sorted(tmp_path.rglob("*")) == before


def test_a_result_that_the_driver_would_save_is_left_alone(tmp_path: Path) -> None:
    stub, saved = copy("elasticity", tmp_path), tmp_path / "saved.pt"
    saved.write_text("of an earlier run")
    stub.write_text(stub.read_text().replace("type = TransientDriver", f"type = TransientDriver\n save_as = '{saved}'"))
    for command in (["verify", "--rows", "2"], ["bench", "--rows", "1", "--seconds", "0"]):
        assert cli.main([command[0], str(stub), *command[1:]]) == 0
    assert saved.read_text() == "of an earlier run"


def test_a_driver_that_fails_gives_the_points_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stub = copy("viscoplasticity", tmp_path)
    tensor = "torch.linspace(0.0, 3.0e-2, 61, dtype=torch.float64)"
    assert tensor in stub.read_text()
    # From step 41 on nobody finds a solution.
    beyond = "torch.where(torch.arange(61) > 40, 1e150, 1.0).to(torch.float64)"
    stub.write_text(stub.read_text().replace(tensor, f"({tensor} * {beyond})"))
    status, document = run(capsys, stub, "--against", source_of("viscoplasticity"), "--rows", 200)
    result = document["result"]
    assert status == 0, document["error"]
    assert result["points"].startswith("driver driver, which fails in its step 41")
    assert result["not_converged"] >= 3 and result["comparisons"][0]["rows"] >= 120


def test_a_model_that_converges_nowhere(capsys: pytest.CaptureFixture[str]) -> None:
    status, document = run(capsys, references.case("viscoplasticity").artifact, "--scale", "strain=1e200", "--rows", 2)
    assert status == 2 and "converges at none of the 2 points" in document["error"]["message"]


def test_nothing_to_compare_with(tmp_path: Path) -> None:
    stub = copy("elasticity", tmp_path)
    metadata = tmp_path / "elasticity/metadata.json"
    document = json.loads(metadata.read_text())
    document["derivatives"] = []
    metadata.write_text(json.dumps(document))
    with pytest.raises(InputError, match="there is nothing to compare"):
        verify(find_target(stub), Wanted())
