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
from processes import Program, descendants, is_alive, leftovers, wait_until
from references import Case

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at processes in /proc")

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
    return {**values, "stress@strain": found.blocks["stress"]["strain"].numpy(), "failed": ~found.converged.numpy()}


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
    names = names or ("stress", "equivalent_plastic_strain", "failed")
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
    def test_from_a_folder_to_a_folder_on_processes(
        self, case: Case, source: Path, tmp_path: Path, expected: Arrays
    ) -> None:
        told: list[tuple[int, int | None]] = []
        done = quiet(
            case.model, source, tmp_path / "out", workers=1, progress=lambda done, total: told.append((done, total))
        )
        assert (done.rows, done.evaluated, done.failed.tolist()) == (ROWS, ROWS, FAILING)
        assert_results(results(tmp_path / "out"), expected)
        assert np.load(tmp_path / "out" / "failed_rows.npy").tolist() == FAILING
        assert sorted(told) == told and told[-1] == (ROWS, ROWS)
        assert leftovers(os.getpid()) == [] or all("sem.loky" in name for name in leftovers(os.getpid()))

    def test_with_derivatives(
        self, case: Case, source: Path, tmp_path: Path, expected: Arrays, threads: ThreadPoolExecutor
    ) -> None:
        quiet(case.model, source, tmp_path / "out", executor=threads, operation="jacobian")
        assert_results(results(tmp_path / "out"), expected, tuple(expected))

    @pytest.mark.parametrize("form", ["arrays", "tensors", "files", "memory maps"])
    def test_from_a_dict(
        self, form: str, case: Case, source: Path, arrays: Arrays, expected: Arrays, tmp_path: Path, threads: Any
    ) -> None:
        forms: dict[str, Callable[[str], Any]] = {
            "arrays": lambda name: arrays[name],
            "tensors": lambda name: torch.from_numpy(arrays[name]),
            "files": lambda name: source / f"{name}.npy",
            "memory maps": lambda name: np.load(source / f"{name}.npy", mmap_mode="r"),
        }
        quiet(case.model, {n: forms[form](n) for n in arrays}, tmp_path / "out", executor=threads)
        assert_results(results(tmp_path / "out"), expected)

    def test_from_a_part_of_a_memory_map(self, case: Case, source: Path, arrays: Arrays, tmp_path: Path) -> None:
        """Which is not what its file begins with."""
        given: dict[str, Any] = dict(arrays)
        given["strain"] = np.load(source / "strain.npy", mmap_mode="r")[10:20]
        given["t"] = np.load(source / "t.npy", mmap_mode="r")[10:20]
        with ThreadPoolExecutor(1) as executor:
            quiet(case.model, given, tmp_path / "out", executor=executor)
        rows = {**{n: torch.from_numpy(a) for n, a in arrays.items()}}
        rows.update({name: rows[name][10:20] for name in ("strain", "t")})
        assert np.allclose(np.load(tmp_path / "out" / "stress.npy"), case.model.forward(rows)["stress"], rtol=1e-12)

    def test_from_blocks_to_a_function(
        self, case: Case, arrays: Arrays, expected: Arrays, threads: ThreadPoolExecutor
    ) -> None:
        found: list[Arrays] = []
        done = quiet(case.model, blocks(arrays), found.append, executor=threads)
        assert done.rows == ROWS and done.failed.tolist() == FAILING
        assert [len(block["t"]) for block in blocks(arrays)] == [len(block["failed"]) for block in found]
        whole = {name: np.concatenate([block[name] for block in found]) for name in found[0]}
        assert_results(whole, expected)

    def test_from_blocks_to_a_folder(
        self, case: Case, arrays: Arrays, expected: Arrays, tmp_path: Path, threads: ThreadPoolExecutor
    ) -> None:
        quiet(case.model, blocks(arrays), tmp_path / "out", executor=threads, rows=ROWS)
        assert_results(results(tmp_path / "out"), expected)
        again = quiet(case.model, blocks(arrays), tmp_path / "out", executor=threads, rows=ROWS)
        assert again.evaluated == 0 and again.failed.tolist() == FAILING
        changed = [{**block, "t": block["t"] + (i == 2)} for i, block in enumerate(blocks(arrays))]
        with pytest.raises(InputError, match=r"rows 200 to 299 .* not those of the run"):
            quiet(case.model, changed, tmp_path / "out", executor=threads, rows=ROWS)

    def test_zarr(self, case: Case, arrays: Arrays, expected: Arrays, tmp_path: Path, threads: Any) -> None:
        zarr = pytest.importorskip("zarr")
        group = zarr.open_group(str(tmp_path / "in.zarr"), mode="w")
        for name, value in arrays.items():
            group.create_array(name, data=value)
        for given in (tmp_path / "in.zarr", group):
            sink = tmp_path / f"out-{type(given).__name__}.zarr"
            assert quiet(case.model, given, sink, executor=threads).failed.tolist() == FAILING
            found = zarr.open_group(str(sink), mode="r")
            assert_results({name: found[name][...] for name in expected if name in found}, expected)
            assert found["failed_rows"][...].tolist() == FAILING
            assert found["stress"].chunks == (64, 6)
            assert quiet(case.model, given, sink, executor=threads).evaluated == 0

    @pytest.mark.long
    def test_a_process_pool_of_the_standard_library(
        self, case: Case, source: Path, tmp_path: Path, expected: Arrays
    ) -> None:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
            quiet(case.artifact, source, tmp_path / "out", executor=executor)
        loose = Model(case.artifact).solve({n: torch.from_numpy(np.load(source / f"{n}.npy")) for n in _names(source)})
        assert_results(results(tmp_path / "out"), {n: v.numpy() for n, v in loose.outputs.items()}, ("stress",))

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


FLAT = """
import resource, sys
from concurrent.futures import Future
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

class Here:
    _max_workers = 1

    def submit(self, function, *arguments):
        found = Future()
        found.set_result(function(*arguments))
        return found

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
map_rows(artifact, folder / "in", folder / "out", executor=Here(), progress=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def _names(source: Path) -> list[str]:
    return [file.name.removesuffix(".npy") for file in source.glob("*.npy")]


def blocks(arrays: Arrays) -> list[Arrays]:
    return [
        {n: a[start : start + 100] if len(a.shape) and len(a) == ROWS else a for n, a in arrays.items()}
        for start in range(0, ROWS, 100)
    ]


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
            pytest.param({"strain": None}, InputError, "missing strain", id="missing"),
            pytest.param({"strian": np.ones((ROWS, 6))}, InputError, "unknown strian", id="unknown"),
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
            ({"workers": 0}, "workers is 0"),
            ({"executor": 3}, "executor is a int, expected one with submit"),
            ({"executor": ThreadPoolExecutor(1), "workers": 2}, "one of the two"),
        ],
    )
    def test_options(self, case: Case, source: Path, tmp_path: Path, options: dict[str, Any], words: str) -> None:
        with pytest.raises(InputError, match=words):
            quiet(case.model, source, tmp_path / "out", **options)

    @pytest.mark.parametrize("rows", [ROWS - 1, ROWS + 1])
    def test_blocks_of_other_numbers_of_rows(
        self, case: Case, arrays: Arrays, tmp_path: Path, rows: int, threads: ThreadPoolExecutor
    ) -> None:
        with pytest.raises(InputError, match=r"\(rows=\)"):
            quiet(case.model, blocks(arrays), tmp_path / "out", rows=rows, executor=threads)

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
        with ThreadPoolExecutor(1) as executor:
            assert quiet(case.artifact, source, out, executor=executor).evaluated == ROWS

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
    def test_nothing_is_evaluated_twice(
        self, case: Case, source: Path, tmp_path: Path, expected: Arrays, threads: ThreadPoolExecutor
    ) -> None:
        out = tmp_path / "out"
        assert quiet(case.model, source, out, executor=threads).evaluated == ROWS
        assert quiet(case.model, source, out, executor=threads).evaluated == 0
        assert quiet(case.model, source, out, executor=threads, resume=False).evaluated == ROWS
        assert_results(results(out), expected)

    @pytest.mark.parametrize("cut", [1, 30, 100])
    def test_a_line_that_was_cut_off_counts_for_nothing(
        self, case: Case, source: Path, tmp_path: Path, expected: Arrays, threads: ThreadPoolExecutor, cut: int
    ) -> None:
        out = tmp_path / "out"
        quiet(case.model, source, out, executor=threads)
        journal = out / "journal.jsonl"
        text = journal.read_text()
        journal.write_text(text[:-cut])
        lost = sum(64 if line["stop"] < ROWS else ROWS % 64 for line in _lost(text, cut))
        assert quiet(case.model, source, out, executor=threads).evaluated == lost > 0
        assert [json.loads(line) for line in journal.read_text().splitlines()]

    @pytest.mark.parametrize("change", ["operation", "chunk", "solver", "source", "model"])
    def test_that_of_another_run(
        self, change: str, case: Case, source: Path, tmp_path: Path, threads: ThreadPoolExecutor
    ) -> None:
        out = tmp_path / "out"
        quiet(case.model, source, out, executor=threads)
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
            np.save(source / "t.npy", np.load(source / "t.npy") + 1.0)
        else:
            artifact = references.edited(case, tmp_path / "other", lambda _: None)
            model = Model(artifact)
            model.set_solver_config(**case.newton)
        with pytest.raises(InputError, match=rf"journal of another run: .*{change}.* differ"):
            quiet(model, source, out, executor=threads, **options)
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

    def test_results_that_are_gone(self, case: Case, source: Path, tmp_path: Path, threads: ThreadPoolExecutor) -> None:
        quiet(case.model, source, tmp_path / "out", executor=threads)
        (tmp_path / "out" / "stress.npy").unlink()
        with pytest.raises(InputError, match=r"stress\.npy: is not there as the journal"):
            quiet(case.model, source, tmp_path / "out", executor=threads)

    def test_two_runs_at_once(self, case: Case, source: Path, tmp_path: Path, threads: ThreadPoolExecutor) -> None:
        refused: list[str] = []

        def again(done: int, total: int | None) -> None:
            if not refused:
                with pytest.raises(InputError, match="another process is writing") as raised:
                    quiet(case.model, source, tmp_path / "out", executor=threads)
                refused.append(str(raised.value))

        quiet(case.model, source, tmp_path / "out", executor=threads, progress=again)
        assert refused

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
        assert len((tmp_path / "out" / "journal.jsonl").read_text().splitlines()) == 2

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
        with ThreadPoolExecutor(1) as fresh:
            again = quiet(case.model, source, out, executor=fresh)
        assert 0 < again.evaluated <= ROWS - 128
        assert_results(results(out), expected)


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
import neml2_aoti_plugin.parallel.rows as rows
rows.SYNC = 0.05
try:
    map_rows(*sys.argv[1:4], workers=1, chunk=64, progress=lambda done, total: print(done, flush=True))
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


# As many copies of the rows, so that a run lasts long enough.
TIMES = 20


class TestRunsThatAreKilled:
    @pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
    def test_it_goes_on_where_it_was(
        self, number: signal.Signals, case: Case, source: Path, tmp_path: Path, threads: ThreadPoolExecutor
    ) -> None:
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
            started = descendants(program.pid)
            if number == signal.SIGINT:
                program.signal_group(number)
                status, told, err = program.finish(30)
                assert status == 0 and told.split()[-1] == "interrupted" and "Traceback" not in err
            else:
                os.kill(program.pid, number)
                program.finish(30)
            assert wait_until(lambda: not any(map(is_alive, started)))
            assert wait_until(lambda: not leftovers(program.pid)), leftovers(program.pid)
        lines = [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()[2:] if line[-1] == "}"]
        done = sum(line["stop"] - line["start"] for line in lines)
        assert 0 < done < TIMES * ROWS
        again = quiet(case.artifact, many, out, executor=threads)
        assert 0 < again.evaluated <= TIMES * ROWS - done + 64
        model = Model(case.artifact)
        whole = model.solve({n: torch.from_numpy(np.load(many / f"{n}.npy")) for n in _names(source)})
        values = {name: value.numpy() for name, value in whole.outputs.items()}
        assert_results(results(out), {**values, "failed": ~whole.converged.numpy()})

    @pytest.mark.long
    def test_a_worker_that_is_killed(self, case: Case, source: Path, tmp_path: Path, expected: Arrays) -> None:
        killed: list[int] = []

        def kill(done: int, total: int | None) -> None:
            if done >= 64 and not killed:
                for pid in descendants(os.getpid()):
                    if b"popen_loky" in Path(f"/proc/{pid}/cmdline").read_bytes():
                        killed.append(pid)
                        os.kill(pid, signal.SIGKILL)
                        break

        quiet(case.model, source, tmp_path / "out", workers=1, chunk=16, progress=kill)
        assert killed
        assert_results(results(tmp_path / "out"), expected)
