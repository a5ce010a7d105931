"""Measure the plugin beside neml2's C++ runtime and others, and write docs/performance.md.

`python -m benchmarks`, in the repository root, makes an environment with torch 2.12.1, where the C++ runtime works
(`--python` names one that exists), compiles the stubs with optimised wrappers, measures for about `--minutes`, and
writes docs/performance.md and docs/performance.png. What is found is stored after each case: a run that was broken off
goes on where it was, as long as sources, versions and options are the same. `--quick` tries all of it on few rows, with
whatever stubs are compiled, and writes its page to the work folder, since its times mean little.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from stubs.build import compiled, folder_of
from stubs.catalogue import CATALOGUE

from . import machine
from .cases import QUICK_ROWS, ROWS, SUBJECTS
from .results import Store
from .run import Shop, all_cases, run_all

DOCS = machine.ROOT / "docs"
WORK = machine.ROOT / "out" / "benchmarks"
# Header entries that must be the same for a run to be taken up again.
SAME = ("sources", "machine", "versions", "threads", "optimised", "rows", "models", "stubs")


def main() -> int:
    """Do what the command line says."""
    options = _parser().parse_args()
    minutes = options.minutes or (3.0 if options.quick else 90.0)
    work = options.work or (WORK / "quick" if options.quick else WORK)
    store = Store(work / "results.json")
    if options.report_only:
        if not store.header:
            print(f"There are no results in {work}.", file=sys.stderr)
            return 1
        return write_page(store, work)
    models = [name for name in SUBJECTS if name in (options.models or SUBJECTS)]
    rows = tuple(n for n in ROWS if n in options.rows) if options.rows else QUICK_ROWS if options.quick else ROWS
    python, versions = environment(options.python)
    folders = {name: stub(name, options.quick) for name in models}
    shop = Shop(python, work.absolute(), machine.snapshot(work.absolute() / "sources"), folders, options.threads, rows)
    header = header_of(shop, versions, optimised=all(folders[n] == folder_of(n, quick=False) for n in models))
    cases = all_cases(models, rows)
    same = all(store.header.get(name) == header[name] for name in SAME)
    # What went wrong is tried again when a run is taken up.
    store.cases = {key: found for key, found in store.cases.items() if not found.trouble}
    left = [case for case in cases if store.get(case) is None]
    if options.again or not same or not left:
        store.begin(header)
        left = cases
    print(f"{len(left)} of {len(cases)} cases are to be measured in {minutes:g} minutes; load {machine.load()}")
    try:
        run_all(shop, store, cases, time.time() + 60.0 * minutes)
    except KeyboardInterrupt:
        print("\nBroken off. The same command goes on from here; with --report-only it writes what there is.")
        return 130
    store.header["ended"] = now()
    store.write()
    return write_page(store, work)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--python", type=Path, help="Python of an environment with the C++ runtime; made if not given")
    parser.add_argument("--minutes", type=float, help="time to measure in (default: 90; with --quick 3)")
    parser.add_argument("--models", nargs="+", choices=list(SUBJECTS), help="measure these alone")
    parser.add_argument("--rows", nargs="+", type=int, choices=ROWS, help="measure these numbers of rows alone")
    parser.add_argument("--threads", type=int, default=2, help="threads inside an operator (default: 2)")
    parser.add_argument("--work", type=Path, help="folder for results, rows and logs (default: out/benchmarks)")
    parser.add_argument("--quick", action="store_true", help="few rows, stubs as they are; the page goes to the folder")
    parser.add_argument("--again", action="store_true", help="start over, where a run could be taken up again")
    parser.add_argument("--report-only", action="store_true", help="write the page from what is stored")
    return parser


def environment(named: Path | None) -> tuple[Path, dict[str, str]]:
    """The Python of the environment with the C++ runtime, and its versions."""
    from tools import compare_native

    # Not resolved: the Python of a virtual environment is a link to another.
    python = named.absolute() if named else compare_native.environment()
    found = compare_native.versions(python)
    return python, {name: found[name] for name in ("Python", "torch", "neml2", "numpy") if name in found}


def stub(name: str, quick: bool) -> Path:
    """A compiled stub with optimised wrappers; in a quick run with others, where only these are compiled."""
    optimised = folder_of(name, quick=False)
    if quick and not optimised.is_dir():
        return compiled(name)
    if not optimised.is_dir():
        print(f"compiling {name} ...", flush=True)
    return compiled(name, quick=False)


def header_of(shop: Shop, versions: dict[str, str], *, optimised: bool) -> dict[str, Any]:
    """What the results belong to."""
    return {
        **machine.sources(shop.sources),
        "changed": machine.changed(),
        "begun": now(),
        "command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
        "machine": machine.description(),
        "versions": {**versions, "compiled under torch": version("torch")},
        "threads": shop.threads,
        "optimised": optimised,
        "rows": list(shop.rows),
        "models": list(shop.folders),
        "stubs": {name: folder.name for name, folder in shop.folders.items()},
        "graphs": {
            name: machine.parallel_graphs(folder / CATALOGUE[name].model) for name, folder in shop.folders.items()
        },
        "load": machine.load(),
    }


def write_page(store: Store, work: Path) -> int:
    """Write the page and the plot: to docs/ if all models and rows were measured, else to the work folder."""
    from .plot import draw
    from .report import page

    whole = store.header["models"] == list(SUBJECTS) and store.header["rows"] == list(ROWS)
    folder = DOCS if whole and store.header["optimised"] else work
    try:
        draw(store, folder / "performance.png")
    except ImportError:
        print("The plot was not drawn, because matplotlib is not installed.", file=sys.stderr)
    file = folder / "performance.md"
    file.write_text(page(store, "performance.png"), encoding="utf-8")
    print(f"written to {file}")
    return 0


def now() -> str:
    """Date and time."""
    return datetime.now().isoformat(" ", "minutes")


if __name__ == "__main__":
    raise SystemExit(main())
