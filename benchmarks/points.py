"""What `Points.update` costs beside `Model.jacobian` on the same rows.

`python -m benchmarks.points`, in the repository root. Both are called in turn, and what is told is the median of the
ratios of neighbours, in processor time, since one thread runs and other programs may use the machine. Rows are random
states of the stub's own history, spread in rate; an update starts where the model starts, as `Model.jacobian` does.
`jacobian(expand=True)` gives what an update gives: one block per row.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from statistics import median, quantiles
from typing import Any

import torch

from neml2_aoti_plugin import Model, Points
from neml2_aoti_plugin.notation import Form, convert
from neml2_aoti_plugin.points import PointsState

from . import machine
from .batches import converging

NOTATIONS = ("mandel", "voigt", "tensor")
# Rounds of that many seconds, and so many at least.
ROUND_SECONDS, LEAST_ROUNDS = 0.05, 5


def main() -> int:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.points", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", default=["viscoplasticity", "elasticity"], help="entries of the catalogue")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 100, 10_000])
    parser.add_argument("--seconds", type=float, default=20.0, help="for each line")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, processor time; load {machine.load()}")
    print("model            rows   notation   jacobian        update          ratio (quartiles)")
    for name in options.models:
        for rows in options.rows:
            for notation in NOTATIONS:
                print(line(name, rows, notation, options.seconds / len(NOTATIONS)), flush=True)
    return 0


def line(name: str, rows: int, notation: Any, seconds: float) -> str:
    """Measure one model at one number of rows in one notation."""
    artifact, inputs = converging(name, rows)
    model = Model(artifact)
    pairs = [pair for pair in model.derivative_pairs if "~" not in pair[1]]
    points = Points(model, rows, notation=notation, pairs=pairs)
    points.restore(PointsState({key: inputs[key] for key in points.kept}, model.digest, rows))
    # The driven inputs as the caller writes them.
    form: Form = "voigt strain" if notation == "voigt" else notation
    given = {
        key: (convert(inputs[key], "mandel", form) if inputs[key].shape[-1:] == (6,) else inputs[key]).clone().numpy()
        for key in points.driven
    }

    def update() -> object:
        points.revert()
        return points.update(given)

    def jacobian() -> object:
        return model.jacobian(inputs, pairs=pairs, expand=True)

    assert bool(points.update(given).converged.all())
    jacobian()
    calls = {"jacobian": jacobian, "update": update}
    found = measured(calls, seconds)
    ratios = [b / a for a, b in zip(found["jacobian"], found["update"], strict=True)]
    low, _, high = quantiles(ratios, n=4)
    times = [f"{1e3 * median(found[key]):9.3f} ms" for key in calls]
    return (
        f"{name:<16} {rows:>6} {notation:<8} {times[0]}   {times[1]}   {median(ratios):.3f} ({low:.3f} to {high:.3f})"
    )


def measured(calls: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Processor seconds of calls in turn, in rounds of as many calls as take long enough for the clock."""
    counts = {}
    for key, call in calls.items():
        start = time.perf_counter()
        call()
        counts[key] = max(1, int(ROUND_SECONDS / (time.perf_counter() - start)))
    found: dict[str, list[float]] = {key: [] for key in calls}
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline or len(found["update"]) < LEAST_ROUNDS:
        for key, call in calls.items():
            start = time.process_time()
            for _ in range(counts[key]):
                call()
            found[key].append((time.process_time() - start) / counts[key])
    return found


if __name__ == "__main__":
    raise SystemExit(main())
