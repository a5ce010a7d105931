"""The wheel holds the package alone, and says what it needs; the sdist holds what a tree without git needs."""

from __future__ import annotations

import email
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import neml2_aoti_plugin
from attacks.children import run_fresh
from environments import ROOT
from neml2_aoti_plugin import _status, errors

IN_THE_SDIST = (
    *("benchmarks", "docs", "examples", "legacy", "machine", "neml2_aoti_plugin", "stubs", "tests", "tools", "*.md"),
    *(".pre-commit-config.yaml", "CITATION.cff", "hatch_build.py", "Makefile", "constraints.txt", "LICENSE"),
    "pyproject.toml",
)


def contents(archive: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(archive) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def test_wheel_is_for_every_platform_and_holds_only_the_package(wheel: Path) -> None:
    version = neml2_aoti_plugin.__version__
    assert wheel.name == f"neml2_aoti_plugin-{version}-py3-none-any.whl"
    found = {Path(name) for name in contents(wheel)}
    assert {path.parts[0] for path in found} == {"neml2_aoti_plugin", f"neml2_aoti_plugin-{version}.dist-info"}
    package = {path.relative_to("neml2_aoti_plugin") for path in found if path.parts[0] == "neml2_aoti_plugin"}
    # Beside Python, the page of the service, the example and the machine code.
    assert {path.as_posix() for path in package if path.suffix != ".py"} == {
        *("py.typed", "serve/page.html", "_solve/machine_code.bc", "_cli/viscoplasticity.i")
    }
    sources = Path(neml2_aoti_plugin.__file__).parent
    if sources.parent == ROOT:
        modules = {path.relative_to(sources) for path in sources.rglob("*.py")}
        assert {path for path in package if path.suffix == ".py"} == modules


def test_wheel_says_what_it_needs(wheel: Path) -> None:
    files = {name.rpartition("/")[2]: data for name, data in contents(wheel).items() if ".dist-info/" in name}
    head = email.message_from_bytes(files["METADATA"])
    needs = [Requirement(text) for text in head.get_all("Requires-Dist", [])]
    assert {need.name: str(need.specifier) for need in needs if "extra" not in str(need.marker)} == {
        "click": "<9,>=8.1",
        "neml2": "<4,>=3.1",
        "llvmlite": ">=0.46",
        "msgspec": "<1,>=0.20",
        "rich": "<17,>=13.7",
        "safetensors": "<1,>=0.4.3",
        "torch": ">=2.10",
    }
    assert (head["Requires-Python"], head["License-Expression"]) == (">=3.10", "MIT")
    assert head.get_all("Provides-Extra") == ["dask", "examples", "netcdf", "plot", "serve"]
    assert {address.partition(",")[0] for address in head.get_all("Project-URL", [])} == {"NEML2"}
    entry_point = b"[torch.backends]\nneml2_aoti_plugin = neml2_aoti_plugin._autoload:autoload"
    assert entry_point in files["entry_points.txt"]


def hatchling(kind: str, folder: Path, cwd: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "--target", kind, "--directory", str(folder)]
    subprocess.run(command, cwd=cwd, check=True, capture_output=True, timeout=120)
    (built,) = (file for file in folder.iterdir() if file.suffix in (".gz", ".whl"))
    return built


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="git tells which files there must be")
@pytest.mark.skipif(not (ROOT / "neml2_aoti_plugin").is_dir(), reason="the sources lie elsewhere")
def test_the_sdist_holds_the_tree_and_gives_the_same(wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(hatchling("sdist", tmp_path, ROOT)) as archive:
        archive.extractall(tmp_path, filter="data")
    sdist = tmp_path / f"neml2_aoti_plugin-{neml2_aoti_plugin.__version__}"
    found = {path.relative_to(sdist).as_posix() for path in sdist.rglob("*") if path.is_file()}
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *IN_THE_SDIST]
    listed = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True, timeout=60)
    # The machine code, so that a build needs no compiler where its sources are as they were; and what hatchling adds,
    # its metadata, and git's list of what to ignore, by which it builds.
    added = {"neml2_aoti_plugin/_solve/machine_code.bc", "PKG-INFO", ".gitignore"}
    assert found == {*listed.stdout.splitlines(), *added}
    one, other = contents(hatchling("wheel", tmp_path / "again", sdist)), contents(wheel)
    assert {n: d for n, d in one.items() if "RECORD" not in n} == {n: d for n, d in other.items() if "RECORD" not in n}


def test_public_names_are_there() -> None:
    assert set(neml2_aoti_plugin.__all__) <= set(dir(neml2_aoti_plugin))
    assert all(getattr(neml2_aoti_plugin, name) is not None for name in neml2_aoti_plugin.__all__)
    exceptions = {name for name, value in vars(errors).items() if isinstance(value, type) and name[0] != "_"}
    assert exceptions <= set(neml2_aoti_plugin.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Modle'; its names are AOTIError"):
        neml2_aoti_plugin.Modle  # noqa: B018


@pytest.mark.parametrize(
    ("neml2", "torch", "on_disk", "verdict"),
    [
        ("3.1.0", "2.10.0", True, "works"),
        ("3.1.0", "2.12.1+cu130", True, "works"),
        ("3.1.0", "2.13.0+cpu", True, "imports, then reads wrong"),
        ("3.1.0", "2.14.0", True, "imports, then reads wrong"),
        ("3.1.0", "2.15.0", True, "does not import"),
        ("3.1.0", "2.16.0a0+gitdeadbee", True, "unknown"),
        ("3.1.0", "nightly", True, "unknown"),
        ("3.2.0", "2.12.0", True, "unknown"),
        ("3.1.0", "2.12.0", False, "cannot be used"),
        (None, "2.12.0", None, "cannot be used"),
        ("3.1.0", None, True, "cannot be used"),
    ],
)
def test_verdict_on_the_native_binding(
    neml2: str | None, torch: str | None, on_disk: bool | None, verdict: str
) -> None:
    assert _status.native_verdict(neml2, torch, on_disk).startswith(verdict)


@pytest.mark.parametrize(
    ("module", "lacks", "extra"),
    [("neml2_aoti_plugin.serve", "starlette", "serve"), ("neml2_aoti_plugin.parallel.dask", "distributed", "dask")],
)
def test_what_needs_an_extra_names_it(module: str, lacks: str, extra: str) -> None:
    program = f"import sys; sys.modules[{lacks!r}] = None; import {module}"
    said = run_fresh(program, status=1).rstrip().rstrip(".")
    assert said.endswith(f"not installed: pip install 'neml2-aoti-plugin[{extra}]'")
