"""How fast rows go from files to files: `python -m benchmarks.scaling map|dask ...`.

Ways are timed in turn, one round after the other, so that all see the same machine; the table has medians and, in
brackets, the least and the most. The load of the machine when a table began and ended stands below it.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from typing import Any

# Before torch is imported, here and in the processes that are started.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from torch import Tensor

from neml2_aoti_plugin import map_rows

from .batches import converging
from .cases import HETEROGENEOUS
from .machine import description, load
from .markdown import table

ROUNDS = 5


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


def write_source(folder: Path, inputs: Mapping[str, Tensor], rows: int) -> None:
    """Files of that many rows, without having them in memory."""
    folder.mkdir(parents=True)
    for name, value in inputs.items():
        out = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float64, (rows, *value.shape[1:]))
        for begin in range(0, rows, len(value)):
            out[begin : begin + len(value)] = value[: rows - begin].numpy()
        out.flush()


def mapped(options: argparse.Namespace) -> None:
    """`map_rows` in this process, and on executors of several processes that have begun."""
    for name in options.models:
        artifact, inputs = converging(name, min(options.rows, 65_536))
        with tempfile.TemporaryDirectory(dir=options.folder) as text, ExitStack() as stack:
            folder = Path(text)
            write_source(folder / "in", inputs, options.rows)
            executors: dict[str, Any] = {HERE: None}
            for count in options.workers:
                executors[f"{count} processes"] = own = stack.enter_context(
                    ProcessPoolExecutor(count, get_context("spawn"), torch.set_num_threads, (1,))
                )
                map_rows(artifact, folder / "in", folder / "warm", executor=own, progress=False, resume=False)
            found: dict[str, list[float]] = {way: [] for way in executors}
            processor, before = [], peak()
            for _ in range(options.rounds):
                for way, executor in executors.items():
                    begun = time.process_time()
                    done = map_rows(
                        artifact,
                        folder / "in",
                        folder / "out",
                        executor=executor,
                        chunk=options.chunk,
                        progress=False,
                        resume=False,
                    )
                    found[way].append(done.seconds)
                    if executor is None:
                        processor.append(time.process_time() - begun)
            size = sum(file.stat().st_size for part in ("in", "out") for file in (folder / part).glob("*.npy")) / 2**20
            show(f"{name}, {options.rows:,} rows, {HETEROGENEOUS}, {size:.0f} MiB of files", found, HERE, options.rows)
            print(
                f"\n{HERE}: processor time {statistics.median(processor):.2f} s ({min(processor):.2f} to "
                f"{max(processor):.2f}); its peak memory grew by {peak() - before:.0f} MiB"
            )


def peak() -> float:
    """The peak memory of this process, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def over_dask(options: argparse.Namespace) -> None:
    """`map_rows` on a `LocalCluster`, whose workers give freed memory back at once or keep it."""
    import dask
    from distributed import Client, LocalCluster

    for name in options.models:
        artifact, inputs = converging(name, min(options.rows, 65_536))
        with tempfile.TemporaryDirectory(dir=options.folder) as text:
            folder = Path(text)
            write_source(folder / "in", inputs, options.rows)
            found: dict[str, list[float]] = {"as Dask sets it": [], "memory kept": []}
            for _ in range(options.rounds):
                for way, seconds in found.items():
                    setting = {TRIM: 65536 if way == "as Dask sets it" else 1 << 30}
                    with (
                        dask.config.set(setting),
                        LocalCluster(options.workers[-1], threads_per_worker=1, dashboard_address=None) as cluster,
                        Client(cluster) as client,
                    ):
                        done = map_rows(
                            artifact, folder / "in", folder / "out", executor=client, progress=False, resume=False
                        )
                        seconds.append(done.seconds)
            show(
                f"{name}, {options.rows:,} rows, {options.workers[-1]} workers", found, "as Dask sets it", options.rows
            )


HERE = "this process"
# Dask's setting of glibc's variable, in bytes.
TRIM = "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_"
COMMANDS = {"map": mapped, "dask": over_dask}


def main() -> int:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--models", nargs="+", default=["viscoplasticity", "chaboche"])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--workers", type=int, nargs="*", default=[2])
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
