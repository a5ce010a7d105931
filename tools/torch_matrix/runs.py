"""What is done in one environment: compile or take over stubs, evaluate them, run the tests, load those of others."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import date, datetime
from pathlib import Path
from xml.etree import ElementTree

from stubs.build import compiled

from ..compare_native import VERSIONS
from .cases import TORCHES, Crossing, Measured, read_crossings, write_crossings, write_json
from .environments import GIB, StepError, Workshop, commit, install, say

# Distributions whose versions the page tells.
TOLD = ("torch", "neml2", "nmhit", "numpy", "scipy", "pytest", "llvmlite")


def measure(shop: Workshop, found: Measured, *, only_tests: bool = False) -> None:
    """Take all steps in one environment, or the tests alone, up to the first that fails; keep what was found."""
    found.day, found.commit, found.trouble = str(date.today()), commit(), ""
    steps: dict[str, Callable[[Workshop, Measured], None]] = {"install": install}
    if not only_tests:
        takes = shop.take_stubs or found.name not in TORCHES
        steps |= {"look around": look_around, "stubs": take_stubs if takes else compile_stubs}
        steps |= {} if takes else {"evaluate": evaluate}
    for name, step in (steps | {"test": run_tests}).items():
        start = time.monotonic()
        try:
            step(shop, found)
        except Exception as error:  # whatever it is, the other environments are still to come
            found.trouble = f"{name}: {' '.join(str(error).split())}"
            say(f"{found.name}: {found.trouble}")
            break
        say(f"{found.name}: {name}, {time.monotonic() - start:.0f} s")
    write_json(shop.of(found) / "result.json", asdict(found))


def look_around(shop: Workshop, found: Measured) -> None:
    """Read the versions in an environment, and its size."""
    every = json.loads(shop.run(found, "versions", ["-c", VERSIONS]).splitlines()[-1])
    found.versions = {name: every[name] for name in ("Python", *TOLD)}
    files = (path.lstat() for path in shop.environment(found).rglob("*"))
    found.size = sum(getattr(status, "st_blocks", status.st_size // 512) * 512 for status in files) / GIB


def compile_stubs(shop: Workshop, found: Measured) -> None:
    """Compile the stubs that the default tests use, or find them in the cache, and count them."""
    text = shop.run(found, "stubs", ["-m", "stubs.build", "-j", str(shop.jobs)], good=(0, 1))
    # Each outcome with what stands below it, which is the error where there was one.
    pieces = re.split(r"^(\w+) +(cached|FAILED|left out: .*|[\d.]+ s)$", text, flags=re.MULTILINE)
    if len(pieces) == 1:
        raise StepError(text.strip().splitlines()[-1][:250])
    found.compiled = 0
    for name, how, below in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True):
        if how == "FAILED":
            found.uncompiled[name] = below.strip().splitlines()[-1]
        elif how.startswith("left out: "):
            found.left_out[name] = how.removeprefix("left out: ")
        else:
            found.compiled += 1


def take_stubs(shop: Workshop, found: Measured) -> None:
    """Give an environment, in a cache of its own, what the Python of this process has compiled or compiles now.

    The names of the folders hold a hash of torch's version with its build, which may be another one there.
    """
    from torch import __version__

    found.compiled_under = str(__version__)
    folders = shop.ask(found, "folders")
    for name, folder in folders.items():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(compiled(name), folder)
    found.compiled = len(folders)


def evaluate(shop: Workshop, found: Measured) -> None:
    """Evaluate what was compiled, for other torches to compare with."""
    told = shop.ask(found, "numbers", str(numbers_of(shop, found.name)))
    found.evaluated, found.not_evaluated = told["evaluated"], told["not_evaluated"]
    found.stamp = datetime.now().isoformat(timespec="seconds")


def numbers_of(shop: Workshop, torch: str) -> Path:
    """Say where the numbers are that a torch gave for what it has compiled."""
    return shop.of(torch) / "numbers.pt"


def run_tests(shop: Workshop, found: Measured) -> None:
    """Run the tests, and count them."""
    found.passed, found.failed, found.skipped, found.test_seconds = 0, {}, 0, 0.0
    report = shop.of(found) / "tests.xml"
    report.unlink(missing_ok=True)
    start = time.monotonic()
    arguments = ["-m", "pytest", "--numprocesses", str(shop.jobs), f"--junitxml={report}", "-q"]
    found.tests = list(found.variant.tests or shop.tests)
    arguments += [f"tests/{name}.py" for name in found.tests]
    shop.run(found, "tests", arguments, good=(0, 1))
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


def cross_load(shop: Workshop, here: Measured, results: list[Measured]) -> None:
    """Load under one torch what each has compiled; what was compared before stays as it is."""
    found = read_crossings(shop.folder, results).get(here.name, {})
    for there in results:
        if not there.stamp or (there.name in found and not found[there.name].trouble):
            continue
        try:
            install(shop, here)
            told = shop.ask(here, "crossing", str(numbers_of(shop, there.name)), log=f"from-{there.name}")
            one = Crossing(there.stamp, commit(), **told)
        except (StepError, ValueError) as error:
            one = Crossing(there.stamp, commit(), there.evaluated, trouble=str(error))
        found[there.name] = one
        say(f"torch {here.name}, compiled under {there.name}: {one.summary}")
        write_crossings(shop.of(here), found)
