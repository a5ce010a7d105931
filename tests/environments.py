"""Fresh virtual environments with the plugin's wheel in them, for tests that start processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import textwrap
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
# What would change the outcome of a test from the outside.
OUTSIDE = ("NEML2_", "PYTHON", "TORCH_")


@dataclass(frozen=True)
class Environment:
    """A virtual environment and the folder its processes are started in."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    @property
    def site(self) -> Path:
        """Its site-packages."""
        return Path(self.run("import sysconfig; print(sysconfig.get_path('purelib'))").strip())

    @property
    def command(self) -> Path:
        """Its console script of the plugin."""
        return self.python.with_name("neml2-aoti.exe" if os.name == "nt" else "neml2-aoti")

    def start(
        self,
        arguments: Sequence[str],
        *,
        flags: Sequence[str] = (),
        variables: Mapping[str, str] | None = None,
        program: Path | None = None,
        cwd: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run its Python, or another program, away from the repository, and give what came of it."""
        command = [str(program or self.python), *flags, *arguments]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(OUTSIDE)}
        variables = {**inherited, **(variables or {})}
        return subprocess.run(
            command, cwd=cwd or self.folder, env=variables, capture_output=True, text=True, timeout=240
        )

    def run(self, code: str, *, flags: Sequence[str] = (), variables: Mapping[str, str] | None = None) -> str:
        """Run a piece of code that must succeed and say nothing on stderr; give what it printed."""
        done = self.start(["-c", textwrap.dedent(code)], flags=flags, variables=variables)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        assert done.stderr == ""
        return done.stdout


def build_wheel(folder: Path) -> Path:
    """Build the plugin's wheel from the working tree into a folder and give its path."""
    # Without isolation nothing is fetched; that needs the build backend, which the group `test` brings.
    isolation = ["--no-build-isolation"] if find_spec("hatchling") else []
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", *isolation, "--wheel-dir", str(folder)]
    subprocess.run([*command, str(ROOT)], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def create(folder: Path, wheel: Path, *, without: Sequence[str] = ()) -> Environment:
    """Create an environment with the plugin installed from its wheel.

    The rest is linked from the environment that runs the tests, package by package, which takes no time, but for those
    whose names begin with one of `without`.
    """
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    environment = Environment(folder)
    site = environment.site
    left_out = ("neml2_aoti_plugin", "_neml2_aoti_plugin", "pip", "__pycache__", *without)
    for source in {Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib")}:
        for entry in source.iterdir():
            if not entry.name.startswith(left_out) and entry.suffix != ".pth":
                (site / entry.name).symlink_to(entry)
    # As a user's pip would, with the console script.
    pip = [sys.executable, "-m", "pip", "--python", str(environment.python), "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    return environment
