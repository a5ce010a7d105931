"""`run` and `plot`: results in every format against neml2's own driver, invariants against closed forms, pictures."""

from __future__ import annotations

import json
import math
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import neml2
import numpy as np
import pytest
import torch

import neml2_aoti_plugin
import references
from commands import answer, refused, source_input, stub_of
from neml2_aoti_plugin._cli.result_files import layouts, read_readings
from neml2_aoti_plugin._cli.results import invariant

# netCDF takes packages of others.
NETCDF = pytest.param("nc", marks=pytest.mark.clients)
ENDINGS = pytest.mark.parametrize("ending", ["pt", "npz", "csv", NETCDF])
WITH_TYPES = pytest.mark.parametrize("ending", ["npz", "csv", NETCDF])


@pytest.fixture(scope="module")
def wanted() -> dict[str, torch.Tensor]:
    """What neml2's driver gives by itself."""
    with references.default_dtype(torch.float64):
        driver = neml2.load_input(stub_of("viscoplasticity")).get_driver("driver")
    driver.run()
    found: dict[str, torch.Tensor] = driver.result()
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, written by the command in all formats."""
    folder = tmp_path_factory.mktemp("results")
    endings = ["pt", "npz", "csv", *(["nc"] if find_spec("xarray") else [])]
    for ending in endings:
        ran(stub_of("viscoplasticity"), "--out", folder / f"result.{ending}")
    return folder


def ran(path: Path, *words: object) -> Any:
    return answer("run", path, "driver", *words)


def drawn(*words: object) -> Any:
    return answer("plot", *words)["lines"]


def texts(picture: Path) -> list[str]:
    """The texts of a .svg picture, in their order: matplotlib notes each that it draws as shapes."""
    return re.findall(r"<!-- (.*?) -->", picture.read_text())


def series(path: Path) -> dict[str, Any]:
    """The variables of a result that can be read in one way."""
    (found,) = read_readings(path)
    return found.series


def row_of(path: Path, line: int) -> dict[str, float]:
    """A line of a .csv file."""
    head, *lines = path.read_text().splitlines()
    return dict(zip(head.split(","), map(float, lines[line].split(",")), strict=True))


def test_a_pt_file_is_neml2s(results: Path, wanted: dict[str, torch.Tensor]) -> None:
    found = torch.load(results / "result.pt", weights_only=True)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@ENDINGS
def test_all_formats_hold_the_same(ending: str, results: Path, wanted: dict[str, torch.Tensor]) -> None:
    (found,) = read_readings(results / f"result.{ending}")
    types = {"t": "Scalar", "strain": "SR2", "stress": "SR2", "equivalent_plastic_strain": "Scalar"}
    # The time is recorded by us; a .pt file is neml2's.
    assert found.types == ({} if ending == "pt" else {"@time": "Scalar"}) | types
    assert (found.steps, found.points) == (61, 3)
    assert found.series["stress"].shape == (61, 3, 6)
    for name in types:
        side = "output" if f"output.1.{name}" in wanted else "input"
        for step in (1, 30, 60):
            # A table has the time once for each point.
            value = np.broadcast_to(wanted[f"{side}.{step}.{name}"].numpy(), found.series[name][step].shape)
            np.testing.assert_allclose(found.series[name][step], value, rtol=1e-14, atol=1e-300)
    # The driver starts from nothing.
    assert (found.series["stress"][0] == 0).all()


def test_components_of_a_csv_are_those_of_the_tensor(results: Path) -> None:
    last, stress = row_of(results / "result.csv", -2), series(results / "result.npz")["stress"][60, 1]
    assert (last["@step"], last["@point"]) == (60, 1)
    assert last["stress.xy"] == pytest.approx(stress[5] / math.sqrt(2), rel=1e-15)
    assert last["stress.xx"] == pytest.approx(stress[0], rel=1e-15, abs=1e-300)


def test_parameters_and_overrides(tmp_path: Path) -> None:
    stub, model = stub_of("promoted"), references.case("promoted").load()
    E = float(model.named_parameters()["promoted.E"])
    model.set_parameter("promoted.E", 3 * E)
    model.save_parameters(tmp_path / "three.safetensors")
    saved, files = tmp_path / "saved.pt", [tmp_path / f"{name}.npz" for name in ("one", "two", "three")]
    assert ran(stub, "--out", files[0], f"Drivers/driver/save_as:={saved}")["saved"] == str(saved)
    ran(stub, "--out", files[1], "--set", f"promoted.E={2 * E}")
    ran(stub, "--out", files[2], "--parameters", tmp_path / "three.safetensors")
    one, two, three = (series(file)["stress"] for file in files)
    np.testing.assert_allclose(two[1:], 2 * one[1:], rtol=1e-13)
    np.testing.assert_allclose(three[1:], 3 * one[1:], rtol=1e-13)
    np.testing.assert_array_equal(series(saved)["stress"], one)


def test_a_step_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    override = "Tensors/strains/expr:='SR2(torch.full((61, 1, 6), torch.nan, dtype=torch.float64))'"
    out = tmp_path / "result.npz"
    out.write_text("before")
    said = refused("run", stub_of("viscoplasticity"), "driver", override, "--out", out, status=1)
    assert said.startswith("step 1 of 60 of [Drivers/driver]")
    assert [p.name for p in tmp_path.iterdir()] == ["result.npz"] and out.read_text() == "before"


def test_wrong_runs(tmp_path: Path) -> None:
    stub, law, names = stub_of("promoted"), tmp_path / "law.i", tmp_path / "names.i"
    written(law, "strain", "stress")
    written(names, "strain", "@time")
    none = ("Tensors/times/expr:='Scalar(torch.zeros(0))'", "Tensors/strains/expr:='SR2(torch.zeros(0, 2, 6))'")
    save_as = "Drivers/driver/save_as:="
    for words, said in (
        ([stub, "nobody"], "no block [Drivers/nobody]; in [Drivers] there are: driver"),
        ([tmp_path / "gone.i", "driver"], "no such file"),
        ([stub, "driver", "--set", "E=1"], "unknown 'E'"),
        ([stub, "driver", "--set", "promoted.E=stiff"], "is not NAME=VALUE with a finite number"),
        ([stub, "driver", "--set", "promoted.E=1", "--set", "promoted.E=2"], "is given twice"),
        ([stub, "driver", "save_as=x"], "is not PATH:=VALUE"),
        ([stub, "driver", "--out", tmp_path / "a.txt"], "expected one of .pt, .npz, .csv, .nc"),
        ([stub, "driver", "--out", tmp_path / "none" / "a.npz"], "cannot be written"),
        ([stub, "driver", f"{save_as}{tmp_path / 'none' / 'a.pt'}"], "a.pt: cannot be written"),
        ([stub, "driver", f"{save_as}{tmp_path}"], "is a folder"),
        ([stub, "driver", "Tensors/times/expr:='Scalar(1/0)'"], "[Drivers/driver]"),
        ([law, "driver", "--set", "promoted.E=1"], "only a compiled model"),
        ([law, "driver", *none], "has no steps"),
        ([names, "driver"], "@time; names that begin with @ are those of the result"),
    ):
        assert said in refused("run", *words), words
    assert sorted(found.name for found in tmp_path.iterdir()) == ["law.i", "names.i"]


def test_an_override_leads_to_another_artifact(tmp_path: Path) -> None:
    case, stub = references.case("promoted"), tmp_path / "moved.i"
    stub.write_text(case.file.read_text())
    assert "moved.i: no metadata.json" in refused("run", stub, "driver")
    assert ran(stub, f"Models/promoted/artifact_path:='{case.artifact}'")["steps"] == 6


def test_an_eager_driver_runs_as_well(tmp_path: Path) -> None:
    case = references.case("promoted")
    for path in (case.file, case.stub.path):
        ran(path, "--out", tmp_path / f"{path.stem}.npz")
    ours, eager = (read_readings(tmp_path / f"{path.stem}.npz")[0] for path in (case.file, case.stub.path))
    assert ours.types == eager.types
    np.testing.assert_allclose(ours.series["stress"], eager.series["stress"], rtol=1e-13)


@pytest.mark.wide
def test_a_float32_leaf(tmp_path: Path) -> None:
    case, files = references.case("elasticity_float32"), [tmp_path / "single.npz", tmp_path / "double.npz"]
    assert ran(case.file, "--device", "cpu", "--dtype", "float32", "--out", files[0])["steps"] == 11
    ran(stub_of("elasticity"), "--out", files[1])
    single, double = (series(file)["stress"] for file in files)
    np.testing.assert_allclose(single, double, rtol=1e-6, atol=1e-3)
    assert "compiled leaves: cpu/float32" in refused("run", case.file, "driver")
    assert answer("verify", case.file, "--against", case.stub.path, "--rtol", "1e-6")["passed"]


# -- series --------------------------------------------------------------------------------------------------------


def read(outputs: tuple[str, ...] = (), **shapes: tuple[int, ...]) -> list[dict[str, tuple[str, int]]]:
    """How a .pt file with these shapes can be read: type and number of sub-batch axes of each variable."""
    return [{name: (of.type, of.sites) for name, of in found.items()} for found in layouts(shapes, outputs)]


def test_types_are_read_from_shapes_that_leave_no_choice() -> None:
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


def test_a_choice_that_shapes_leave_is_left_open() -> None:
    assert read(t=(), x=(6,)) == [{"t": ("Scalar", 0), "x": (kind, 0)} for kind in ("SR2", "Scalar")]
    assert read(t=(), x=(3,)) == [{"t": ("Scalar", 0), "x": (kind, 0)} for kind in ("Vec", "Scalar")]
    assert read(x=(3, 3)) == [{"x": ("R2", 0)}, {"x": ("Vec", 0)}]
    # Two sites, or two points with one strain.
    assert [found["stress"] for found in read(strain=(6,), stress=(2, 6))] == [("SR2", 1), ("SR2", 0)]


def test_values_that_a_step_lacks_are_nan(tmp_path: Path) -> None:
    one = torch.ones(2, dtype=torch.float64)
    torch.save({"input.0.t": one[0], "input.1.t": one[0], "output.1.rate": one}, tmp_path / "a.pt")
    rate = series(tmp_path / "a.pt")["rate"]
    assert np.isnan(rate[0]).all() and (rate[1] == 1).all()


# -- sub-batches, batches, and names -------------------------------------------------------------------------------


@ENDINGS
def test_sites_are_kept_apart_from_points(ending: str, tmp_path: Path) -> None:
    """Three branches at two points: the sites of one point are those of neml2's own run, and lines of a picture."""
    case, out, picture = references.case("cross_group"), tmp_path / f"branches.{ending}", tmp_path / "a.svg"
    report = ran(case.file, "--out", out)
    assert report["rows"] == 2
    assert {v["name"]: v["shape"] for v in report["variables"]}["branch_strain"] == [21, 2, 3, 6]
    wanted, found = case.driver.result(), series(out)
    for step in (1, 20):
        for name in ("branch_strain", "strain"):
            np.testing.assert_allclose(found[name][step], wanted[f"output.{step}.{name}"], rtol=1e-12, atol=1e-15)
    last = wanted["output.20.branch_strain"]
    if ending == "csv":
        row = row_of(out, -2)
        assert (row["@step"], row["@point"]) == (20, 0)
        assert row["branch_strain[2].xx"] == pytest.approx(float(last[0, 2, 0]), rel=1e-12)
        assert row["branch_strain[2].xy"] == pytest.approx(float(last[0, 2, 5]) / math.sqrt(2), rel=1e-12)
    lines = drawn(out, "--out", picture, "--x", "strain.xx", "--y", "branch_strain.xx")
    ends = {(line["row"], *line["site"]): line["y_last"] for line in lines}
    assert ends == {(p, i): pytest.approx(float(last[p, i, 0]), rel=1e-12) for p in range(2) for i in range(3)}
    words = ("--x", "branch_strain[1].xx", "--y", "branch_strain[2].vonmises", "--row", 1)
    (one,) = drawn(out, "--out", picture, *words)
    assert (one["row"], one["site"]) == (1, [])


# Elasticity under names that files, columns and pictures use themselves, or read as more than a name.
NAMES = """
Tensors/times Python expr="Scalar(torch.linspace(0.0, 2.0, 3, dtype=torch.float64))"
Tensors/strains Python expr="SR2(torch.linspace(0.0, 1.0e-3, 3, dtype=torch.float64).reshape(-1, 1, 1) * torch.ones(SHAPE, 6))"
Drivers/driver TransientDriver model=law prescribed_time=times prescribed_SR2_names=STRAIN prescribed_SR2_values=strains
Models/law LinearIsotropicElasticity strain=STRAIN stress=STRESS coefficients='1000 0.25' coefficient_types='YOUNGS_MODULUS POISSONS_RATIO'
"""  # noqa: E501


def written(path: Path, strain: str, stress: str, shape: str = "2") -> Path:
    text = NAMES.replace("STRAIN", strain).replace("STRESS", stress).replace("SHAPE", shape)
    path.write_text(source_input(text))
    return path


@WITH_TYPES
@pytest.mark.parametrize(
    ("strain", "stress"),
    [("file", "t"), ("step", "row"), ("forces/E", "../state"), ("a.xx", "a%2Exx"), ("row[0]", "a")],
)
def test_no_name_of_a_variable_hides_another_or_ours(ending: str, strain: str, stress: str, tmp_path: Path) -> None:
    out, picture = tmp_path / f"out.{ending}", tmp_path / "a.svg"
    report = ran(written(tmp_path / "law.i", strain, stress), "--out", out)
    assert [found["name"] for found in report["variables"]] == ["@time", strain, stress]
    found = series(out)
    assert found.keys() == {"@time", strain, stress}
    np.testing.assert_array_equal(found["@time"][:, 0], [0.0, 1.0, 2.0])
    np.testing.assert_allclose(found[strain][-1], 1e-3)
    # E / (1 - 2 nu) on the diagonal, E / (1 + nu) beside it.
    np.testing.assert_allclose(found[stress][-1, 1], [2.0] * 3 + [0.8] * 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["law.i", out.name]
    name = stress.replace("%", "%25").replace(".", "%2E")
    (line,) = drawn(out, "--out", picture, "--x", "@time", "--y", f"{name}.xx", "--row", 0)
    assert line["y_last"] == pytest.approx(2.0)
    assert [line["y"] for line in drawn(out, "--out", picture)] == [f"{name}.vonmises"] * 2


@pytest.mark.parametrize("shape", ["4, 2", "1, 2", "4, 1"])
@WITH_TYPES
def test_two_batch_axes_are_folded_onto_points(ending: str, shape: str, tmp_path: Path) -> None:
    path, out = written(tmp_path / "law.i", "strain", "stress", shape), tmp_path / f"out.{ending}"
    path.write_text(path.read_text().replace(".reshape(-1, 1, 1)", ".reshape(-1, 1, 1, 1)"))
    points = math.prod(map(int, shape.split(",")))
    assert ran(path, "--out", out)["rows"] == points
    assert series(out)["stress"].shape == (3, points, 6)


@pytest.mark.parametrize("ending", ["pt", "npz", "csv"])
def test_a_run_without_points_is_written_and_not_drawn(ending: str, tmp_path: Path) -> None:
    out = tmp_path / f"out.{ending}"
    assert ran(written(tmp_path / "law.i", "strain", "stress", "0"), "--out", out)["rows"] == 0 and out.is_file()
    assert "has no points" in refused("plot", out, "--out", tmp_path / "a.svg", "--y", "stress.xx")


@pytest.mark.parametrize(("count", "part"), [(6, "xx"), (3, "x")])
def test_a_scalar_at_six_points_is_no_tensor(count: int, part: str, tmp_path: Path) -> None:
    """A .pt file records no types: what is asked for says what it is, and without that nothing is guessed."""
    saved, picture = tmp_path / "saved.pt", tmp_path / "a.svg"
    times = {f"input.{step}.t": torch.tensor(float(step), dtype=torch.float64) for step in range(3)}
    values = {f"output.{step}.x": step * torch.arange(count, dtype=torch.float64) for step in (1, 2)}
    torch.save({**times, **values}, saved)
    said = f"x as Scalar at {count} point(s). Name what to draw"
    assert said in refused("plot", saved, "--out", picture) and not picture.exists()
    for file, why in ((saved, "in several ways"), (tmp_path / "gone.npz", "cannot be read")):
        with pytest.raises(neml2_aoti_plugin.InputError, match=why):
            neml2_aoti_plugin.read_result(file)
    lines = drawn(saved, "--out", picture, "--x", "t", "--y", "x")
    assert [(line["row"], line["y_last"]) for line in lines] == [(point, 2.0 * point) for point in range(count)]
    (line,) = drawn(saved, "--out", picture, "--y", f"x.{part}")
    assert (line["row"], line["y_last"]) == (0, 0.0)


# -- results in Python ---------------------------------------------------------------------------------------------


@ENDINGS
def test_read_result_names_dimensions(ending: str, results: Path, wanted: dict[str, torch.Tensor]) -> None:
    found = neml2_aoti_plugin.read_result(results / f"result.{ending}")
    dims, stress = found.variables["stress"]
    assert dims == ("time", "point", "component") and stress.shape == (61, 3, 6)
    # Components of the tensor: without the square root of 2.
    last = wanted["output.60.stress"][2].numpy() / np.array([1, 1, 1, *(math.sqrt(2),) * 3])
    np.testing.assert_allclose(stress[60, 2], last, rtol=1e-12, atol=1e-12)
    assert list(found.coords["component"]) == ["xx", "yy", "zz", "yz", "xz", "xy"]
    assert list(found.coords["point"]) == [0, 1, 2]
    if ending == "pt":
        assert "time" not in found.coords and found.variables["t"][0] == ("time",)
    else:
        np.testing.assert_allclose(found.coords["time"], np.linspace(0.0, 30.0, 61), atol=1e-12)
    lines = np.array([*found.table.values()]).T
    assert lines.shape == (183, len(found.table)) and found.table["stress.xy"][-1] == stress[60, 2, 5]


def test_read_result_with_sites_and_times_of_points(tmp_path: Path) -> None:
    out = tmp_path / "a.npz"
    ran(references.case("cross_group").file, "--out", out)
    found = neml2_aoti_plugin.read_result(out)
    assert found.variables["branch_strain"][0] == ("time", "point", "site", "component")
    assert list(found.coords["site"]) == [0, 1, 2]
    types = {"@time": "Scalar", "a": "Scalar", "b": "Vec", "c": "Scalar", "time": "R2"}
    dims = {
        "@time": ("time_", "point"),
        "a": ("time_", "point", "site"),
        "b": ("time_", "point", "b.site", "axis"),
        "c": ("time_", "point", "site_0", "site_1"),
        "time": ("time_", "row", "column"),
    }
    shapes = {"@time": (4, 2), "a": (4, 2, 5), "b": (4, 2, 3, 3), "c": (4, 2, 7, 3), "time": (4, 3, 3)}
    arrays = {name: np.arange(float(math.prod(shape))).reshape(shape) for name, shape in shapes.items()}
    notes = {"@types": np.array(json.dumps(types)), "@dims": np.array(json.dumps(dims))}
    np.savez(tmp_path / "b.npz", **arrays, **notes)  # type: ignore[arg-type]
    found = neml2_aoti_plugin.read_result(str(tmp_path / "b.npz"))
    assert {name: dims for name, (dims, _) in found.variables.items()} == dims
    assert list(found.coords["row"]) == ["x", "y", "z"]
    for name, (of, values) in found.variables.items():
        sizes = dict(zip(of, values.shape, strict=True))
        assert all(len(found.coords[dim]) == size for dim, size in sizes.items() if dim != "time_")
        np.testing.assert_array_equal(values, arrays[name])


def test_a_npz_file_has_names_and_coordinates(results: Path) -> None:
    """A program without this package finds all it needs for named arrays."""
    with np.load(results / "result.npz") as file:
        dims = json.loads(str(file["@dims"]))
        assert dims["stress"] == ["time", "point", "component"] and dims["t"] == dims["@time"] == ["time"]
        for name, of in dims.items():
            assert file[name].shape == tuple(len(file[f"@{dim}"]) for dim in of)
        assert list(file["@component"]) == ["xx", "yy", "zz", "yz", "xz", "xy"]


@pytest.mark.clients
def test_xarray_takes_a_result(results: Path, tmp_path: Path) -> None:
    import xarray

    found = neml2_aoti_plugin.read_result(results / "result.npz")
    ours = xarray.Dataset(found.variables, found.coords)
    theirs = xarray.load_dataset(results / "result.nc")
    xarray.testing.assert_allclose(ours, theirs, rtol=1e-15)
    assert theirs["stress"].attrs == {"long_name": "stress", "type": "SR2"}
    axial = theirs["stress"].sel(component="xx", point=0).sel(time=30.0)
    assert float(axial) == found.table["stress.xx"][-3]
    (tmp_path / "bad.nc").write_text("no result")
    assert "is not a result" in refused("plot", tmp_path / "bad.nc", "--out", tmp_path / "a.svg")
    law = written(tmp_path / "law.i", "strain", "stress", "0")
    assert "netCDF has no empty dimensions" in refused("run", law, "driver", "--out", tmp_path / "a.nc")


def test_netcdf_says_what_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xarray", None)
    said = "this needs the package xarray, which is not installed: pip install 'neml2-aoti-plugin[netcdf]'"
    assert said in refused("run", stub_of("elasticity"), "driver", "--out", tmp_path / "a.nc")
    with pytest.raises(neml2_aoti_plugin.InputError, match=re.escape(said)):
        neml2_aoti_plugin.read_result(tmp_path / "a.nc")


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
    assert invariant(name, mandel.data.to(torch.float64).numpy()) == pytest.approx(value, rel=1e-6, abs=1e-6)


# -- pictures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_pictures(ending: str, results: Path, tmp_path: Path) -> None:
    picture, files = tmp_path / f"curve.{ending}", [results / "result.npz", results / "result.csv"]
    lines = drawn(*files, "--out", picture, "--row", 0, "--row", 2)
    assert picture.read_bytes()[:5] == {"png": b"\x89PNG\r", "svg": b"<?xml"}[ending]
    assert [(line["result"], line["x"], line["y"], line["row"], line["steps"]) for line in lines] == [
        (str(file), "strain.equivalent", "stress.vonmises", row, 61) for file in files for row in (0, 2)
    ]
    assert [line["y_last"] for line in lines[:2]] == pytest.approx([line["y_last"] for line in lines[2:]])
    # Files of one name are told apart.
    labels = [f"strain xx to {value}" for value in ("0.03", "0.018")]
    assert [line["label"] for line in lines] == [f"{file}, {label}" for file in files for label in labels]


def test_names_are_no_formulas(results: Path, tmp_path: Path) -> None:
    files = [tmp_path / f"{name}.npz" for name in ("$a_{", "_b")]
    for file in files:
        file.write_bytes((results / "result.npz").read_bytes())
    picture = tmp_path / "names.svg"
    words = ("--row", 0, "--label", "@point", "--title", "$_{", "--xlabel", "a$b$", "--ylabel", "_s$")
    drawn(*files, "--out", picture, *words)
    assert {"$_{", "a$b$", "_s$", *(f"{file.stem}, point 0" for file in files)} <= {t.strip() for t in texts(picture)}


@pytest.mark.parametrize(
    ("words", "title", "values"),
    [
        # Of the inputs the first component that has another value at each point, and of a ramp its last value.
        ((), "strain xx at the end", ["0.03", "0", "0.018"]),
        (("--label", "strain.equivalent"), "equivalent strain at the end", ["0.0298", "0.02939", "0.023"]),
        (("--label", "@point"), "point", ["0", "1", "2"]),
    ],
)
def test_legends_say_what_differs(
    words: tuple[str, ...], title: str, values: list[str], results: Path, tmp_path: Path
) -> None:
    picture, file = tmp_path / "a.svg", results / "result.npz"
    lines = drawn(file, "--out", picture, *words)
    shown = texts(picture)
    assert {"von Mises stress", "equivalent strain", title} <= set(shown)
    found = shown[shown.index(title, 1) + 1 :][: len(values)]
    assert list(map(float, found)) == pytest.approx(list(map(float, values)), rel=1e-3)
    name = title.removesuffix(" at the end")
    assert [line["label"] for line in lines] == [f"{name}{' to' if name != title else ''} {value}" for value in found]


def test_a_constant_input_tells_points_apart_before_others(tmp_path: Path) -> None:
    """A temperature of each point says more than a strain that grows; many lines have a scale of colours instead."""
    for count in (3, 12):
        rows = [f"{k},{p},{k},{k * (p + 1)},{300 + 10 * p},{k * p}" for k in range(3) for p in range(count)]
        file, picture = tmp_path / f"{count}.csv", tmp_path / f"{count}.svg"
        file.write_text("\n".join(["@step,@point,@time,strain,temperature,stress_xx", *rows]))
        lines = drawn(file, "--out", picture, "--x", "strain", "--y", "stress_xx")
        assert [line["label"] for line in lines] == [f"temperature {300 + 10 * p}" for p in range(count)]
        shown = texts(picture)
        assert "temperature" in shown and "stress xx" in shown and ("310" in shown) == (count == 3)
    # One point of several keeps its label.
    (line,) = drawn(file, "--out", picture, "--x", "strain", "--y", "stress_xx", "--row", 2)
    assert line["label"] == "temperature 320"


def test_quantities_of_other_kinds_have_their_own_axes(results: Path, tmp_path: Path) -> None:
    picture, file = tmp_path / "a.svg", results / "result.npz"
    words = ("--y", "stress.xx", "--y", "equivalent_plastic_strain", "--y", "stress.yy", "--x", "strain.xx")
    labels = ("--ylabel", "axial (MPa)", "--xlabel", "axial strain", "--title", "Steel")
    lines = drawn(file, "--out", picture, "--row", 0, *words, *labels)
    assert picture.read_text().count('id="axes_') == 2
    assert {"axial (MPa), stress yy", "equivalent plastic strain", "axial strain", "Steel"} <= set(texts(picture))
    assert [line["label"] for line in lines] == [
        "axial (MPa), strain xx to 0.03",
        "stress yy, strain xx to 0.03",
        "strain xx to 0.03",
    ]
    assert "--ylabel is given 2 times, for 1" in refused("plot", file, "--out", picture, *("--ylabel", "a") * 2)


def test_scalars_are_drawn_over_the_time_if_nothing_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("@step,@point,t,x\n0,0,0,1\n1,0,1,2\n")
    (line,) = drawn(tmp_path / "a.csv", "--out", tmp_path / "a.svg")
    assert (line["x"], line["y"], line["y_first"], line["y_last"]) == ("t", "x", 1.0, 2.0)


def test_wrong_plots(results: Path, tmp_path: Path) -> None:
    good, out = results / "result.npz", tmp_path / "a.png"
    torch.save({"weights": torch.ones(2)}, tmp_path / "other.pt")
    np.savez(tmp_path / "other.npz", a=np.ones(2))
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    (tmp_path / "text.pt").write_text("no result")
    (tmp_path / "binary.csv").write_bytes(b"\xff")
    for name in ("other.pt", "other.npz", "other.csv", "text.pt", "binary.csv"):
        assert "is not a result" in refused("plot", tmp_path / name, "--out", out)
    for words, said in (
        ([tmp_path / "gone.npz", "--out", out], "cannot be read (No such file or directory)"),
        ([good, "--out", tmp_path / "a.bmp"], "expected one of .png, .svg, .pdf"),
        ([good, "--out", tmp_path / "none" / "a.png"], "cannot be written"),
        ([good, "--out", out, "--y", "stress.zx"], "'stress.zx' is not in this result: there are @time, t, equivalent"),
        ([good, "--out", out, "--y", "t.vonmises"], "'t.vonmises' is not in this result"),
        ([good, "--out", out, "--y", "stress[0].xx"], "'stress' has no sites"),
        ([good, "--out", out, "--y", "stress."], "is not the name of a variable"),
        ([good, "--out", out, "--label", "heat"], "'heat' is not in this result"),
        ([good, "--out", out, "--row", "3"], "there is no point 3; the points are 0 to 2"),
    ):
        assert said in refused("plot", *words), words
    assert not [p for p in tmp_path.iterdir() if p.suffix == ".png"]
