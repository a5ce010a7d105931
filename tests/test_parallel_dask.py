"""Rows over a real `LocalCluster` of two worker processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import neml2
import numpy as np
import pytest
import torch

import references
from long_runs import FAILING, ROWS, Arrays, Run, arrays, assert_results, blocks, case, expected, joined
from neml2_aoti_plugin import ArtifactError, InputError, InputTypeError, Model

pytest.importorskip("distributed")
pytestmark = [
    # Dask's own, of its threads and sockets.
    pytest.mark.filterwarnings("default"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="starts processes as Linux does"),
]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    import dask
    from distributed import Client, LocalCluster

    folder = tmp_path_factory.mktemp("dask")
    with (
        dask.config.set({"temporary-directory": str(folder), "distributed.admin.system-monitor.gil.enabled": False}),
        LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, host="127.0.0.1"
        ) as cluster,
        Client(cluster) as found,
    ):
        yield found


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def workers_of(client: Any) -> dict[str, int]:
    """Identifiers of the worker processes by address."""
    found: dict[str, int] = client.run(os.getpid)
    return found


@pytest.mark.long
class TestMapRows:
    def test_a_worker_is_killed(self, client: Any, run: Run) -> None:
        client.wait_for_workers(2)
        before = workers_of(client)
        assert len(before) == 2 and os.getpid() not in before.values()
        killed: list[int] = []

        def kill(done: int, total: int | None) -> None:
            if done >= 100 and not killed:
                killed.append(next(iter(before.values())))
                os.kill(killed[0], signal.SIGKILL)

        done = run(executor=client, chunk=20, progress=kill)
        assert killed and done.evaluated == ROWS and done.failed.tolist() == FAILING
        assert_results(run.results(), expected())
        # It has come again, and has loaded the model before any work; on one thread, as Dask has it.
        client.wait_for_workers(2)
        after = workers_of(client)
        assert killed[0] not in after.values()
        found = client.run(loaded)
        assert len(found) == 2 and all(models >= 1 and threads == 1 for models, threads in found.values())

    def test_rows_come_back_where_there_are_no_files(self, client: Any, run: Run) -> None:
        found: list[Arrays] = []
        run(arrays(), found.append, executor=client, chunk=100, operation="jacobian")
        assert len(found) == 5
        assert_results(joined(found), expected(), *expected())

    def test_an_artifact_that_is_another_one_there(self, client: Any, run: Run, tmp_path: Path) -> None:
        artifact = references.edited(case(), tmp_path / "here", lambda _: None)
        model = Model(artifact)
        recipe_of = type(model).__getstate__
        with pytest.MonkeyPatch.context() as patch:
            # It changes once the recipe is made.
            def and_change(self: Model) -> Any:
                found = recipe_of(self)
                with (artifact / "metadata.json").open("a") as file:
                    file.write("\n")
                return found

            patch.setattr(Model, "__getstate__", and_change)
            with pytest.raises(ArtifactError, match="not the artifact that"):
                run(model=model, executor=client)


def load(path: Path) -> Model:
    return Model(path)


@pytest.mark.long
class TestClient:
    """Models as values of a cluster: sent to its workers, and given back by tasks."""

    def test_scattered_model(self, client: Any) -> None:
        model = case().model
        inputs = {name: torch.from_numpy(value) for name, value in blocks(10)[1].items()}
        wanted = model.forward(inputs)["stress"]
        for hashed in (True, False):
            scattered = client.scatter(model, broadcast=True, hash=hashed)
            assert torch.equal(client.submit(evaluated, scattered, inputs, pure=False).result(), wanted)

    def test_task_that_gives_a_model_back(self, client: Any) -> None:
        future = client.submit(load, case().artifact)
        assert future.result().digest == case().model.digest
        # From one task to another, on whichever worker.
        assert client.submit(digest, future).result() == case().model.digest


def evaluated(model: Model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model.forward(inputs)["stress"]


def digest(model: Model) -> str:
    return model.digest


class Holder(torch.nn.Module):
    """A module of a user with a compiled model in it."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model


@pytest.mark.parametrize("kind", ["raw", "typed", "held"])
def test_dask_sends_a_model_with_its_parameters(kind: str) -> None:
    from distributed.protocol import deserialize, serialize

    case = references.case("promoted")
    model = case.load() if kind != "typed" else neml2.load_model(case.file, case.stub.model)
    model.set_parameter("promoted.E", 1234.0)
    given = Holder(model) if kind == "held" else model
    found = deserialize(*serialize(given, on_error="raise"))
    there = found.model if kind == "held" else found
    assert type(there) is type(model) and there is not model
    assert there.get_parameter("promoted.E").item() == 1234.0
    # What torch has as its parameter is what calls take.
    with torch.no_grad():
        there.get_parameter("promoted.E").mul_(2.0)
    raw = {name: value for name, value in case.rows().items()}
    stress = there.jvp(raw, {"strain": raw["strain"]})[1]["stress"]
    assert torch.allclose(stress, 2.0 * model.jvp(raw, {"strain": raw["strain"]})[1]["stress"])


PROGRAM = """
import sys
from neml2_aoti_plugin import Model
model = Model(sys.argv[1])
from dask.tokenize import tokenize
from distributed.protocol import deserialize, serialize
tokenize(model)
assert deserialize(*serialize(model, on_error="raise")).digest == model.digest
"""


def test_dask_that_is_imported_after_the_model_was_made() -> None:
    case = references.case("promoted")
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(case.artifact)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def loaded() -> tuple[int, int]:
    """Of a worker, the number of models it has loaded, and torch's threads."""
    from neml2_aoti_plugin.parallel import _tasks as tasks

    return tasks.unpickled.cache_info().currsize, torch.get_num_threads()


class TestDaskArrays:
    @pytest.mark.long
    @pytest.mark.parametrize("operation", ["forward", "jacobian"])
    def test_in_and_out(self, client: Any, run: Run, operation: str) -> None:
        import dask.array as da

        from neml2_aoti_plugin.parallel.dask import map_blocks

        given: dict[str, Any] = dict(arrays())
        for name in ("strain", "t"):
            mapped = np.load(run.source / f"{name}.npy", mmap_mode="r")
            given[name] = da.from_array(mapped, chunks=(125, *mapped.shape[1:]))
        found = map_blocks(case().model, given, client=client, operation=operation)
        assert found["stress"].chunks == ((125,) * 4, (6,)) and found["@failed"].dtype == bool
        values = client.gather(client.compute(list(found.values())))
        assert ("stress@strain" in found) == (operation == "jacobian")
        assert_results(dict(zip(found, values, strict=True)), expected(), *found)

    def test_what_does_not_fit(self) -> None:
        import dask.array as da

        from neml2_aoti_plugin.parallel.dask import map_blocks

        model, rows = case().model, arrays()
        with pytest.raises(InputTypeError, match="no Dask array"):
            map_blocks(model, rows)
        cut = {**rows, "strain": da.from_array(rows["strain"], chunks=(100, 6))}
        with pytest.raises(InputError, match="cut along the rows otherwise"):
            map_blocks(model, {**cut, "t": da.from_array(rows["t"], chunks=200)})
        with pytest.raises(InputError, match="another axis than the rows"):
            map_blocks(model, {**rows, "strain": da.from_array(rows["strain"], chunks=(100, 3))})
        with pytest.raises(InputError, match="missing 'strain'"):
            map_blocks(model, {name: value for name, value in cut.items() if name != "strain"})
