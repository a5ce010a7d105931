"""`run` and `plot`: results in every format against neml2's own driver, invariants against closed forms, pictures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import neml2
import numpy as np
import pytest
import torch

import references
from neml2_aoti_plugin import ConvergenceError, InputError, UnknownNameError
from neml2_aoti_plugin import _cli as cli
from neml2_aoti_plugin._workbench.drive import run
from neml2_aoti_plugin._workbench.plot import INVARIANTS, default_x, default_y, plot, quantity
from neml2_aoti_plugin._workbench.result_files import read_result
from neml2_aoti_plugin._workbench.results import Result, columns, from_tensors
from neml2_aoti_plugin._workbench.shapes import layouts


@pytest.fixture(scope="module")
def wanted() -> dict[str, torch.Tensor]:
    """What neml2's driver gives by itself."""
    with references.default_dtype(torch.float64):
        driver = neml2.load_input(references.case("viscoplasticity").file).get_driver("driver")
    driver.run()
    found: dict[str, torch.Tensor] = driver.result()
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, written by the command's function in all formats."""
    folder = tmp_path_factory.mktemp("results")
    steps: list[tuple[int, int]] = []
    for ending in ("pt", "npz", "csv"):
        run(
            references.case("viscoplasticity").file,
            "driver",
            values={},
            out=folder / f"result.{ending}",
            on_step=lambda done, last: steps.append((done, last)),
        )
    assert steps == [(k, 60) for k in range(1, 61)] * 3
    return folder


def series(path: Path) -> dict[str, Any]:
    """The variables of a result that can be read in one way."""
    (found,) = read_result(path)
    return found.series


def test_a_pt_file_is_neml2s(results: Path, wanted: dict[str, torch.Tensor]) -> None:
    found = torch.load(results / "result.pt", weights_only=True)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("ending", ["pt", "npz", "csv"])
def test_all_formats_hold_the_same(ending: str, results: Path, wanted: dict[str, torch.Tensor]) -> None:
    (found,) = read_result(results / f"result.{ending}")
    types = {"t": "Scalar", "strain": "SR2", "stress": "SR2", "equivalent_plastic_strain": "Scalar"}
    # The time is recorded by us; a .pt file is neml2's.
    assert found.types == ({} if ending == "pt" else {"@time": "Scalar"}) | types
    assert (found.steps, found.points) == (61, 3)
    assert found.series["stress"].shape == (61, 3, 6)
    for name in types:
        values = found.series[name]
        side = "output" if f"output.1.{name}" in wanted else "input"
        for step in (1, 30, 60):
            value = wanted[f"{side}.{step}.{name}"].numpy()
            # A table has the time once for each point.
            np.testing.assert_allclose(
                values[step], np.broadcast_to(value, values[step].shape), rtol=1e-14, atol=1e-300
            )
    # The driver starts from nothing.
    assert (found.series["stress"][0] == 0).all()


def test_components_of_a_csv_are_those_of_the_tensor(results: Path) -> None:
    head, *lines = (results / "result.csv").read_text().splitlines()
    last = dict(zip(head.split(","), map(float, lines[-2].split(",")), strict=True))
    stress = series(results / "result.npz")["stress"][60, 1]
    assert (last["@step"], last["@point"]) == (60, 1)
    assert last["stress.xy"] == pytest.approx(stress[5] / math.sqrt(2), rel=1e-15)
    assert last["stress.xx"] == pytest.approx(stress[0], rel=1e-15, abs=1e-300)


def test_parameters_and_overrides(tmp_path: Path) -> None:
    stub = references.case("promoted").file
    model = references.case("promoted").load()
    E = float(model.named_parameters()["promoted.E"])
    model.set_parameter("promoted.E", 3 * E)
    model.save_parameters(tmp_path / "three.safetensors")
    saved = tmp_path / "saved.pt"
    run(stub, "driver", values={}, out=tmp_path / "one.npz", overrides=(f"Drivers/driver/save_as:={saved}",))
    run(stub, "driver", values={"promoted.E": 2 * E}, out=tmp_path / "two.npz")
    run(stub, "driver", values={}, parameters=tmp_path / "three.safetensors", out=tmp_path / "three.npz")
    one, two, three = (series(tmp_path / f"{n}.npz")["stress"] for n in ("one", "two", "three"))
    np.testing.assert_allclose(two[1:], 2 * one[1:], rtol=1e-13)
    np.testing.assert_allclose(three[1:], 3 * one[1:], rtol=1e-13)
    np.testing.assert_array_equal(series(saved)["stress"], one)


def test_a_step_that_fails_leaves_nothing_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stub = references.case("viscoplasticity").file
    out = tmp_path / "result.npz"
    override = "Tensors/strains/expr:='SR2(torch.full((61, 1, 6), torch.nan, dtype=torch.float64))'"
    with pytest.raises(ConvergenceError, match=r"step 1 of 60 of \[Drivers/driver\]"):
        run(stub, "driver", values={}, out=out, overrides=(override,))
    assert not list(tmp_path.iterdir())
    out.write_text("before")
    assert cli.main(["run", str(stub), "driver", override, "--out", str(out), "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["error"]["kind"] == "ConvergenceError" and document["status"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["result.npz"] and out.read_text() == "before"


def test_wrong_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stub = references.case("promoted").file
    for arguments, said in (
        ([stub, "nobody"], "no block [Drivers/nobody]; in [Drivers] there are: driver"),
        ([tmp_path / "gone.i", "driver"], "no such file"),
        ([stub, "driver", "--set", "E=1"], "'E' is not a promoted parameter"),
        ([stub, "driver", "--set", "promoted.E=stiff"], "is not NAME=VALUE with a finite number"),
        ([stub, "driver", "--set", "promoted.E=1", "--set", "promoted.E=2"], "is given twice"),
        ([stub, "driver", "save_as=x"], "is not PATH:=VALUE"),
        ([stub, "driver", "--out", tmp_path / "a.txt"], "expected one of .pt, .npz, .csv"),
        ([stub, "driver", "--out", tmp_path / "none" / "a.npz"], "cannot be written"),
        ([stub, "driver", "Tensors/times/expr:='Scalar(1/0)'"], "[Drivers/driver]"),
        ([references.case("promoted").stub.path, "driver", "--set", "promoted.E=1"], "only a compiled model"),
    ):
        assert cli.main(["run", *map(str, arguments)]) == 2, arguments
        told = capsys.readouterr().err
        assert said in told and "Traceback" not in told
    assert not list(tmp_path.iterdir())


def test_an_override_leads_to_another_artifact(tmp_path: Path) -> None:
    case = references.case("promoted")
    stub = tmp_path / "moved.i"
    stub.write_text(case.file.read_text())
    with pytest.raises(InputError, match=r"\[Models/promoted\] in .*moved.i: no metadata.json"):
        run(stub, "driver", values={})
    where = f"Models/promoted/artifact_path:='{case.artifact}'"
    assert run(stub, "driver", values={}, overrides=(where,)).steps == 6


def test_an_eager_driver_runs_as_well(tmp_path: Path) -> None:
    case = references.case("promoted")
    for path in (case.file, case.stub.path):
        run(path, "driver", values={}, out=tmp_path / f"{path.stem}.npz")
    ours, eager = (read_result(tmp_path / f"{path.stem}.npz")[0] for path in (case.file, case.stub.path))
    assert ours.types == eager.types
    np.testing.assert_allclose(ours.series["stress"], eager.series["stress"], rtol=1e-13)


@pytest.mark.wide
def test_a_float32_leaf(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = references.case("elasticity_float32")
    report = run(case.file, "driver", values={}, device="cpu", dtype="float32", out=tmp_path / "single.npz")
    run(references.case("elasticity").file, "driver", values={}, out=tmp_path / "double.npz")
    single, double = (series(tmp_path / f"{name}.npz")["stress"] for name in ("single", "double"))
    np.testing.assert_allclose(single, double, rtol=1e-6, atol=1e-3)
    assert report.steps == 11
    assert cli.main(["run", str(case.file), "driver"]) == 2
    assert "compiled leaves: cpu/float32" in capsys.readouterr().err
    assert cli.main(["verify", str(case.file), "--against", str(case.stub.path), "--rtol", "1e-6"]) == 0
    assert "FAILED" not in capsys.readouterr().out


# -- series --------------------------------------------------------------------------------------------------------


def read(outputs: tuple[str, ...] = (), **shapes: tuple[int, ...]) -> list[dict[str, tuple[str, int]]]:
    """How a .pt file with these shapes can be read: type and number of sub-batch axes of each variable."""
    return [{name: (of.type, of.sites) for name, of in found.items()} for found in layouts(shapes, outputs)]


def test_types_are_told_by_shapes_that_leave_no_choice() -> None:
    scalar, tensor = ("Scalar", 0), ("SR2", 0)
    assert read(t=(), strain=(6,), R=(3, 3), v=(3,)) == [
        {"t": scalar, "strain": tensor, "R": ("R2", 0), "v": ("Vec", 0)}
    ]
    # Six points of a scalar beside six points of a tensor; three of a vector beside three of a tensor.
    assert read(t=(1,), strain=(6, 6), p=(6,)) == [{"t": scalar, "strain": tensor, "p": scalar}]
    assert read(t=(), strain=(3, 6), v=(3, 3)) == [{"t": scalar, "strain": tensor, "v": ("Vec", 0)}]
    # One point without a batch axis; two batch axes.
    assert read(("stress", "p"), strain=(6,), stress=(6,), p=()) == [{"strain": tensor, "stress": tensor, "p": scalar}]
    assert read(stress=(4, 2, 6), p=(4, 2)) == [{"stress": tensor, "p": scalar}]
    # Sites are what is left between batch and base.
    assert read(stress=(2, 6), strain=(2, 3, 6)) == [{"stress": tensor, "strain": ("SR2", 1)}]
    assert read(direction=(20, 3), slip=(20, 12)) == [{"direction": ("Vec", 0), "slip": ("Scalar", 1)}]


def test_a_choice_that_shapes_leave_is_told() -> None:
    assert read(t=(), x=(6,)) == [{"t": ("Scalar", 0), "x": (kind, 0)} for kind in ("SR2", "Scalar")]
    assert read(t=(), x=(3,)) == [{"t": ("Scalar", 0), "x": (kind, 0)} for kind in ("Vec", "Scalar")]
    assert read(x=(3, 3)) == [{"x": ("R2", 0)}, {"x": ("Vec", 0)}]
    # Two sites, or two points with one strain.
    assert [found["stress"] for found in read(strain=(6,), stress=(2, 6))] == [("SR2", 1), ("SR2", 0)]


def test_values_that_a_step_lacks_are_nan() -> None:
    one = torch.ones(2, dtype=torch.float64)
    (found,) = from_tensors({"input.0.t": one[0], "input.1.t": one[0], "output.1.rate": one})
    assert np.isnan(found.series["rate"][0]).all() and (found.series["rate"][1] == 1).all()


# -- sub-batches, batches, and names -------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["pt", "npz", "csv"])
def test_sites_are_kept_apart_from_points(ending: str, tmp_path: Path) -> None:
    """Three branches at two points: the sites of one point are those of neml2's own run, and lines of a picture."""
    case = references.case("cross_group")
    out = tmp_path / f"branches.{ending}"
    report = run(case.file, "driver", values={}, out=out)
    assert report.rows == 2
    assert next(found.shape for found in report.variables if found.name == "branch_strain") == (21, 2, 3, 6)
    wanted = case.driver.result()
    found = series(out)
    for step in (1, 20):
        for name in ("branch_strain", "strain"):
            np.testing.assert_allclose(found[name][step], wanted[f"output.{step}.{name}"], rtol=1e-12, atol=1e-15)
    if ending == "csv":
        head, *lines = out.read_text().splitlines()
        row = dict(zip(head.split(","), map(float, lines[-2].split(",")), strict=True))
        value = wanted["output.20.branch_strain"][0, 2]
        assert (row["@step"], row["@point"]) == (20, 0)
        assert row["branch_strain[2].xx"] == pytest.approx(float(value[0]), rel=1e-12)
        assert row["branch_strain[2].xy"] == pytest.approx(float(value[5]) / math.sqrt(2), rel=1e-12)
    drawn = plot([out], tmp_path / "branches.svg", "strain.xx", ["branch_strain.xx"])
    last = {(line.row, line.site): line.y_last for line in drawn.lines}
    assert last.keys() == {(row, (site,)) for row in range(2) for site in range(3)}
    for (point, site), found_there in last.items():
        value = wanted["output.20.branch_strain"][point, site[0], 0]
        assert found_there == pytest.approx(float(value), rel=1e-12)
    (one,) = plot([out], tmp_path / "one.svg", "branch_strain[1].xx", ["branch_strain[2].vonmises"], rows=[1]).lines
    assert (one.row, one.site) == (1, ())


# Elasticity under names that files, columns and pictures use themselves, or read as more than a name.
NAMES = """
[Tensors]
  [times]
    type = Python
    expr = 'Scalar(torch.linspace(0.0, 2.0, 3, dtype=torch.float64))'
  []
  [strains]
    type = Python
    expr = 'SR2(torch.linspace(0.0, 1.0e-3, 3, dtype=torch.float64).reshape(-1, 1, 1) * torch.ones(SHAPE, 6))'
  []
[]
[Drivers]
  [driver]
    type = TransientDriver
    model = 'law'
    prescribed_time = 'times'
    prescribed_SR2_names = 'STRAIN'
    prescribed_SR2_values = 'strains'
  []
[]
[Models]
  [law]
    type = LinearIsotropicElasticity
    strain = 'STRAIN'
    stress = 'STRESS'
    coefficients = '1000 0.25'
    coefficient_types = 'YOUNGS_MODULUS POISSONS_RATIO'
  []
[]
"""


def written(path: Path, strain: str, stress: str, shape: str = "2") -> Path:
    path.write_text(NAMES.replace("STRAIN", strain).replace("STRESS", stress).replace("SHAPE", shape))
    return path


@pytest.mark.parametrize("ending", ["npz", "csv"])
@pytest.mark.parametrize(
    ("strain", "stress"),
    [("file", "t"), ("step", "row"), ("forces/E", "../state"), ("a.xx", "a%2Exx"), ("row[0]", "a")],
)
def test_no_name_of_a_variable_hides_another_or_ours(ending: str, strain: str, stress: str, tmp_path: Path) -> None:
    out = tmp_path / f"out.{ending}"
    report = run(written(tmp_path / "law.i", strain, stress), "driver", values={}, out=out)
    assert [found.name for found in report.variables] == ["@time", strain, stress]
    found = series(out)
    assert found.keys() == {"@time", strain, stress}
    np.testing.assert_array_equal(found["@time"][:, 0], [0.0, 1.0, 2.0])
    np.testing.assert_allclose(found[strain][-1], 1e-3)
    # E / (1 - 2 nu) on the diagonal, E / (1 + nu) beside it.
    np.testing.assert_allclose(found[stress][-1, 1], [2.0] * 3 + [0.8] * 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["law.i", out.name]
    name = stress.replace("%", "%25").replace(".", "%2E")
    (line,) = plot([out], tmp_path / "a.svg", "@time", [f"{name}.xx"], rows=[0]).lines
    assert line.y_last == pytest.approx(2.0)
    assert [line.y for line in plot([out], tmp_path / "a.svg").lines] == [f"{name}.vonmises"] * 2


def test_names_that_are_ours_are_refused_before_a_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="@time; names that begin with @ are those of the result"):
        run(written(tmp_path / "law.i", "strain", "@time"), "driver", values={})


@pytest.mark.parametrize("shape", ["4, 2", "1, 2", "4, 1"])
@pytest.mark.parametrize("ending", ["npz", "csv"])
def test_two_batch_axes_are_folded_onto_points(ending: str, shape: str, tmp_path: Path) -> None:
    text = NAMES.replace(".reshape(-1, 1, 1)", ".reshape(-1, 1, 1, 1)").replace("STRAIN", "strain")
    path = tmp_path / "law.i"
    path.write_text(text.replace("STRESS", "stress").replace("SHAPE", shape))
    out = tmp_path / f"out.{ending}"
    points = math.prod(map(int, shape.split(",")))
    assert run(path, "driver", values={}, out=out).rows == points
    assert series(out)["stress"].shape == (3, points, 6)


@pytest.mark.parametrize("ending", ["pt", "npz", "csv"])
def test_a_run_without_points_is_written_and_not_drawn(ending: str, tmp_path: Path) -> None:
    out = tmp_path / f"out.{ending}"
    report = run(written(tmp_path / "law.i", "strain", "stress", "0"), "driver", values={}, out=out)
    assert report.rows == 0 and out.is_file()
    with pytest.raises(InputError, match="has no points"):
        plot([out], tmp_path / "a.svg", ys=["stress.xx"])


def test_a_driver_without_steps_is_refused_before_the_run(tmp_path: Path) -> None:
    path = written(tmp_path / "law.i", "strain", "stress")
    none = ("Tensors/times/expr:='Scalar(torch.zeros(0))'", "Tensors/strains/expr:='SR2(torch.zeros(0, 2, 6))'")
    with pytest.raises(InputError, match="has no steps"):
        run(path, "driver", values={}, overrides=none)


def test_a_scalar_at_six_points_is_no_tensor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A .pt file tells no types: what is asked for says what it is, and without that nothing is guessed."""
    for count, part in ((6, "xx"), (3, "x")):
        saved = tmp_path / f"{count}.pt"
        times = {f"input.{step}.t": torch.tensor(float(step), dtype=torch.float64) for step in range(3)}
        values = {f"output.{step}.x": step * torch.arange(count, dtype=torch.float64) for step in (1, 2)}
        torch.save({**times, **values}, saved)
        lines = plot([saved], tmp_path / "a.svg", "t", ["x"]).lines
        assert [(line.row, line.y_last) for line in lines] == [(point, 2.0 * point) for point in range(count)]
        (line,) = plot([saved], tmp_path / "a.svg", ys=[f"x.{part}"]).lines
        assert (line.row, line.y_last) == (0, 0.0)
        assert cli.main(["plot", str(saved), "--out", str(tmp_path / "b.svg")]) == 2
        assert f"x as Scalar at {count} point(s). Name what to draw" in capsys.readouterr().err
    assert not (tmp_path / "b.svg").exists()


def test_what_a_driver_saves_itself_is_told_and_begun_before_the_run(tmp_path: Path) -> None:
    path, saved = written(tmp_path / "law.i", "strain", "stress"), tmp_path / "saved.pt"
    report = run(path, "driver", values={}, overrides=(f"Drivers/driver/save_as:={saved}",))
    assert (report.saved, report.written) == (str(saved), None)
    assert torch.load(saved, weights_only=True)["output.2.stress"].shape == (2, 6)
    steps: list[int] = []
    for where in (tmp_path / "none" / "saved.pt", tmp_path):
        override = f"Drivers/driver/save_as:={where}"
        with pytest.raises(InputError, match=r"saved\.pt: cannot be written|is a folder"):
            run(path, "driver", values={}, overrides=(override,), on_step=lambda done, last: steps.append(done))
    assert not steps and sorted(found.name for found in tmp_path.iterdir()) == ["law.i", "saved.pt"]


# -- invariants ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tensor", "value"),
    [
        # Uniaxial: Mises' stress is the stress. Pure shear: the square root of 3 times it.
        ("vonmises", np.diag([7.0, 0, 0]), 7.0),
        ("vonmises", np.array([[0, 2.0, 0], [2.0, 0, 0], [0, 0, 0]]), 2 * math.sqrt(3)),
        ("vonmises", np.diag([5.0, 5, 5]), 0.0),
        # Incompressible tension: the equivalent strain is the strain.
        ("equivalent", np.diag([0.02, -0.01, -0.01]), 0.02),
        ("norm", np.array([[0, 2.0, 0], [2.0, 0, 0], [0, 0, 1.0]]), 3.0),
        ("trace", np.diag([1.0, 2, 3]), 6.0),
        ("mean", np.diag([1.0, 2, 3]), 2.0),
    ],
)
def test_invariants(name: str, tensor: Any, value: float) -> None:
    mandel = neml2.types.SR2.fill(*(float(x) for x in (*np.diag(tensor), tensor[1, 2], tensor[0, 2], tensor[0, 1])))
    assert INVARIANTS[name](mandel.data.to(torch.float64).numpy()) == pytest.approx(value, rel=1e-6, abs=1e-6)


# -- pictures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_pictures(ending: str, results: Path, tmp_path: Path) -> None:
    picture = tmp_path / f"curve.{ending}"
    report = plot([results / "result.npz", results / "result.csv"], picture, rows=[0, 2])
    assert picture.read_bytes()[:5] == {"png": b"\x89PNG\r", "svg": b"<?xml"}[ending]
    assert [(Path(line.result).name, line.x, line.y, line.row, line.steps) for line in report.lines] == [
        (name, "strain.equivalent", "stress.vonmises", row, 61)
        for name in ("result.npz", "result.csv")
        for row in (0, 2)
    ]
    assert [line.y_last for line in report.lines[:2]] == pytest.approx([line.y_last for line in report.lines[2:]])


def test_names_are_no_formulas(results: Path, tmp_path: Path) -> None:
    names = ("$a_{", "_b")
    for name in names:
        (tmp_path / f"{name}.npz").write_bytes((results / "result.npz").read_bytes())
    picture = tmp_path / "names.svg"
    plot([tmp_path / f"{name}.npz" for name in names], picture, rows=[0])
    drawn = picture.read_text()
    # matplotlib notes each text that it draws as shapes.
    assert all(f"{name}, point 0 -->" in drawn for name in names)


def test_what_is_drawn_if_nothing_is_asked_for(results: Path) -> None:
    (found,) = read_result(results / "result.npz")
    assert (default_x(found), default_y(found, "strain.equivalent")) == ("strain.equivalent", "stress.vonmises")
    scalars = Result({"t": np.zeros((2, 1)), "x": np.zeros((2, 1))}, {"t": "Scalar", "x": "Scalar"})
    assert (default_x(scalars), default_y(scalars, "t")) == ("t", "x")
    assert set(columns(scalars)) == {"t", "x"}


def test_wrong_plots(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, out = results / "result.npz", tmp_path / "a.png"
    torch.save({"weights": torch.ones(2)}, tmp_path / "other.pt")
    np.savez(tmp_path / "other.npz", a=np.ones(2))
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    (tmp_path / "text.pt").write_text("no result")
    for arguments, said in (
        ([tmp_path / "gone.npz", "--out", out], "cannot be read (No such file or directory)"),
        ([tmp_path / "other.pt", "--out", out], "is not a result"),
        ([tmp_path / "other.npz", "--out", out], "is not a result"),
        ([tmp_path / "other.csv", "--out", out], "is not a result"),
        ([tmp_path / "text.pt", "--out", out], "is not a result"),
        ([good, "--out", tmp_path / "a.bmp"], "expected one of .png, .svg, .pdf"),
        ([good, "--out", tmp_path / "none" / "a.png"], "cannot be written"),
        ([good, "--out", out, "--y", "stress.zx"], "'stress.zx' is not in this result: there are @time, t, equivalent"),
        ([good, "--out", out, "--y", "stress[0].xx"], "'stress' has no sites"),
        ([good, "--out", out, "--y", "stress."], "is not the name of a variable"),
        ([good, "--out", out, "--row", "3"], "there is no point 3; the points are 0 to 2"),
    ):
        assert cli.main(["plot", *map(str, arguments)]) == 2, arguments
        told = capsys.readouterr().err
        assert said in told and "Traceback" not in told
    assert not [p for p in tmp_path.iterdir() if p.suffix == ".png"]
    with pytest.raises(UnknownNameError):
        quantity(read_result(good)[0], "t.vonmises")
    with pytest.raises(InputError):
        read_result(tmp_path / "other.csv")
