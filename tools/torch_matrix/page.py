"""The page docs/compatibility.md, from what was found."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from .environments import NEML2
from .results import PYTHON_TORCH, TOLERANCE, TORCHES, Crossing, Crossings, Measured

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


def cell(found: Crossing | None) -> str:
    """Give one cell of the second table."""
    return found.summary if found else "not measured"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Lay out a Markdown table whose first columns are flush left."""
    rule = "|---" * left + "|--:" * (len(head) - left) + "|"
    return "\n".join([f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(cells)} |" for cells in rows)])


def troubles(results: dict[str, Measured], crossings: Crossings) -> Iterator[str]:
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


UNDER_PYTHONS = """
Each Python has an environment of its own with torch {torch}. The stubs are those that another Python had compiled under
that release of torch. `python -m tools.torch_matrix --pythons PROGRAM ...` measures these alone.
"""


def left_out(results: dict[str, Measured]) -> Iterator[str]:
    """Give a section on the stubs that a torch is too old for, if there are any."""
    lines = [f"- torch {t}: `{name}`: {why}" for t, one in results.items() for name, why in one.left_out.items()]
    if lines:
        yield "## What an older torch cannot compile"
        yield "\n".join(lines)
        yield wrapped("Tests of these stubs are skipped there.")


def pythons_section(pythons: Sequence[Measured]) -> Iterator[str]:
    """Give a section on other Pythons, if any were tested."""
    if pythons:
        yield "## Pythons"
        yield wrapped(UNDER_PYTHONS.format(torch=PYTHON_TORCH))
        head = ("Python", "measured", "torch", "llvmlite", "stubs", "passed", "failed", "skipped", "test run")
        yield table(head, [python_row(found) for found in pythons], left=4)


def with_pythons(page: str, pythons: Sequence[Measured]) -> str:
    """Give a page with another section on Pythons, and all else as it is.

    Args:
        page: As it was written before.
        pythons: What was found under each Python.
    """
    begin, end = "## Pythons\n", "## What failed\n"
    before, _, rest = page.partition(end)
    kept = before.partition(begin)[0].rstrip("\n")
    failed = [f"- {line}" for line in troubles({one.torch: one for one in pythons}, {})]
    return "\n\n".join([kept, *pythons_section(pythons), *(["\n".join(failed)] if failed else []), end + rest])


def python_row(found: Measured) -> tuple[str, ...]:
    """Give one row of the table of Pythons."""
    versions = [found.versions.get(name, "") for name in ("torch", "llvmlite")]
    python = found.versions.get("Python") or found.torch.partition("-python")[2]
    return python, f"{found.day}, {found.commit}", *versions, str(found.cached), *row(found.torch, found)[-4:]


def page(results: dict[str, Measured], crossings: Crossings, pythons: Sequence[Measured], jobs: int) -> str:
    """Write docs/compatibility.md."""
    every = {f"{name} {version}" for found in results.values() for name, version in found.versions.items()}
    others = sorted(one for one in every if not one.startswith(("torch ", "Python ")))
    sizes = [f"{torch}: {found.size:.1f} GiB" for torch, found in results.items() if found.size]
    compiling = [torch for torch, found in results.items() if found.stamp]
    loading = [torch for torch in TORCHES if crossings.get(torch)]
    grid = [[there, *(cell(crossings[here].get(there)) for here in loading)] for there in compiling]
    crossed = [one for told in crossings.values() for one in told.values()]
    stubs = {name for one in crossed for name in one.values}
    derivatives = {name for one in crossed for name in one.derivatives}
    commits = sorted({one.commit for one in crossed})
    missing = [torch for torch in TORCHES if torch not in results]
    bad = [
        *troubles(results | {one.torch: one for one in pythons}, crossings),
        *([f"tests not run: torch {', '.join(missing)}"] if missing else []),
    ]
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
        *pythons_section(pythons),
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
