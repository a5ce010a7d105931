"""`neml2-aoti run`: run a driver of an input file step by step, with a progress bar, and keep its result."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from .._files import draft
from ..errors import InputError, UnknownNameError
from .output import Report, waits_for, written
from .points import defaults, load_driver, run_driver
from .process import heeded
from .result_files import require_format, write_result
from .results import from_driver


@dataclass(frozen=True)
class SeriesReport:
    """A variable of a run."""

    name: str  # of the variable
    type: str  # neml2's name of its type
    shape: tuple[int, ...]  # `(steps, rows, *sub_batch, *base)`; with one row where all have the same value


@dataclass(frozen=True)
class RunReport(Report):
    """A run of a driver."""

    input: str  # the input file
    driver: str  # name of the driver
    steps: int  # number of steps, the first one included, in which the model is not called
    rows: int  # number of points
    seconds: float  # that the run took, without loading
    variables: tuple[SeriesReport, ...]  # what was recorded
    written: str | None  # the file that was written; null if none was
    saved: str | None  # the file that the driver's own `save_as` names; null if it names none

    def render(self) -> Iterator[str]:
        yield f"{self.driver}: {self.steps - 1} steps of {self.rows} point(s) in {self.seconds:.2f} s"
        for found in self.variables:
            yield f"  {found.name}  {found.type} {list(found.shape)}"
        yield from written(self.saved, self.written)


def run(
    stub: Path,
    driver: str,
    overrides: tuple[str, ...],
    values: Mapping[str, float],
    parameters: Path | None,
    out: Path | None,
    device: str | None,
    dtype: str,
) -> RunReport:
    """Run a driver, with promoted parameters of a file and other values, and write what it gives."""
    for text in overrides:
        if ":=" not in text:
            raise click.BadParameter(f"{text!r} is not PATH:=VALUE.", param_hint="PATH:=VALUE")
    if out is not None:
        require_format(out)
    read = [stub, *([parameters] if parameters is not None else [])]
    # What is to be written is begun before the run, which may take long, so that what cannot be written is known now.
    with heeded() as heed, contextlib.ExitStack() as drafts, defaults(device, dtype):
        waits_for(f"loading {stub}")
        to_out = None if out is None else drafts.enter_context(draft(out, read))
        built = load_driver(stub, driver, overrides, device=device, dtype=dtype)
        _require_transient(built, driver, stub)
        _set(built.model, values, parameters)
        # The driver itself would write without a look ahead, at the end.
        save_as, built.save_as = built.save_as, ""
        to_save_as = drafts.enter_context(draft(Path(save_as), read)) if save_as else None
        begun, last = 0, built.nsteps - 1

        def on_step(*_: object) -> None:
            nonlocal begun
            heed()
            waits_for(driver, begun, last)
            begun += 1

        start = time.perf_counter()
        failed = run_driver(built, on_step)
        seconds = time.perf_counter() - start
        heed()
        if failed is not None:
            failed.args = (f"step {begun} of {last} of [Drivers/{driver}] in {stub}: {failed}", *failed.args[1:])
            raise failed
        waits_for(driver, last, last)
        result = from_driver(built)
        if to_save_as is not None:
            built.save_result(to_save_as)
        if to_out is not None:
            write_result(to_out, built, result)
    return RunReport(
        input=str(stub),
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


def _set(model: Any, values: Mapping[str, float], parameters: Path | None) -> None:
    """Set promoted parameters of the driver's model; only a compiled one has such."""
    from .._host.hit import AOTIModel

    if isinstance(model, AOTIModel):
        if parameters is not None:
            model.load_parameters(parameters)
        for name, value in values.items():
            model.set_parameter(name, value)
    elif values or parameters is not None:
        raise UnknownNameError(
            "only a compiled model has promoted parameters to set, and this driver's is another one. Override the "
            "input file instead: Models/NAME/OPTION:=VALUE"
        )
