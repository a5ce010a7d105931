"""The wheel holds the package and nothing else, and says what it needs."""

from __future__ import annotations

import email
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import neml2_aoti_plugin
from neml2_aoti_plugin import _status, errors


def test_wheel_is_for_every_platform_and_holds_only_the_package(wheel: Path) -> None:
    version = neml2_aoti_plugin.__version__
    assert wheel.name == f"neml2_aoti_plugin-{version}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names} == {
        "neml2_aoti_plugin",
        f"neml2_aoti_plugin-{version}.dist-info",
    }
    package = [name for name in names if name.startswith("neml2_aoti_plugin/")]
    # Beside Python, the page of the service and the machine code.
    others = {name for name in package if not name.endswith(".py")}
    assert others == {
        f"neml2_aoti_plugin/{name}"
        for name in ("py.typed", "serve/page.html", "_solve/machine_code.bc", "_cli/viscoplasticity.i")
    }
    sources = Path(neml2_aoti_plugin.__file__).parent
    if sources.parent == Path(__file__).parents[1]:
        assert {name for name in package if name.endswith(".py")} == {
            path.relative_to(sources.parent).as_posix() for path in sources.rglob("*.py")
        }


def test_wheel_says_what_it_needs(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (folder,) = {name.partition("/")[0] for name in archive.namelist() if ".dist-info/" in name}
    head = email.message_from_bytes(archive.read(f"{folder}/METADATA"))
    needs = [Requirement(text) for text in head.get_all("Requires-Dist", [])]
    at_run_time = {need.name: str(need.specifier) for need in needs if "extra" not in str(need.marker)}
    assert at_run_time == {
        "click": "<9,>=8.1",
        "neml2": "<4,>=3.1",
        "llvmlite": ">=0.46",
        "msgspec": "<1,>=0.20",
        "rich": "<17,>=13.7",
        "safetensors": "<1,>=0.4.3",
        "torch": ">=2.10",
    }
    assert head["Requires-Python"] == ">=3.10"
    assert head["License-Expression"] == "MIT"
    assert head.get_all("Provides-Extra") == ["dask", "examples", "netcdf", "plot", "serve"]
    assert {address.partition(",")[0] for address in head.get_all("Project-URL", [])} == {"NEML2"}
    entry_points = archive.read(f"{folder}/entry_points.txt").decode()
    assert "[torch.backends]\nneml2_aoti_plugin = neml2_aoti_plugin._autoload:autoload" in entry_points


def test_public_names_are_there() -> None:
    assert set(neml2_aoti_plugin.__all__) <= set(dir(neml2_aoti_plugin))
    for name in neml2_aoti_plugin.__all__:
        assert getattr(neml2_aoti_plugin, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Modle'; its names are AOTIError"):
        neml2_aoti_plugin.Modle  # noqa: B018


def test_exceptions_are_all_public() -> None:
    declared = {name for name, value in vars(errors).items() if isinstance(value, type) and name[0] != "_"}
    assert declared <= set(neml2_aoti_plugin.__all__)


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
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.rstrip().rstrip(".").endswith(f"not installed: pip install 'neml2-aoti-plugin[{extra}]'")
