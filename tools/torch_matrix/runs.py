"""What is done under one torch: compile stubs, evaluate them, run the tests, load what others have compiled."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date, datetime
from xml.etree import ElementTree

from .environments import GIB, StepError, Workshop, commit, install, say
from .results import Crossing, Measured, numbers_of, read_loaded, write_loaded

# Distributions whose versions the page tells.
TOLD = ("torch", "neml2", "nmhit", "numpy", "scipy", "pytest", "llvmlite")


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
    told = shop.ask(found.torch, "numbers", numbers_of(shop.folder, found.torch))
    found.evaluated, found.not_evaluated = told["evaluated"], told["not_evaluated"]
    found.stamp = datetime.now().isoformat(timespec="seconds")


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
    found = {there: one for there, one in read_loaded(shop.folder, here).items() if there in results}
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
            told = shop.ask(here, "crossing", numbers_of(shop.folder, there), log=f"from-{there}")
            found[there] = Crossing(stamps[there], commit(), **told)
        except (StepError, ValueError) as error:
            found[there] = Crossing(stamps[there], commit(), results[there].evaluated, trouble=str(error))
        say(f"torch {here}, compiled under {there}: {found[there].summary}")
        write_loaded(shop.folder, here, found)
    return found
