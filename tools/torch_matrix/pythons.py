"""The tests under another Python, with one torch and with stubs that were compiled before."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from datetime import date
from pathlib import Path

from stubs.build import compiled
from stubs.catalogue import CATALOGUE

from .environments import Workshop, commit, install
from .results import Measured, name_of
from .runs import look_around, run_tests, take_steps


def measure_python(shop: Workshop, python: str) -> Measured:
    """Install and test under another Python.

    Args:
        shop: Where to.
        python: The program, or its name on the PATH.

    Returns:
        What was found; the environment is deleted.
    """
    program = Path(shutil.which(python) or python).absolute()
    code = "import sys; print(*sys.version_info[:2], sep='.')"
    name = name_of(subprocess.run([program, "-c", code], check=True, capture_output=True, text=True).stdout.strip())
    own = replace(shop, python=program)
    found = Measured(name, day=str(date.today()), commit=commit())
    take_steps(
        own,
        found,
        {
            "install": lambda: install(own, name),
            "look around": lambda: look_around(own, found),
            "take over stubs": lambda: adopt_stubs(own, found),
            "test": lambda: run_tests(own, found),
        },
    )
    shutil.rmtree(own.environment(name), ignore_errors=True)
    return found


def adopt_stubs(shop: Workshop, found: Measured) -> None:
    """Give an environment what the Python of this process has compiled, or compiles now.

    The names of the folders hold a hash of torch's version with its build, which may be another one there.
    """
    file = shop.of(found.torch) / "stubs.json"
    stubs = {name: str(compiled(name)) for name, stub in CATALOGUE.items() if not stub.wide}
    file.write_text(json.dumps(stubs), encoding="utf-8")
    found.cached = shop.ask(found.torch, "adopt", file)["adopted"]
