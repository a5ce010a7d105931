"""Test the plugin's wheel under several releases of torch, and load under each what every other one has compiled.

`python tools/torch_matrix.py` takes all releases of `TORCHES`; releases named on the command line are taken alone. For
each, in a fresh virtual environment: torch by itself, then the wheel with neml2 and the test dependencies; the stubs
that the default tests use are compiled; the tests run, from a copy of the repository without the package's sources
beside them; and every compiled stub is evaluated on states of its own driver's trajectory. Then each torch loads what
the others have compiled and evaluates it on the same inputs.

What was found is kept in the work folder, with the log of each step, so that a run can be broken off and taken up
again, and docs/compatibility.md is written anew after each release. A failure under one torch does not stop the others.
The exit status is 0 if nothing failed and nothing is missing, else 1.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

if TYPE_CHECKING:
    from torch import Tensor

    from neml2_aoti_plugin.model import Model

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "compatibility.md"
WORK = Path.home() / ".cache" / "neml2-aoti-plugin" / "torch-matrix"
PACKAGE = "neml2_aoti_plugin"

TORCHES = ("2.10.0", "2.11.0", "2.12.1", "2.13.0", "2.14.1", "2.15.0")
NEML2 = "3.1.0"
TOLERANCE = 1e-12
STUB_CACHE = "NEML2_AOTI_PLUGIN_STUB_CACHE"
# What would change an outcome from the outside.
OUTSIDE = ("NEML2_", "PYTHON", "TORCH_")
# Distributions whose versions the page tells.
TOLD = ("torch", "neml2", "nmhit", "numpy", "scipy", "pytest")
# Seconds that each step may take.
LIMITS = {"torch": 1800, "packages": 900, "stubs": 3600, "tests": 3600, "numbers": 1200, "crossing": 900}
GIB = 2**30


class StepError(RuntimeError):
    """A step under one torch failed; the message is one line."""


@dataclass
class Measured:
    """What was found under one torch.

    Args:
        torch: Its release, as asked for.
        day: On which this was.
        stamp: When the compiled stubs were evaluated.
        commit: Of the sources.
        versions: Of Python and of some distributions in the environment.
        size: Of the environment, in GiB.
        compiled: Stubs that were compiled.
        cached: Stubs that an earlier run had compiled under this torch.
        left_out: Stubs that cannot be compiled with a torch as old as this, with the reason.
        uncompiled: Stubs that failed to compile, with the last line of what was said.
        compile_seconds: For those that were compiled.
        evaluated: Compiled stubs that were loaded and evaluated.
        not_evaluated: The others, with what went wrong.
        passed: Number of tests.
        failed: Names of tests, with the first line of what went wrong.
        skipped: Number of tests.
        test_seconds: Of the whole test run.
        trouble: The step that stopped all further ones under this torch.
    """

    torch: str
    day: str = ""
    stamp: str = ""
    commit: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    size: float = 0.0
    compiled: int = 0
    cached: int = 0
    left_out: dict[str, str] = field(default_factory=dict)
    uncompiled: dict[str, str] = field(default_factory=dict)
    compile_seconds: float = 0.0
    evaluated: int = 0
    not_evaluated: dict[str, str] = field(default_factory=dict)
    passed: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    skipped: int = 0
    test_seconds: float = 0.0
    trouble: str = ""

    @property
    def good(self) -> bool:
        """Whether nothing failed."""
        return not (self.trouble or self.uncompiled or self.not_evaluated or self.failed)


@dataclass
class Crossing:
    """What one torch made of the stubs that another, or itself, had compiled.

    Args:
        stamp: Of the numbers that were compared with.
        commit: Of the sources with which they were loaded.
        wanted: Number of compiled stubs.
        values: Largest relative difference of an output, by stub.
        derivatives: Largest relative difference of a derivative, by stub that has any.
        refused: What kept a stub from being loaded or evaluated.
        trouble: What kept all of them.
    """

    stamp: str
    commit: str = ""
    wanted: int = 0
    values: dict[str, float] = field(default_factory=dict)
    derivatives: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    trouble: str = ""

    @property
    def worst(self) -> float:
        """Largest relative difference of all."""
        return max((*self.values.values(), *self.derivatives.values()), default=0.0)

    @property
    def good(self) -> bool:
        """Whether all stubs gave the same numbers."""
        return not (self.trouble or self.refused) and self.worst <= TOLERANCE


# -- in an environment's own process ---------------------------------------------------------------------------------


def evaluate(model: Model, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Give the outputs of a compiled model, and all derivatives that it was compiled with, by `OUT:BY`."""
    outputs = dict(model.forward(inputs))
    blocks: dict[str, Tensor] = {}
    calls = ((model.derivative_pairs, model.jacobian), (model.parameter_derivative_pairs, model.param_jacobian))
    for pairs, call in calls:
        if pairs:
            found: dict[str, dict[str, Tensor]] = call(inputs)[1]
            blocks.update({f"{out}:{by}": found[out][by] for out, by in pairs})
    return outputs, blocks


def numbers(file: Path) -> dict[str, Any]:
    """Evaluate the stubs of the default tests that this torch has compiled, and save inputs and numbers.

    Args:
        file: Where to save them.

    Returns:
        The number of stubs evaluated, and what went wrong with the others.
    """
    import torch

    import references  # type: ignore[import-not-found]  # of tests/
    from stubs.build import folder_of
    from stubs.catalogue import CATALOGUE

    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    troubles: dict[str, str] = {}
    for name, stub in CATALOGUE.items():
        if stub.wide or not folder_of(name).is_dir():
            continue
        try:
            case = references.case(name)
            inputs = case.rows()
            values, derivatives = evaluate(case.load(tight=False), inputs)
        except Exception as error:
            traceback.print_exc()
            troubles[name] = line_of(error)
            continue
        found[name] = {
            "artifact": str(case.artifact),
            "inputs": inputs,
            "values": values,
            "derivatives": derivatives,
        }
    torch.save(found, file)
    return {"evaluated": len(found), "not_evaluated": troubles}


def cross(file: Path) -> dict[str, Any]:
    """Evaluate under this torch what another has compiled, and compare with the numbers that the other gave.

    Args:
        file: What `numbers` has saved under the other torch.

    Returns:
        The fields of a `Crossing`, but for its stamp and commit.
    """
    import torch
    from neml2.aoti import Model

    torch.set_num_threads(1)
    saved: dict[str, Any] = torch.load(file, weights_only=True)
    result = Crossing("", wanted=len(saved))
    for name, was in saved.items():
        try:
            model = Model(was["artifact"])
            values, derivatives = evaluate(model, was["inputs"])
            result.values[name] = worst(values, was["values"])
            if derivatives or was["derivatives"]:
                givens = was["inputs"] | dict(model.named_parameters())
                # A derivative may be zero but for rounding; then its numbers are no measure of what matters.
                pairs = {pair: pair.split(":") for pair in derivatives}
                least = {pair: size(values[out]) / size(givens[by]) for pair, (out, by) in pairs.items()}
                result.derivatives[name] = worst(derivatives, was["derivatives"], least)
        except Exception as error:
            traceback.print_exc()
            result.refused[name] = line_of(error)
    return {key: value for key, value in asdict(result).items() if key not in ("stamp", "commit")}


def size(value: Tensor) -> float:
    """Give the largest absolute value, 1 where all is zero."""
    return (float(value.detach().abs().max()) if value.numel() else 0.0) or 1.0


def worst(found: dict[str, Tensor], wanted: dict[str, Tensor], least: dict[str, float] | None = None) -> float:
    """Compare tensors by name; raise where there is no comparing.

    Args:
        found: Tensors.
        wanted: What they should be.
        least: What the difference is taken over at least, by name.

    Returns:
        The largest difference over the largest number of the same tensor.
    """
    if set(found) != set(wanted):
        raise ValueError(f"names {sorted(found)}, and {sorted(wanted)} under the torch that compiled")
    gaps = [0.0]
    for name, value in found.items():
        other = wanted[name]
        if value.shape != other.shape or value.dtype != other.dtype or not bool(value.isfinite().all()):
            raise ValueError(f"{name}: {value.dtype} {tuple(value.shape)}, or not finite")
        if value.numel():
            gaps.append(float((value - other).abs().max()) / max(size(other), (least or {}).get(name, 0.0)))
    return max(gaps)


def line_of(error: Exception) -> str:
    """Put an exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def child(task: str, file: str) -> None:
    """Carry out a task in an environment, and print what it found as the last line, in JSON."""
    import neml2_aoti_plugin

    place = Path(neml2_aoti_plugin.__file__).resolve()
    if not place.is_relative_to(Path(sys.prefix).resolve()):
        raise SystemExit(f"{PACKAGE} comes from {place}, not from the wheel")
    tasks: dict[str, Callable[[Path], dict[str, Any]]] = {"numbers": numbers, "crossing": cross}
    found = tasks[task](Path(file))
    print("\n" + json.dumps(found))


# -- an environment --------------------------------------------------------------------------------------------------


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
        return self.folder / f"torch-{torch}"

    def environment(self, torch: str) -> Path:
        """Give the folder of one environment, whether it is there or not."""
        return self.folder / "environments" / torch

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
        variables = inherited | ({"PYTHONPATH": path} if step in ("numbers", "crossing") else {})
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

    def last_line(self, torch: str, step: str, arguments: Sequence[str], *, log: str = "") -> dict[str, Any]:
        """Run a task of `child` in an environment, and read its last line."""
        text = self.run(torch, step, [str(Path(__file__).resolve()), "--child", step, *arguments], log=log)
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
        shop.run(torch, "torch", [*pip, "--no-cache-dir", f"torch=={torch}"])
        complete.touch()
    pinned = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if "==" in line]
    own = {"torch": torch, "neml2": NEML2}
    kept = [line for line in pinned if line.partition("==")[0].strip() not in own]
    constraints = shop.of(torch) / "constraints.txt"
    constraints.write_text("\n".join([*kept, *(f"{n}=={v}" for n, v in own.items())]) + "\n", encoding="utf-8")
    shop.run(torch, "packages", [*pip, "--constraint", str(constraints), f"{shop.wheel}[dev]"])
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


# -- under one torch -------------------------------------------------------------------------------------------------


def measure(shop: Workshop, torch: str) -> Measured:
    """Install, compile, evaluate and test under one torch."""
    found = Measured(torch, day=str(date.today()), commit=commit())
    take_steps(
        shop,
        found,
        {
            "install": lambda: install(shop, torch),
            "look around": lambda: look_around(shop, found),
            "compile stubs": lambda: compile_stubs(shop, found),
            "evaluate": lambda: take_numbers(shop, found),
            "test": lambda: run_tests(shop, found),
        },
    )
    return found


def measure_tests(shop: Workshop, before: Measured) -> Measured:
    """Run the tests again under one torch, and keep what else was found."""
    found = replace(before, day=str(date.today()), commit=commit(), trouble="")
    steps = {"install": lambda: install(shop, found.torch), "test": lambda: run_tests(shop, found)}
    take_steps(shop, found, steps)
    return found


def take_steps(shop: Workshop, found: Measured, steps: dict[str, Callable[[], None]]) -> None:
    """Take steps under one torch, up to the first that fails."""
    for name, step in steps.items():
        start = time.monotonic()
        try:
            step()
        except Exception as error:  # whatever it is, the other releases are still to come
            found.trouble = f"{name}: {' '.join(str(error).split())}"
            say(f"torch {found.torch}: {found.trouble}")
            break
        say(f"torch {found.torch}: {name}, {time.monotonic() - start:.0f} s")


def look_around(shop: Workshop, found: Measured) -> None:
    """Read the versions in an environment, and its size."""
    code = (
        "import json, platform; from importlib import metadata; "
        "print(json.dumps({d.metadata['Name']: d.version for d in metadata.distributions()} "
        "| {'Python': platform.python_version()}))"
    )
    text = shop.run(found.torch, "packages", ["-c", code], log="versions")
    every: dict[str, str] = json.loads(text.splitlines()[-1])
    found.versions = {name: every[name] for name in ("Python", *TOLD)}
    files = (path.lstat() for path in shop.environment(found.torch).rglob("*"))
    found.size = sum(getattr(status, "st_blocks", status.st_size // 512) * 512 for status in files) / GIB


def compile_stubs(shop: Workshop, found: Measured) -> None:
    """Compile the stubs that the default tests use, and count them."""
    start = time.monotonic()
    text = shop.run(found.torch, "stubs", ["-m", "stubs.build", "-j", str(shop.jobs)], good=(0, 1))
    seconds = time.monotonic() - start
    # Each outcome with what stands below it, which is the error where there was one.
    pieces = re.split(r"^(\w+) +(cached|FAILED|left out: .*|[\d.]+ s)$", text, flags=re.MULTILINE)
    outcomes = {name: (how, below) for name, how, below in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True)}
    if not outcomes:
        raise StepError(text.strip().splitlines()[-1][:250])
    for name, (how, below) in outcomes.items():
        if how == "FAILED":
            found.uncompiled[name] = below.strip().splitlines()[-1]
        elif how.startswith("left out: "):
            found.left_out[name] = how.removeprefix("left out: ")
        elif how == "cached":
            found.cached += 1
        else:
            found.compiled += 1
    found.compile_seconds = seconds if found.compiled else 0.0


def take_numbers(shop: Workshop, found: Measured) -> None:
    """Evaluate what was compiled, for other torches to compare with."""
    told = shop.last_line(found.torch, "numbers", [str(numbers_of(shop, found.torch))])
    found.evaluated, found.not_evaluated = told["evaluated"], told["not_evaluated"]
    found.stamp = datetime.now().isoformat(timespec="seconds")


def numbers_of(shop: Workshop, torch: str) -> Path:
    """Say where the numbers are that a torch gave for what it has compiled."""
    return shop.of(torch) / "numbers.pt"


def run_tests(shop: Workshop, found: Measured) -> None:
    """Run the tests, and count them."""
    found.passed, found.failed, found.skipped, found.test_seconds = 0, {}, 0, 0.0
    report = shop.of(found.torch) / "tests.xml"
    report.unlink(missing_ok=True)
    start = time.monotonic()
    arguments = ["-m", "pytest", "--numprocesses", str(shop.jobs), f"--junitxml={report}", "-q"]
    shop.run(found.torch, "tests", arguments, good=(0, 1))
    found.test_seconds = time.monotonic() - start
    for test in ElementTree.parse(report).getroot().iter("testcase"):
        bad = [outcome for outcome in test if outcome.tag in ("failure", "error")]
        if bad:
            name = f"{test.get('classname')}.{test.get('name')}"
            found.failed[name] = " ".join((bad[0].get("message") or "").split())[:300]
        elif test.find("skipped") is not None:
            found.skipped += 1
        else:
            found.passed += 1


def cross_load(shop: Workshop, here: str, results: dict[str, Measured]) -> dict[str, Crossing]:
    """Load under one torch what each has compiled; what was compared before stays as it is."""
    file = shop.of(here) / "crossings.json"
    kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    found = {there: Crossing(**told) for there, told in kept.items() if there in results}
    stamps = {t: m.stamp for t, m in results.items() if m.stamp}
    stale = [t for t, stamp in stamps.items() if t not in found or found[t].stamp != stamp or found[t].trouble]
    if not stale:
        return found
    try:
        install(shop, here)
    except Exception as error:
        say(f"torch {here}: {error}")
        return found
    for there in stale:
        try:
            saved = [str(numbers_of(shop, there))]
            found[there] = Crossing(
                stamps[there], commit(), **shop.last_line(here, "crossing", saved, log=f"from-{there}")
            )
        except (StepError, ValueError) as error:
            found[there] = Crossing(stamps[there], commit(), results[there].evaluated, trouble=str(error))
        say(f"torch {here}, compiled under {there}: {crossing_cell(found[there])}")
        write_json(file, {key: asdict(one) for key, one in found.items()})
    return found


# -- the page --------------------------------------------------------------------------------------------------------

HEAD = ("torch", "measured", "Python", "stubs compiled", "loaded, evaluated", "passed", "failed", "skipped", "test run")


def row(torch: str, found: Measured | None) -> tuple[str, ...]:
    """Give one row of the first table."""
    if found is None:
        return torch, "not run", *[""] * (len(HEAD) - 2)
    total = found.compiled + found.cached + len(found.uncompiled) + len(found.left_out)
    stubs = f"{found.compiled + found.cached} of {total}"
    stubs += f", {found.compile_seconds:.0f} s" if found.compiled and not found.cached else ""
    stubs += f" ({found.cached} from the cache)" if found.cached else ""
    tested = found.test_seconds > 0
    return (
        found.versions.get("torch", torch),
        f"{found.day}, {found.commit}",
        found.versions.get("Python", ""),
        stubs if total else "no",
        f"{found.evaluated} of {found.evaluated + len(found.not_evaluated)}" if found.stamp else "no",
        str(found.passed) if tested else "no",
        str(len(found.failed)) if tested else "",
        str(found.skipped) if tested else "",
        f"{found.test_seconds:.0f} s" if tested else "",
    )


def crossing_cell(found: Crossing | None) -> str:
    """Give one cell of the second table."""
    if found is None:
        return "not measured"
    if found.trouble:
        return "failed"
    number = len(found.values)
    of = str(number) if number == found.wanted else f"{number} of {found.wanted}"
    return f"{of}: {found.worst:.0e}" if found.worst else f"{of}: 0"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Lay out a Markdown table whose first columns are flush left."""
    rule = "|---" * left + "|--:" * (len(head) - left) + "|"
    return "\n".join([f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(cells)} |" for cells in rows)])


def troubles(results: dict[str, Measured], crossings: dict[str, dict[str, Crossing]]) -> Iterator[str]:
    """Give a line for each thing that failed."""
    for torch, found in results.items():
        if found.trouble:
            yield f"torch {torch}: stopped at {as_code(found.trouble)}"
        for name, why in (found.uncompiled | found.not_evaluated | found.failed).items():
            yield f"torch {torch}: `{name}`: {as_code(why)}"
    for here, told in crossings.items():
        for there, one in told.items():
            if one.trouble:
                yield f"torch {here}, compiled under {there}: {as_code(one.trouble)}"
            for name, why in one.refused.items():
                yield f"torch {here}, compiled under {there}: `{name}`: {as_code(why)}"
            for name in one.values:
                gap = max(one.values[name], one.derivatives.get(name, 0.0))
                if gap > TOLERANCE:
                    yield f"torch {here}, compiled under {there}: `{name}` differs by {gap:.1e}"


def as_code(text: str) -> str:
    """Show a message as it is, cut to about a line."""
    return "`" + textwrap.shorten(text.replace("`", "'"), 160, placeholder=" ...") + "`"


TESTED = """
For each torch there is a virtual environment of its own. torch is installed first and by itself, then the plugin's
wheel with neml2 {neml2} and the test dependencies. The stubs that the default tests use are compiled under that
torch, and the compiled stubs are loaded and evaluated. The tests run from a copy of the repository that has no
package beside it, so that the wheel is what they test. Everything runs on the processor, none of it on a GPU.
"""

COLUMNS = """
*Measured* gives the day of the tests and the commit of the sources, with a plus sign if they had changes since.
Seconds are those of the whole step, with {jobs} processes at a time and other work on the same machine: they are no
benchmark. *From the cache* are stubs that an earlier run had compiled under the same torch. Also installed: {others}.
The environments take, by torch, {sizes}.
"""

CROSSED = """
A row is the torch that compiled, a column the torch that loads. Each cell gives the number of compiled stubs that
were loaded and evaluated, and the largest relative difference from what the compiling torch gave for the same inputs:
of an output, or of a derivative where any were compiled, over the largest number in the same tensor, and for a
derivative at least over that in the output divided by that in the input, since some derivatives are zero but for
rounding. 0 is equality to the last bit. More than {tolerance:.0e} counts as a failure. The inputs are states of the
stubs' own load histories. {derivatives} of {stubs} stubs have derivatives. Where a torch loads what it compiled
itself, that is done in another process. Loaded at commit {commits}.
"""


def left_out(results: dict[str, Measured]) -> Iterator[str]:
    """Give a section on the stubs that a torch is too old for, if there are any."""
    lines = [f"- torch {t}: `{name}`: {why}" for t, one in results.items() for name, why in one.left_out.items()]
    if lines:
        yield "## What an older torch cannot compile"
        yield "\n".join(lines)
        yield wrapped("Tests of these stubs are skipped there.")


def page(results: dict[str, Measured], crossings: dict[str, dict[str, Crossing]], jobs: int) -> str:
    """Write docs/compatibility.md."""
    every = {f"{name} {version}" for found in results.values() for name, version in found.versions.items()}
    others = sorted(one for one in every if not one.startswith(("torch ", "Python ")))
    sizes = [f"{torch}: {found.size:.1f} GiB" for torch, found in results.items() if found.size]
    compiling = [torch for torch, found in results.items() if found.stamp]
    loading = [torch for torch in TORCHES if crossings.get(torch)]
    grid = [[there, *(crossing_cell(crossings[here].get(there)) for here in loading)] for there in compiling]
    crossed = [one for told in crossings.values() for one in told.values()]
    stubs = {name for one in crossed for name in one.values}
    derivatives = {name for one in crossed for name in one.derivatives}
    commits = sorted({one.commit for one in crossed})
    missing = [torch for torch in TORCHES if torch not in results]
    bad = [*troubles(results, crossings), *([f"tests not run: torch {', '.join(missing)}"] if missing else [])]
    blocks = (
        "# torch releases",
        "What the plugin was seen to do under each torch. This page is written by",
        "    make torch-matrix",
        wrapped(f"on {machine()}."),
        wrapped(TESTED.format(neml2=NEML2)),
        "## Tests",
        table(HEAD, [row(torch, results.get(torch)) for torch in TORCHES], left=3),
        wrapped(COLUMNS.format(jobs=jobs, others=", ".join(others), sizes=", ".join(sizes))),
        "## Compiled under one torch, loaded under another",
        wrapped(
            CROSSED.format(
                tolerance=TOLERANCE, derivatives=len(derivatives), stubs=len(stubs), commits=", ".join(commits)
            )
        ),
        table(["compiled under", *(f"loaded under {torch}" for torch in loading)], grid),
        *left_out(results),
        "## What failed",
        "\n".join(f"- {line}." for line in bad) or "Nothing.",
    )
    return "\n\n".join(blocks) + "\n"


def wrapped(text: str) -> str:
    """Break a paragraph into lines."""
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)


def machine() -> str:
    """Describe this machine."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        named = re.search(r"^model name\s*: (.+)$", info.read_text(encoding="utf-8"), re.MULTILINE)
        model = named[1] if named else model
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    told = "no C++ compiler"
    if compiler:
        told = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout.splitlines()[0]
    return f"{platform.platform()}, {model} ({os.cpu_count()} cores), {told}"


def commit() -> str:
    """Name the commit of the sources, with a plus sign if they have been changed since."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--", PACKAGE, "tests", "stubs", "pyproject.toml")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


# -- all -------------------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """Print a line with the time."""
    print(f"{datetime.now():%H:%M:%S} {text}", flush=True)


def write_json(file: Path, value: Any) -> None:
    """Write a file whole or not at all."""
    scratch = file.with_suffix(".new")
    scratch.write_text(json.dumps(value, indent=1), encoding="utf-8")
    scratch.replace(file)


def results_in(shop: Workshop) -> dict[str, Measured]:
    """Read what was found so far."""
    files = {torch: shop.of(torch) / "result.json" for torch in TORCHES}
    return {t: Measured(**json.loads(f.read_text(encoding="utf-8"))) for t, f in files.items() if f.exists()}


def crossings_in(shop: Workshop, results: dict[str, Measured]) -> dict[str, dict[str, Crossing]]:
    """Read what was loaded so far of what the results speak of."""
    files = {torch: shop.of(torch) / "crossings.json" for torch in TORCHES}
    told = {torch: json.loads(file.read_text(encoding="utf-8")) for torch, file in files.items() if file.exists()}
    crossings = {here: {there: Crossing(**one) for there, one in row.items()} for here, row in told.items()}
    return {
        here: {there: one for there, one in row.items() if there in results and one.stamp == results[there].stamp}
        for here, row in crossings.items()
    }


def main() -> int:
    """Measure what is missing, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("torches", nargs="*", metavar="TORCH", help=f"of {', '.join(TORCHES)}; all if none is named")
    parser.add_argument("--work", type=Path, default=WORK, help=f"folder for environments and results; else {WORK}")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page to write; else docs/compatibility.md")
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="Python to make environments of")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (default 2)")
    parser.add_argument("--space", type=float, default=20, help="GiB to be free before an install (default 20)")
    parser.add_argument("--fresh", action="store_true", help="discard what was found before on the chosen torches")
    parser.add_argument("--retest", action="store_true", help="run the tests again, and keep what else was found")
    parser.add_argument("--load-only", action="store_true", help="only load what others have compiled")
    parser.add_argument("--keep", action="store_true", help="leave the environments when all is done")
    parser.add_argument("--page-only", action="store_true", help="write the page from what was found before")
    options = parser.parse_args()
    chosen = options.torches or list(TORCHES)
    if unknown := set(chosen) - set(TORCHES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}. There are: {', '.join(TORCHES)}")
    shop = Workshop(options.work.expanduser().absolute(), options.jobs, options.space, options.python.absolute())
    shop.folder.mkdir(parents=True, exist_ok=True)

    def write() -> tuple[dict[str, Measured], dict[str, dict[str, Crossing]]]:
        results = results_in(shop)
        crossings = crossings_in(shop, results)
        options.page.write_text(page(results, crossings, shop.jobs), encoding="utf-8")
        return results, crossings

    if not options.page_only:
        if options.fresh:
            for torch in chosen:
                shutil.rmtree(shop.of(torch), ignore_errors=True)
                shutil.rmtree(shop.environment(torch), ignore_errors=True)
        lay_out(shop)
        for torch in [] if options.load_only else chosen:
            before = results_in(shop).get(torch)
            if before is None or before.trouble:
                found = measure(shop, torch)
            elif options.retest:
                found = measure_tests(shop, before)
            else:
                say(f"torch {torch}: measured on {before.day}; --fresh measures again")
                continue
            write_json(shop.of(torch) / "result.json", asdict(found))
            write()
        for torch in chosen:
            cross_load(shop, torch, results_in(shop))
            write()
            if not options.keep:
                shutil.rmtree(shop.environment(torch), ignore_errors=True)
    results, crossings = write()
    say(f"written: {options.page}")
    complete = all(there in crossings.get(here, {}) for here in results for there in results)
    good = all(one.good for one in results.values()) and all(c.good for row in crossings.values() for c in row.values())
    return 0 if good and complete and set(TORCHES) <= set(results) else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        raise SystemExit(main())
