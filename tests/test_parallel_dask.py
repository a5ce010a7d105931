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

    folder = str(tmp_path_factory.mktemp("dask"))
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None, "host": "127.0.0.1"}
    with (
        dask.config.set({"temporary-directory": folder, "distributed.admin.system-monitor.gil.enabled": False}),
        LocalCluster(processes=True, **options) as cluster,
        Client(cluster) as found,
    ):
        yield found


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


# What workers do.


def load(path: Path) -> Model:
    return Model(path)


def evaluated(model: Model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model.forward(inputs)["stress"]


def digest(model: Model) -> str:
    return model.digest


def loaded() -> tuple[int, int]:
    """The number of models that a worker has loaded, and torch's threads."""
    from neml2_aoti_plugin.parallel import _tasks as tasks

    return tasks.unpickled.cache_info().currsize, torch.get_num_threads()


@pytest.mark.long
class TestMapRows:
    def test_a_worker_is_killed(self, client: Any, run: Run) -> None:
        client.wait_for_workers(2)
        before = client.run(os.getpid).values()
        assert len(before) == 2 and os.getpid() not in before
        victim, killed = min(before), list[int]()

        def kill(done: int, total: int | None) -> None:
            if done >= 100 and not killed:
                os.kill(victim, signal.SIGKILL)
                killed.append(victim)

        done = run(executor=client, chunk=20, progress=kill)
        assert killed and done.evaluated == ROWS and done.failed.tolist() == FAILING
        assert_results(run.results(), expected())
        # It has come again, and has loaded the model before any work; on one thread, as Dask has it.
        client.wait_for_workers(2)
        assert victim not in client.run(os.getpid).values()
        found = client.run(loaded).values()
        assert len(found) == 2 and all(models >= 1 and threads == 1 for models, threads in found)

    def test_rows_come_back_where_there_are_no_files(self, client: Any, run: Run) -> None:
        found: list[Arrays] = []
        run(arrays(), found.append, executor=client, chunk=100, operation="jacobian")
        assert len(found) == 5
        assert_results(joined(found), expected(), *expected())

    def test_an_artifact_that_is_another_one_there(
        self, client: Any, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        artifact = references.copied("viscoplasticity", tmp_path / "here")
        model, recipe_of = Model(artifact), Model.__getstate__

        def and_change(self: Model) -> Any:
            """The recipe, after which the artifact changes."""
            found = recipe_of(self)
            with (artifact / "metadata.json").open("a") as file:
                file.write("\n")
            return found

        monkeypatch.setattr(Model, "__getstate__", and_change)
        with pytest.raises(ArtifactError, match="not the artifact that"):
            run(model=model, executor=client)


@pytest.mark.long
class TestClient:
    """Models as values of a cluster: sent to its workers, and given back by tasks."""

    def test_scattered_model(self, client: Any) -> None:
        model = case().model
        inputs = {name: torch.from_numpy(value) for name, value in blocks(10)[1].items()}
        for hashed in (True, False):
            scattered = client.scatter(model, broadcast=True, hash=hashed)
            found = client.submit(evaluated, scattered, inputs, pure=False).result()
            assert torch.equal(found, evaluated(model, inputs))

    def test_task_that_gives_a_model_back(self, client: Any) -> None:
        future = client.submit(load, case().artifact)
        assert future.result().digest == case().model.digest
        # From one task to another, on whichever worker.
        assert client.submit(digest, future).result() == case().model.digest


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
    found = deserialize(*serialize(Holder(model) if kind == "held" else model, on_error="raise"))
    there = found.model if kind == "held" else found
    assert type(there) is type(model) and there is not model
    assert there.get_parameter("promoted.E").item() == 1234.0
    # What torch has as its parameter is what calls take.
    with torch.no_grad():
        there.get_parameter("promoted.E").mul_(2.0)
    rows = case.rows()
    twice, once = (m.jvp(rows, {"strain": rows["strain"]})[1]["stress"] for m in (there, model))
    assert torch.allclose(twice, 2.0 * once)


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
    command = [sys.executable, "-c", PROGRAM, str(references.case("promoted").artifact)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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

    @pytest.mark.parametrize(
        ("chunks", "error", "words"),
        [
            ({}, InputTypeError, "no Dask array"),
            ({"strain": (100, 6), "t": 200}, InputError, "cut along the rows otherwise"),
            ({"strain": (100, 3)}, InputError, "another axis than the rows"),
            ({"strain": None, "t": 100}, InputError, "missing 'strain'"),
        ],
    )
    def test_what_does_not_fit(self, chunks: dict[str, Any], error: type[Exception], words: str) -> None:
        import dask.array as da

        from neml2_aoti_plugin.parallel.dask import map_blocks

        given = {**arrays(), **{n: da.from_array(arrays()[n], cut) for n, cut in chunks.items() if cut}}
        given = {name: value for name, value in given.items() if chunks.get(name, ()) is not None}
        with pytest.raises(error, match=words):
            map_blocks(case().model, given)
