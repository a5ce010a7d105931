"""Journals of long runs: which rows are done, of which run, and runs that are killed."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import references
from attacks import children
from long_runs import ROWS, Arrays, Run, arrays, assert_results, case, expected, put, solved
from neml2_aoti_plugin import InputError, Model

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="signals and file systems of Linux")
FORMS = pytest.mark.parametrize("form", ["files", "zarr", "arrays"])


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def done(run: Run, chunks: int | None = None) -> int:
    """The number of rows that are done, of all chunks or the first ones."""
    return sum(stop - start for start, stop in run.done()[:chunks])


class TestJournal:
    def test_nothing_is_evaluated_twice(self, run: Run) -> None:
        assert [run(resume=resume).evaluated for resume in (True, True, False)] == [ROWS, 0, ROWS]
        assert_results(run.results(), expected())

    @pytest.mark.parametrize("cut", [1, 30, 100, 250])
    def test_a_line_that_was_cut_off_counts_for_nothing(self, run: Run, cut: int) -> None:
        run()
        run.journal.write_bytes(run.journal.read_bytes()[:-cut])
        kept = done(run)
        assert run().evaluated == ROWS - kept > 0
        assert done(run) == ROWS

    @pytest.mark.parametrize("change", ["operation", "chunk", "solver", "source", "model"])
    def test_that_of_another_run(self, change: str, run: Run, tmp_path: Path) -> None:
        run()
        before, model = run.files(), case().load()
        options: dict[str, Any] = {"operation": "jacobian"} if change == "operation" else {"model": model}
        if change == "chunk":
            options["chunk"] = 32
        elif change == "solver":
            model.set_solver(miters=30)
        elif change == "source":
            np.save(run.source / "stress~1.npy", np.zeros((ROWS, 6)))
        elif change == "model":
            options["model"] = Model(references.edited(case(), tmp_path / "other", lambda _: None))
            options["model"].set_solver_config(**case().newton)
        with pytest.raises(InputError, match=rf"journal of another run: .*{change}.* differ"):
            run(**options)
        assert run.files() == before

    @pytest.mark.parametrize("other", [torch.tensor(2e5), torch.tensor([1e5])], ids=["value", "shape"])
    def test_that_of_other_parameters(self, other: torch.Tensor, run: Run) -> None:
        rows, model = {"strain": np.zeros((100, 6))}, references.case("promoted").load()
        model.set_parameter("promoted.E", torch.tensor(1e5).double())
        assert [run(rows, model=model).evaluated for _ in range(2)] == [100, 0]
        model.set_parameter("promoted.E", other.double())
        with pytest.raises(InputError, match="journal of another run: parameters differ"):
            run(rows, model=model)

    @pytest.mark.parametrize("resume", [True, False])
    @pytest.mark.parametrize("text", ["my diary\n", "my diary", '{"other": 1}\n', "[" * 100_000 + "\n"])
    def test_that_of_something_else(self, run: Run, text: str, resume: bool) -> None:
        run.out.mkdir()
        run.journal.write_text(text)
        with pytest.raises(InputError, match="is no journal"):
            run(resume=resume)
        assert run.files() == {"journal.jsonl": text.encode()}

    @pytest.mark.parametrize(
        "line",
        [
            b"[" * 100_000 + b"\n",
            b'{"start": 0, "stop": 64, "x": "\xff\xfe"}\n',
            b'{"start": 0, "stop": 1e999}\n',
            b'{"start": 0, "stop": ' + b"9" * 9999 + b"}\n",
            b'{"start": 0, "stop": true}\n',
            b"\0" * 4096,
            b'{"start": 0, "x": "' + b" " * (2 << 20) + b'", "stop": 64}\n',
        ],
        ids=["nested", "not UTF-8", "infinite", "huge", "bool", "zeros", "long"],
    )
    def test_a_line_that_is_damaged_and_what_follows_count_for_nothing(self, line: bytes, run: Run) -> None:
        run()
        kept, lines = done(run, 2), run.journal.read_bytes().splitlines(keepends=True)
        run.journal.write_bytes(b"".join([*lines[:3], line, *lines[3:]]))
        assert run().evaluated == ROWS - kept
        assert_results(run.results(), expected())
        again = run.journal.read_bytes().splitlines(keepends=True)
        assert again[:3] == lines[:3] and sorted(again) == sorted(lines)

    @pytest.mark.parametrize(("sink", "file"), [("out", "stress.npy"), ("out.zarr", "stress/zarr.json")])
    def test_results_that_are_gone(self, sink: str, file: str, run: Run, tmp_path: Path) -> None:
        if sink == "out.zarr":
            pytest.importorskip("zarr")
        run(sink=tmp_path / sink)
        (tmp_path / sink / file).unlink()
        with pytest.raises(InputError, match=rf"{sink}/stress(\.npy)?: is not there as the journal"):
            run(sink=tmp_path / sink)

    def test_two_runs_at_once(self, run: Run) -> None:
        refused: list[str] = []

        def again(done: int, total: int | None) -> None:
            if not refused:
                with pytest.raises(InputError, match="another process is writing") as raised:
                    run()
                refused.append(str(raised.value))

        run(progress=again)
        assert refused


class TestSourcesThatChange:
    """Rows are told by what they are, not by their files' sizes and times; old and new ones are never mixed."""

    @staticmethod
    def put(form: str, folder: Path, rows: Arrays) -> object:
        if form == "zarr":
            pytest.importorskip("zarr")
        found = put(form, folder, rows)
        for file in found.glob("*.npy") if form == "files" else ():
            os.utime(file, (1e9, 1e9))
        return found

    @pytest.fixture(autouse=True)
    def stopped(self, form: str, run: Run, tmp_path: Path) -> None:
        """A run that was stopped."""

        def stop(done: int, total: int | None) -> None:
            if done >= 128:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(self.put(form, tmp_path, arrays()), progress=stop)
        assert 128 <= done(run) < ROWS

    @pytest.mark.parametrize("common", [False, True])
    @FORMS
    def test_rows_that_are_done(self, form: str, common: bool, run: Run, tmp_path: Path) -> None:
        start, before = run.done()[0][0], run.files()
        changed = {name: value.copy() for name, value in arrays().items()}
        changed["stress~1" if common else "t"][0 if common else start + 6] += 1e-9
        # No row is evaluated before that is found.
        with pytest.raises(InputError, match=rf"rows {'.*' if common else start} to .* not those of the run"):
            run(self.put(form, tmp_path, changed))
        assert run.files() == before

    @FORMS
    def test_rows_that_are_not_done(self, form: str, run: Run, tmp_path: Path) -> None:
        """Which are evaluated as they are now."""
        left = ROWS - done(run)
        changed = {**arrays(), "t": arrays()["t"] + 0.25 * (np.arange(ROWS) >= 448)}
        assert run(self.put(form, tmp_path, changed)).evaluated == left
        assert_results(run.results(), solved(changed), "stress")


def test_sources_that_move(run: Run, tmp_path: Path) -> None:
    run()
    moved = run.source.rename(tmp_path / "elsewhere")
    os.utime(moved / "t.npy", (1e9, 1e9))
    assert run(moved).evaluated == 0


LONG_RUN = """
import sys
from neml2_aoti_plugin import map_rows
import neml2_aoti_plugin.parallel._journal as journal
journal.SYNC = 0.05
try:
    map_rows(*sys.argv[1:4], chunk=64, progress=lambda done, total: print(done, flush=True))
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_killed_goes_on_where_it_was(number: signal.Signals, run: Run, tmp_path: Path) -> None:
    # As many copies of the rows, so that a run lasts long enough.
    times = 20
    many = {n: np.concatenate([a] * times) if a.shape[:1] == (ROWS,) else a for n, a in arrays().items()}
    put("files", tmp_path, many)
    child = children.start(LONG_RUN, case().artifact, run.source, run.out)
    child.line()
    while int(child.output.split()[-1]) < 2000:
        time.sleep(0.01)
    status = child.send(number, 30)
    if number == signal.SIGINT:
        # It may have come between a number and the end of its line.
        assert status == 0 and child.output.endswith("interrupted\n") and "Traceback" not in child.output
    before = done(run)
    assert 0 < before < times * ROWS
    assert 0 < run(model=case().artifact).evaluated <= times * ROWS - before + 64
    assert_results(run.results(), solved(many, Model(case().artifact)))
