"""A package is known by its bytes: what was checked is what runs, whatever happens to the file meanwhile."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import threading
from collections import Counter
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
CHANGED = "has changed since the model was loaded"


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
def test_a_package_that_is_exchanged(artifact: Path, exchange: Callable[[Path, bytes], None]) -> None:
    called, waiting, data = Model(artifact), Model(artifact), pickle.dumps(Model(artifact))
    exchange(package(artifact), variant(artifact, 2.0))
    # A model that was not called yet refuses it, and so do a pickled one and a copy.
    with pytest.raises(ArtifactError, match=rf"elasticity\.pt2: {CHANGED}"):
        stress(waiting)
    with pytest.raises(ArtifactError, match=r"not the artifact .* pickled model was made from: elasticity\.pt2 differ"):
        pickle.loads(data)
    for how in (pickle.dumps, copy.deepcopy):
        with pytest.raises(ArtifactError, match=r"elasticity\.pt2 was changed or removed after the model was load"):
            how(waiting)
    exchange(package(artifact), variant(artifact, 1.0))
    assert stress(called) == stress(waiting) == stress(pickle.loads(data)) == TWICE_SHEAR
    exchange(package(artifact), variant(artifact, 3.0))
    # A new model has the new numbers, and what is loaded stays what it was.
    assert (stress(Model(artifact)), stress(called)) == (3.0 * TWICE_SHEAR, TWICE_SHEAR)


def test_what_is_refused_never_runs_in_a_race(artifact: Path) -> None:
    """While one thread exchanges a package for one whose build record is refused, another loads and calls models."""
    file = package(artifact)
    good = file.read_bytes()
    bad = recorded(AOTI_PLATFORM="win32")(variant(artifact, 2.0))
    stop = threading.Event()

    def exchange() -> None:
        other = file.with_suffix(".new")
        while not stop.is_set():
            for data in (bad, good):
                other.write_bytes(data)
                os.replace(other, file)

    ends: Counter[str] = Counter()
    thread = threading.Thread(target=exchange)
    thread.start()
    try:
        for number in range(150):
            # A graph is read again only where no model has loaded it; a new variant each time keeps it so.
            if number % 10 == 0:
                good = variant(artifact / str(number % 9), 1.0)
            try:
                assert stress(Model(artifact)) == TWICE_SHEAR
                ends["runs"] += 1
            except ArtifactError as error:
                assert "win32" in str(error) or CHANGED in str(error)
                ends["refused at the load" if "win32" in str(error) else "refused at the call"] += 1
    finally:
        stop.set()
        thread.join()
    assert ends["runs"] and ends["refused at the load"], ends


class TestOneContentOneLibrary:
    @pytest.fixture
    def other(self, artifact: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(artifact, tmp_path / "other" / "elasticity"))

    def test_models_of_two_copies_share_it(self, artifact: Path, other: Path) -> None:
        out = run(
            """
            import sys
            from attacks.artifacts import runs
            for path in sys.argv[1:]:
                assert runs(path)
                with open("/proc/self/maps") as maps:
                    print(sum("neml2-aoti-" in line for line in maps))
            """,
            artifact,
            other,
        )
        first, second = out.split()
        assert first == second != "0"

    def test_one_copy_is_enough(self, artifact: Path, other: Path) -> None:
        models = [Model(artifact), Model(other)]
        package(other).unlink()
        assert [stress(model) for model in models] == [TWICE_SHEAR] * 2

    def test_other_bytes_are_another_library(self, artifact: Path, other: Path) -> None:
        package(other).write_bytes(variant(artifact, 7.0))
        assert (stress(Model(artifact)), stress(Model(other))) == (TWICE_SHEAR, 7.0 * TWICE_SHEAR)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: path.symlink_to("nothing")])
def test_other_files_do_not_keep_a_model_from_being_copied(artifact: Path, make: Callable[[Path], None]) -> None:
    make(package(artifact, "extra"))
    for copied in (pickle.loads(pickle.dumps(Model(artifact))), copy.deepcopy(Model(artifact))):
        assert stress(copied) == TWICE_SHEAR
