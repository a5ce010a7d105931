"""`verify`: it passes what is right, finds what is wrong, and says where it compared nothing."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import references
from commands import answer, copy_of, printed, source_input, stub_of, write_points
from neml2_aoti_plugin import Model, read_result
from neml2_aoti_plugin._cli.points import ChosenPoints, EvaluatedPoints
from neml2_aoti_plugin._cli.references import central
from stubs.build import QUICK
from stubs.catalogue import CATALOGUE


def source_of(name: str) -> Path:
    return CATALOGUE[name].path


def edited(file: Path, old: str, new: str, to: Path | None = None) -> Path:
    """A file, or a copy of it, in which a text, which must be there, is another one."""
    text = file.read_text()
    assert old in text
    to = to or file
    to.write_text(text.replace(old, new))
    return to


def verified(name: str, *words: object, passed: bool = True) -> Any:
    report = answer("verify", stub_of(name), *words, status=0 if passed else 1)
    assert report["passed"] is passed
    return report


def compared(report: Any, *keys: str) -> list[Any]:
    """What a report has of each comparison."""
    found = [tuple(comparison[key] for key in keys) for comparison in report["comparisons"]]
    return [one for (one,) in found] if len(keys) == 1 else found


# -- against the source, and against finite differences ------------------------------------------------------------

BOTH = ("elasticity", "viscoplasticity", "promoted", "calibration", "composed")


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        *((name, "source") for name in (*BOTH, "cross_group", "crystal")),
        *((name, "differences") for name in (*BOTH, "substepping")),
    ],
)
def test_what_is_right_passes(name: str, reference: str) -> None:
    report = verified(name, "--rows", 4, *(("--against", source_of(name)) if reference == "source" else ()))
    model = references.case(name).model
    wanted = [f"d({out})/d({by})" for out, by in (*model.derivative_pairs, *model.parameter_derivative_pairs)]
    if reference == "source":
        wanted += model.outputs
        assert report["rows"] == 8 and report["not_converged"] == 0
    else:
        assert report["not_compared"] == ["values: no source (--against INPUT.i) and no golden file (--golden FILE)"]
        wanted.append("values")
    named = [*compared(report, "quantity"), *(text.partition(": ")[0] for text in report["not_compared"])]
    assert sorted(named) == sorted(wanted)
    assert all(c["rows"] > 0 and c["worst"] < 1e-6 and c["reference"] == reference for c in report["comparisons"])


@pytest.mark.wide
def test_differences_of_a_model_in_single_precision() -> None:
    ((left_out, worst),) = compared(verified("elasticity_float32", "--rows", 4), "left_out", "worst")
    assert left_out == 0 and worst < 2e-4


def test_another_source_fails(tmp_path: Path) -> None:
    other = edited(source_of("elasticity"), "205000", "205205", tmp_path / "other.i")
    report = verified("elasticity", "--against", other, passed=False)
    # All of it is stiffer by one part in a thousand.
    errors = dict(compared(report, "quantity", "worst"))
    assert errors == pytest.approx({"stress": 1e-3 / 1.001, "d(stress)/d(strain)": 1e-3 / 1.001}, rel=1e-6)


def test_numbers_that_only_the_compiled_model_has_not_finite_fail(tmp_path: Path) -> None:
    """At a strain of 1e304 the stress of steel overflows, in its source as well; that of a soft model does not."""
    points, steel = tmp_path / "points.npz", source_of("elasticity")
    np.savez(points, strain=np.outer([1e304, 1e-3, 0.0], np.ones(6)))
    for source, passed in ((steel, True), (edited(steel, "205000", "0.5", tmp_path / "soft.i"), False)):
        report = verified("elasticity", "--against", source, "--points", points, passed=passed)
        assert report["not_converged"] == 1
        assert ("finite numbers", 1, 0, passed) in compared(report, "quantity", "rows", "worst_row", "passed")


# A source of the stub `promoted` that gives a quantity more.
MORE = """
Models/LEAF LinearIsotropicElasticity strain=strain stress=stress coefficients='COEFFICIENTS' coefficient_types='YOUNGS_MODULUS POISSONS_RATIO'
Models/volume SR2Invariant invariant_type=I1 tensor=strain invariant=volume
Models/more ComposedModel models='LEAF volume'
"""  # noqa: E501


@pytest.mark.parametrize("leaf", ["promoted", "hooke"])
def test_a_source_that_gives_more_or_fewer_derivatives(leaf: str, tmp_path: Path) -> None:
    """One output more depends on no parameter; where parameters have other names, differences take their place."""
    (coefficients,) = re.findall(r"coefficients = '(.*)'", source_of("promoted").read_text())
    source = tmp_path / "more.i"
    source.write_text(source_input(MORE.replace("LEAF", leaf).replace("COEFFICIENTS", coefficients)))
    report = verified("promoted", "--against", source, "--source-model", "more", "--rows", 4)
    lost = [f"d(stress)/d(promoted.{name})" for name in ("E", "nu")]
    instead = "source" if leaf == "promoted" else "differences"
    wanted = [("stress", "source"), ("d(stress)/d(strain)", "source"), *((name, instead) for name in lost)]
    assert compared(report, "quantity", "reference") == wanted
    why = "with the source: it has no parameter of that name"
    assert report["not_compared"] == ([f"{name} {why}" for name in lost] if leaf == "hooke" else [])


@pytest.mark.parametrize(
    "shape", ["(-1, 1) * torch.ones(6)", "(-1, 1, 1, 1) * torch.ones(2, 3, 6)", "(-1, 1, 1) * torch.ones(1, 6)"]
)
def test_drivers_with_any_number_of_batch_axes(shape: str, tmp_path: Path) -> None:
    stub = copy_of("elasticity", tmp_path)
    text, changed = re.subn(r"\(-1, 1, 1\) \* torch\.tensor\(.*?\]\]\)", shape, stub.read_text(), count=1)
    assert changed
    stub.write_text(text)
    points = 10 * (6 if "2, 3" in shape else 1)
    assert answer("verify", stub, "--against", source_of("elasticity"), "--rows", 100)["rows"] == points + 100
    measured = answer("bench", stub, "--rows", "1,7", "--seconds", 0)["measurements"]
    assert [m["rows"] for m in measured] == [1, 7]


@pytest.mark.parametrize("words", [("verify", "--rows", 2), ("bench", "--rows", "1,2", "--seconds", 0)])
def test_pictures_are_reported(words: tuple[object, ...], tmp_path: Path) -> None:
    picture, (command, *options) = tmp_path / "a.svg", words
    arguments = (command, stub_of("elasticity"), *options)
    assert answer(*arguments)["picture"] is None
    assert printed(*arguments, "--plot", picture)[0].rstrip().endswith(f"written: {picture}") and picture.is_file()
    assert answer(*arguments, "--plot", picture)["picture"] == str(picture)
    shown = re.findall(r"<!-- (.*?) -->", picture.read_text())
    wanted = ["largest error", "tolerance"] if command == "verify" else ["rows in a call", "rows per second", "1", "10"]
    assert set(wanted) <= set(shown) and any(text.startswith("elasticity (cpu/float64), ") for text in shown)


# x moves by (2 a + k) dt in a step: given by a sum alone, or by a solve for x. k depends on nothing.
CONSTANT = """
Tensors/times Python expr="Scalar(torch.linspace(0.0, 2.0, 5, dtype=torch.float64))"
Tensors/values Python expr="Scalar(torch.arange(15, dtype=torch.float64).reshape(5, 3))"
Drivers/driver TransientDriver model=law prescribed_time=times prescribed_Scalar_names=a prescribed_Scalar_values=values
Models/rate ScalarLinearCombination from='a k' to=x_rate weights='2 1'
Models/constant ScalarConstantParameter value=4 parameter=k
Models/step ScalarBackwardEulerTimeIntegration variable=x
Models/residual ComposedModel models='rate step'
Models/update ImplicitUpdate equation_system=system solver=newton
Models/law ComposedModel models='constant LAST' additional_outputs=k
EquationSystems/system NonlinearSystem model=residual unknowns=x
Solvers/newton Newton linear_solver=lu
Solvers/lu DenseLU
"""


@pytest.mark.wide
@pytest.mark.parametrize(("last", "out"), [("rate", "x_rate"), ("update", "x")])
def test_an_output_that_depends_on_no_input_is_the_same_in_all_rows(last: str, out: str, tmp_path: Path) -> None:
    """Graphs give it without rows. It feeds later segments, and is one of the outputs."""
    source = tmp_path / "law.i"
    source.write_text(source_input(CONSTANT.replace("LAST", last)))
    command = [str(Path(sys.executable).with_name("neml2-compile")), str(source), "--driver", "driver", "-q"]
    pairs = ["-d", f"{out}:a", "-d", "k:a", "--output-dir", str(tmp_path)]
    subprocess.run([*command, *pairs], env={**os.environ, **QUICK}, check=True)
    model = Model(tmp_path / "law")
    for batch in ((), (1,), (3,), (2, 3)):
        a = torch.arange(float(math.prod(batch)), dtype=torch.float64).reshape(batch)
        dt = torch.full_like(a, 0.5 if last == "update" else 1.0)
        inputs = {"a": a} if last == "rate" else {"a": a, "x": 0 * a, "x~1": 0 * a, "t": dt, "t~1": 0 * a}
        values, along = model.jvp(inputs, {"a": a})
        blocks = {name: row["a"] for name, row in model.jacobian(inputs, expand=True)[1].items()}
        wanted = {out: (2 * a + 4) * dt, "k": torch.full_like(a, 4.0)}
        for found, expected in (
            *((found, wanted) for found in (model(inputs), model(inputs), model.solve(inputs).outputs, values)),
            (blocks, {out: 2 * dt, "k": 0 * a}),
            (along, {out: 2 * a * dt, "k": 0 * a}),
        ):
            torch.testing.assert_close(dict(found), expected, rtol=1e-12, atol=0.0)
    results = {}
    for name, path in (("compiled", tmp_path / "law_aoti.i"), ("eager", source)):
        answer("run", path, "driver", "--out", tmp_path / f"{name}.npz")
        results[name] = read_result(tmp_path / f"{name}.npz").table
    for name, column in results["eager"].items():
        np.testing.assert_allclose(results["compiled"][name], column, rtol=1e-12)
    report = answer("verify", tmp_path / "law_aoti.i", "--against", source)
    assert set(compared(report, "reference")) == {"source"} and not report["not_compared"]


def test_a_zero_derivative_by_an_input_that_is_zero_everywhere_is_no_error() -> None:
    rounding = torch.full((2,), 1e-12, dtype=torch.float64)
    found = EvaluatedPoints(ChosenPoints({"a": torch.zeros(2)}, ""), {"x": torch.ones(2)}, {})
    assert found.scale_of(("x", "a"), rounding) > 1e6 * 1e-12


def test_kinks_are_left_out() -> None:
    """Of y = |x| + x^2: smooth away from zero; the kink is found where it is, and where a step reaches it."""
    x = torch.tensor([[1.0], [-0.5], [0.0], [3e-5]], dtype=torch.float64)

    def evaluate(moved: torch.Tensor, times: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        return {"y": moved.abs() + moved**2}, torch.ones(len(moved), dtype=torch.bool)

    found = central(x, (1,), ["y"], evaluate)["y"]
    assert found.smooth.tolist() == [True, True, False, False]
    assert torch.allclose(found.block[:2, 0, 0], torch.tensor([3.0, -2.0], dtype=torch.float64), rtol=1e-9)


# -- golden files --------------------------------------------------------------------------------------------------


def test_a_golden_file_is_found_beside_the_artifact(tmp_path: Path) -> None:
    stub, golden = copy_of("viscoplasticity", tmp_path), tmp_path / "viscoplasticity.golden.safetensors"
    answer("verify", stub, "--record", golden, "--rows", 3)
    report = answer("verify", tmp_path / "viscoplasticity")
    assert report["points"] == golden.name
    names = ("stress", "equivalent_plastic_strain", "d(stress)/d(strain)")
    assert compared(report, "quantity", "reference", "worst") == [(name, "golden", 0.0) for name in names]


def test_a_failure_is_not_recorded(tmp_path: Path) -> None:
    stub, record = copy_of("elasticity", tmp_path), tmp_path / "elasticity.golden.safetensors"
    arguments = ("verify", stub, "--record", record, "--rows", 2)
    assert answer(*arguments, "--difference-rtol", 0, status=1)["recorded"] is None and not record.exists()
    assert answer(*arguments)["recorded"] == str(record) and record.exists()
    # Recorded anew, it is not compared with itself; and what is asked for goes before it.
    for again in (arguments, ("verify", stub, "--driver", "driver")):
        assert set(compared(answer(*again), "reference")) == {"differences"}


def test_another_model_at_golden_points_fails(tmp_path: Path) -> None:
    stub, golden = copy_of("promoted", tmp_path), tmp_path / "a.safetensors"
    answer("verify", stub, "--record", golden, "--rows", 3)

    def stiffer(metadata: Any) -> None:
        metadata["parameters"][0]["values"][0] *= 1.01

    references.change_json(tmp_path / "promoted/metadata.json", stiffer)
    report = answer("verify", stub, "--golden", golden, status=1)
    failed = {c["quantity"]: c["worst"] for c in report["comparisons"] if not c["passed"]}
    assert failed["stress"] == pytest.approx(0.01, rel=0.5)


# -- points --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".npz", ".pt", ".safetensors"])
def test_points_of_a_file(suffix: str, tmp_path: Path) -> None:
    strain = 1e-3 * torch.arange(12.0, dtype=torch.float64).reshape(2, 6)
    file, golden = tmp_path / f"points{suffix}", tmp_path / "golden.safetensors"
    write_points(file, strain=strain)
    report = verified("elasticity", "--points", file, "--record", golden)
    assert (report["points"], report["rows"]) == (file.name, 2)
    # What is recorded there is what was given.
    wanted, recorded = references.case("elasticity").model.forward({"strain": strain})["stress"], load_file(golden)
    assert torch.equal(recorded["input.strain"], strain) and torch.equal(recorded["output.stress"], wanted)


def test_a_result_that_the_driver_would_save_is_left_alone(tmp_path: Path) -> None:
    saved = tmp_path / "saved.pt"
    saved.write_text("of an earlier run")
    stub = edited(copy_of("elasticity", tmp_path), "= TransientDriver", f"= TransientDriver\n save_as = '{saved}'")
    answer("verify", stub, "--rows", 2)
    answer("bench", stub, "--rows", 1, "--seconds", 0)
    assert saved.read_text() == "of an earlier run"


def test_a_driver_that_fails_gives_the_points_before(tmp_path: Path) -> None:
    # From step 41 on nobody finds a solution.
    tensor, beyond = "torch.linspace(0.0, 3.0e-2, 61, dtype=torch.float64)", "torch.arange(61) > 40, 1e150, 1.0"
    stub = copy_of("viscoplasticity", tmp_path)
    edited(stub, tensor, f"({tensor} * torch.where({beyond}).to(torch.float64))")
    report = answer("verify", stub, "--against", source_of("viscoplasticity"), "--rows", 200)
    assert report["points"].startswith("driver driver, which fails in its step 41")
    assert report["not_converged"] >= 3 and report["comparisons"][0]["rows"] >= 120
