"""Run a driver of an input file, step by step."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import UnknownNameError
from ..files import draft
from .points import defaults, load_driver
from .results import Result, from_steps, require_format, write_result


@dataclass(frozen=True)
class SeriesReport:
    """A variable of a run.

    Args:
        name: of the variable.
        type: neml2's name of its type.
        shape: `(steps, rows, *base)`.
    """

    name: str
    type: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class RunReport:
    """A run of a driver.

    Args:
        input: the input file.
        driver: name of the driver.
        steps: number of steps, the first one included, in which the model is not called.
        rows: number of points.
        seconds: that the run took, without loading.
        variables: what was recorded.
        written: the file that was written; null if none was.
    """

    input: str
    driver: str
    steps: int
    rows: int
    seconds: float
    variables: tuple[SeriesReport, ...]
    written: str | None


def run(
    path: Path,
    driver: str,
    *,
    values: Mapping[str, float],
    parameters: Path | None = None,
    overrides: tuple[str, ...] = (),
    out: Path | None = None,
    device: str | None = None,
    dtype: str = "float64",
    on_step: Callable[[int, int], None] | None = None,
) -> RunReport:
    """Run a driver.

    Args:
        path: the input file, such as a stub.
        driver: name of the driver.
        values: of promoted parameters of the compiled model.
        parameters: a file of them.
        overrides: HIT overrides, such as `Drivers/driver/prescribed_time:=slow`.
        out: file for the result (.pt, .npz or .csv).
        device: of tensors in the input file, and of the compiled model's leaf; torch's default device if None.
        dtype: of tensors in the input file, and of the leaf.
        on_step: called behind each step with its number and the number of the last one.

    Raises:
        InputError: an argument does not fit.
        ArtifactError: the compiled model cannot run here.
        ConvergenceError: a step failed; nothing is written.
    """
    if out is None:
        return _run(path, driver, values, parameters, overrides, device, dtype, on_step)[0]
    require_format(out)
    # Before the run, for it may take long.
    with draft(out, [path, *([parameters] if parameters is not None else [])]) as scratch:
        report, result, flat = _run(path, driver, values, parameters, overrides, device, dtype, on_step)
        write_result(scratch, result, flat)
    return RunReport(**{**vars(report), "written": str(out)})


def _run(
    path: Path,
    driver: str,
    values: Mapping[str, float],
    parameters: Path | None,
    overrides: tuple[str, ...],
    device: str | None,
    dtype: str,
    on_step: Callable[[int, int], None] | None,
) -> tuple[RunReport, Result, dict[str, Any]]:
    with defaults(device, dtype):
        built = load_driver(path, driver, overrides, device=device, dtype=dtype)
        _set(built.model, values, parameters)
        last = built.nsteps - 1
        done = 0

        def count(*_: object) -> None:
            nonlocal done
            done += 1
            if on_step is not None:
                on_step(done, last)

        handle = built.model.register_forward_hook(count)
        start = time.perf_counter()
        try:
            built.run()
        except RuntimeError as error:
            if type(error).__name__ == "ConvergenceError":
                error.args = (f"step {done + 1} of {last} of [Drivers/{driver}] in {path}: {error}", *error.args[1:])
            raise
        finally:
            handle.remove()
        seconds = time.perf_counter() - start
    flat = built.result()
    types = {name: kind.__name__ for name, kind in {**built.model.input_spec, **built.model.output_spec}.items()}
    result = from_steps(flat, {name: kind for name, kind in types.items() if "~" not in name})
    # A driver records the time only where the model takes it.
    time_name = getattr(built, "time_name", "")
    if time_name and time_name not in result.series:
        times = built.prescribed_time.data.detach().cpu().to(torch.float64).numpy().reshape(built.nsteps, -1)
        result = Result({time_name: times, **result.series}, {time_name: "Scalar", **result.types})
    variables = tuple(SeriesReport(n, result.types[n], v.shape) for n, v in result.series.items())
    report = RunReport(str(path), driver, built.nsteps, result.rows, seconds, variables, None)
    return report, result, flat


def _set(model: Any, values: Mapping[str, float], parameters: Path | None) -> None:
    """Set promoted parameters of the driver's model; only a compiled one has such."""
    from ..host.hit import AOTIModel

    if isinstance(model, AOTIModel):
        if parameters is not None:
            model._inner.load_parameters(parameters)
        for name, value in values.items():
            model.set_parameter(name, value)
    elif values or parameters is not None:
        raise UnknownNameError(
            "only a compiled model has promoted parameters to set, and this driver's is another one. Override the "
            "input file instead: Models/NAME/OPTION:=VALUE"
        )
