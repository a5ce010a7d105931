"""The page docs/compatibility.md, from what was found; a section of which nothing was found stays as it was."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import textwrap
from collections.abc import Iterator, Sequence

from benchmarks.machine import description
from benchmarks.markdown import table

from .cases import COMMON_TORCH, TOLERANCE, TORCHES, VARIANTS, Crossing, Crossings, Measured
from .environments import NEML2

HEAD = """
What was seen under other releases of torch, under other Pythons, and in other ways to install and run. Written by
`python -m tools.torch_matrix` (`make torch-matrix`) on {machine}; a run that measures a part writes that part alone.

Each environment is made anew: torch first and by itself, then the plugin with neml2 {neml2} and the test dependencies.
numba is not among them. The default tests run from a copy of the repository that has no package beside it, so that what
is installed is what they test. All runs on the processor, nothing on a GPU. *Measured* gives the day and the commit of
the sources, with a plus sign if they had changes since. *Stubs* are the compiled models of the default tests, and the
torch that compiled them: with `--take-stubs` another one. *Some* tests are those that `--tests` names. Seconds are
those of the whole step, with {jobs} processes at a time and other work on the same machine: they are no benchmark.
"""

CROSSED = """
A row is the torch that compiled, a column the torch that loads. Each cell gives the number of compiled stubs that were
loaded and evaluated, and the largest relative difference from what the compiling torch gave for the same inputs: of an
output, or of a derivative where any were compiled, over the largest number in the same tensor, and for a derivative at
least over that in the output divided by that in the input, since some derivatives are zero but for rounding. 0 is
equality to the last bit. More than {tolerance:.0e} counts as a failure. The inputs are states of the stubs' own load
histories. {derivatives} of {stubs} stubs have derivatives. Where a torch loads what it compiled itself, that is done in
another process. Loaded at commit {commits}.
"""

PLATFORMS = """
The machine code of solves is emitted for Linux on aarch64, macOS on arm64 and Windows on x86-64 by a test
(`tests/test_machine_code.py`): it becomes an object there that needs nothing which this platform's does not. It was not
run there.
"""

WARNINGS = """
From 2.14 on torch's runner prints `[WARNING] Could not dlsym AOTInductorModelContainer...` on stderr for packages that
an older torch has compiled. Graphs that are called by their C interface do not go through it. At the first derivative
in forward mode torch warns of its own use of `torch.jit.script`: by a DeprecationWarning, from 2.15 on by a
FutureWarning, which Python shows. Neither changes a number.
"""

TITLES = ("Releases of torch", "Compiled under one torch, loaded under another", "Pythons", "Other ways to run")


def page(results: Sequence[Measured], crossings: Crossings, jobs: int, before: str = "") -> str:
    """Write the page; sections of which nothing was found are taken from the page before."""
    sections = dict(zip(TITLES, sections_of(results, crossings), strict=True))
    old = dict(re.findall(r"^## (.*)\n\n((?:.|\n)*?)(?=\n## |\Z)", before, re.MULTILINE))
    kept = {title: text or old.get(title, "").strip() for title, text in sections.items()}
    kept |= {"Other platforms": wrapped(PLATFORMS), "What torch warns of": wrapped(WARNINGS)}
    head = ["# Compatibility", *map(wrapped, HEAD.format(machine=machine(), neml2=NEML2, jobs=jobs).split("\n\n"))]
    return "\n\n".join([*head, *(f"## {title}\n\n{text}" for title, text in kept.items() if text)]) + "\n"


def sections_of(results: Sequence[Measured], crossings: Crossings) -> Iterator[str]:
    """The text of each section; empty where nothing was found of it."""
    torches = [one for one in results if one.name in TORCHES]
    yield tested("torch", torches, f"Python {'.'.join(platform.python_version_tuple()[:2])}." if torches else "")
    yield crossed([one.name for one in torches if one.stamp], crossings)
    others = f"With torch {COMMON_TORCH}"
    yield tested("Python", [one for one in results if one.name.startswith("python")], f"{others}.")
    yield tested("how", [one for one in results if one.name in VARIANTS], f"{others}, on Linux.")


def tested(first: str, results: Sequence[Measured], told: str) -> str:
    """A table of test runs, what else was installed, and what failed."""
    if not results:
        return ""
    told_of = ("measured", "Python", "torch", "llvmlite", "stubs", "tests")
    head = (first, *told_of, "passed", "failed", "skipped", "test run")
    others = {f"{name} {version}" for one in results for name, version in one.versions.items()}
    installed = sorted(one for one in others if not one.startswith(("torch ", "Python ", "llvmlite ")))
    sizes = ", ".join(f"{one.name}: {one.size:.1f} GiB" for one in results if one.size)
    untaken = [f"- torch {one.name}: {why}" for one in results for why in one.left_out.values()]
    some = {", ".join(f"`{name}`" for name in one.tests): None for one in results if one.tests}
    told += f" *Some* tests: {'; or '.join(some)}." if some else ""
    if not all(one.versions.get("llvmlite") for one in results):
        told += " Rows without llvmlite are of sources that took numba in its place, and of a machine of that day."
    return "\n\n".join(
        [
            wrapped(told),
            table(head, [row(one) for one in results], left=7),
            wrapped(f"Also installed: {', '.join(installed)}. The environments take, by {first}, {sizes}."),
            *(["Left out, and their tests skipped:", "\n".join(untaken)] if untaken else []),
            failures([line for one in results for line in troubles(one)]),
        ]
    )


def row(found: Measured) -> tuple[str, ...]:
    """One row of a table of test runs."""
    tested = found.test_seconds > 0
    by = found.compiled_under or found.versions.get("torch", "")
    return (
        found.variant.told or found.name.removeprefix("python"),
        f"{found.day}, {found.commit}",
        *(found.versions.get(name, "") for name in ("Python", "torch", "llvmlite")),
        f"{found.compiled} by {by}" if found.compiled else "no",
        "some" if found.tests else "all",
        *(map(str, (found.passed, len(found.failed), found.skipped)) if tested else ("no", "", "")),
        f"{found.test_seconds:.0f} s" if tested else "",
    )


def crossed(compiling: Sequence[str], crossings: Crossings) -> str:
    """The table of what each torch made of what the others compiled."""
    every = [one for told in crossings.values() for one in told.values()]
    if not every:
        return ""
    told = CROSSED.format(
        tolerance=TOLERANCE,
        derivatives=len({name for one in every for name in one.derivatives}),
        stubs=len({name for one in every for name in one.values}),
        commits=", ".join(sorted({one.commit for one in every})),
    )
    grid = [[there, *(cell(told.get(there)) for told in crossings.values())] for there in compiling]
    bad = [
        f"torch {here}, compiled under {there}: {line}"
        for here, told in crossings.items()
        for there, one in told.items()
        for line in differences(one)
    ]
    head = ["compiled under", *(f"loaded under {torch}" for torch in crossings)]
    return "\n\n".join([wrapped(told), table(head, grid), failures(bad)])


def cell(found: Crossing | None) -> str:
    """One cell of the table of crossings."""
    return found.summary if found else "not measured"


def troubles(found: Measured) -> Iterator[str]:
    """A line for each thing that failed in one environment."""
    if found.trouble:
        yield f"{found.name}: stopped at {as_code(found.trouble)}"
    for name, why in (found.uncompiled | found.not_evaluated | found.failed).items():
        yield f"{found.name}: `{name}`: {as_code(why)}"


def differences(one: Crossing) -> Iterator[str]:
    """A line for each stub that another torch refused or gave other numbers for."""
    if one.trouble:
        yield as_code(one.trouble)
    for name, why in one.refused.items():
        yield f"`{name}`: {as_code(why)}"
    for name, gap in one.values.items():
        if (gap := max(gap, one.derivatives.get(name, 0.0))) > TOLERANCE:
            yield f"`{name}` differs by {gap:.1e}"


def failures(lines: Sequence[str]) -> str:
    """What failed, in a list."""
    return "\n".join(["Failed:", "", *(f"- {line}" for line in lines)]) if lines else "Nothing failed."


def as_code(text: str) -> str:
    """Show a message as it is, cut to about a line."""
    return "`" + textwrap.shorten(text.replace("`", "'"), 160, placeholder=" ...") + "`"


def wrapped(text: str) -> str:
    """Break a paragraph into lines."""
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)


def machine() -> str:
    """Describe this machine."""
    here = description()
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    told = "no C++ compiler"
    if compiler:
        told = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout.splitlines()[0]
    return f"{platform.platform()}, {here['processor']} ({here['cores']} cores), {told}"
