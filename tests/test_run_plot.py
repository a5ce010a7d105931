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

import references
from commands import answer, elastic_law, refused, stub_of
from neml2_aoti_plugin import InputError, read_result
from neml2_aoti_plugin._cli.result_files import layouts

# netCDF takes packages of others.
NETCDF = pytest.param("nc", marks=pytest.mark.clients)
ENDINGS = pytest.mark.parametrize("ending", ["pt", "npz", "csv", NETCDF])
WITH_TYPES = pytest.mark.parametrize("ending", ["npz", "csv", NETCDF])
# What neml2 multiplies the components of a symmetric tensor with.
MANDEL = np.array([1, 1, 1, *(math.sqrt(2),) * 3])


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
    for ending in ["pt", "npz", "csv", *(["nc"] if find_spec("xarray") else [])]:
        ran(stub_of("viscoplasticity"), "--out", folder / f"result.{ending}")
    return folder


def ran(path: Path, *words: object) -> Any:
    return answer("run", path, "driver", *words)


def drawn(*words: object) -> Any:
    return answer("plot", *words)["lines"]


def texts(picture: Path) -> list[str]:
    """The texts of a .svg picture, in their order: matplotlib notes each that it draws as shapes."""
    return re.findall(r"<!-- (.*?) -->", picture.read_text())


def values(path: Path, name: str) -> Any:
    """The values of a variable of a result, in components of the tensor."""
    return read_result(path).variables[name][1]


def row_of(path: Path, line: int) -> dict[str, float]:
    """A line of a .csv file."""
    head, *lines = path.read_text().splitlines()
    return dict(zip(head.split(","), map(float, lines[line].split(",")), strict=True))


# -- run -----------------------------------------------------------------------------------------------------------


@ENDINGS
def test_all_formats_hold_what_neml2_gives(ending: str, results: Path, wanted: dict[str, torch.Tensor]) -> None:
    file = results / f"result.{ending}"
    found = read_result(file)
    names = {"strain": "input", "stress": "output", "equivalent_plastic_strain": "output"}
    assert found.variables.keys() == {"t", *names}
    for name, side in names.items():
        dims, ours = found.variables[name]
        assert dims == ("time", "point", "component")[: ours.ndim]
        theirs = np.stack([wanted[f"{side}.{step}.{name}"].numpy() for step in range(1, 61)])
        expected = theirs / MANDEL if "component" in dims else theirs
        np.testing.assert_allclose(ours[1:], expected, rtol=1e-14, atol=1e-300)
    stress, time = (found.variables[name][1] for name in ("stress", "t"))
    # A table has it once for each point.
    np.testing.assert_allclose(time.reshape(61, -1).T, [np.linspace(0.0, 30.0, 61)] * (3 if ending == "csv" else 1))
    # The driver starts from nothing.
    assert stress.shape == (61, 3, 6) and (stress[0] == 0).all()
    assert list(found.coords["component"]) == ["xx", "yy", "zz", "yz", "xz", "xy"]
    assert list(found.coords["point"]) == [0, 1, 2]
    # A .pt file is neml2's, to which nothing is added; the time is recorded by us.
    if ending == "pt":
        saved = torch.load(file, weights_only=True)
        assert saved.keys() == wanted.keys() and all(torch.equal(saved[key], wanted[key]) for key in wanted)
        assert "time" not in found.coords
    else:
        np.testing.assert_allclose(found.coords["time"], np.linspace(0.0, 30.0, 61), atol=1e-12)
    assert {len(column) for column in found.table.values()} == {183}
    assert found.table["stress.xy"][-1] == stress[60, 2, 5]
    if ending == "csv":
        last = row_of(file, -2)
        assert (last["@step"], last["@point"]) == (60, 1)
        assert [last[f"stress.{part}"] for part in ("xx", "xy")] == list(stress[60, 1, [0, 5]])


def test_a_npz_file_has_names_and_coordinates(results: Path) -> None:
    """A program without this package finds all it needs for named arrays."""
    with np.load(results / "result.npz") as file:
        dims = json.loads(str(file["@dims"]))
        assert dims["stress"] == ["time", "point", "component"] and dims["t"] == dims["@time"] == ["time"]
        for name, of in dims.items():
            assert file[name].shape == tuple(len(file[f"@{dim}"]) for dim in of)
        assert list(file["@component"]) == ["xx", "yy", "zz", "yz", "xz", "xy"]


def test_parameters_and_overrides(tmp_path: Path) -> None:
    stub, model = stub_of("promoted"), references.case("promoted").load()
    E = float(model.named_parameters()["promoted.E"])
    model.set_parameter("promoted.E", 3 * E)
    model.save_parameters(tmp_path / "three.safetensors")
    saved, files = tmp_path / "saved.pt", [tmp_path / f"{name}.npz" for name in ("one", "two", "three")]
    assert ran(stub, "--out", files[0], f"Drivers/driver/save_as:={saved}")["saved"] == str(saved)
    ran(stub, "--out", files[1], "--set", f"promoted.E={2 * E}")
    ran(stub, "--out", files[2], "--parameters", tmp_path / "three.safetensors")
    one, two, three = (values(file, "stress") for file in files)
    np.testing.assert_allclose(two[1:], 2 * one[1:], rtol=1e-13)
    np.testing.assert_allclose(three[1:], 3 * one[1:], rtol=1e-13)
    np.testing.assert_array_equal(values(saved, "stress"), one)


def test_a_step_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    override = "Tensors/strains/expr:='SR2(torch.full((61, 1, 6), torch.nan, dtype=torch.float64))'"
    out = tmp_path / "result.npz"
    out.write_text("before")
    said = refused("run", stub_of("viscoplasticity"), "driver", override, "--out", out, status=1)
    assert said.startswith("step 1 of 60 of [Drivers/driver]")
    assert [p.name for p in tmp_path.iterdir()] == ["result.npz"] and out.read_text() == "before"


def test_an_override_leads_to_another_artifact(tmp_path: Path) -> None:
    case, stub = references.case("promoted"), tmp_path / "moved.i"
    stub.write_text(case.file.read_text())
    assert "moved.i: no metadata.json" in refused("run", stub, "driver")
    assert ran(stub, f"Models/promoted/artifact_path:='{case.artifact}'")["steps"] == 6


def test_an_eager_driver_runs_as_well(tmp_path: Path) -> None:
    case, out = references.case("promoted"), tmp_path / "a.npz"
    ran(case.file, "--out", out)
    ours = read_result(out)
    ran(case.stub.path, "--out", out)
    eager = read_result(out)
    assert {name: dims for name, (dims, _) in ours.variables.items()} == {n: d for n, (d, _) in eager.variables.items()}
    np.testing.assert_allclose(ours.variables["stress"][1], eager.variables["stress"][1], rtol=1e-13)


@pytest.mark.wide
def test_a_float32_leaf(tmp_path: Path) -> None:
    case, files = references.case("elasticity_float32"), [tmp_path / "single.npz", tmp_path / "double.npz"]
    assert ran(case.file, "--device", "cpu", "--dtype", "float32", "--out", files[0])["steps"] == 11
    ran(stub_of("elasticity"), "--out", files[1])
    single, double = (values(file, "stress") for file in files)
    np.testing.assert_allclose(single, double, rtol=1e-6, atol=1e-3)
    assert "compiled leaves: cpu/float32" in refused("run", case.file, "driver")
    assert answer("verify", case.file, "--against", case.stub.path, "--rtol", "1e-6")["passed"]


# -- what a result holds -------------------------------------------------------------------------------------------

SCALAR, TENSOR, VECTOR = ("Scalar", 0), ("SR2", 0), ("Vec", 0)


@pytest.mark.parametrize(
    ("outputs", "shapes", "readings"),
    [
        ((), {"t": (), "E": (6,), "R": (3, 3), "v": (3,)}, [{"t": SCALAR, "E": TENSOR, "R": ("R2", 0), "v": VECTOR}]),
        # Six points of a scalar beside six points of a tensor; three of a vector beside three of a tensor.
        ((), {"t": (1,), "strain": (6, 6), "p": (6,)}, [{"t": SCALAR, "strain": TENSOR, "p": SCALAR}]),
        ((), {"t": (), "strain": (3, 6), "v": (3, 3)}, [{"t": SCALAR, "strain": TENSOR, "v": VECTOR}]),
        # One point without a batch axis; two batch axes.
        (("s", "p"), {"strain": (6,), "s": (6,), "p": ()}, [{"strain": TENSOR, "s": TENSOR, "p": SCALAR}]),
        ((), {"stress": (4, 2, 6), "p": (4, 2)}, [{"stress": TENSOR, "p": SCALAR}]),
        # Sites are what is left between batch and base.
        ((), {"stress": (2, 6), "strain": (2, 3, 6)}, [{"stress": TENSOR, "strain": ("SR2", 1)}]),
        ((), {"direction": (20, 3), "slip": (20, 12)}, [{"direction": VECTOR, "slip": ("Scalar", 1)}]),
        # A choice that shapes leave is left open.
        ((), {"t": (), "x": (6,)}, [{"t": SCALAR, "x": TENSOR}, {"t": SCALAR, "x": SCALAR}]),
        ((), {"t": (), "x": (3,)}, [{"t": SCALAR, "x": VECTOR}, {"t": SCALAR, "x": SCALAR}]),
        ((), {"x": (3, 3)}, [{"x": ("R2", 0)}, {"x": VECTOR}]),
        # Two sites, or two points with one strain.
        ((), {"E": (6,), "s": (2, 6)}, [{"E": TENSOR, "s": ("SR2", 1)}, {"E": TENSOR, "s": TENSOR}]),
    ],
)
def test_types_are_read_from_the_shapes_of_a_pt_file(outputs: Any, shapes: Any, readings: Any) -> None:
    found = [{name: (of.type, of.sites) for name, of in found.items()} for found in layouts(shapes, outputs)]
    assert found == readings


@pytest.mark.parametrize(("count", "part"), [(6, "xx"), (3, "x")])
def test_a_scalar_at_six_points_is_no_tensor(count: int, part: str, tmp_path: Path) -> None:
    """A .pt file records no types: what is asked for says what it is, and without that nothing is guessed."""
    saved, picture = tmp_path / "saved.pt", tmp_path / "a.svg"
    times = {f"input.{step}.t": torch.tensor(float(step), dtype=torch.float64) for step in range(3)}
    outputs = {f"output.{step}.x": step * torch.arange(count, dtype=torch.float64) for step in (1, 2)}
    torch.save({**times, **outputs}, saved)
    said = f"x as Scalar at {count} point(s). Name what to draw"
    assert said in refused("plot", saved, "--out", picture) and not picture.exists()
    for file, why in ((saved, "in several ways"), (tmp_path / "gone.npz", "cannot be read")):
        with pytest.raises(InputError, match=why):
            read_result(file)
    lines = drawn(saved, "--out", picture, "--x", "t", "--y", "x")
    assert [(line["row"], line["y_last"]) for line in lines] == [(point, 2.0 * point) for point in range(count)]
    (line,) = drawn(saved, "--out", picture, "--y", f"x.{part}")
    assert (line["row"], line["y_last"]) == (0, 0.0)


def test_values_that_a_step_lacks_are_nan(tmp_path: Path) -> None:
    one = torch.ones(2, dtype=torch.float64)
    torch.save({"input.0.t": one[0], "input.1.t": one[0], "output.1.rate": one}, tmp_path / "a.pt")
    rate = values(tmp_path / "a.pt", "rate")
    assert np.isnan(rate[0]).all() and (rate[1] == 1).all()


@ENDINGS
def test_sites_are_kept_apart_from_points(ending: str, tmp_path: Path) -> None:
    """Three branches at two points: the sites of one point are those of neml2's own run, and lines of a picture."""
    case, out, picture = references.case("cross_group"), tmp_path / f"branches.{ending}", tmp_path / "a.svg"
    report = ran(case.file, "--out", out)
    assert report["rows"] == 2
    assert {v["name"]: v["shape"] for v in report["variables"]}["branch_strain"] == [21, 2, 3, 6]
    wanted, found = case.driver.result(), read_result(out)
    for name in ("branch_strain", "strain"):
        expected = np.stack([wanted[f"output.{step}.{name}"].numpy() / MANDEL for step in range(1, 21)])
        np.testing.assert_allclose(found.variables[name][1][1:], expected, rtol=1e-12, atol=1e-15)
    assert found.variables["branch_strain"][0] == ("time", "point", "site", "component")
    assert list(found.coords["site"]) == [0, 1, 2]
    last = found.variables["branch_strain"][1][20]
    if ending == "csv":
        row = row_of(out, -2)
        assert (row["@step"], row["@point"]) == (20, 0)
        assert [row[f"branch_strain[2].{part}"] for part in ("xx", "xy")] == list(last[0, 2, [0, 5]])
    lines = drawn(out, "--out", picture, "--x", "strain.xx", "--y", "branch_strain.xx")
    ends = {(line["row"], *line["site"]): line["y_last"] for line in lines}
    assert ends == {(p, i): pytest.approx(last[p, i, 0], rel=1e-12) for p in range(2) for i in range(3)}
    words = ("--x", "branch_strain[1].xx", "--y", "branch_strain[2].vonmises", "--row", 1)
    (one,) = drawn(out, "--out", picture, *words)
    assert (one["row"], one["site"]) == (1, [])


def test_sites_that_differ_and_times_of_points_have_dimensions_of_their_own(tmp_path: Path) -> None:
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
    found = read_result(str(tmp_path / "b.npz"))
    assert {name: dims for name, (dims, _) in found.variables.items()} == dims
    assert list(found.coords["row"]) == ["x", "y", "z"]
    for name, (of, array) in found.variables.items():
        sizes = dict(zip(of, array.shape, strict=True))
        assert all(len(found.coords[dim]) == size for dim, size in sizes.items() if dim != "time_")
        np.testing.assert_array_equal(array, arrays[name])


@WITH_TYPES
@pytest.mark.parametrize(
    ("strain", "stress"),
    [("file", "t"), ("step", "row"), ("forces/E", "../state"), ("a.xx", "a%2Exx"), ("row[0]", "a")],
)
def test_no_name_of_a_variable_hides_another_or_ours(ending: str, strain: str, stress: str, tmp_path: Path) -> None:
    out, picture = tmp_path / f"out.{ending}", tmp_path / "a.svg"
    report = ran(elastic_law(tmp_path / "law.i", strain, stress), "--out", out)
    assert [found["name"] for found in report["variables"]] == ["@time", strain, stress]
    found = read_result(out)
    assert found.variables.keys() == {strain, stress}
    np.testing.assert_array_equal(found.coords["time"], [0.0, 1.0, 2.0])
    # E / (1 - 2 nu) on the diagonal, E / (1 + nu) beside it.
    for name, expected in ((strain, [1e-3] * 6), (stress, [2.0] * 3 + [0.8] * 3)):
        np.testing.assert_allclose(found.variables[name][1][-1, 1] * MANDEL, expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["law.i", out.name]
    name = stress.replace("%", "%25").replace(".", "%2E")
    (line,) = drawn(out, "--out", picture, "--x", "@time", "--y", f"{name}.xx", "--row", 0)
    assert line["y_last"] == pytest.approx(2.0)
    assert [line["y"] for line in drawn(out, "--out", picture)] == [f"{name}.vonmises"] * 2


@pytest.mark.parametrize("shape", ["4, 2", "1, 2", "4, 1"])
@WITH_TYPES
def test_two_batch_axes_are_folded_onto_points(ending: str, shape: str, tmp_path: Path) -> None:
    path, out = elastic_law(tmp_path / "law.i", shape=shape), tmp_path / f"out.{ending}"
    path.write_text(path.read_text().replace(".reshape(-1, 1, 1)", ".reshape(-1, 1, 1, 1)"))
    points = math.prod(map(int, shape.split(",")))
    assert ran(path, "--out", out)["rows"] == points
    assert values(out, "stress").shape == (3, points, 6)


@pytest.mark.parametrize("ending", ["pt", "npz", "csv"])
def test_a_run_without_points_is_written_and_not_drawn(ending: str, tmp_path: Path) -> None:
    out = tmp_path / f"out.{ending}"
    assert ran(elastic_law(tmp_path / "law.i", shape="0"), "--out", out)["rows"] == 0 and out.is_file()
    assert "has no points" in refused("plot", out, "--out", tmp_path / "a.svg", "--y", "stress.xx")


@pytest.mark.clients
def test_xarray_takes_a_result(results: Path, tmp_path: Path) -> None:
    import xarray

    found = read_result(results / "result.npz")
    ours = xarray.Dataset(found.variables, found.coords)
    theirs = xarray.load_dataset(results / "result.nc")
    xarray.testing.assert_allclose(ours, theirs, rtol=1e-15)
    assert theirs["stress"].attrs == {"long_name": "stress", "type": "SR2"}
    axial = theirs["stress"].sel(component="xx", point=0).sel(time=30.0)
    assert float(axial) == found.table["stress.xx"][-3]
    (tmp_path / "bad.nc").write_text("no result")
    assert "is not a result" in refused("plot", tmp_path / "bad.nc", "--out", tmp_path / "a.svg")
    law = elastic_law(tmp_path / "law.i", shape="0")
    assert "netCDF has no empty dimensions" in refused("run", law, "driver", "--out", tmp_path / "a.nc")


def test_netcdf_says_what_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xarray", None)
    said = "this needs the package xarray, which is not installed: pip install 'neml2-aoti-plugin[netcdf]'"
    assert said in refused("run", stub_of("elasticity"), "driver", "--out", tmp_path / "a.nc")
    with pytest.raises(InputError, match=re.escape(said)):
        read_result(tmp_path / "a.nc")


# -- plot ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # Of a uniaxial stress of 7, for which Mises' is the same; of a shear of 2; and of a pressure.
        ("vonmises", [7.0, 2 * math.sqrt(3), 0.0]),
        # Of an incompressible tension it would be the strain.
        ("equivalent", [14 / 3, 4 / math.sqrt(3), 0.0]),
        ("norm", [7.0, 2 * math.sqrt(2), 5 * math.sqrt(3)]),
        ("trace", [7.0, 0.0, 15.0]),
        ("mean", [7 / 3, 0.0, 5.0]),
    ],
)
def test_invariants(name: str, expected: list[float], tmp_path: Path) -> None:
    file, head = tmp_path / "a.csv", [f"s.{part}" for part in ("xx", "yy", "zz", "yz", "xz", "xy")]
    rows = ["7,0,0,0,0,0", "0,0,0,0,0,2", "5,5,5,0,0,0"]
    file.write_text("\n".join([",".join(["@step", "@point", *head]), *(f"0,{k},{row}" for k, row in enumerate(rows))]))
    lines = drawn(file, "--out", tmp_path / "a.svg", "--x", "@step", "--y", f"s.{name}")
    assert [line["y_last"] for line in lines] == pytest.approx(expected, abs=1e-12)


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
    ("words", "title", "labels"),
    [
        # Of the inputs the first component that has another value at each point, and of a ramp its last value.
        ((), "strain xx at the end", ["0.03", "0", "0.018"]),
        (("--label", "strain.equivalent"), "equivalent strain at the end", ["0.0298", "0.02939", "0.023"]),
        (("--label", "@point"), "point", ["0", "1", "2"]),
    ],
)
def test_legends_say_what_differs(
    words: tuple[str, ...], title: str, labels: list[str], results: Path, tmp_path: Path
) -> None:
    picture = tmp_path / "a.svg"
    lines = drawn(results / "result.npz", "--out", picture, *words)
    shown = texts(picture)
    assert {"von Mises stress", "equivalent strain", title} <= set(shown)
    found = shown[shown.index(title, 1) + 1 :][: len(labels)]
    assert list(map(float, found)) == pytest.approx(list(map(float, labels)), rel=1e-3)
    name = title.replace(" at the end", " to")
    assert [line["label"] for line in lines] == [f"{name} {value}" for value in found]


def test_a_constant_input_tells_points_apart_before_others(tmp_path: Path) -> None:
    """A temperature of each point says more than a strain that grows; many lines have a scale of colours instead."""
    axes = ("--x", "strain", "--y", "stress_xx")
    for count in (3, 12):
        rows = [f"{k},{p},{k},{k * (p + 1)},{300 + 10 * p},{k * p}" for k in range(3) for p in range(count)]
        file, picture = tmp_path / f"{count}.csv", tmp_path / f"{count}.svg"
        file.write_text("\n".join(["@step,@point,@time,strain,temperature,stress_xx", *rows]))
        lines = drawn(file, "--out", picture, *axes)
        assert [line["label"] for line in lines] == [f"temperature {300 + 10 * p}" for p in range(count)]
        shown = texts(picture)
        assert "temperature" in shown and "stress xx" in shown and ("310" in shown) == (count == 3)
    # One point of several keeps its label.
    (line,) = drawn(file, "--out", picture, *axes, "--row", 2)
    assert line["label"] == "temperature 320"


def test_quantities_of_other_kinds_have_their_own_axes(results: Path, tmp_path: Path) -> None:
    picture, file = tmp_path / "a.svg", results / "result.npz"
    words = ("--y", "stress.xx", "--y", "equivalent_plastic_strain", "--y", "stress.yy", "--x", "strain.xx")
    labels = ("--ylabel", "axial (MPa)", "--xlabel", "axial strain", "--title", "Steel")
    lines = drawn(file, "--out", picture, "--row", 0, *words, *labels)
    assert picture.read_text().count('id="axes_') == 2
    assert {"axial (MPa), stress yy", "equivalent plastic strain", "axial strain", "Steel"} <= set(texts(picture))
    assert [line["label"] for line in lines] == [
        f"{name}strain xx to 0.03" for name in ("axial (MPa), ", "stress yy, ", "")
    ]


def test_scalars_are_drawn_over_the_time_if_nothing_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("@step,@point,t,x\n0,0,0,1\n1,0,1,2\n")
    (line,) = drawn(tmp_path / "a.csv", "--out", tmp_path / "a.svg")
    assert (line["x"], line["y"], line["y_first"], line["y_last"]) == ("t", "x", 1.0, 2.0)
