"""Fixtures that more than one test module uses."""

from __future__ import annotations

import inspect
import os
import signal
import threading
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

# Before torch is imported, and for processes that tests start: two workers with a pool of threads each wait for each
# other most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell has programs that it starts in the background ignore Ctrl-C, and they pass that on to what they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch
from filelock import FileLock

import environments
import references
from neml2_aoti_plugin._program.program import Program
from stubs.build import OlderTorchError
from stubs.catalogue import CATALOGUE

WIDE = frozenset(name for name, stub in CATALOGUE.items() if stub.wide)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of wide stubs: the default run leaves them out, for it must compile all its stubs in minutes."""
    for item in items:
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        if any(isinstance(value, str) and value in WIDE for value in parameters.values()):
            item.add_marker("wide")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Generator[None, Any, Any]:
    """Skip tests of a stub that this torch is too old for, whether they or their fixtures need it."""
    try:
        return (yield)
    except OlderTorchError as error:
        pytest.skip(str(error))


pytest_runtest_call = pytest_runtest_setup


@pytest.fixture(autouse=True)
def _wide_stubs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let only tests of the wide suite use its stubs."""
    monkeypatch.setattr(references, "wide_allowed", request.node.get_closest_marker("wide") is not None)


@pytest.fixture(params=["native", "torch"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both implementations of the Newton loop, one after the other."""
    monkeypatch.setenv("NEML2_AOTI_PLUGIN_KERNELS", request.param)
    return str(request.param)


@pytest.fixture
def doubles() -> Iterator[None]:
    """What computes in torch's default dtype computes in double precision."""
    with references.default_dtype(torch.float64):
        yield


@pytest.fixture
def evaluations(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of every evaluation that programs make from now on."""
    seen: list[dict[str, Any]] = []
    evaluate = Program.evaluate

    def noted(*arguments: Any, **options: Any) -> Any:
        seen.append(inspect.signature(evaluate).bind(*arguments, **options).arguments)
        return evaluate(*arguments, **options)

    monkeypatch.setattr(Program, "evaluate", noted)
    return seen


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """A copy of the elasticity artifact that a test may damage."""
    return references.copied("elasticity", tmp_path / "folder")


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A temporary folder that all pytest-xdist workers of a run share."""
    own = tmp_path_factory.getbasetemp()
    return own if worker_id == "master" else own.parent


@pytest.fixture(scope="session")
def wheel(shared_folder: Path) -> Path:
    """The plugin's wheel, built from the working tree once per run."""
    folder = shared_folder / "wheel"
    with FileLock(shared_folder / "wheel.lock"):
        return next(folder.glob("*.whl"), None) or environments.build_wheel(folder)


@pytest.fixture(scope="session")
def environment(shared_folder: Path, wheel: Path) -> environments.Environment:
    """A fresh environment in which the plugin's wheel is installed beside torch and neml2."""
    folder = shared_folder / "environment"
    with FileLock(shared_folder / "environment.lock"):
        return environments.Environment(folder) if folder.exists() else environments.create(folder, wheel)
