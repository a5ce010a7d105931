"""Long runs over files: the same as one model, journals, full disks, and runs that are killed."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import references
from neml2_aoti_plugin import AOTIError, ArtifactError, InputError, InputTypeError, Model, map_rows
from neml2_aoti_plugin.parallel import Mapped
from processes import Program
from references import Case

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="signals and file systems of Linux")

ROWS = 500
FAILING = [7, 123, 499]
Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def case() -> Case:
    return references.case("viscoplasticity")


@pytest.fixture(scope="module")
def arrays() -> Arrays:
    """Rows of viscoplasticity, three of which fail; the state before the step is the same for all."""
    random = np.random.default_rng(11)
    strain = 3e-3 * random.standard_normal((ROWS, 6))
    strain[FAILING, 0] = np.nan
    return {
        "strain": strain,
        "strain~1": np.zeros(6),
        "t": 0.5 + random.random(ROWS),
        "t~1": np.zeros(()),
        "equivalent_plastic_strain~1": np.zeros(()),
        "stress~1": np.zeros(6),
    }


@pytest.fixture(scope="module")
def expected(case: Case, arrays: Arrays) -> Arrays:
    found = case.model.solve({name: torch.from_numpy(value) for name, value in arrays.items()}, jacobian=True)
    assert (~found.converged).nonzero().flatten().tolist() == FAILING
    values = {name: value.numpy() for name, value in found.outputs.items()}
    return {**values, "stress@strain": found.blocks["stress"]["strain"].numpy(), "@failed": ~found.converged.numpy()}


@pytest.fixture
def source(tmp_path: Path, arrays: Arrays) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    for name, value in arrays.items():
        np.save(folder / f"{name}.npy", value)
    return folder


@pytest.fixture(scope="module")
def threads() -> Iterator[ThreadPoolExecutor]:
    """An executor without processes, for what is not about them."""
    with ThreadPoolExecutor(2) as found:
        yield found


def assert_results(found: dict[str, Any], expected: Arrays, names: tuple[str, ...] = ()) -> None:
    names = names or ("stress", "equivalent_plastic_strain", "@failed")
    assert set(names) <= set(found)
    for name in names:
        mine, theirs = np.asarray(found[name]), expected[name]
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
        if mine.dtype == bool:
            assert (mine == theirs).all()
        else:
            assert (np.isnan(mine) == np.isnan(theirs)).all()
            assert np.nanmax(np.abs(mine - theirs)) <= 1e-12 * np.nanmax(np.abs(theirs)), name


def results(folder: Path) -> Arrays:
    return {file.stem: np.load(file) for file in folder.glob("*.npy")}


def quiet(model: Any, source: object, sink: object, **options: Any) -> Mapped:
    return map_rows(model, source, sink, **{"progress": False, "chunk": 64, **options})


class TestForms:
    def test_from_a_folder_to_a_folder(self, case: Case, source: Path, tmp_path: Path, expected: Arrays) -> None:
        told: list[tuple[int, int | None]] = []
        done = quiet(case.model, source, tmp_path / "out", progress=lambda done, total: told.append((done, total)))
        assert (done.rows, done.evaluated, done.failed.tolist()) == (ROWS, ROWS, FAILING)
        assert_results(results(tmp_path / "out"), expected)
        assert np.load(tmp_path / "out" / "@failed_rows.npy").tolist() == FAILING
        assert sorted(told) == told and told[-1] == (ROWS, ROWS)

    def test_with_derivatives(self, case: Case, source: Path, tmp_path: Path, expected: Arrays) -> None:
        quiet(case.model, source, tmp_path / "out", operation="jacobian")
        assert_results(results(tmp_path / "out"), expected, tuple(expected))

    @pytest.mark.parametrize("form", ["arrays", "tensors", "files", "memory maps"])
    def test_from_a_dict(
        self, form: str, case: Case, source: Path, arrays: Arrays, expected: Arrays, tmp_path: Path
    ) -> None:
        forms: dict[str, Callable[[str], Any]] = {
            "arrays": lambda name: arrays[name],
            "tensors": lambda name: torch.from_numpy(arrays[name]),
            "files": lambda name: source / f"{name}.npy",
            "memory maps": lambda name: np.load(source / f"{name}.npy", mmap_mode="r"),
        }
        quiet(case.model, {n: forms[form](n) for n in arrays}, tmp_path / "out")
        assert_results(results(tmp_path / "out"), expected)

    def test_from_a_part_of_a_memory_map(self, case: Case, source: Path, arrays: Arrays, tmp_path: Path) -> None:
        """Which is not what its file begins with."""
        given: dict[str, Any] = dict(arrays)
        given["strain"] = np.load(source / "strain.npy", mmap_mode="r")[10:20]
        given["t"] = np.load(source / "t.npy", mmap_mode="r")[10:20]
        quiet(case.model, given, tmp_path / "out")
        rows = {**{n: torch.from_numpy(a) for n, a in arrays.items()}}
        rows.update({name: rows[name][10:20] for name in ("strain", "t")})
        assert np.allclose(np.load(tmp_path / "out" / "stress.npy"), case.model.forward(rows)["stress"], rtol=1e-12)

    def test_from_blocks_to_a_function(self, case: Case, arrays: Arrays, expected: Arrays) -> None:
        found: list[Arrays] = []
        done = quiet(case.model, blocks(arrays), found.append)
        assert done.rows == ROWS and done.failed.tolist() == FAILING
        assert [len(block["t"]) for block in blocks(arrays)] == [len(block["@failed"]) for block in found]
        whole = {name: np.concatenate([block[name] for block in found]) for name in found[0]}
        assert_results(whole, expected)

    def test_from_blocks_to_a_folder(self, case: Case, arrays: Arrays, expected: Arrays, tmp_path: Path) -> None:
        quiet(case.model, blocks(arrays), tmp_path / "out", rows=ROWS)
        assert_results(results(tmp_path / "out"), expected)
        again = quiet(case.model, blocks(arrays), tmp_path / "out", rows=ROWS)
        assert again.evaluated == 0 and again.failed.tolist() == FAILING
        changed = [{**block, "t": block["t"] + (i == 2)} for i, block in enumerate(blocks(arrays))]
        with pytest.raises(InputError, match=r"rows 200 to 299 .* not those of the run"):
            quiet(case.model, changed, tmp_path / "out", rows=ROWS)

    def test_zarr(self, case: Case, arrays: Arrays, expected: Arrays, tmp_path: Path) -> None:
        zarr = pytest.importorskip("zarr")
        group = zarr.open_group(str(tmp_path / "in.zarr"), mode="w")
        for name, value in arrays.items():
            group.create_array(name, data=value)
        for given in (tmp_path / "in.zarr", group):
            sink = tmp_path / f"out-{type(given).__name__}.zarr"
            assert quiet(case.model, given, sink).failed.tolist() == FAILING
            found = zarr.open_group(str(sink), mode="r")
            assert_results({name: found[name][...] for name in expected if name in found}, expected)
            assert found["@failed_rows"][...].tolist() == FAILING
            assert found["stress"].chunks == (64, 6)
            assert quiet(case.model, given, sink).evaluated == 0

    @pytest.mark.long
    def test_memory_stays_flat(self, tmp_path: Path, case: Case) -> None:
        """By the peak of a process that maps ten times as many rows."""
        peaks = []
        for rows in (20_000, 200_000):
            with Program(FLAT, case.artifact, tmp_path / str(rows), rows) as program:
                status, out, err = program.finish(200)
                assert status == 0, err
                peaks.append(int(out.split()[-1]))
        assert peaks[1] - peaks[0] < 10 << 10, peaks

    @pytest.mark.wide
    def test_in_a_daemonic_process(self, case: Case, source: Path, tmp_path: Path, expected: Arrays) -> None:
        """Which must have no processes of its own, as those of multiprocessing's pools."""
        with Program(DAEMONIC, case.artifact, source, tmp_path / "out") as program:
            status, out, err = program.finish(100)
        assert (status, out) == (0, "0\n"), err
        assert results(tmp_path / "out")["@failed_rows"].tolist() == FAILING


DAEMONIC = """
import multiprocessing, sys

def work():
    from neml2_aoti_plugin import map_rows
    assert multiprocessing.current_process().daemon
    map_rows(*sys.argv[1:], progress=False)

process = multiprocessing.get_context("fork").Process(target=work, daemon=True)
process.start()
process.join()
print(process.exitcode)
"""

FLAT = """
import resource, sys
import numpy as np, torch
from pathlib import Path
from neml2_aoti_plugin import map_rows

torch.set_num_threads(1)
artifact, folder, rows = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
folder.mkdir()
(folder / "in").mkdir()
shapes = {"strain": (rows, 6), "strain~1": (rows, 6), "stress~1": (rows, 6), "t": (rows,), "t~1": (), }
shapes["equivalent_plastic_strain~1"] = (rows,)
for name, shape in shapes.items():
    # Zeros that take no memory.
    np.lib.format.open_memmap(folder / "in" / f"{name}.npy", "w+", np.float64, shape)
np.save(folder / "in" / "t~1.npy", np.array(-1.0))

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
map_rows(artifact, folder / "in", folder / "out", progress=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def _names(source: Path) -> list[str]:
    return [file.name.removesuffix(".npy") for file in source.glob("*.npy")]


def blocks(arrays: Arrays, size: int = 100) -> list[Arrays]:
    return [
        {n: a[start : start + size] if len(a.shape) and len(a) == ROWS else a for n, a in arrays.items()}
        for start in range(0, ROWS, size)
    ]


# Names of files that lead elsewhere if they are taken as they are.
ELASTIC = {"strain": "forces/E", "stress": "../../state/S"}


@pytest.fixture(scope="module")
def slashes(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Elasticity by names that are no names of files."""
    return _elasticity(tmp_path_factory.mktemp("slashes"), ELASTIC["stress"])


def _elasticity(folder: Path, stress: str) -> Model:
    def rename(metadata: dict[str, Any]) -> None:
        metadata["boundary_aliases"] = {"inputs": {"strain": ELASTIC["strain"]}, "outputs": {"stress": stress}}

    return Model(references.edited(references.case("elasticity"), folder, rename))


def hooke(strain: np.ndarray) -> np.ndarray:
    """The stress of stubs/elasticity.i."""
    young, poisson = 205000.0, 0.29
    trace = strain[:, :3].sum(1, keepdims=True) * np.array([1.0, 1, 1, 0, 0, 0])
    found: np.ndarray = young / (1 + poisson) * (strain + poisson / (1 - 2 * poisson) * trace)
    return found


class TestNames:
    """What variables are called does not matter to the files, nor to what is ours among them."""

    STRAIN = 1e-3 * np.random.default_rng(2).standard_normal((20, 6))

    def test_a_folder_of_files(self, slashes: Model, tmp_path: Path) -> None:
        (tmp_path / "a" / "in").mkdir(parents=True)
        np.save(tmp_path / "a" / "in" / "forces%2FE.npy", self.STRAIN)
        out = tmp_path / "a" / "b" / "out"
        quiet(slashes, tmp_path / "a" / "in", out, operation="jacobian")
        stress = "%2E.%2F..%2Fstate%2FS"
        names = {stress, f"{stress}@forces%2FE", "@failed", "@failed_rows"}
        assert set(results(out)) == names and {file.name for file in tmp_path.iterdir()} == {"a"}
        assert np.allclose(np.load(out / f"{stress}.npy"), hooke(self.STRAIN), rtol=1e-12)

    def test_zarr(self, slashes: Model, tmp_path: Path) -> None:
        zarr = pytest.importorskip("zarr")
        group = zarr.open_group(str(tmp_path / "in.zarr"), mode="w")
        group.create_array("forces%2FE", data=self.STRAIN)
        out = tmp_path / "a" / "out.zarr"
        quiet(slashes, tmp_path / "in.zarr", out)
        found = zarr.open_group(str(out), mode="r")
        assert sorted(found) == ["%2E.%2F..%2Fstate%2FS", "@failed", "@failed_rows"]
        assert np.allclose(found["%2E.%2F..%2Fstate%2FS"][...], hooke(self.STRAIN), rtol=1e-12)

    @pytest.mark.parametrize("name", ["failed", "failed_rows"])
    def test_an_output_of_the_name_of_a_mask(self, name: str, tmp_path: Path) -> None:
        model = _elasticity(tmp_path / "model", name)
        found: list[Arrays] = []
        for sink in (tmp_path / "out", found.append):
            done = quiet(model, {"forces/E": self.STRAIN}, sink)
            assert done.failed.tolist() == []
        for stress in (np.load(tmp_path / "out" / f"{name}.npy"), found[0][name]):
            assert np.allclose(stress, hooke(self.STRAIN), rtol=1e-12)
        assert not found[0]["@failed"].any() and not np.load(tmp_path / "out" / "@failed.npy").any()


class TestRowsThatAreNotFinite:
    """They have failed, in models that solve nothing too, and no other row has."""

    def test_an_input(self, slashes: Model, tmp_path: Path) -> None:
        strain = 1e-3 * np.random.default_rng(3).standard_normal((200, 6))
        strain[70, 2], strain[199, 0] = np.nan, np.inf
        assert quiet(slashes, {"forces/E": strain}, tmp_path / "out").failed.tolist() == [70, 199]
        found = results(tmp_path / "out")
        stress, failed = found["%2E.%2F..%2Fstate%2FS"], found["@failed"]
        assert np.flatnonzero(failed).tolist() == [70, 199] == found["@failed_rows"].tolist()
        assert np.isnan(stress[failed]).all() and np.allclose(stress[~failed], hooke(strain[~failed]), rtol=1e-12)

    @pytest.mark.wide
    def test_a_step_of_no_length(self, tmp_path: Path) -> None:
        """Of a rate; a cohesive zone."""
        separation = np.random.default_rng(5).random((100, 3))
        given = {
            "separation": separation,
            "separation~1": 0.5 * separation,
            "t": np.where(np.arange(100) == 33, 1.0, 3.0),
            "t~1": np.ones(()),
            "damage~1": np.zeros(()),
        }
        model = references.case("cohesive").model
        assert quiet(model, given, tmp_path / "out").failed.tolist() == [33]
        found = results(tmp_path / "out")
        others = np.arange(100) != 33
        assert all(np.isnan(found[name][33]).all() and np.isfinite(found[name][others]).all() for name in model.outputs)
        assert np.allclose(found["separation_rate"][others], 0.25 * separation[others], rtol=1e-12)


class TestSourcesAmongTheResults:
    """Refused, by whatever path they are named, and left as they are."""

    @pytest.mark.parametrize("way", ["itself", "link", "hard link", "memory map", "a view of a memory map"])
    def test_a_file(self, way: str, case: Case, arrays: Arrays, tmp_path: Path) -> None:
        out = tmp_path / "out"
        out.mkdir()
        result = out / "stress.npy"
        np.save(result, arrays["strain"])
        before = result.read_bytes()
        given: Any = result
        if way == "link":
            given = tmp_path / "given.npy"
            given.symlink_to(result)
        elif way == "hard link":
            given = tmp_path / "given.npy"
            os.link(result, given)
        elif "memory map" in way:
            given = np.load(result, mmap_mode="r")
            given = np.asarray(given)[:] if "view" in way else given
        with pytest.raises(InputError, match=r"out/stress\.npy: the source .* is the same file"):
            quiet(case.model, {**arrays, "strain": given}, out, resume=False)
        assert result.read_bytes() == before and list(out.iterdir()) == [result]

    def test_zarr(self, case: Case, arrays: Arrays, tmp_path: Path) -> None:
        zarr = pytest.importorskip("zarr")
        group = zarr.open_group(str(tmp_path / "both.zarr"), mode="w")
        for name, value in arrays.items():
            group.create_array(name, data=value)
        (tmp_path / "both.zarr" / "stress").symlink_to(tmp_path / "both.zarr" / "strain")
        (tmp_path / "link.zarr").symlink_to(tmp_path / "both.zarr")
        for sink in ("both.zarr", "link.zarr"):
            with pytest.raises(InputError, match=r"stress: the source .* is the same file"):
                quiet(case.model, tmp_path / "both.zarr", tmp_path / sink, resume=False)
        assert (group["strain"][...] == arrays["strain"])[~np.isnan(arrays["strain"])].all()

    @pytest.mark.parametrize("name", ["stress.npy", "@failed_rows.npy", "journal.jsonl"])
    def test_a_link_in_the_sink_is_not_followed(self, name: str, case: Case, source: Path, tmp_path: Path) -> None:
        foreign = tmp_path / "foreign"
        foreign.write_bytes(b"")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / name).symlink_to(foreign)
        with pytest.raises(InputError, match=name.replace(".", r"\.")):
            quiet(case.model, source, tmp_path / "out", resume=False)
        assert foreign.read_bytes() == b"" and (tmp_path / "out" / name).is_symlink()

    def test_a_pipe_in_the_place_of_the_journal(self, case: Case, source: Path, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        os.mkfifo(tmp_path / "out" / "journal.jsonl")
        with pytest.raises(InputError, match="no plain file"):
            quiet(case.model, source, tmp_path / "out")

    def test_an_artifact_is_not_written_into(self, case: Case, source: Path, tmp_path: Path) -> None:
        artifact = references.edited(case, tmp_path, lambda _: None)
        before = sorted(artifact.rglob("*"))
        for sink in (artifact, artifact / "out", artifact / "cpu" / "x.zarr"):
            with pytest.raises(InputError, match="lies in the artifact"):
                quiet(case.model, source, sink)
        assert sorted(artifact.rglob("*")) == before


class TestBadInput:
    """Refused before any work; no result is there that a later run would take for one."""

    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            pytest.param(
                {"t": np.ones(499)}, InputError, r"differ in their number of rows: .*strain 500.*t 499", id="rows"
            ),
            pytest.param({"t": np.ones(ROWS, np.float32)}, InputTypeError, "'t' has dtype float32", id="dtype"),
            pytest.param({"strain": np.ones((ROWS, 3))}, InputError, r"'strain' has shape \(500, 3\)", id="shape"),
            pytest.param({"strain": None}, InputError, "missing .strain.", id="missing"),
            pytest.param({"strian": np.ones((ROWS, 6))}, InputError, "unknown .strian.", id="unknown"),
            pytest.param({"strain": np.ones(6), "t": np.ones(())}, InputError, "there are no rows", id="no rows"),
            pytest.param({"t": [1.0]}, InputTypeError, "'t' is a list", id="list"),
        ],
    )
    def test_sources(
        self, case: Case, arrays: Arrays, tmp_path: Path, change: dict[str, Any], error: type, words: str
    ) -> None:
        given = {name: value for name, value in {**arrays, **change}.items() if value is not None}
        with pytest.raises(error, match=words):
            quiet(case.model, given, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_a_file_that_is_damaged(self, case: Case, source: Path, tmp_path: Path) -> None:
        (source / "t.npy").write_bytes((source / "t.npy").read_bytes()[:200])
        with pytest.raises(InputError, match=r"t\.npy: cannot be read as a \.npy file"):
            quiet(case.model, source, tmp_path / "out")

    @pytest.mark.parametrize("what", ["header", "pipe", "npz", "objects", "device"])
    def test_what_is_no_npy_file(self, what: str, case: Case, source: Path, tmp_path: Path) -> None:
        file = source / "t.npy"
        file.unlink()
        if what == "header":
            text = b"(" * 9000
            file.write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text)
        elif what == "pipe":
            os.mkfifo(file)
        elif what == "npz":
            with file.open("wb") as out:
                np.savez(out, t=np.ones(ROWS))
        elif what == "objects":
            np.save(file, np.array([{}] * ROWS))
        else:
            file.symlink_to("/dev/zero")
        with pytest.raises(InputError, match=r"t\.npy: cannot be read as a \.npy file"):
            quiet(case.model, source, tmp_path / "out")

    @pytest.mark.parametrize("text", ["", "[" * 100_000, "[]", '{"zarr_format": 3, "node_type": "array"}'])
    def test_a_zarr_array_that_is_damaged(self, text: str, case: Case, arrays: Arrays, tmp_path: Path) -> None:
        zarr = pytest.importorskip("zarr")
        group = zarr.open_group(str(tmp_path / "in.zarr"), mode="w")
        for name, value in arrays.items():
            group.create_array(name, data=value)
        (tmp_path / "in.zarr" / "t" / "zarr.json").write_text(text)
        with pytest.raises(InputError, match=r"in\.zarr/t: cannot be read as a Zarr array"):
            quiet(case.model, tmp_path / "in.zarr", tmp_path / "out")

    def test_what_is_no_source_or_sink(self, case: Case, source: Path, tmp_path: Path) -> None:
        for given in (3, tmp_path / "nothing", [], [1]):
            with pytest.raises(InputError, match="source"):
                quiet(case.model, given, tmp_path / "out", rows=3)
        with pytest.raises(InputTypeError, match="sink is a int"):
            quiet(case.model, source, 3)
        with pytest.raises(InputError, match="rows is needed"):
            quiet(case.model, _endless(source), tmp_path / "out")

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"operation": "jvp"}, "operation is 'jvp', expected one of forward, jacobian"),
            ({"chunk": 0}, "chunk is 0"),
            ({"rows": 0}, "rows is 0"),
            ({"executor": 3}, "executor is a int, expected one with submit"),
        ],
    )
    def test_options(self, case: Case, source: Path, tmp_path: Path, options: dict[str, Any], words: str) -> None:
        with pytest.raises(InputError, match=words):
            quiet(case.model, source, tmp_path / "out", **options)

    @pytest.mark.parametrize("rows", [ROWS - 1, ROWS + 1])
    def test_blocks_of_other_numbers_of_rows(self, case: Case, arrays: Arrays, tmp_path: Path, rows: int) -> None:
        with pytest.raises(InputError, match=r"\(rows=\)"):
            quiet(case.model, blocks(arrays), tmp_path / "out", rows=rows)

    def test_a_sink_that_is_a_file_or_read_only(self, case: Case, source: Path, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(InputError, match="cannot be written"):
            quiet(case.model, source, tmp_path / "file")
        with pytest.raises(InputError, match="cannot be written"):
            quiet(case.model, source, "/proc/self/out")

    def test_results_without_a_journal_are_not_touched(self, case: Case, source: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        out.mkdir()
        np.save(out / "stress.npy", np.zeros(3))
        with pytest.raises(InputError, match="no journal"):
            quiet(case.model, source, out)
        assert np.load(out / "stress.npy").shape == (3,) and len(list(out.iterdir())) == 1

    def test_a_full_disk_at_the_start(self, case: Case, source: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        with Program(FULL, case.artifact, source, out) as program:
            status, told, err = program.finish(60)
        assert status == 0, err
        assert "InputError" in told and "cannot be written (File too large). Make room" in told
        assert [file.name for file in out.iterdir()] == ["journal.jsonl"]
        # With room, the same call begins.
        assert quiet(case.artifact, source, out).evaluated == ROWS

    def test_a_small_file_system(self, case: Case, source: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        out.mkdir()
        if os.system(f"mount -t tmpfs -o size=32k tmpfs '{out}' 2>/dev/null") != 0:
            pytest.skip("only root may mount a file system")
        try:
            with pytest.raises(InputError, match="No space left on device"):
                quiet(case.model, source, out)
            assert not list(out.glob("*.npy"))
        finally:
            assert os.system(f"umount '{out}'") == 0


FULL = """
import resource, sys
import numpy as np, torch
from neml2_aoti_plugin import Model, map_rows

model = Model(sys.argv[1])
# Its graphs are unpacked at the first call, to files that are larger than this.
model.solve({name: torch.from_numpy(np.load(f"{sys.argv[2]}/{name}.npy")) for name in model.inputs})
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    map_rows(model, *sys.argv[2:], chunk=64, progress=False)
except Exception as error:
    print(type(error).__name__, error)
"""


def _endless(source: Path) -> Iterator[Arrays]:
    while True:
        yield {name: np.load(source / f"{name}.npy") for name in _names(source)}


class TestJournal:
    def test_nothing_is_evaluated_twice(self, case: Case, source: Path, tmp_path: Path, expected: Arrays) -> None:
        out = tmp_path / "out"
        assert quiet(case.model, source, out).evaluated == ROWS
        assert quiet(case.model, source, out).evaluated == 0
        assert quiet(case.model, source, out, resume=False).evaluated == ROWS
        assert_results(results(out), expected)

    @pytest.mark.parametrize("cut", [1, 30, 100])
    def test_a_line_that_was_cut_off_counts_for_nothing(
        self, case: Case, source: Path, tmp_path: Path, expected: Arrays, cut: int
    ) -> None:
        out = tmp_path / "out"
        quiet(case.model, source, out)
        journal = out / "journal.jsonl"
        text = journal.read_text()
        journal.write_text(text[:-cut])
        lost = sum(64 if line["stop"] < ROWS else ROWS % 64 for line in _lost(text, cut))
        assert quiet(case.model, source, out).evaluated == lost > 0
        assert [json.loads(line) for line in journal.read_text().splitlines()]

    @pytest.mark.parametrize("change", ["operation", "chunk", "solver", "source", "model"])
    def test_that_of_another_run(self, change: str, case: Case, source: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        quiet(case.model, source, out)
        before = {file.name: file.read_bytes() for file in out.iterdir()}
        model = case.model
        options: dict[str, Any] = {}
        if change == "operation":
            options = {"operation": "jacobian"}
        elif change == "chunk":
            options = {"chunk": 32}
        elif change == "solver":
            model = case.load()
            model.set_solver(miters=30)
        elif change == "source":
            np.save(source / "stress~1.npy", np.zeros((ROWS, 6)))
        else:
            artifact = references.edited(case, tmp_path / "other", lambda _: None)
            model = Model(artifact)
            model.set_solver_config(**case.newton)
        with pytest.raises(InputError, match=rf"journal of another run: .*{change}.* differ"):
            quiet(model, source, out, **options)
        assert {file.name: file.read_bytes() for file in out.iterdir()} == before

    @pytest.mark.parametrize("resume", [True, False])
    @pytest.mark.parametrize("text", ["my diary\n", "my diary", '{"other": 1}\n'])
    def test_that_of_something_else(self, case: Case, source: Path, tmp_path: Path, text: str, resume: bool) -> None:
        file = tmp_path / "out" / "journal.jsonl"
        file.parent.mkdir()
        file.write_text(text)
        with pytest.raises(InputError, match="is no journal"):
            quiet(case.model, source, tmp_path / "out", resume=resume)
        assert list(file.parent.iterdir()) == [file] and file.read_text() == text

    def test_nested_deeper_than_python_reads(self, case: Case, source: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        quiet(case.model, source, out)
        journal = out / "journal.jsonl"
        whole = journal.read_bytes()
        deep = b"[" * 100_000 + b"\n"
        journal.write_bytes(deep + whole)
        with pytest.raises(InputError, match="is no journal"):
            quiet(case.model, source, out)
        assert journal.read_bytes() == deep + whole

    @pytest.mark.parametrize(
        "line",
        [
            pytest.param(b"[" * 100_000 + b"\n", id="nested"),
            pytest.param(b'{"start": 0, "stop": 64, "x": "\xff\xfe"}\n', id="not UTF-8"),
            pytest.param(b'{"start": 0, "stop": 1e999}\n', id="infinite"),
            pytest.param(b'{"start": 0, "stop": ' + b"9" * 9999 + b"}\n", id="huge"),
            pytest.param(b'{"start": 0, "stop": true}\n', id="bool"),
            pytest.param(b"\0" * 4096, id="zeros"),
            pytest.param(b'{"start": 0, "x": "' + b" " * (2 << 20) + b'", "stop": 64}\n', id="long"),
        ],
    )
    def test_a_line_that_is_damaged_and_what_follows_count_for_nothing(
        self, line: bytes, case: Case, source: Path, tmp_path: Path, expected: Arrays
    ) -> None:
        out = tmp_path / "out"
        quiet(case.model, source, out)
        journal = out / "journal.jsonl"
        lines = journal.read_bytes().splitlines(keepends=True)
        journal.write_bytes(b"".join([*lines[:3], line, *lines[3:]]))
        kept = sum(record["stop"] - record["start"] for record in map(json.loads, lines[1:3]))
        assert quiet(case.model, source, out).evaluated == ROWS - kept
        assert_results(results(out), expected)
        again = journal.read_bytes().splitlines(keepends=True)
        assert again[:3] == lines[:3] and sorted(again) == sorted(lines)

    def test_results_that_are_gone(self, case: Case, source: Path, tmp_path: Path) -> None:
        quiet(case.model, source, tmp_path / "out")
        (tmp_path / "out" / "stress.npy").unlink()
        with pytest.raises(InputError, match=r"stress\.npy: is not there as the journal"):
            quiet(case.model, source, tmp_path / "out")

    def test_two_runs_at_once(self, case: Case, source: Path, tmp_path: Path) -> None:
        refused: list[str] = []

        def again(done: int, total: int | None) -> None:
            if not refused:
                with pytest.raises(InputError, match="another process is writing") as raised:
                    quiet(case.model, source, tmp_path / "out")
                refused.append(str(raised.value))

        quiet(case.model, source, tmp_path / "out", progress=again)
        assert refused


class TestExecutors:
    def test_threads(self, case: Case, source: Path, tmp_path: Path, expected: Arrays, threads: Any) -> None:
        quiet(case.model, source, tmp_path / "out", executor=threads)
        assert_results(results(tmp_path / "out"), expected)

    def test_a_function_gets_rows_in_their_order(
        self, case: Case, arrays: Arrays, expected: Arrays, threads: ThreadPoolExecutor
    ) -> None:
        found: list[Arrays] = []
        assert quiet(case.model, arrays, found.append, executor=threads).failed.tolist() == FAILING
        assert_results({name: np.concatenate([block[name] for block in found]) for name in found[0]}, expected)

    def test_blocks_that_share_a_chunk_of_zarr(
        self, case: Case, arrays: Arrays, expected: Arrays, tmp_path: Path, threads: ThreadPoolExecutor
    ) -> None:
        """Which two workers must not write at once: each would undo what the other one has written."""
        zarr = pytest.importorskip("zarr")
        given = blocks(arrays, 10)
        quiet(case.model, given, tmp_path / "out.zarr", executor=threads, rows=ROWS, chunk=ROWS)
        found = zarr.open_group(str(tmp_path / "out.zarr"), mode="r")
        assert found["stress"].chunks == (ROWS, 6)
        assert_results({name: found[name][...] for name in expected if name in found}, expected)

    @pytest.mark.long
    def test_a_process_pool_of_the_standard_library(
        self, case: Case, source: Path, tmp_path: Path, expected: Arrays
    ) -> None:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
            quiet(case.artifact, source, tmp_path / "out", executor=executor)
        loose = Model(case.artifact).solve({n: torch.from_numpy(np.load(source / f"{n}.npy")) for n in _names(source)})
        assert_results(results(tmp_path / "out"), {n: v.numpy() for n, v in loose.outputs.items()}, ("stress",))

    def test_an_artifact_that_workers_do_not_see(self, source: Path, tmp_path: Path, case: Case) -> None:
        artifact = references.edited(case, tmp_path / "here", lambda _: None)
        model = Model(artifact)

        class Elsewhere(ThreadPoolExecutor):
            """Where the artifact is not."""

            def submit(self, *arguments: Any, **more: Any) -> Any:
                if artifact.exists():
                    artifact.rename(tmp_path / "gone")
                return super().submit(*arguments, **more)

        with Elsewhere(1) as executor, pytest.raises(ArtifactError, match="viscoplasticity"):
            quiet(model, source, tmp_path / "out", executor=executor)
        # Nothing counts as done.
        assert len((tmp_path / "out" / "journal.jsonl").read_text().splitlines()) == 1

    @pytest.mark.long
    def test_an_executor_that_breaks_leaves_what_was_done(
        self, case: Case, source: Path, tmp_path: Path, expected: Arrays
    ) -> None:
        out = tmp_path / "out"
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:

            def kill(done: int, total: int | None) -> None:
                if done >= 128:
                    for process in list((executor._processes or {}).values()):
                        process.kill()

            with pytest.raises(AOTIError, match="call map_rows again with a new executor"):
                quiet(case.model, source, out, executor=executor, progress=kill)
        again = quiet(case.model, source, out)
        assert 0 < again.evaluated <= ROWS - 128
        assert_results(results(out), expected)


class TestSourcesThatChange:
    """Rows are told by what they are, not by their files' sizes and times; old and new ones are never mixed."""

    @staticmethod
    def put(form: str, folder: Path, arrays: Arrays) -> object:
        if form == "arrays":
            return arrays
        if form == "zarr":
            group = pytest.importorskip("zarr").open_group(str(folder / "in.zarr"), mode="w")
            for name, value in arrays.items():
                group.create_array(name, data=value)
            return folder / "in.zarr"
        (folder / "in").mkdir(exist_ok=True)
        for name, value in arrays.items():
            np.save(folder / "in" / f"{name}.npy", value)
            os.utime(folder / "in" / f"{name}.npy", (1e9, 1e9))
        return folder / "in"

    @staticmethod
    def stopped(model: Model, source: object, out: Path) -> int:
        """Rows that are done in a run that is stopped."""

        def stop(done: int, total: int | None) -> None:
            if done >= 128:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            quiet(model, source, out, progress=stop)
        lines = [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()[1:]]
        return sum(line["stop"] - line["start"] for line in lines)

    @pytest.mark.parametrize("common", [False, True])
    @pytest.mark.parametrize("form", ["files", "zarr", "arrays"])
    def test_rows_that_are_done(self, form: str, common: bool, case: Case, arrays: Arrays, tmp_path: Path) -> None:
        out = tmp_path / "out"
        assert 128 <= self.stopped(case.model, self.put(form, tmp_path, arrays), out) < ROWS
        start = json.loads((out / "journal.jsonl").read_text().splitlines()[1])["start"]
        before = {file.name: file.read_bytes() for file in out.iterdir()}
        changed = {name: value.copy() for name, value in arrays.items()}
        if common:
            changed["stress~1"][0] = 1e-9
        else:
            changed["t"][start + 6] += 1e-9
        # No row is evaluated before that is found.
        with pytest.raises(InputError, match=rf"rows {'.*' if common else start} to .* not those of the run"):
            quiet(case.model, self.put(form, tmp_path, changed), out)
        assert {file.name: file.read_bytes() for file in out.iterdir()} == before

    @pytest.mark.parametrize("form", ["files", "zarr", "arrays"])
    def test_rows_that_are_not_done(self, form: str, case: Case, arrays: Arrays, tmp_path: Path) -> None:
        """Which are evaluated as they are now."""
        out = tmp_path / "out"
        done = self.stopped(case.model, self.put(form, tmp_path, arrays), out)
        changed = {**arrays, "t": arrays["t"] + 0.25 * (np.arange(ROWS) >= 448)}
        again = quiet(case.model, self.put(form, tmp_path, changed), out)
        assert again.evaluated == ROWS - done
        whole = case.model.solve({name: torch.from_numpy(value) for name, value in changed.items()})
        assert_results(results(out), {name: value.numpy() for name, value in whole.outputs.items()}, ("stress",))

    def test_that_move(self, case: Case, source: Path, tmp_path: Path) -> None:
        quiet(case.model, source, tmp_path / "out")
        moved = source.rename(tmp_path / "elsewhere")
        os.utime(moved / "t.npy", (1e9, 1e9))
        assert quiet(case.model, moved, tmp_path / "out").evaluated == 0


def _lost(text: str, cut: int) -> list[dict[str, Any]]:
    """The lines of a journal that end behind a place."""
    end, found = len(text) - cut, []
    place = 0
    for line in text.splitlines(keepends=True):
        place += len(line)
        if place > end:
            found.append(json.loads(line))
    return found


LONG_RUN = """
import sys
from neml2_aoti_plugin import map_rows
import neml2_aoti_plugin.parallel._rows as rows
rows.SYNC = 0.05
try:
    map_rows(*sys.argv[1:4], chunk=64, progress=lambda done, total: print(done, flush=True))
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


# As many copies of the rows, so that a run lasts long enough.
TIMES = 20


class TestRunsThatAreKilled:
    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
    def test_it_goes_on_where_it_was(self, number: signal.Signals, case: Case, source: Path, tmp_path: Path) -> None:
        out, many = tmp_path / "out", tmp_path / "many"
        many.mkdir()
        for name in _names(source):
            value = np.load(source / f"{name}.npy")
            if value.shape[:1] == (ROWS,):
                value = np.concatenate([value] * TIMES)
            np.save(many / f"{name}.npy", value)
        with Program(LONG_RUN, case.artifact, many, out) as program:
            while int(program.line()) < 2000:
                pass
            if number == signal.SIGINT:
                program.signal_group(number)
                status, told, err = program.finish(30)
                assert status == 0 and told.split()[-1] == "interrupted" and "Traceback" not in err
            else:
                os.kill(program.pid, number)
                program.finish(30)
        lines = [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()[1:] if line[-1] == "}"]
        done = sum(line["stop"] - line["start"] for line in lines)
        assert 0 < done < TIMES * ROWS
        again = quiet(case.artifact, many, out)
        assert 0 < again.evaluated <= TIMES * ROWS - done + 64
        model = Model(case.artifact)
        whole = model.solve({n: torch.from_numpy(np.load(many / f"{n}.npy")) for n in _names(source)})
        values = {name: value.numpy() for name, value in whole.outputs.items()}
        assert_results(results(out), {**values, "@failed": ~whole.converged.numpy()})
