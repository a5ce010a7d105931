"""The sdist holds what a tree without git needs, and gives the same wheel."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import neml2_aoti_plugin
from environments import ROOT

FOLDERS = ("benchmarks", "docs", "examples", "legacy", "machine", "neml2_aoti_plugin", "stubs", "tests", "tools")
FILES = (
    ".pre-commit-config.yaml",
    "CITATION.cff",
    "hatch_build.py",
    "Makefile",
    "constraints.txt",
    "LICENSE",
    "pyproject.toml",
)

pytestmark = [
    pytest.mark.skipif(not (ROOT / "neml2_aoti_plugin").is_dir(), reason="the sources lie elsewhere"),
    pytest.mark.skipif(not (ROOT / ".git").exists(), reason="git tells which files there must be"),
]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "sdist", "--directory", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (file,) = folder.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        archive.extractall(folder, filter="data")
    return folder / f"neml2_aoti_plugin-{neml2_aoti_plugin.__version__}"


def test_the_sdist_holds_the_tree_and_nothing_else(sdist: Path) -> None:
    found = {path.relative_to(sdist).as_posix() for path in sdist.rglob("*") if path.is_file()}
    # Hatchling adds its metadata, and git's list of what to ignore, by which it builds.
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *FOLDERS, *FILES, "*.md"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    # The machine code, so that a build needs no compiler where its sources are as they were.
    assert found - {"PKG-INFO", ".gitignore"} == {
        *listed.stdout.splitlines(),
        "neml2_aoti_plugin/_solve/machine_code.bc",
    }


def test_the_sdist_gives_the_same_wheel(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(build, cwd=sdist, check=True, capture_output=True, timeout=120)
    (built,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(built) as one, zipfile.ZipFile(wheel) as other:
        assert {name: one.read(name) for name in one.namelist() if not name.endswith("RECORD")} == {
            name: other.read(name) for name in other.namelist() if not name.endswith("RECORD")
        }
