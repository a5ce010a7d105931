"""Long runs over files: the same as one call, what is refused, full disks, and executors."""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import references
from attacks import children
from long_runs import FAILING, ROWS, Arrays, Run, arrays, assert_results, blocks, case, expected, joined, put, solved
from neml2_aoti_plugin import AOTIError, ArtifactError, InputError, InputTypeError, Model

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="signals and file systems of Linux")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


@pytest.fixture
def zarr() -> Any:
    return pytest.importorskip("zarr")


def read(sink: Path) -> dict[str, Any]:
    """The arrays of a sink, which is a Zarr group or a folder of files."""
    if sink.suffix == ".zarr":
        import zarr

        return dict(zarr.open_group(str(sink), mode="r").arrays())
    return {file.stem: np.load(file) for file in sink.glob("*.npy")}


class TestForms:
    def test_from_a_folder_to_a_folder(self, run: Run) -> None:
        told: list[tuple[int, int | None]] = []
        done = run(operation="jacobian", progress=lambda done, total: told.append((done, total)))
        assert (done.rows, done.evaluated, done.failed.tolist()) == (ROWS, ROWS, FAILING)
        assert_results(run.results(), expected(), *expected())
        assert run.results()["@failed_rows"].tolist() == FAILING
        assert sorted(told) == told and told[-1] == (ROWS, ROWS)

    @pytest.mark.parametrize("form", ["arrays", "tensors", "files", "memory maps", "parts of memory maps"])
    def test_from_a_dict(self, form: str, run: Run) -> None:
        forms: dict[str, Callable[[Path], Any]] = {
            "arrays": np.load,
            "tensors": lambda file: torch.from_numpy(np.load(file)),
            "files": lambda file: file,
            "memory maps": lambda file: np.load(file, mmap_mode="r"),
            # Which are not what their files begin with.
            "parts of memory maps": lambda file: np.load(file, mmap_mode="r")[10:20],
        }
        names, rows = (("strain", "t"), slice(10, 20)) if "parts" in form else (arrays(), slice(None))
        run({**arrays(), **{name: forms[form](run.source / f"{name}.npy") for name in names}})
        assert_results(run.results(), {name: value[rows] for name, value in expected().items()}, "stress", "@failed")

    @pytest.mark.parametrize("executor", [None, ThreadPoolExecutor])
    def test_from_blocks_to_a_function(self, executor: Any, run: Run) -> None:
        """It gets rows in their order, whoever evaluates them."""
        found: list[Arrays] = []
        with executor(2) if executor else contextlib.nullcontext() as threads:
            done = run(blocks(), found.append, executor=threads)
        assert done.rows == ROWS and done.failed.tolist() == FAILING
        assert [len(block["@failed"]) for block in found] == [100] * 5
        assert_results(joined(found), expected())

    def test_from_blocks_to_a_folder(self, run: Run) -> None:
        run(blocks(), rows=ROWS)
        assert_results(run.results(), expected())
        again = run(blocks(), rows=ROWS)
        assert again.evaluated == 0 and again.failed.tolist() == FAILING
        changed = [{**block, "t": block["t"] + (i == 2)} for i, block in enumerate(blocks())]
        with pytest.raises(InputError, match=r"rows 200 to 299 .* not those of the run"):
            run(changed, rows=ROWS)

    def test_zarr(self, zarr: Any, run: Run, tmp_path: Path) -> None:
        path = put("zarr", tmp_path, arrays())
        for given in (path, zarr.open_group(str(path), mode="r")):
            sink = tmp_path / f"out-{type(given).__name__}.zarr"
            assert run(given, sink).failed.tolist() == FAILING
            found = read(sink)
            assert_results(found, expected())
            assert found["@failed_rows"][...].tolist() == FAILING and found["stress"].chunks == (64, 6)
            assert run(given, sink).evaluated == 0

    @pytest.mark.long
    def test_memory_stays_flat(self, tmp_path: Path) -> None:
        """By the peak of a process that maps ten times as many rows."""
        less, more = (
            int(children.run(FLAT, case().artifact, tmp_path / str(rows), rows, limit=200).split()[-1])
            for rows in (20_000, 200_000)
        )
        assert more - less < 10 << 10, (less, more)


FLAT = """
import resource, sys
import numpy as np, torch
from pathlib import Path
from neml2_aoti_plugin import Model, map_rows

torch.set_num_threads(1)
model, folder, rows = Model(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
(folder / "in").mkdir(parents=True)
for name, variable in model.inputs.items():
    # Zeros that take no memory.
    np.lib.format.open_memmap(folder / "in" / f"{name}.npy", "w+", np.float64, (rows, *variable.base_shape))
np.save(folder / "in" / "t~1.npy", np.array(-1.0))

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
map_rows(model, folder / "in", folder / "out", progress=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""

# Names of files that lead elsewhere if they are taken as they are, and the file of the second one.
STRAIN, STRESS, FILE = "forces/E", "../../state/S", "%2E.%2F..%2Fstate%2FS"
STRAINS = 1e-3 * np.random.default_rng(2).standard_normal((200, 6))


def elasticity(folder: Path, stress: str = STRESS) -> Model:
    """Elasticity by names that are no names of files."""
    names = {"inputs": {"strain": STRAIN}, "outputs": {"stress": stress}}
    return references.altered("elasticity", folder / "model", boundary_aliases=names)


def stress_of(strain: np.ndarray) -> np.ndarray:
    found: np.ndarray = references.case("elasticity").model({"strain": torch.from_numpy(strain)})["stress"].numpy()
    return found


class TestNames:
    """What variables are called does not matter to the files, nor to what is ours among them."""

    @pytest.mark.parametrize("form", ["files", "zarr"])
    def test_files_lie_in_the_sink(self, form: str, request: pytest.FixtureRequest, run: Run, tmp_path: Path) -> None:
        if form == "zarr":
            request.getfixturevalue("zarr")
        sink = tmp_path / "a" / "b" / ("out.zarr" if form == "zarr" else "out")
        source = put(form, tmp_path / "given", {"forces%2FE": STRAINS})
        run(source, sink, elasticity(tmp_path), operation="jacobian")
        assert set(read(sink)) == {FILE, f"{FILE}@forces%2FE", "@failed", "@failed_rows"}
        assert {file.name for file in tmp_path.iterdir()} == {"a", "given", "model"}
        assert np.allclose(read(sink)[FILE][...], stress_of(STRAINS), rtol=1e-12)

    @pytest.mark.parametrize("name", ["failed", "failed_rows"])
    def test_an_output_of_the_name_of_a_mask(self, name: str, run: Run, tmp_path: Path) -> None:
        model, found = elasticity(tmp_path, name), list[Arrays]()
        for sink in (run.out, found.append):
            assert run({STRAIN: STRAINS}, sink, model).failed.tolist() == []
        for results in (run.results(), joined(found)):
            assert np.allclose(results[name], stress_of(STRAINS), rtol=1e-12) and not results["@failed"].any()


def test_rows_that_are_not_finite_have_failed(run: Run, tmp_path: Path) -> None:
    """In models that solve nothing too, and no other row has."""
    strain = STRAINS.copy()
    strain[70, 2], strain[199, 0] = np.nan, np.inf
    assert run({STRAIN: strain}, model=elasticity(tmp_path)).failed.tolist() == [70, 199]
    stress, failed = run.results()[FILE], run.results()["@failed"]
    assert np.flatnonzero(failed).tolist() == [70, 199] == run.results()["@failed_rows"].tolist()
    assert np.isnan(stress[failed]).all() and np.allclose(stress[~failed], stress_of(strain[~failed]), rtol=1e-12)


class TestSourcesAmongTheResults:
    """Refused, by whatever path they are named, and left as they are."""

    @pytest.mark.parametrize("way", ["itself", "link", "hard link", "memory map", "a view of a memory map"])
    def test_a_file(self, way: str, run: Run, tmp_path: Path) -> None:
        run.out.mkdir()
        result, other = run.out / "stress.npy", tmp_path / "given.npy"
        np.save(result, arrays()["strain"])
        before = run.files()
        given: Any = other if "link" in way else result
        if "link" in way:
            os.link(result, other) if "hard" in way else other.symlink_to(result)
        elif "memory map" in way:
            given = np.load(result, mmap_mode="r")
            given = np.asarray(given)[:] if "view" in way else given
        with pytest.raises(InputError, match=r"out/stress\.npy: the source .* is the same file"):
            run({**arrays(), "strain": given}, resume=False)
        assert run.files() == before

    @pytest.mark.usefixtures("zarr")
    def test_zarr(self, run: Run, tmp_path: Path) -> None:
        path, link = put("zarr", tmp_path, arrays()), tmp_path / "link.zarr"
        (path / "stress").symlink_to(path / "strain")
        link.symlink_to(path)
        for sink in (path, link):
            with pytest.raises(InputError, match=r"stress: the source .* is the same file"):
                run(path, sink, resume=False)
        assert np.array_equal(read(path)["strain"][...], arrays()["strain"], equal_nan=True)

    @pytest.mark.parametrize("name", ["stress.npy", "@failed_rows.npy", "journal.jsonl"])
    def test_a_link_in_the_sink_is_not_followed(self, name: str, run: Run, tmp_path: Path) -> None:
        foreign = tmp_path / "foreign"
        foreign.write_bytes(b"")
        run.out.mkdir()
        (run.out / name).symlink_to(foreign)
        with pytest.raises(InputError, match=name.replace(".", r"\.")):
            run(resume=False)
        assert foreign.read_bytes() == b"" and (run.out / name).is_symlink()

    def test_an_artifact_is_not_written_into(self, run: Run, tmp_path: Path) -> None:
        artifact = references.copied("viscoplasticity", tmp_path)
        before = sorted(artifact.rglob("*"))
        for sink in (artifact, artifact / "out", artifact / "cpu" / "x.zarr"):
            with pytest.raises(InputError, match="lies in the artifact"):
                run(model=artifact, sink=sink)
        assert sorted(artifact.rglob("*")) == before


class TestBadInput:
    """Refused before any work; no result is there that a later run would take for one."""

    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            ({"t": np.ones(499)}, InputError, r"differ in their number of rows: .*strain 500.*t 499"),
            ({"t": np.ones(ROWS, np.float32)}, InputTypeError, "'t' has dtype float32"),
            ({"strain": np.ones((ROWS, 3))}, InputError, r"'strain' has shape \(500, 3\)"),
            ({"strain": None}, InputError, "missing 'strain'"),
            ({"strian": np.ones((ROWS, 6))}, InputError, "unknown 'strian'.*The inputs are: strain, "),
            ({"strain": np.ones(6), "t": np.ones(())}, InputError, "there are no rows"),
            ({"t": [1.0]}, InputTypeError, "'t' is a list"),
        ],
    )
    def test_sources(self, run: Run, change: dict[str, Any], error: type, words: str) -> None:
        given = {name: value for name, value in {**arrays(), **change}.items() if value is not None}
        with pytest.raises(error, match=words):
            run(given)
        assert not run.out.exists()

    @pytest.mark.parametrize("what", ["cut off", "header", "pipe", "npz", "objects", "device"])
    def test_what_is_no_npy_file(self, what: str, run: Run) -> None:
        file = run.source / "t.npy"
        whole = file.read_bytes()
        file.unlink()
        if what == "cut off":
            file.write_bytes(whole[:200])
        elif what == "header":
            file.write_bytes(b"\x93NUMPY\x01\x00" + (9000).to_bytes(2, "little") + b"(" * 9000)
        elif what == "pipe":
            os.mkfifo(file)
        elif what == "device":
            file.symlink_to("/dev/zero")
        else:
            with file.open("wb") as out:
                np.savez(out, t=np.ones(ROWS)) if what == "npz" else np.save(out, np.array([{}] * ROWS))
        with pytest.raises(InputError, match=r"t\.npy: cannot be read as a \.npy file"):
            run()

    @pytest.mark.usefixtures("zarr")
    @pytest.mark.parametrize("text", ["", "[" * 100_000, "[]", '{"zarr_format": 3, "node_type": "array"}'])
    def test_a_zarr_array_that_is_damaged(self, text: str, run: Run, tmp_path: Path) -> None:
        source = put("zarr", tmp_path, arrays())
        (source / "t" / "zarr.json").write_text(text)
        with pytest.raises(InputError, match=r"in\.zarr/t: cannot be read as a Zarr array"):
            run(source)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            *(({"source": source, "rows": 3}, "source") for source in (3, "nothing", [], [1])),
            ({"sink": 3}, "sink is a int"),
            *(({"sink": f"out{end}"}, f"out{end}: is named like a file.* such as out") for end in (".txt", ".NPY")),
            ({"source": itertools.cycle(blocks())}, "rows is needed"),
            ({"operation": "jvp"}, "operation is 'jvp', expected one of forward, jacobian"),
            ({"chunk": 0}, "chunk is 0"),
            ({"rows": 0}, "rows is 0"),
            ({"executor": 3}, "executor is a int, expected one with submit"),
            ({"source": blocks(), "rows": ROWS - 1}, r"\(rows=\)"),
            ({"source": blocks(), "rows": ROWS + 1}, r"\(rows=\)"),
            ({"sink": "/proc/self/out"}, "cannot be written"),
            ({"sink": __file__}, "cannot be written"),
        ],
    )
    def test_arguments(self, run: Run, options: dict[str, Any], words: str) -> None:
        with pytest.raises(InputError, match=words):
            run(**options)

    @pytest.mark.parametrize("what", ["results without a journal", "a pipe for a journal"])
    def test_what_is_in_the_sink_already(self, what: str, run: Run) -> None:
        run.out.mkdir()
        if what == "a pipe for a journal":
            os.mkfifo(run.journal)
        else:
            np.save(run.out / "stress.npy", np.zeros(3))
        before = sorted(run.out.iterdir())
        with pytest.raises(InputError, match=r"no journal|no plain file"):
            run()
        assert sorted(run.out.iterdir()) == before

    def test_a_full_disk_at_the_start(self, run: Run) -> None:
        # Its graphs are unpacked at the first call, to files that are larger than the limit.
        solved(arrays())
        source, limits = run.source, resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        try:
            with pytest.raises(InputError, match=r"cannot be written \(File too large\). Make room"):
                run(source)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert list(run.files()) == ["journal.jsonl"]
        # With room, the same call begins.
        assert run().evaluated == ROWS


class TestExecutors:
    @pytest.mark.usefixtures("zarr")
    def test_blocks_that_share_a_chunk_of_zarr(self, run: Run, tmp_path: Path) -> None:
        """Which two workers must not write at once: each would undo what the other one has written."""
        with ThreadPoolExecutor(2) as threads:
            run(blocks(10), tmp_path / "out.zarr", executor=threads, rows=ROWS, chunk=ROWS)
        assert read(tmp_path / "out.zarr")["stress"].chunks == (ROWS, 6)
        assert_results(read(tmp_path / "out.zarr"), expected())

    @pytest.mark.long
    def test_a_process_pool_of_the_standard_library(self, run: Run) -> None:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
            run(model=case().artifact, executor=executor)
        assert_results(run.results(), solved(arrays(), Model(case().artifact)), "stress")

    @pytest.mark.parametrize("lost", ["artifact", "source", "journal"])
    def test_workers_that_do_not_see_the_same_files(self, lost: str, run: Run, tmp_path: Path) -> None:
        artifact = references.copied("viscoplasticity", tmp_path / "here")
        path, words = {
            "artifact": (artifact, "viscoplasticity"),
            "source": (run.source / "t.npy", "under the same path"),
            "journal": (run.journal, "does not see the sink"),
        }[lost]

        class Elsewhere(ThreadPoolExecutor):
            """Where a file is not."""

            def submit(self, *arguments: Any, **more: Any) -> Any:
                if path.exists():
                    path.rename(tmp_path / "gone")
                return super().submit(*arguments, **more)

        with Elsewhere(1) as executor, pytest.raises((ArtifactError, AOTIError), match=words):
            run(model=Model(artifact), executor=executor)
        # Nothing counts as done.
        journal = tmp_path / "gone" if lost == "journal" else run.journal
        assert len(journal.read_text().splitlines()) == 1

    @pytest.mark.long
    def test_an_executor_that_breaks_leaves_what_was_done(self, run: Run) -> None:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:

            def kill(done: int, total: int | None) -> None:
                if done >= 128:
                    for process in list((executor._processes or {}).values()):
                        process.kill()

            with pytest.raises(AOTIError, match="call map_rows again with a new executor"):
                run(executor=executor, progress=kill)
        assert 0 < run().evaluated <= ROWS - 128
        assert_results(run.results(), expected())
