"""The processes of a pool: those that die, those whose caller ends, and drivers that use them."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import neml2
import pytest
import torch
from torch import Tensor

import references
from attacks.children import environment
from neml2_aoti_plugin import AOTIError, InputError, Pool
from neml2_aoti_plugin.host.hit import AOTIModel
from neml2_aoti_plugin.parallel.folder import SPARE_PER_WORKER
from neml2_aoti_plugin.parallel.workers import shared
from processes import Program, descendants, is_alive, leftovers, wait_until
from references import difference
from test_parallel import assert_same, viscoplasticity

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at processes in /proc")

BIN = Path(sys.executable).parent


def during(target: Callable[[], object], action: Callable[[], bool]) -> object:
    """Repeat an action in another thread while a call goes on, until it says that it is enough."""
    over = threading.Event()

    def act() -> None:
        while not over.is_set() and not action():
            time.sleep(0.005)

    thread = threading.Thread(target=act)
    thread.start()
    try:
        return target()
    finally:
        over.set()
        thread.join(20)


class TestWorkersThatDie:
    def test_chunks_in_flight_are_tried_again(self) -> None:
        model = references.case("viscoplasticity").model
        inputs = viscoplasticity(6000)
        # One process, for each takes seconds to start.
        with Pool(model, 1, chunk=100) as pool:
            pool.forward(viscoplasticity(300))
            first = pool.processes.processes
            folder = pool.processes.folder
            names = {path.name for path in folder.iterdir()}
            begun = time.time_ns()

            def kill() -> bool:
                # Rows are on their way: the process is at work.
                if not any(path.stat().st_mtime_ns > begun for path in folder.glob("rows-*")):
                    return False
                os.kill(first[0], signal.SIGKILL)
                return True

            found = during(lambda: pool.forward(inputs), kill)
            assert_same(found, model.forward(inputs))
            assert not set(first) & set(pool.processes.processes) and len(pool.processes.processes) == 1
            assert wait_until(lambda: not any(map(is_alive, first)))
            # But for those that are kept to be written over.
            left = [path for path in folder.iterdir() if path.name not in names]
            assert all(path.name.startswith("rows-") for path in left) and len(left) <= SPARE_PER_WORKER

    @pytest.mark.long
    def test_one_that_dies_between_two_calls(self) -> None:
        model = references.case("viscoplasticity").model
        with Pool(model, 1, chunk=20) as pool:
            pool.forward(viscoplasticity(50))
            (pid,) = pool.processes.processes
            os.kill(pid, signal.SIGKILL)
            assert_same(pool.forward(viscoplasticity(50)), model.forward(viscoplasticity(50)))

    @pytest.mark.long
    def test_always_is_an_error_that_names_the_rows(self) -> None:
        with Pool(references.case("viscoplasticity").model, 1, chunk=20) as pool:

            def kill() -> bool:
                for pid in pool.processes.processes:
                    if is_alive(pid):
                        os.kill(pid, signal.SIGKILL)
                return False

            with pytest.raises(AOTIError, match=r"rows \d+ to \d+: the worker process died.*SIGKILL"):
                during(lambda: pool.forward(viscoplasticity(50)), kill)
            assert_same(pool.forward(viscoplasticity(50)), pool.model.forward(viscoplasticity(50)))


CALLER = """
import os, sys, time, traceback
import torch
from neml2_aoti_plugin import Pool

torch.set_num_threads(1)

def scaled(rows):
    zero = torch.zeros((), dtype=torch.float64)
    return {
        "strain": 3e-3 * torch.randn(rows, 6, dtype=torch.float64), "strain~1": torch.zeros(6, dtype=torch.float64),
        "stress~1": torch.zeros(6, dtype=torch.float64), "equivalent_plastic_strain~1": zero,
        "t": zero + 1.0, "t~1": zero,
    }

pool = Pool(sys.argv[1], 1, chunk=200)
pool.forward(scaled(1000))
print(*pool.processes.processes, flush=True)
print(pool.processes.folder, flush=True)
if sys.argv[2] == "work":
    rows = scaled(20_000)
    try:
        while True:
            pool.forward(rows)
    except KeyboardInterrupt as error:
        frames = traceback.extract_tb(error.__traceback__)
        in_flight = any(f.filename.endswith("workers.py") and f.name == "run" for f in frames)
        print("interrupted", in_flight, len(pool.processes.processes), flush=True)
        pool.forward(scaled(1000))
        print("again", len(pool.processes.processes), flush=True)
elif sys.argv[2] == "full":
    import resource

    before = set(pool.processes.folder.iterdir())
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, unlimited[1]))
    try:
        pool.forward(scaled(1000))
    except Exception as error:
        print(type(error).__name__, error, flush=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    left = set(pool.processes.folder.iterdir()) - before
    pool.forward(scaled(1000))
    print(len(left), "files are left, and it works again", flush=True)
    pool.close()
"""


class TestCallersThatEnd:
    """The process that has the pool is interrupted, or ends by itself; no process and no file is left."""

    @pytest.mark.parametrize(
        "number",
        [
            signal.SIGINT,
            pytest.param(signal.SIGTERM, marks=pytest.mark.long),
            pytest.param(signal.SIGKILL, marks=pytest.mark.long),
        ],
    )
    def test_in_the_middle_of_a_call(self, number: signal.Signals) -> None:
        with Program(CALLER, references.case("viscoplasticity").artifact, "work") as program:
            workers = [int(pid) for pid in program.line().split()]
            folder = Path(program.line())
            assert folder.is_dir() and all(map(is_alive, workers))
            started = descendants(program.pid)
            assert set(workers) <= set(started)
            time.sleep(0.2)
            if number == signal.SIGINT:
                # To all processes of the terminal; the workers leave it to the caller.
                program.signal_group(number)
                status, out, err = program.finish(60)
                # What is in flight is ended; between two calls nothing is.
                assert out.split() in (
                    ["interrupted", "True", "0", "again", "1"],
                    ["interrupted", "False", "1", "again", "1"],
                )
                assert status == 0 and "Traceback" not in err, err
            else:
                os.kill(program.pid, number)
                assert program.finish(20)[0] == -number
            assert wait_until(lambda: not any(map(is_alive, started))), "processes are left"
            assert wait_until(lambda: not leftovers(program.pid)), leftovers(program.pid)
            assert not folder.exists()

    @pytest.mark.long
    def test_at_the_end_of_a_program_that_forgot_to_close(self) -> None:
        with Program(CALLER, references.case("viscoplasticity").artifact, "unclosed") as program:
            program.line()
            folder, started = Path(program.line()), descendants(program.pid)
            status, _, err = program.finish(30)
            assert status == 0 and err == ""
            assert wait_until(lambda: not any(map(is_alive, started)))
            assert not folder.exists() and not leftovers(program.pid)

    @pytest.mark.parametrize(
        ("count", "workers"), [(1, 1), pytest.param(20, 2, marks=[pytest.mark.long, pytest.mark.timeout(1500)])]
    )
    def test_pools_in_a_row(self, count: int, workers: int) -> None:
        model, here = references.case("viscoplasticity").model, os.getpid()

        def once(number: int) -> None:
            with Pool(model, workers, chunk=50) as pool:
                pool.forward(viscoplasticity(200, number))
                folder, started = pool.processes.folder, pool.processes.processes
                assert folder.is_dir() and len(started) == workers
            assert not folder.exists()
            assert wait_until(lambda: not any(map(is_alive, started)))

        # loky and Python have a process each that tracks resources, from the first pool to the end of this process.
        once(0)
        gc.collect()
        before = set(descendants(here)), set(leftovers(here)), len(os.listdir("/proc/self/fd"))
        for number in range(count):
            once(number + 1)
        gc.collect()
        assert set(descendants(here)) <= before[0]
        assert set(leftovers(here)) <= before[1]
        assert len(os.listdir("/proc/self/fd")) <= before[2]

    @pytest.mark.long
    def test_a_full_folder(self) -> None:
        with Program(CALLER, references.case("viscoplasticity").artifact, "full") as program:
            program.line()
            program.line()
            told = program.line()
            assert told.startswith("AOTIError there is no room in /") and "File too large" in told and "chunk=" in told
            status, out, err = program.finish(30)
            assert (status, out, err) == (0, "0 files are left, and it works again\n", "")
            assert not leftovers(program.pid)


MANY = """
[Tensors]
  [times]
    type = Python
    expr = 'Scalar(torch.linspace(0.0, 2.0, 3, dtype=torch.float64))'
  []
  [strains]
    type = Python
    expr = 'SR2(torch.linspace(0.0, 4.0e-3, 3, dtype=torch.float64).reshape(-1, 1, 1) * torch.linspace(0.5, 1.0, 5000, dtype=torch.float64).reshape(1, -1, 1) * torch.tensor([1.0, -0.49, -0.49, 0.0, 0.0, 0.3], dtype=torch.float64))'
  []
[]
[Drivers]
  [driver]
    type = TransientDriver
    model = 'viscoplasticity'
    prescribed_time = 'times'
    prescribed_SR2_names = 'strain'
    prescribed_SR2_values = 'strains'
  []
[]
[Models]
  [viscoplasticity]
    type = AOTIModel
    artifact_path = '{artifact}'{more}
  []
[]
"""  # noqa: E501


class TestDrivers:
    """5,000 points, which is more than is evaluated in the caller's process."""

    def stub(self, folder: Path, more: str = "") -> Path:
        stub = folder / "many.i"
        artifact = references.case("viscoplasticity").artifact
        stub.write_text(MANY.replace("{artifact}", str(artifact)).replace("{more}", more), encoding="utf-8")
        return stub

    def driven(self, stub: Path) -> tuple[Any, dict[str, Tensor]]:
        with references.default_dtype(torch.float64):
            driver = neml2.load_input(stub).get_driver("driver")
            driver.run()
        return driver.model, driver.result()

    def test_neml2_run_with_the_environment_variable(self, tmp_path: Path) -> None:
        stub, file = self.stub(tmp_path), tmp_path / "result.pt"
        command = [str(BIN / "neml2-run"), str(stub), "driver", f"Drivers/driver/save_as:={file}"]
        run = subprocess.Popen(
            command, env=environment(NEML2_AOTI_PLUGIN_WORKERS="2"), stderr=subprocess.PIPE, text=True
        )
        seen: set[int] = set()
        while run.poll() is None:
            for pid in descendants(run.pid):
                try:
                    words = Path(f"/proc/{pid}/cmdline").read_bytes()
                except OSError:
                    continue
                if b"popen_loky" in words:
                    seen.add(pid)
            time.sleep(0.01)
        assert run.stderr is not None
        with run.stderr as stream:
            assert run.returncode == 0 and stream.read() == ""
        assert len(seen) == 2
        assert wait_until(lambda: not any(map(is_alive, seen))) and leftovers(run.pid) == []
        _, expected = self.driven(stub)
        saved = torch.load(file, weights_only=True)
        assert set(saved) == set(expected)
        for name, value in expected.items():
            if bool(value.any()):
                # Errors of earlier steps add up.
                assert difference(saved[name], value.detach()) < 1e-10, name

    @pytest.mark.long
    def test_the_option_of_the_input_file(self, tmp_path: Path) -> None:
        _, expected = self.driven(self.stub(tmp_path))
        (tmp_path / "two").mkdir()
        model, found = self.driven(self.stub(tmp_path / "two", "\n    workers = 2"))
        try:
            assert model._workers == 2 and len(shared(2).processes) == 2
            for name, value in expected.items():
                if bool(value.any()):
                    assert difference(found[name].detach(), value.detach()) < 1e-10, name
            copied = pickle.loads(pickle.dumps(model))
            assert copied._workers == 2
        finally:
            shared(2).close()

    @pytest.mark.parametrize("text", ["0", "two", "-1", "99999"])
    def test_a_variable_that_is_no_number_of_workers(self, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("NEML2_AOTI_PLUGIN_WORKERS", text)
        with pytest.raises(InputError, match=f"NEML2_AOTI_PLUGIN_WORKERS is '?{text}"):
            AOTIModel(references.case("viscoplasticity").artifact)

    def test_lockstep_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("NEML2_AOTI_PLUGIN_MODE", "lockstep")
        with pytest.raises(InputError, match="lockstep"):
            AOTIModel(references.case("viscoplasticity").artifact, workers=2)

    @pytest.mark.long
    def test_typed_calls_are_the_same(self) -> None:
        case = references.case("viscoplasticity")
        alone = AOTIModel(case.artifact)
        many = AOTIModel(case.artifact, workers=2)
        # The rows of a typed call, more than are evaluated in this process.
        inputs = {n: many.input_spec[n](x) for n, x in viscoplasticity(5000).items()}
        try:
            assert_same(
                [x.data for x in many(*(inputs[n] for n in many.input_spec))],
                [x.data for x in alone(*(inputs[n] for n in alone.input_spec))],
            )
            mine, theirs = many.jacobian(inputs), alone.jacobian(inputs)
            assert_same(mine[1]["stress"]["strain"].data, theirs[1]["stress"]["strain"].data)
            assert len(shared(2).processes) == 2
        finally:
            shared(2).close()
