"""Measure the plugin beside neml2's C++ runtime and others, and write docs/performance.md.

`python -m benchmarks`, in the repository root, makes an environment with torch 2.12.1, where the C++ runtime works
(`--python` names one that exists), compiles the stubs with optimised wrappers, measures for about `--minutes`, and
writes docs/performance.md and docs/performance.png. What is found is stored after each case: a run that was broken off
goes on where it was, as long as sources, versions and options are the same.

`--quick` tries it on few rows, with whatever stubs are compiled, and writes its page to the work folder. `--check`
makes a quick run and compares its ratios to the C++ runtime with those in benchmarks/reference.json, which
`--write-reference` writes; its exit status is 1 if something has become slower.
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

from . import check, machine
from .cases import QUICK_ROWS, ROWS, SUBJECTS
from .results import Store
from .run import Shop, all_cases, run_all

DOCS = machine.ROOT / "docs"
WORK = machine.ROOT / "out" / "benchmarks"
POOLS = WORK / "pools"
# Header entries that must be the same for a run to be taken up again.
SAME = ("sources", "machine", "versions", "threads", "optimised", "rows", "models", "stubs")


# How long a run measures unless it is told, in minutes; a last case may take a little more. Compiling stubs is extra.
MINUTES, QUICK_MINUTES = 55.0, 4.0
# How long what looks slower is measured again.
AGAIN_MINUTES = 1.0


def main() -> int:
    """Do what the command line says."""
    parser = _parser()
    options = parser.parse_args()
    reference: check.Reference | None = None
    if options.check:
        if options.write_reference:
            parser.error("--check compares with the stored ratios, --write-reference replaces them: give one of them")
        if not check.FILE.exists():
            parser.error(f"there is no {check.FILE}; `python -m benchmarks --quick --write-reference` makes one")
        reference = check.read()
        options.quick = options.again = True
    minutes = options.minutes or (QUICK_MINUTES if options.quick else MINUTES)
    work = options.work or (WORK / ("check" if options.check else "quick") if options.quick else WORK)
    store = Store(work / "results.json")
    if options.report_only:
        if not store.header:
            print(f"There are no results in {work}.", file=sys.stderr)
            return 1
        return finish(store, work, options)
    models = [name for name in SUBJECTS if name in (options.models or SUBJECTS)]
    rows = tuple(n for n in ROWS if n in options.rows) if options.rows else QUICK_ROWS if options.quick else ROWS
    python, versions = environment(options.python)
    as_they_are = not reference.header["optimised"] if reference else options.quick
    folders = {name: stub(name, as_they_are) for name in models}
    sources = machine.snapshot(work.absolute() / "sources")
    shop = Shop(python, work.absolute(), POOLS, sources, folders, options.threads, rows, options.quick)
    header = header_of(shop, versions, optimised=all(folders[n] == folder_of(n, quick=False) for n in models))
    cases = all_cases(models, rows, memory=not options.quick)
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
    return compare(shop, store, reference) if reference else finish(store, work, options)


def finish(store: Store, work: Path, options: argparse.Namespace) -> int:
    """Write what is to be written."""
    if options.write_reference:
        print(f"{check.write(store)} ratios written to {check.FILE}")
    return write_page(store, work)


def compare(shop: Shop, store: Store, reference: check.Reference) -> int:
    """Tell what has become slower since the reference; what looks so is measured again in new processes."""
    for line in check.unlike(reference, store.header):
        print(f"unlike the reference, which may move ratios: {line}")
    found = check.ratios_in(store)
    suspects = {one.key for one in check.worse(reference.ratios, found)}
    if suspects:
        print(f"{len(suspects)} of {len(found)} look slower; they are measured again")
        second = Store(shop.work / "again.json")
        second.begin(store.header)
        cases = [case for case in all_cases(shop.folders, shop.rows, memory=False) if case.key in suspects]
        run_all(shop, second, cases, time.time() + 60.0 * AGAIN_MINUTES)
        again = check.ratios_in(second)
        suspects = {one.key for one in check.worse(reference.ratios, again)}
        found.update(again)
    slower = [one for one in check.worse(reference.ratios, found) if one.key in suspects]
    failed = [one for one in store.cases.values() if one.trouble]
    missing = [key for key in reference.ratios if key not in found and key in store.cases]
    before = reference.header
    print(f"reference: commit {before['commit']} of {before['begun']}, {before['machine']['processor']}")
    for one in slower:
        print(f"slower: {one}")
    for trouble in failed:
        print(f"failed: {trouble.key}: {trouble.trouble}")
    for key in missing:
        print(f"not measured: {key}")
    noisy = check.blind(reference.ratios, found)
    if noisy:
        print(f"too noisy to tell, here or in the reference: {', '.join(noisy)}")
    print(f"{len(slower)} of {len(found)} cases have become slower")
    return 1 if slower or failed or missing else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--python", type=Path, help="Python of an environment with the C++ runtime; made if not given")
    parser.add_argument(
        "--minutes", type=float, help=f"time to measure in (default: {MINUTES:g}; quick: {QUICK_MINUTES:g})"
    )
    parser.add_argument("--models", nargs="+", choices=list(SUBJECTS), help="measure these alone")
    parser.add_argument("--rows", nargs="+", type=int, choices=ROWS, help="measure these numbers of rows alone")
    parser.add_argument("--threads", type=int, default=1, help="threads inside an operator (default: 1)")
    parser.add_argument("--work", type=Path, help="folder for results, rows and logs (default: out/benchmarks)")
    parser.add_argument("--quick", action="store_true", help="few rows, stubs as they are; the page goes to the folder")
    parser.add_argument("--check", action="store_true", help="tell what has become slower; the exit status is 1 then")
    parser.add_argument("--write-reference", action="store_true", help="store the ratios, for --check")
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


def stub(name: str, as_they_are: bool) -> Path:
    """A compiled stub with optimised wrappers; or with others, where only these are compiled and will do."""
    optimised = folder_of(name, quick=False)
    if as_they_are and not optimised.is_dir():
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
