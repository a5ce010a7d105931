"""How much faster rows are on several processes: `python -m benchmarks.scaling pool|map|dask|threshold|load ...`.

Ways are timed in turn, one round after the other, so that all see the same machine; the table has medians and, in
brackets, the least and the most. The load of the machine when a table began and ended stands below it.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

# Before torch is imported, here and in the processes that are started.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from torch import Tensor

from neml2_aoti_plugin import Model, Pool, map_rows
from stubs.build import compiled
from stubs.catalogue import CATALOGUE

from .batches import spread, states, taken, with_typical_first
from .cases import HETEROGENEOUS
from .machine import description, load
from .markdown import table

ROUNDS = 5
POOL_ROWS = 4096


def inputs_of(name: str, rows: int) -> tuple[Path, dict[str, Tensor]]:
    """The artifact of a stub, and rows that differ in state and rate, all of which converge."""
    stub = CATALOGUE[name]
    folder = compiled(name)
    artifact = folder / stub.model
    pool = spread(states(folder / f"{stub.model}_aoti.i", stub.driver), POOL_ROWS)
    found = Model(artifact).solve(pool)
    kept = {n: x[found.converged] for n, x in pool.items()}
    return artifact, taken(with_typical_first(kept, found.iterations[found.converged]), rows)


def in_turn(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round; each has been called once before."""
    for call in ways.values():
        call()
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, call in ways.items():
            start = time.perf_counter()
            call()
            found[name].append(time.perf_counter() - start)
    return found


def processor_seconds(pids: list[int]) -> float:
    """Processor time that processes have had, on Linux."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def processor_time(model: Model, own: Pool, inputs: dict[str, Tensor], rounds: int) -> str:
    """What a batch costs in processor time, alone and in a pool, which hardly depends on the load of the machine."""
    alone, together, caller = [], [], []
    here = [os.getpid()]
    for _ in range(rounds):
        begun = processor_seconds(here)
        model.forward(inputs)
        alone.append(processor_seconds(here) - begun)
        begun, workers = processor_seconds(here), processor_seconds(own.processes.processes)
        own.forward(inputs)
        caller.append(processor_seconds(here) - begun)
        together.append(caller[-1] + processor_seconds(own.processes.processes) - workers)
    ratio = statistics.median(own.workers * a / b for a, b in zip(alone, together, strict=True))
    return (
        f"processor time: Model {statistics.median(alone):.2f} s, Pool {statistics.median(together):.2f} s, of which "
        f"the caller {statistics.median(caller):.2f} s; on {own.workers} free cores that is {ratio:.2f} times as fast"
    )


def show(title: str, found: Mapping[str, list[float]], first: str, rows: int) -> None:
    """Print a table: each way beside the first one, by the ratios of each round."""
    lines = []
    for name, seconds in found.items():
        ratios = [a / b for a, b in zip(found[first], seconds, strict=True)]
        lines.append(
            (
                name,
                f"{statistics.median(seconds):.3f} s ({min(seconds):.3f} to {max(seconds):.3f})",
                f"{rows / statistics.median(seconds):,.0f}",
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
            )
        )
    print(f"\n{title}\n\n{table(('', 'time', 'rows/s', f'times as fast as {first}'), lines)}", flush=True)


def pool(options: argparse.Namespace) -> None:
    """`Model` beside `Pool`."""
    for name in options.models:
        artifact, inputs = inputs_of(name, options.rows)
        model = Model(artifact)
        alone = f"Model, {torch.get_num_threads()} thread"
        ways: dict[str, Callable[[], object]] = {alone: partial(model.forward, inputs)}
        pools = [(count, Pool(model, count, chunk=options.chunk)) for count in options.workers]
        for count, own in pools:
            ways[f"Pool, {count} workers"] = partial(own.forward, inputs)
        found = in_turn(ways, options.rounds)
        here, there = model.forward(inputs), pools[-1][1].forward(inputs)
        apart = max(float((here[n] - there[n]).abs().max() / here[n].abs().max()) for n in here)
        from neml2_aoti_plugin.parallel import chunks

        size = chunks.sizes(model, options.chunk)
        parts = chunks.cut(options.rows, options.workers[-1], size)
        sizes = [part.stop - part.start for part in parts]
        processor = processor_time(model, pools[-1][1], inputs, options.rounds)
        for _, own in pools:
            own.close()
        show(f"{name}, {options.rows:,} rows, {HETEROGENEOUS}", found, alone, options.rows)
        print(f"\n{len(parts)} chunks of {max(sizes):,} to {min(sizes):,} rows; results differ by {apart:.1e}")
        print(processor)


def threshold(options: argparse.Namespace) -> None:
    """From how many rows on a pool with warm processes is faster."""
    for name in options.models:
        artifact, inputs = inputs_of(name, 32_768)
        model = Model(artifact)
        lines = []
        for rows in (512, 1024, 2048, 4096, 8192, 16_384, 32_768):
            part = {n: x[:rows].contiguous() for n, x in inputs.items()}
            # In as many chunks as there would be for the default sizes.
            with Pool(model, 2, chunk=max(rows // 4, 1)) as own:
                found = in_turn({"Model": partial(model.forward, part), "Pool": partial(own.forward, part)}, 9)
            alone, both = (statistics.median(found[way]) for way in ("Model", "Pool"))
            lines.append((f"{rows:,}", f"{1e3 * alone:.1f} ms", f"{1e3 * both:.1f} ms", f"{alone / both:.2f}"))
        print(f"\n{name}\n\n{table(('rows', 'Model', 'Pool, 2 workers', 'times as fast'), lines)}", flush=True)


def start(options: argparse.Namespace) -> None:
    """What it takes until a pool gives its first result."""
    for name in options.models:
        artifact, inputs = inputs_of(name, 4096)
        model = Model(artifact)
        model.forward(inputs)
        for count in options.workers:
            seconds = []
            for _ in range(options.rounds):
                begun = time.perf_counter()
                with Pool(model, count, chunk=512) as own:
                    own.forward(inputs)
                    seconds.append(time.perf_counter() - begun)
            print(
                f"{name}, {count} workers: first result after {statistics.median(seconds):.2f} s "
                f"(least {min(seconds):.2f})"
            )


def write_source(folder: Path, inputs: Mapping[str, Tensor], rows: int) -> None:
    """Files of that many rows, without having them in memory."""
    folder.mkdir(parents=True)
    for name, value in inputs.items():
        out = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float64, (rows, *value.shape[1:]))
        for begin in range(0, rows, len(value)):
            out[begin : begin + len(value)] = value[: rows - begin].numpy()
        out.flush()


def mapped(options: argparse.Namespace) -> None:
    """`map_rows` over `.npy` files, with the peak memory of the caller."""
    for name in options.models:
        artifact, inputs = inputs_of(name, min(options.rows, 65_536))
        for count in options.workers:
            with tempfile.TemporaryDirectory(dir=options.folder) as text:
                folder = Path(text)
                write_source(folder / "in", inputs, options.rows)
                before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                peaks: list[int] = []
                done = map_rows(
                    artifact,
                    folder / "in",
                    folder / "out",
                    workers=count,
                    progress=lambda _, __, peaks=peaks: peaks.append(_largest_child()),  # type: ignore[misc]
                )
                grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
                size = sum(file.stat().st_size for file in folder.rglob("*.npy")) / 2**20
                middle = peaks[len(peaks) // 10 :]
                print(
                    f"{name}, {options.rows:,} rows, {count} workers: {done.seconds:.2f} s, "
                    f"{options.rows / done.seconds:,.0f} rows/s; {size:.0f} MiB of files; the caller's peak grew by "
                    f"{grown / 1024:.0f} MiB, its largest worker had {middle[0] / 1024:.0f} MiB after a tenth of the "
                    f"rows and {max(middle) / 1024:.0f} MiB at most",
                    flush=True,
                )


def _largest_child() -> int:
    """Resident memory of the largest worker process that this process has, in KiB."""
    found = [0]
    for path in Path("/proc").glob("[0-9]*/status"):
        try:
            text = path.read_text()
            command = path.with_name("cmdline").read_bytes()
        except OSError:
            continue
        fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
        if int(fields["PPid"]) == os.getpid() and b"popen_loky" in command:
            found.append(int(fields.get("VmRSS", "0").split()[0]))
    return max(found)


def over_dask(options: argparse.Namespace) -> None:
    """`map_rows` on a `LocalCluster`, with Dask's malloc settings as they are and as the plugin sets them."""
    from distributed import Client, LocalCluster

    from neml2_aoti_plugin.parallel import dask as own

    for name in options.models:
        artifact, inputs = inputs_of(name, min(options.rows, 65_536))
        with tempfile.TemporaryDirectory(dir=options.folder) as text:
            folder = Path(text)
            write_source(folder / "in", inputs, options.rows)
            count = options.workers[-1]
            found: dict[str, list[float]] = {"kept by the plugin": [], "as Dask sets it": [], "loky": []}
            for number in range(options.rounds):
                for way, seconds in found.items():
                    seconds.append(_once(artifact, folder, f"{way}-{number}", count, way, (Client, LocalCluster, own)))
            show(f"{name}, {options.rows:,} rows, {count} workers", found, "loky", options.rows)


def _once(artifact: Path, folder: Path, sink: str, count: int, way: str, parts: tuple[Any, Any, Any]) -> float:
    client_of, cluster_of, own = parts
    if way == "loky":
        return map_rows(artifact, folder / "in", folder / sink, workers=count, progress=False).seconds

    class LoadOnly(own.LoadModel):  # type: ignore[name-defined, misc]
        """Loads the model, and leaves memory as Dask has set it."""

        def setup(self, worker: Any) -> None:
            own.model_of(self.model)

    plugin = own.LoadModel
    with (
        cluster_of(n_workers=count, threads_per_worker=1, dashboard_address=None, host="127.0.0.1") as cluster,
        client_of(cluster) as client,
    ):
        try:
            if way == "as Dask sets it":
                own.LoadModel = LoadOnly
            return map_rows(artifact, folder / "in", folder / sink, executor=client, progress=False).seconds
        finally:
            own.LoadModel = plugin


def malloc(options: argparse.Namespace) -> None:
    """What Dask's malloc setting costs, and what is left of that: processor time of calls in processes of their own."""
    ways = {
        "as it is": {},
        "as Dask sets it": {DASK: DASK_BYTES},
        "set back by the plugin": {DASK: DASK_BYTES, BACK: "1"},
    }
    for name in options.models:
        compiled(name)
        found: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(options.rounds):
            for way, variables in ways.items():
                command = [sys.executable, "-m", "benchmarks.scaling", "one-malloc", "--models", name]
                done = subprocess.run(
                    command, env={**os.environ, **variables}, capture_output=True, text=True, check=True, timeout=300
                )
                found[way].append(float(done.stdout.split()[0]))
        show(
            f"{name}, {MALLOC_CALLS} calls of {MALLOC_ROWS:,} rows, processor time",
            found,
            "as it is",
            MALLOC_CALLS * MALLOC_ROWS,
        )


def one_malloc(options: argparse.Namespace) -> None:
    """Print the processor time of some calls."""
    if os.environ.get(BACK):
        from neml2_aoti_plugin.parallel.malloc import keep_freed_memory

        keep_freed_memory()
    artifact, inputs = inputs_of(options.models[0], MALLOC_ROWS)
    model = Model(artifact)
    model.forward(inputs)
    begun = time.process_time()
    for _ in range(MALLOC_CALLS):
        model.forward(inputs)
    print(time.process_time() - begun)


# glibc's variable, the value that Dask's nanny gives it, and one that has the plugin set it back.
DASK, DASK_BYTES, BACK = "MALLOC_TRIM_THRESHOLD_", "65536", "SCALING_SET_BACK"
MALLOC_CALLS, MALLOC_ROWS = 20, 5_376

COMMANDS = {
    "pool": pool,
    "threshold": threshold,
    "start": start,
    "map": mapped,
    "dask": over_dask,
    "malloc": malloc,
    "one-malloc": one_malloc,
}


def main() -> int:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--models", nargs="+", default=["viscoplasticity", "chaboche"])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[2])
    parser.add_argument("--chunk", type=int)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--folder", help="for files; the folder for temporary files if not given")
    options = parser.parse_args()
    torch.set_num_threads(1)
    begun = load()
    COMMANDS[options.command](options)
    machine = description()
    print(
        f"\n{machine['processor']}, {machine['cores']} cores, torch {torch.__version__}, Python "
        f"{sys.version.split()[0]}; load {begun} at the start, {load()} at the end"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
