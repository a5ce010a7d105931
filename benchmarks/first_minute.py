"""What compiling gains over eager neml2: the table of README.md.

`python -m benchmarks.first_minute`, in the repository root, on an otherwise idle machine. The model is that of
stubs/viscoplasticity.i. Each row of the table is a process of its own, with torch's threads as they are by default; the
machine code of solves is kept from an earlier run.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from stubs.build import compiled
from stubs.catalogue import CATALOGUE

from .markdown import duration, table

STUB = CATALOGUE["viscoplasticity"]
COUNTS = (10, 10_000)
SEED = 20261130
# Each measured call is made again for this long, and the median is given.
SECONDS = 3.0


def strains(points: int) -> torch.Tensor:
    """Strains `(points, 6)` of up to 0.5 %, each in a direction of its own, reached from zero in a second."""
    random = torch.Generator().manual_seed(SEED)
    direction = torch.randn(points, 6, generator=random, dtype=torch.float64)
    size = 5e-3 * torch.rand(points, 1, generator=random, dtype=torch.float64)
    unit: torch.Tensor = direction / direction.norm(dim=1, keepdim=True)
    return size * unit


def caller(way: str) -> Callable[[torch.Tensor], Any]:
    """The model, loaded from its source input or from the stub, as a function of the strain."""
    import neml2

    path = STUB.path if way == "eager" else compiled(STUB.name) / f"{STUB.model}_aoti.i"
    model = neml2.load_model(path, STUB.model)

    def call(strain: torch.Tensor) -> Any:
        shapes = {"strain": strain, "strain~1": torch.zeros_like(strain), "stress~1": torch.zeros_like(strain)}
        zero = strain.new_zeros(len(strain))
        values = {"t": zero + 1.0, "t~1": zero, "equivalent_plastic_strain~1": zero, **shapes}
        with torch.no_grad():
            return model(*(model.input_spec[name](values[name]) for name in model.input_spec))

    return call


def measure(way: str) -> list[float]:
    """Seconds until the first result, loading included, and of a later call for each number of points."""
    start = time.perf_counter()
    call = caller(way)
    call(strains(COUNTS[0]))
    taken = [time.perf_counter() - start]
    for points in COUNTS:
        strain = strains(points)
        times: list[float] = []
        while sum(times) < SECONDS or len(times) < 3:
            start = time.perf_counter()
            call(strain)
            times.append(time.perf_counter() - start)
        taken.append(statistics.median(times))
    return taken


def main() -> None:
    """Measure one way, or both in processes of their own, and print the table."""
    if len(sys.argv) > 1:
        print(*measure(sys.argv[1]))
        return
    compiled(STUB.name)
    rows = []
    for way in ("compiled", "eager"):
        command = [sys.executable, "-m", "benchmarks.first_minute", way]
        for _ in range(2):  # the first run may make what the second one finds
            done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path.cwd())
        rows.append((way, *(duration(float(value)) for value in done.stdout.split())))
    print(table(("", "load and first call", *(f"each later call, {n:,} points" for n in COUNTS)), rows))


if __name__ == "__main__":
    main()
