"""What looking over, sealing and taking turns cost: the figures of docs/reliability.md.

`python benchmarks/reliability.py load|calls|memory|threads|first [STUB]`, in the repository root.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import neml2  # noqa: F401
import torch

from neml2_aoti_plugin import Model, seal
from neml2_aoti_plugin._artifact import compatibility
from neml2_aoti_plugin._artifact.decode import read_metadata
from neml2_aoti_plugin._artifact.locate import locate
from neml2_aoti_plugin._artifact.package import open_archive, operators_in, signature_in
from neml2_aoti_plugin._graphs.unpack import load_runner
from stubs.build import compiled
from stubs.catalogue import CATALOGUE


def milliseconds(work: Callable[[], object], times: int = 25) -> float:
    """The median time of this process on the processor, which other processes disturb least."""
    work()
    taken = []
    for _ in range(times):
        start = time.process_time()
        work()
        taken.append((time.process_time() - start) * 1e3)
    return statistics.median(taken)


def show(what: str, value: float, unit: str = "ms") -> None:
    print(f"{what:<58} {value:10.3f} {unit}")


def load(artifact: Path) -> None:
    """What a load is made of."""
    place = locate(artifact)
    metadata = read_metadata(place)
    files = [place.leaf / name for name in sorted(metadata.files)]
    print(f"{artifact.name}: {len(files)} graphs, {sum(f.stat().st_size for f in files) / 1e6:.1f} MB")
    show("find the leaf", milliseconds(lambda: locate(artifact)))
    show("read the metadata", milliseconds(lambda: read_metadata(place)))
    packages = compatibility.check(metadata, place).packages
    checked = milliseconds(lambda: compatibility.check(metadata, place))

    def first() -> None:
        compatibility.known_packages.clear()
        compatibility.check(metadata, place)

    def read_again() -> None:
        for package in packages.values():
            package.read()

    show("compatibility check, per graph", milliseconds(first) / len(files))
    show("the same of bytes that this process has checked before", checked / len(files))
    show("read a package again and compare its digest", milliseconds(read_again) / len(files))
    show("Model(...), all of that and the rest", milliseconds(lambda: Model(artifact)))
    data = {file: file.read_bytes() for file in files}
    own = milliseconds(lambda: [load_runner(file, data[file], place.device) for file in files])
    show("unpack and load a graph here", own / len(files))
    loader = torch._C._aoti.AOTIModelPackageLoader
    other = milliseconds(lambda: [loader(str(file), "model", False, 1, -1) for file in files])
    show("unpack and load a graph by torch's own loader", other / len(files))
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(artifact, Path(folder) / artifact.name))
        before = milliseconds(lambda: Model(copy))
        seal(copy)
        show("seal verified at load, in addition", milliseconds(lambda: Model(copy)) - before)


def calls(artifact: Path) -> None:
    """What a call of a graph pays."""
    tensors = [torch.zeros(3, 6) for _ in range(4)]
    many = 5_000

    def loop(work: Callable[[], object]) -> float:
        return milliseconds(lambda: [work() for _ in range(many)], 7) / many * 1e3

    nothing = loop(lambda: tensors)
    show("ranks of four arguments, each call", loop(lambda: tuple([t.ndim for t in tensors])) - nothing, "us")
    place = locate(artifact)
    for file in sorted(place.leaf / name for name in read_metadata(place).files):
        with open_archive(file, file.read_bytes()) as archive:
            if "neml2::opaque_pow" not in operators_in(archive):
                continue
            signature = signature_in(archive)
        assert signature is not None
        given = [torch.ones([1 if n is None else n for n in a.extents], dtype=a.dtype) for a in signature.arguments]
        as_it_is = torch._C._aoti.AOTIModelPackageLoader(str(file), "model", False, 1, -1)
        here, _ = load_runner(file, file.read_bytes(), place.device)
        show(f"{file.stem}, one row, neml2's power in Python", loop(partial(as_it_is.run, given)), "us")
        show(f"{file.stem}, one row, torch's in its place", loop(partial(here.run, given)), "us")


def memory(artifact: Path) -> None:
    """What a process grows by when it loads a model again and again."""
    import resource

    def size() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    place = locate(artifact)
    model = Model(artifact)
    zeros = {n: torch.zeros(1, *v.natural_shape, dtype=torch.float64) for n, v in model.inputs.items()}
    model.solve(zeros)
    show("after the first load", size(), "MB")
    for _ in range(120):
        Model(artifact).solve(zeros)
    show("after 120 more", size(), "MB")
    file = place.leaf / min(read_metadata(place).files)
    for _ in range(120):
        torch._C._aoti.AOTIModelPackageLoader(str(file), "model", False, 1, -1)
    show(f"after 120 more of {file.name} by torch's own loader", size(), "MB")


def threads(artifact: Path) -> None:
    """How much of their time several threads on one model work at once, and what a call costs them."""
    torch.set_num_threads(1)
    model = Model(artifact)
    print("rows  threads    calls/s   processors at work   processor time of a call")
    for rows in (1, 100, 10_000):
        inputs = {n: torch.zeros(rows, *v.natural_shape, dtype=torch.float64) for n, v in model.inputs.items()}
        inputs |= {n: inputs[n] + step for n, step in (("strain", 2e-3), ("t", 1.0)) if n in inputs}
        model.forward(inputs)
        for count in (1, 2, 4, 8):
            calls, wall, work = _together(model, inputs, count)
            print(f"{rows:5} {count:7} {calls / wall:11.1f} {work / wall:19.2f} {work / calls * 1e3:22.2f} ms")


def _together(
    model: Model, inputs: dict[str, torch.Tensor], count: int, seconds: float = 3.0
) -> tuple[int, float, float]:
    """Calls made by some threads, seconds that passed, and seconds of processor time."""
    done = [0] * count
    end = time.perf_counter() + seconds

    def work(i: int) -> None:
        while time.perf_counter() < end:
            model.forward(inputs)
            done[i] += 1

    running = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    start, start_work = time.perf_counter(), time.process_time()
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return sum(done), time.perf_counter() - start, time.process_time() - start_work


FIRST_CALL = """
import resource, sys, time
import neml2, torch
from neml2_aoti_plugin import Model

def size():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

def took(work):
    start, start_work = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - start_work

torch.set_num_threads(1)
before = size()
if sys.argv[2] == "import":
    print(*took(lambda: __import__("llvmlite.binding")), size() - before)
else:
    # The machine code is loaded with the model.
    start, start_work = time.perf_counter(), time.process_time()
    model = Model(sys.argv[1])
    load, load_work = time.perf_counter() - start, time.process_time() - start_work
    inputs = {n: torch.zeros(10, *v.natural_shape, dtype=torch.float64) for n, v in model.inputs.items()}
    inputs |= {n: inputs[n] + step for n, step in (("strain", 2e-3), ("t", 1.0)) if n in inputs}
    call, call_work = took(lambda: model.forward(inputs))
    print(load + call, load_work + call_work, size() - before)
"""


def first(artifact: Path) -> None:
    """What the first call of a process costs with machine code: the least of some fresh processes."""
    print(f"{'':<58} {'by the clock':>12} {'processor':>11} {'memory':>10}")
    with tempfile.TemporaryDirectory() as folder:
        kept = f"{folder}/kept"
        _first("import llvmlite", 5, artifact, "import")
        _first("first forward, machine code made and kept", 3, artifact, NEML2_AOTI_PLUGIN_CACHE=kept, forget=kept)
        _first("first forward, machine code found", 5, artifact, NEML2_AOTI_PLUGIN_CACHE=kept)
        _first("first forward, NEML2_AOTI_PLUGIN_KERNELS=torch", 5, artifact, NEML2_AOTI_PLUGIN_KERNELS="torch")


def _first(what: str, times: int, artifact: Path, how: str = "call", forget: str = "", **variables: str) -> None:
    found = []
    for _ in range(times):
        if forget:
            shutil.rmtree(forget, ignore_errors=True)
        command = [sys.executable, "-c", FIRST_CALL, str(artifact), how]
        done = subprocess.run(command, env={**os.environ, **variables}, check=True, capture_output=True, text=True)
        found.append([float(x) for x in done.stdout.split()])
    clock, work, memory = (min(column) for column in zip(*found, strict=True))
    print(f"{what:<58} {clock:10.2f} s {work:9.2f} s {memory:7.0f} MB")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["load", "calls", "memory", "threads", "first"])
    parser.add_argument("stub", nargs="?", default="viscoplasticity")
    options = parser.parse_args()
    artifact = compiled(options.stub) / CATALOGUE[options.stub].model
    print(f"torch {torch.__version__}, Python {sys.version.split()[0]}")
    {"load": load, "calls": calls, "memory": memory, "threads": threads, "first": first}[options.what](artifact)


if __name__ == "__main__":
    main()
