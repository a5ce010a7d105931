"""Test what users install under several releases of torch, and load under each what every other one has compiled.

`python -m tools.torch_matrix`, in the repository root, takes all releases of `TORCHES`; those named on the command line
are taken alone. For each, in a fresh virtual environment: torch by itself, then the wheel with neml2 and the test
dependencies, which numba is not among; the stubs that the default tests use are compiled; the tests run, from a copy of
the repository without the package's sources beside them; and every compiled stub is evaluated on states of its own
driver's trajectory. Then each torch loads what the others have compiled and evaluates it on the same inputs.

A key of `VARIANTS` is taken like a release, with another way to install or run. `--pythons python3.12 python3.13 --`
runs the tests under other Pythons. Both have one torch and the stubs that the Python of this program has compiled; with
`--take-stubs` so have the releases.

What was found is kept in the work folder, with the log of each step, so that a run can be broken off and taken up
again, and docs/compatibility.md is written anew after each environment. A failure in one does not stop the others. The
exit status is 0 if nothing failed and, where no Pythons or variants were asked for, no release is missing; else 1.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from .cases import TORCHES, VARIANTS, Crossings, Measured, read_all, read_crossings
from .environments import ROOT, Workshop, lay_out, say
from .page import page
from .runs import cross_load, measure

WORK = Path.home() / ".cache" / "neml2-aoti-plugin" / "torch-matrix"


def main() -> int:
    """Measure what is missing, and write the page."""
    options = _options()
    pythons = dict(map(_python, options.pythons))
    work, python = options.work.expanduser().absolute(), options.python.absolute()
    tests = tuple(options.tests)
    shop = Workshop(work, options.jobs, options.space, python, pythons, options.take_stubs, tests)
    shop.folder.mkdir(parents=True, exist_ok=True)
    if not options.page_only:
        for name in options.names if options.fresh else ():
            shutil.rmtree(shop.of(name), ignore_errors=True)
            shutil.rmtree(shop.environment(name), ignore_errors=True)
        lay_out(shop)
        for name in () if options.load_only else (*options.names, *pythons):
            found = {one.name: one for one in read_all(shop.folder)}.get(name)
            if found is None or found.trouble or name in pythons:
                measure(shop, Measured(name))
            elif options.retest:
                measure(shop, found, only_tests=True)
            else:
                say(f"{name}: measured on {found.day}; --fresh measures again")
            publish(shop, options.page)
        for name in (*options.names, *pythons):
            if name in TORCHES:
                cross_load(shop, Measured(name), read_all(shop.folder))
                publish(shop, options.page)
            if not options.keep:
                shutil.rmtree(shop.environment(name), ignore_errors=True)
    results, crossings = publish(shop, options.page)
    say(f"written: {options.page}")
    return 0 if is_good(results, crossings, every=list(TORCHES) == options.names) else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.torch_matrix", description=(__doc__ or "").splitlines()[0])
    known = (*TORCHES, *VARIANTS)
    parser.add_argument("names", nargs="*", metavar="TORCH", help=f"of {', '.join(known)}; else all torches")
    parser.add_argument("--work", type=Path, default=WORK, help=f"folder for environments and results; else {WORK}")
    page = ROOT / "docs" / "compatibility.md"
    parser.add_argument("--page", type=Path, default=page, help="the page to write; else docs/compatibility.md")
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="Python to make environments of")
    parser.add_argument("--pythons", nargs="+", default=[], metavar="PROGRAM", help="run the tests under these Pythons")
    parser.add_argument("--take-stubs", action="store_true", help="compile no stubs under other torches than this one")
    parser.add_argument("--tests", nargs="+", default=[], metavar="MODULE", help="run these modules of tests alone")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (default 2)")
    parser.add_argument("--space", type=float, default=20, help="GiB to be free before an install (default 20)")
    parser.add_argument("--fresh", action="store_true", help="discard what was found before on what is named")
    parser.add_argument("--retest", action="store_true", help="run the tests again, and keep what else was found")
    parser.add_argument("--load-only", action="store_true", help="only load what others have compiled")
    parser.add_argument("--keep", action="store_true", help="leave the environments when all is done")
    parser.add_argument("--page-only", action="store_true", help="write the page from what was found before")
    options = parser.parse_args()
    if unknown := set(options.names) - set(known):
        parser.error(f"unknown: {', '.join(sorted(unknown))}. There are: {', '.join(known)}")
    options.names = options.names or ([] if options.pythons else list(TORCHES))
    return options


def _python(program: str) -> tuple[str, Path]:
    """Name what is found under a Python by its major and minor number."""
    path = Path(shutil.which(program) or program).absolute()
    code = "import sys; print('python%d.%d' % sys.version_info[:2])"
    return subprocess.run([path, "-c", code], check=True, capture_output=True, text=True).stdout.strip(), path


def publish(shop: Workshop, file: Path) -> tuple[list[Measured], Crossings]:
    """Write the page from what was found so far; give what it was written from."""
    results = read_all(shop.folder)
    crossings = read_crossings(shop.folder, results)
    before = file.read_text(encoding="utf-8") if file.exists() else ""
    file.write_text(page(results, crossings, shop.jobs, before), encoding="utf-8")
    return results, crossings


def is_good(results: list[Measured], crossings: Crossings, *, every: bool) -> bool:
    """Say whether nothing failed and, where all were asked for, nothing is missing."""
    good = all(one.good for one in results) and all(c.good for row in crossings.values() for c in row.values())
    compiled = [one.name for one in results if one.stamp]
    complete = all(there in crossings.get(here, {}) for here in TORCHES for there in compiled)
    return good and (not every or (complete and set(TORCHES) <= {one.name for one in results}))


if __name__ == "__main__":
    raise SystemExit(main())
