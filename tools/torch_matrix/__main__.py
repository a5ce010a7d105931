"""Test the plugin's wheel under several releases of torch, and load under each what every other one has compiled.

`python -m tools.torch_matrix`, in the repository root, takes all releases of `TORCHES`; releases named on the command
line are taken alone. For each, in a fresh virtual environment: torch by itself, then the wheel with neml2 and the test
dependencies; the stubs that the default tests use are compiled; the tests run, from a copy of the repository without
the package's sources beside them; and every compiled stub is evaluated on states of its own driver's trajectory. Then
each torch loads what the others have compiled and evaluates it on the same inputs.

`--pythons python3.12 python3.13 --` runs the tests under other Pythons instead, with one torch; releases of torch are
then left alone. The stubs are those that the Python which runs this program has compiled.

What was found is kept in the work folder, with the log of each step, so that a run can be broken off and taken up
again, and docs/compatibility.md is written anew after each release. A failure under one torch does not stop the others.
The exit status is 0 if nothing failed and nothing is missing, else 1.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from .environments import ROOT, Workshop, lay_out, say
from .page import page, with_pythons
from .pythons import measure_python
from .results import (
    PYTHON_TORCH,
    TORCHES,
    Crossings,
    Measured,
    read_crossings,
    read_pythons,
    read_results,
    write_result,
)
from .runs import cross_load, measure, measure_tests

PAGE = ROOT / "docs" / "compatibility.md"
WORK = Path.home() / ".cache" / "neml2-aoti-plugin" / "torch-matrix"


def main() -> int:
    """Measure what is missing, and write the page."""
    options = _options()
    shop = Workshop(options.work.expanduser().absolute(), options.jobs, options.space, options.python.absolute())
    shop.folder.mkdir(parents=True, exist_ok=True)
    if not options.page_only:
        if options.fresh:
            discard(shop, options.torches)
        lay_out(shop)
        if not options.load_only:
            for torch in options.torches:
                if found := measure_missing(shop, torch, retest=options.retest):
                    write_result(shop.folder, found)
                    publish(shop, options.page)
        for python in options.pythons:
            write_result(shop.folder, measure_python(shop, python))
            publish(shop, options.page)
        for torch in options.torches:
            cross_load(shop, torch, read_results(shop.folder))
            publish(shop, options.page)
            if not options.keep:
                shutil.rmtree(shop.environment(torch), ignore_errors=True)
    results, crossings = publish(shop, options.page)
    say(f"written: {options.page}")
    if options.pythons:
        return 0 if all(one.good for one in read_pythons(shop.folder)) else 1
    return 0 if is_good(results, crossings) else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.torch_matrix", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("torches", nargs="*", metavar="TORCH", help=f"of {', '.join(TORCHES)}; all if none is named")
    parser.add_argument("--work", type=Path, default=WORK, help=f"folder for environments and results; else {WORK}")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page to write; else docs/compatibility.md")
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="Python to make environments of")
    told = f"run the tests under these Pythons, with torch {PYTHON_TORCH}, and under no other torch"
    parser.add_argument("--pythons", nargs="+", default=[], metavar="PROGRAM", help=told)
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (default 2)")
    parser.add_argument("--space", type=float, default=20, help="GiB to be free before an install (default 20)")
    parser.add_argument("--fresh", action="store_true", help="discard what was found before on the chosen torches")
    parser.add_argument("--retest", action="store_true", help="run the tests again, and keep what else was found")
    parser.add_argument("--load-only", action="store_true", help="only load what others have compiled")
    parser.add_argument("--keep", action="store_true", help="leave the environments when all is done")
    parser.add_argument("--page-only", action="store_true", help="write the page from what was found before")
    options = parser.parse_args()
    if unknown := set(options.torches) - set(TORCHES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}. There are: {', '.join(TORCHES)}")
    if options.pythons and options.torches:
        parser.error("--pythons takes no releases of torch beside it")
    options.torches = options.torches or ([] if options.pythons else list(TORCHES))
    return options


def discard(shop: Workshop, torches: Sequence[str]) -> None:
    """Delete what was found under some torches, and their environments."""
    for torch in torches:
        shutil.rmtree(shop.of(torch), ignore_errors=True)
        shutil.rmtree(shop.environment(torch), ignore_errors=True)


def measure_missing(shop: Workshop, torch: str, *, retest: bool) -> Measured | None:
    """Measure under one torch what was not measured before.

    Args:
        shop: Where to.
        torch: The release.
        retest: Whether to run the tests again if they were run before.

    Returns:
        What was found; None if there was nothing to do.
    """
    before = read_results(shop.folder).get(torch)
    if before is None or before.trouble:
        return measure(shop, torch)
    if retest:
        return measure_tests(shop, before)
    say(f"torch {torch}: measured on {before.day}; --fresh measures again")
    return None


def publish(shop: Workshop, file: Path) -> tuple[dict[str, Measured], Crossings]:
    """Write the page from what was found so far; give what it was written from."""
    results, pythons = read_results(shop.folder), read_pythons(shop.folder)
    crossings = read_crossings(shop.folder, results)
    if results or not file.exists():
        text = page(results, crossings, pythons, shop.jobs)
    else:
        # Under Pythons alone nothing was found that could take the place of what the page says of torch.
        text = with_pythons(file.read_text(encoding="utf-8"), pythons)
    file.write_text(text, encoding="utf-8")
    return results, crossings


def is_good(results: dict[str, Measured], crossings: Crossings) -> bool:
    """Say whether nothing failed and nothing is missing."""
    complete = all(there in crossings.get(here, {}) for here in results for there in results)
    good = all(one.good for one in results.values()) and all(c.good for row in crossings.values() for c in row.values())
    return good and complete and set(TORCHES) <= set(results)


if __name__ == "__main__":
    raise SystemExit(main())
