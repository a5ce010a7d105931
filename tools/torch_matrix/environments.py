"""The work folder and the virtual environments in it: laying out, installing, running an environment's Python."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from .cases import Measured

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "neml2_aoti_plugin"
# The file of machine code, which git does not keep and the build makes.
CODE = f"{PACKAGE}/_solve/machine_code.bc"
NEML2 = "3.1.0"
STUB_CACHE = "NEML2_AOTI_PLUGIN_STUB_CACHE"
# What would change an outcome from the outside.
OUTSIDE = ("NEML2_", "PYTHON", "TORCH_")
# Seconds that a step may take.
LIMIT = 3600
GIB = 2**30


class StepError(RuntimeError):
    """A step in an environment failed; the message is one line."""


@dataclass(frozen=True)
class Workshop:
    """The work folder, and what is tested there."""

    folder: Path
    jobs: int
    # GiB that must be free before torch is installed.
    space: float
    # What environments are made of, but for those of `pythons`: programs by the name of what is found under them.
    python: Path
    pythons: dict[str, Path] = field(default_factory=dict)
    # Whether torches too test with the stubs that this Python has compiled.
    take_stubs: bool = False
    # Modules to run where it is no variant that names its own; all if empty.
    tests: tuple[str, ...] = ()

    @property
    def tree(self) -> Path:
        """The copy of the repository that the tests run from."""
        return self.folder / "tree"

    def built(self, found: Measured) -> Path:
        """The wheel or the sdist under test."""
        return next((self.folder / "built").glob("*.tar.gz" if found.variant.sdist else "*.whl"))

    def of(self, found: Measured | str) -> Path:
        """The folder of what was found, and of the steps' logs."""
        return self.folder / "results" / (found if isinstance(found, str) else found.name)

    def environment(self, found: Measured | str) -> Path:
        """The folder of an environment, whether it is there or not."""
        return self.folder / "environments" / (found if isinstance(found, str) else found.name)

    def run(
        self, found: Measured, log: str, arguments: Sequence[str], *, beside: bool = False, good: Sequence[int] = (0,)
    ) -> str:
        """Run an environment's Python in the tree, beside its modules if so; give what it printed, which is kept."""
        file = self.of(found) / f"{log}.log"
        variables = {k: v for k, v in os.environ.items() if not k.startswith(OUTSIDE) or k == STUB_CACHE}
        variables |= found.variant.variables
        if found.compiled_under:
            variables[STUB_CACHE] = str(self.of(found) / "stubs")
        if beside:
            variables["PYTHONPATH"] = os.pathsep.join(map(str, (self.tree, self.tree / "tests")))
        program = self.environment(found) / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        command = [str(program), *arguments]
        with file.open("w", encoding="utf-8") as out:
            out.write(f"$ {shlex.join(command)}\n")
            out.flush()
            try:
                done = subprocess.run(
                    command, cwd=self.tree, env=variables, stdout=out, stderr=subprocess.STDOUT, timeout=LIMIT
                )
            except subprocess.TimeoutExpired:
                raise StepError(f"{log}: not done after {LIMIT} s") from None
        text = file.read_text(encoding="utf-8", errors="replace")
        if done.returncode not in good:
            raise StepError(f"{log}: exit status {done.returncode}: {text.strip().splitlines()[-1][:250]}")
        return text

    def ask(self, found: Measured, task: str, *arguments: str, log: str = "") -> dict[str, Any]:
        """Run a task of `child.py` in an environment, and read the last line that it printed."""
        # By name: started by its path, the child would find this folder's environments.py before that of tests/.
        text = self.run(found, log or task, ["-m", "tools.torch_matrix.child", task, *arguments], beside=True)
        told: dict[str, Any] = json.loads(text.strip().splitlines()[-1])
        return told


def lay_out(shop: Workshop) -> None:
    """Build wheel and sdist, and copy the repository with the package's sources out of the tests' way.

    The tests build the wheel too. In the copy the sources are therefore still there, but in a folder that is on
    nobody's path, which the copy's pyproject.toml and build hook name.
    """
    for folder in (shop.tree, shop.folder / "built"):
        shutil.rmtree(folder, ignore_errors=True)
    build = [sys.executable, "-m", "hatchling", "build", "-d", str(shop.folder / "built")]
    subprocess.run(build, cwd=ROOT, check=True)
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True)
    for name in filter(None, [*listed.stdout.split("\0"), CODE]):
        if (ROOT / name).is_file():
            target = shop.tree / ("sources" if name.startswith(f"{PACKAGE}/") else ".") / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)
    for name, places in {"pyproject.toml": 2, "hatch_build.py": 1}.items():
        text = (shop.tree / name).read_text(encoding="utf-8")
        for begin in ('path = "', 'packages = ["', 'FILE = "'):
            text = text.replace(f"{begin}{PACKAGE}", f"{begin}sources/{PACKAGE}")
        if text.count("sources/") != places:
            raise SystemExit(f"{name} does not name the package's folder as this program expects it.")
        (shop.tree / name).write_text(text, encoding="utf-8")


def install(shop: Workshop, found: Measured) -> None:
    """Make an environment, or find it, and bring the plugin in it up to date."""
    folder = shop.environment(found)
    complete = folder / "torch-is-installed"
    shop.of(found).mkdir(parents=True, exist_ok=True)
    pip = ["-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
    if not complete.exists():
        shutil.rmtree(folder, ignore_errors=True)
        make_room(shop)
        subprocess.run([str(shop.pythons.get(found.name, shop.python)), "-m", "venv", str(folder)], check=True)
        # By itself: resolved together with the rest, pip may look at every release of it. Its wheels are large and
        # used once, so they are not kept in pip's cache.
        shop.run(found, "torch", [*pip, "--no-cache-dir", f"torch=={found.torch}"])
        complete.touch()
    own = [f"torch=={found.torch}", f"neml2=={NEML2}", *found.variant.pinned]
    names = {line.partition("==")[0] for line in own}
    pinned = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if "==" in line]
    constraints = shop.of(found) / "constraints.txt"
    kept = [line for line in pinned if line.partition("==")[0].strip() not in names]
    constraints.write_text("\n".join([*kept, *own]) + "\n", encoding="utf-8")
    # Dependency groups are known to pip from 25.1 on.
    shop.run(found, "pip", [*pip, "pip>=25.1"])
    built = str(shop.built(found))
    test = ["--group", f"{ROOT / 'pyproject.toml'}:test"]
    shop.run(found, "packages", [*pip, "--constraint", str(constraints), f"{built}[dask,serve]", *test])
    shop.run(found, "wheel", [*pip, "--no-deps", "--force-reinstall", built])


def make_room(shop: Workshop) -> None:
    """Delete environments, oldest first, until there is space for one more."""

    def free() -> float:
        return shutil.disk_usage(shop.folder).free / GIB

    folder = shop.folder / "environments"
    folder.mkdir(parents=True, exist_ok=True)
    for other in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime):
        if free() < shop.space:
            say(f"{free():.0f} GiB free: deleting the environment {other.name}")
            shutil.rmtree(other)
    if free() < shop.space:
        raise StepError(f"torch: {free():.0f} GiB free in {shop.folder}, {shop.space:g} wanted (--space)")


def commit() -> str:
    """Name the commit of the sources, with a plus sign if they have been changed since."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--", PACKAGE, "tests", "stubs", "pyproject.toml")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def say(text: str) -> None:
    """Print a line with the time."""
    print(f"{datetime.now():%H:%M:%S} {text}", flush=True)
