"""The work folder and the virtual environments in it: laying out, installing, running an environment's Python."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from .results import folder_of, release_of

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "neml2_aoti_plugin"
CHILD = "tools.torch_matrix.child"

NEML2 = "3.1.0"
STUB_CACHE = "NEML2_AOTI_PLUGIN_STUB_CACHE"
# What would change an outcome from the outside.
OUTSIDE = ("NEML2_", "PYTHON", "TORCH_")
# Seconds that each step may take.
LIMITS = {"torch": 1800, "packages": 900, "stubs": 3600, "adopt": 300, "tests": 3600, "numbers": 1200, "crossing": 900}
GIB = 2**30


class StepError(RuntimeError):
    """A step under one torch failed; the message is one line."""


@dataclass(frozen=True)
class Workshop:
    """The work folder, and what is tested there.

    Args:
        folder: The work folder.
        jobs: Processes at a time.
        space: GiB that must be free before torch is installed.
        python: Python that the environments are made of.
    """

    folder: Path
    jobs: int
    space: float
    python: Path

    @property
    def tree(self) -> Path:
        """The copy of the repository that the tests run from."""
        return self.folder / "tree"

    @property
    def wheel(self) -> Path:
        """The wheel under test."""
        return next((self.folder / "wheel").glob("*.whl"))

    def of(self, torch: str) -> Path:
        """Give the folder of what was found under one torch."""
        return folder_of(self.folder, torch)

    def environment(self, torch: str) -> Path:
        """Give the folder of one environment, whether it is there or not."""
        return self.folder / "environments" / torch

    def stubs_of(self, torch: str) -> dict[str, str]:
        """Give the variable that names the stubs of another Python; a torch of its own uses the common cache."""
        return {} if torch == release_of(torch) else {STUB_CACHE: str(self.of(torch) / "stubs")}

    def program(self, torch: str) -> Path:
        """Give the Python of one environment."""
        return self.environment(torch) / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    def run(self, torch: str, step: str, arguments: Sequence[str], *, log: str = "", good: Sequence[int] = (0,)) -> str:
        """Run an environment's Python in the tree.

        Args:
            torch: The environment's torch.
            step: A key of `LIMITS`.
            arguments: For Python.
            log: Name of the log; that of the step if not given.
            good: Exit statuses that are no failure.

        Returns:
            What it printed.

        Raises:
            StepError: It took too long, or ended with another status.
        """
        file = self.of(torch) / f"{log or step}.log"
        file.parent.mkdir(parents=True, exist_ok=True)
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(OUTSIDE) or k == STUB_CACHE}
        path = os.pathsep.join(map(str, (self.tree, self.tree / "tests")))
        variables = (
            inherited
            | self.stubs_of(torch)
            | ({"PYTHONPATH": path} if step in ("adopt", "numbers", "crossing") else {})
        )
        command = [str(self.program(torch)), *arguments]
        with file.open("w", encoding="utf-8") as out:
            out.write(f"$ {shlex.join(command)}\n")
            out.flush()
            try:
                done = subprocess.run(
                    command, cwd=self.tree, env=variables, stdout=out, stderr=subprocess.STDOUT, timeout=LIMITS[step]
                )
            except subprocess.TimeoutExpired:
                raise StepError(f"{step}: not done after {LIMITS[step]} s") from None
        text = file.read_text(encoding="utf-8", errors="replace")
        if done.returncode not in good:
            raise StepError(f"{step}: exit status {done.returncode}: {text.strip().splitlines()[-1][:250]}")
        return text

    def ask(self, torch: str, task: str, numbers: Path, *, log: str = "") -> dict[str, Any]:
        """Run a task of `child.py` in an environment, and read the last line that it printed.

        Args:
            torch: The environment's torch.
            task: The task, which is a key of `LIMITS` too.
            numbers: The file with numbers that the task writes or reads.
            log: Name of the log; that of the task if not given.

        Returns:
            What it found.
        """
        # By name: started by its path, the child would find this folder's environments.py before that of tests/.
        text = self.run(torch, task, ["-m", CHILD, task, str(numbers)], log=log)
        found: dict[str, Any] = json.loads(text.strip().splitlines()[-1])
        return found


def lay_out(shop: Workshop) -> None:
    """Build the wheel, and copy the repository with the package's sources out of the tests' way.

    The tests build the wheel too. In the copy the sources are therefore still there, but in a folder that is on
    nobody's path, which the copy's pyproject.toml names.
    """
    for folder in (shop.tree, shop.folder / "wheel"):
        shutil.rmtree(folder, ignore_errors=True)
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            target = shop.tree / ("sources" if name.startswith(f"{PACKAGE}/") else ".") / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)
    project = shop.tree / "pyproject.toml"
    text = project.read_text(encoding="utf-8")
    edited = text.replace(f'path = "{PACKAGE}/', f'path = "sources/{PACKAGE}/')
    edited = edited.replace(f'packages = ["{PACKAGE}"]', f'packages = ["sources/{PACKAGE}"]')
    if edited.count("sources/") != 2:
        raise SystemExit(f"{project} does not name the package's folder as this program expects it.")
    project.write_text(edited, encoding="utf-8")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-build-isolation", "--wheel-dir", str(shop.folder / "wheel"), str(ROOT)]
    subprocess.run(command, check=True)


def install(shop: Workshop, torch: str) -> None:
    """Make an environment, or find it, and bring the wheel in it up to date."""
    folder = shop.environment(torch)
    complete = folder / "torch-is-installed"
    pip = ["-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
    if not complete.exists():
        shutil.rmtree(folder, ignore_errors=True)
        make_room(shop)
        subprocess.run([str(shop.python), "-m", "venv", str(folder)], check=True)
        # By itself: resolved together with the rest, pip may look at every release of it. Its wheels are large and
        # used once, so they are not kept in pip's cache.
        shop.run(torch, "torch", [*pip, "--no-cache-dir", f"torch=={release_of(torch)}"])
        complete.touch()
    pinned = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if "==" in line]
    own = {"torch": release_of(torch), "neml2": NEML2}
    kept = [line for line in pinned if line.partition("==")[0].strip() not in own]
    constraints = shop.of(torch) / "constraints.txt"
    constraints.write_text("\n".join([*kept, *(f"{n}=={v}" for n, v in own.items())]) + "\n", encoding="utf-8")
    # Dependency groups are known to pip from 25.1 on.
    shop.run(torch, "packages", [*pip, "pip>=25.1"], log="pip")
    test = ["--group", f"{ROOT / 'pyproject.toml'}:test"]
    shop.run(torch, "packages", [*pip, "--constraint", str(constraints), f"{shop.wheel}[dask,serve]", *test])
    shop.run(torch, "packages", [*pip, "--no-deps", "--force-reinstall", str(shop.wheel)], log="wheel")


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
