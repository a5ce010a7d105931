"""Run a driver of an input file, step by step."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._files import draft
from ..errors import InputError, UnknownNameError
from .points import defaults, load_driver
from .result_files import require_format, write_result
from .results import from_driver


@dataclass(frozen=True)
class SeriesReport:
    """A variable of a run.

    Args:
        name: of the variable.
        type: neml2's name of its type.
        shape: `(steps, rows, *sub_batch, *base)`; with one row where all have the same value.
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
        saved: the file that the driver's own `save_as` names; null if it names none.
    """

    input: str
    driver: str
    steps: int
    rows: int
    seconds: float
    variables: tuple[SeriesReport, ...]
    written: str | None
    saved: str | None


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
    if out is not None:
        require_format(out)
    # What is to be written is begun before the run, which may take long, so that what cannot be written is told now.
    with contextlib.ExitStack() as drafts, defaults(device, dtype):
        read = [path, *([parameters] if parameters is not None else [])]
        written = None if out is None else drafts.enter_context(draft(out, read))
        built = load_driver(path, driver, overrides, device=device, dtype=dtype)
        _require_transient(built, driver, path)
        _set(built.model, values, parameters)
        # The driver itself would write without a look ahead, at the end.
        save_as, built.save_as = built.save_as, ""
        saved = drafts.enter_context(draft(Path(save_as), read)) if save_as else None
        seconds = _steps(built, f"[Drivers/{driver}] in {path}", on_step)
        result = from_driver(built)
        if saved is not None:
            built.save_result(saved)
        if written is not None:
            write_result(written, built)
    return RunReport(
        input=str(path),
        driver=driver,
        steps=built.nsteps,
        rows=result.points,
        seconds=seconds,
        variables=tuple(SeriesReport(n, result.types[n], v.shape) for n, v in result.series.items()),
        written=None if out is None else str(out),
        saved=save_as or None,
    )


def _require_transient(built: Any, driver: str, path: Path) -> None:
    """Refuse a driver without steps, and variables whose names are ours in files."""
    from neml2.drivers import TransientDriver

    if not isinstance(built, TransientDriver):
        raise InputError(f"[Drivers/{driver}] in {path} is of type {type(built).__name__}, expected a TransientDriver.")
    if not built.nsteps:
        raise InputError(f"[Drivers/{driver}] in {path} has no steps. Give prescribed_time some entries.")
    ours = [name for name in (*built.model.input_spec, *built.model.output_spec) if name.startswith("@")]
    if ours:
        raise InputError(
            f"the model of [Drivers/{driver}] in {path} has variables {', '.join(ours)}; names that begin with @ are "
            "those of the result itself. Give them other names."
        )


def _steps(built: Any, where: str, on_step: Callable[[int, int], None] | None) -> float:
    """Run a driver; gives the seconds that it took."""
    last, done = built.nsteps - 1, 0

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
            error.args = (f"step {done + 1} of {last} of {where}: {error}", *error.args[1:])
        raise
    finally:
        handle.remove()
    return time.perf_counter() - start


def _set(model: Any, values: Mapping[str, float], parameters: Path | None) -> None:
    """Set promoted parameters of the driver's model; only a compiled one has such."""
    from .._host.hit import AOTIModel

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
