"""A package is known by its bytes: what was checked is what runs, whatever happens to the file meanwhile."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import references
from attacks.archives import TWICE_SHEAR, recorded, with_shear
from attacks.artifacts import package
from attacks.children import run
from neml2_aoti_plugin import ArtifactError, Model

SHEAR = {"strain": torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0, 0.0], dtype=torch.float64)}


@pytest.fixture
def artifact(artifact: Path) -> Path:
    """A copy of the elasticity artifact whose value graph no other test has."""
    package(artifact).write_bytes(variant(artifact, 1.0))
    return artifact


def variant(artifact: Path, factor: float) -> bytes:
    """The package with a shear modulus so many times the true one; all variants have one size."""
    original = package(references.case("elasticity").artifact).read_bytes()
    return with_shear(factor * TWICE_SHEAR, str(artifact))(original)


def stress(model: Model) -> float:
    return float(model.forward(SHEAR)["stress"][3])


def in_place(file: Path, data: bytes) -> None:
    """Overwrite a file, then put its times back."""
    before = file.stat()
    file.write_bytes(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_ino, after.st_mtime_ns, after.st_size) == (before.st_ino, before.st_mtime_ns, before.st_size)


def replaced(file: Path, data: bytes) -> None:
    """Put another file of the same size and times in its place."""
    other = file.with_suffix(".new")
    other.write_bytes(data)
    shutil.copystat(file, other)
    os.replace(other, file)


@pytest.mark.parametrize("exchange", [in_place, replaced])
class TestExchange:
    def test_a_new_model_has_the_new_numbers(self, artifact: Path, exchange: Callable[[Path, bytes], None]) -> None:
        model = Model(artifact)
        assert stress(model) == TWICE_SHEAR
        exchange(package(artifact), variant(artifact, 2.0))
        assert stress(Model(artifact)) == 2.0 * TWICE_SHEAR
        # What is loaded stays what it was.
        assert stress(model) == TWICE_SHEAR
        for how in (pickle.dumps, copy.deepcopy):
            with pytest.raises(ArtifactError, match=r"elasticity\.pt2 was changed or removed after the model was load"):
                how(model)

    def test_a_model_that_was_not_called_yet_refuses_the_other(
        self, artifact: Path, exchange: Callable[[Path, bytes], None]
    ) -> None:
        package(artifact).write_bytes(variant(artifact, 3.0))
        model, data = Model(artifact), pickle.dumps(Model(artifact))
        exchange(package(artifact), variant(artifact, 4.0))
        with pytest.raises(ArtifactError, match=r"elasticity\.pt2: has changed since the model was loaded"):
            stress(model)
        text = r"not the artifact that the pickled model was made from: elasticity\.pt2 differ"
        with pytest.raises(ArtifactError, match=text):
            pickle.loads(data)
        exchange(package(artifact), variant(artifact, 3.0))
        assert stress(model) == stress(pickle.loads(data)) == 3.0 * TWICE_SHEAR


def test_what_is_refused_never_runs_in_a_race(artifact: Path) -> None:
    """While one thread exchanges a package for one whose build record is refused, another loads and calls models."""
    file = package(artifact)
    good = file.read_bytes()
    bad = recorded(AOTI_PLATFORM="win32")(variant(artifact, 2.0))
    stop = threading.Event()

    def exchange() -> None:
        for number in range(10**9):
            if stop.is_set():
                return
            other = file.with_suffix(".new")
            other.write_bytes(bad if number % 2 == 0 else good)
            os.replace(other, file)

    ends = {"runs": 0, "refused at the load": 0, "refused at the call": 0}
    thread = threading.Thread(target=exchange)
    thread.start()
    try:
        for number in range(150):
            # A graph is read again only where no model has loaded it; a new variant each time keeps it so.
            if number % 10 == 0:
                good = variant(artifact / str(number % 9), 1.0)
            try:
                model = Model(artifact)
            except ArtifactError as error:
                assert "win32" in str(error)
                ends["refused at the load"] += 1
                continue
            try:
                assert stress(model) == TWICE_SHEAR
                ends["runs"] += 1
            except ArtifactError as error:
                assert "has changed since the model was loaded" in str(error)
                ends["refused at the call"] += 1
    finally:
        stop.set()
        thread.join()
    assert min(ends["runs"], ends["refused at the load"]) > 0, ends


class TestOneContentOneLibrary:
    @pytest.fixture
    def other(self, artifact: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(artifact, tmp_path / "other" / "elasticity"))

    def test_models_of_two_copies_share_it(self, artifact: Path, other: Path) -> None:
        out = run(
            """
            import sys, torch
            from neml2_aoti_plugin import Model
            for path in sys.argv[1:]:
                Model(path).forward({"strain": torch.zeros(6, dtype=torch.float64)})
                with open("/proc/self/maps") as maps:
                    print(sum("neml2-aoti-" in line for line in maps))
            """,
            artifact,
            other,
        )
        first, second = out.split()
        assert first == second != "0"

    def test_one_copy_is_enough(self, artifact: Path, other: Path) -> None:
        for path in (artifact, other):
            package(path).write_bytes(variant(artifact, 5.0))
        models = [Model(artifact), Model(other)]
        package(other).unlink()
        assert [stress(model) for model in models] == [5.0 * TWICE_SHEAR] * 2

    def test_other_bytes_are_another_library(self, artifact: Path, other: Path) -> None:
        package(other).write_bytes(variant(artifact, 7.0))
        assert (stress(Model(artifact)), stress(Model(other))) == (TWICE_SHEAR, 7.0 * TWICE_SHEAR)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: path.symlink_to("nothing")])
@pytest.mark.parametrize("how", [lambda m: pickle.loads(pickle.dumps(m)), copy.deepcopy])
def test_other_files_do_not_keep_a_model_from_being_copied(
    artifact: Path, make: Callable[[Path], None], how: Callable[[Model], Model]
) -> None:
    make(package(artifact, "extra"))
    assert stress(how(Model(artifact))) == TWICE_SHEAR
