"""Run the cases in processes of the environment with the C++ runtime, and keep what they find."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from . import machine
from .cases import COPY, HETEROGENEOUS, HOMOGENEOUS, NATIVE, PLUGIN, Case, cases_of, memory_case_of
from .results import HANGS, Found, Orders, Store

# What would change a time or a number from the outside.
OUTSIDE = ("NEML2_", "PYTHON", "TORCH_", "OMP_", "MKL_")
# Why peers are left out.
ESSENTIAL_ONLY = "left out of a quick run"
AFTER_DEATH = "left out after the process had been killed with it"


@dataclass(frozen=True)
class Shop:
    """Where and with what is measured.

    Args:
        python: of the environment with the C++ runtime.
        work: folder for results and logs.
        pools: folder for the rows of the models, which all runs share.
        sources: folder with the copy of what is imported.
        folders: the compiled stubs, by model.
        threads: for each process.
        rows: numbers of rows to measure.
        essential: whether eager neml2, `neml2.compile` and the memory are left out.
    """

    python: Path
    work: Path
    pools: Path
    sources: Path
    folders: dict[str, Path]
    threads: int
    rows: tuple[int, ...]
    essential: bool

    def command(self, module: str, *arguments: str) -> list[str]:
        """The command that runs a module of this package."""
        return [str(self.python), "-m", f"benchmarks.{module}", *arguments]

    def variables(self) -> dict[str, str]:
        """The environment of all processes: neml2's binding in force, the plugin on the path."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(OUTSIDE)}
        return {**kept, "NEML2_AOTI_PLUGIN": "0", "PYTHONPATH": str(self.sources)}

    def log(self, name: str) -> Path:
        """The file for what a process says beside its results."""
        (self.work / "logs").mkdir(parents=True, exist_ok=True)
        return self.work / "logs" / f"{name}.log"

    def pool(self, model: str) -> Path:
        """The file with the rows of a model; another version of `batches` makes other rows."""
        version = hashlib.sha256((self.sources / "benchmarks" / "batches.py").read_bytes()).hexdigest()[:8]
        return self.pools / f"{self.folders[model].name}-{version}.pt"


def all_cases(models: Iterable[str], rows: tuple[int, ...], *, memory: bool = True) -> list[Case]:
    """All cases of some models, in the order in which they are measured; memory where the most rows are among them."""
    found = []
    for name in models:
        if memory and memory_case_of(name).rows in rows:
            found.append(memory_case_of(name))
        for batch in (HETEROGENEOUS, HOMOGENEOUS):
            found += cases_of(name, batch, rows)
    return found


def run_all(shop: Shop, store: Store, cases: list[Case], deadline: float) -> None:
    """Measure the cases that have not been measured."""
    waiting = [case for case in cases if store.get(case) is None]
    for name in dict.fromkeys(case.model for case in waiting):
        mine = [case for case in waiting if case.model == name]
        # The rows are kept from before, or made by a process that has no cases.
        orders = Orders(name, "", str(shop.folders[name]), str(shop.pool(name)), [], shop.threads, 0.0)
        if not shop.pool(name).exists() and _work(shop, store, orders):
            for case in mine:
                store.put(Found(case.key, trouble=f"its rows could not be made; see {shop.log(name)}"))
            print(f"{name}: its rows could not be made; see {shop.log(name)}", flush=True)
            continue
        for case in [case for case in mine if case.quantity == "memory"]:
            store.put(memory(shop, store, case))
            print(line_of(store.cases[case.key]), flush=True)
        for batch in (HETEROGENEOUS, HOMOGENEOUS):
            series = [case for case in mine if case.batch == batch and case.quantity != "memory"]
            left = [case for case in waiting if store.get(case) is None]
            if series:
                share = sum(c.weight for c in series) / sum(c.weight for c in left)
                run_series(shop, store, series, time.time() + share * (deadline - time.time()))


def run_series(shop: Shop, store: Store, cases: list[Case], deadline: float) -> None:
    """Measure the cases of one model and one kind of batch, in a process that is started anew when it dies."""
    deaths: dict[str, int] = {}
    while True:
        left = [case for case in cases if store.get(case) is None]
        if not left:
            return
        first = deaths.get(left[0].key, 0)
        orders = orders_of(shop, store, left, deadline, first)
        # After a death the case is tried alone with fewer peers; those behind it are tried with all again.
        if first:
            orders.cases[1:] = []
        dying = _work(shop, store, orders)
        if dying is None:
            continue
        deaths[dying] = deaths.get(dying, 0) + 1
        print(f"{dying}: the process died", flush=True)
        if deaths[dying] == 3:
            store.put(Found(dying, trouble=f"the process died three times; see {shop.log(cases[0].model)}"))


def orders_of(shop: Shop, store: Store, cases: list[Case], deadline: float, deaths: int) -> Orders:
    """The orders for a series, with what is known from the cases before it."""
    model, batch = cases[0].model, cases[0].batch
    known: dict[tuple[str, str], list[object]] = {}
    for case in cases_of(model, batch, shop.rows):
        found = store.get(case)
        for peer in found.seconds if found else ():
            assert found is not None
            known[case.quantity, peer] = [case.quantity, peer, case.rows, found.time(peer)]
    return Orders(
        model,
        batch,
        str(shop.folders[model]),
        str(shop.pool(model)),
        [[case.model, case.batch, case.quantity, case.rows] for case in cases],
        shop.threads,
        max(deadline, time.time() + 2.0 * len(cases)),
        list(known.values()),
        bytes_per_row(store, model),
        only_essential=ESSENTIAL_ONLY if shop.essential else AFTER_DEATH if deaths else "",
        only_plugin=deaths > 1,
    )


def bytes_per_row(store: Store, model: str) -> dict[str, float]:
    """Memory that a peer needs for each row, as it was measured."""
    case = memory_case_of(model)
    measured = store.get(case)
    return {peer: size / case.rows for peer, size in measured.growth.items()} if measured else {}


def _work(shop: Shop, store: Store, orders: Orders) -> str | None:
    """Run one process; give the case that it died in, if it did."""
    started: str | None = None
    with shop.log(orders.model).open("a", encoding="utf-8") as log:
        process = subprocess.Popen(
            shop.command("worker"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=shop.sources,
            env=shop.variables(),
        )
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(asdict(orders)))
            process.stdin.close()
            for line in process.stdout:
                kind, _, rest = line.partition(" ")
                if kind == "START":
                    started = rest.strip()
                elif kind == "RESULT":
                    found = Found(**json.loads(rest))
                    store.header["load"] = max(machine.load() or 0.0, store.header.get("load") or 0.0)
                    store.put(found)
                    print(line_of(found), flush=True)
                    started = None
            process.wait()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if process.returncode == 0:
        return None
    return started or "/".join(map(str, next(iter(orders.cases), [orders.model])))


def memory(shop: Shop, store: Store, case: Case) -> Found:
    """Measure the memory of all peers on one number of rows, each in a process of its own."""
    found = Found(case.key)
    for peer in case.peers:
        folder, pool = str(shop.folders[case.model]), str(shop.pool(case.model))
        command = shop.command("memory", peer, case.model, folder, pool, str(case.rows), str(shop.threads))
        try:
            done = subprocess.run(
                command,
                cwd=shop.sources,
                env=shop.variables(),
                capture_output=True,
                text=True,
                check=False,
                timeout=HANGS,
            )
        except subprocess.TimeoutExpired:
            found.skipped[peer] = f"took longer than {HANGS:.0f} s"
            continue
        with shop.log(case.model).open("a", encoding="utf-8") as log:
            log.write(done.stderr)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [""])[-1][:200]
            found.skipped[peer] = f"exit status {done.returncode}: {last}"
            continue
        told = json.loads(done.stdout.splitlines()[-1])
        found.growth[peer] = told.pop("growth")
        found.size = told
    if PLUGIN not in found.growth and NATIVE not in found.growth:
        found.trouble = "; ".join(found.skipped.values())
    return found


def line_of(found: Found) -> str:
    """What is printed of a case."""
    if found.trouble:
        return f"{found.key}: {found.trouble}"
    if found.growth:
        return f"{found.key}: " + ", ".join(f"{peer} {size / 2**20:.1f} MiB" for peer, size in found.growth.items())
    parts = [f"{1e6 * (found.time(PLUGIN) or 0.0):.4g} us"]
    for peer in found.seconds:
        if peer not in (PLUGIN, COPY):
            ratios = found.ratios(PLUGIN, peer)
            assert ratios is not None
            parts.append(f"{ratios.median:.2f} ({ratios.low:.2f} to {ratios.high:.2f}) of {peer}")
    return f"{found.key}: {', '.join(parts)} ({len(found.seconds.get(PLUGIN, []))} rounds)"
