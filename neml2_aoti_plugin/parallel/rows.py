"""`map_rows`: more rows than memory, over all cores or many machines, with a journal to go on from."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors import InputError, InputTypeError
from ..model import Model
from . import chunks
from .executors import Runner, require_executor, runner_for
from .journal import Journal
from .part import OPERATIONS, Done, Part, digest, evaluate_part, evaluate_rows, read_part, require_visible
from .recipes import loaded_model, recipe
from .remote import ModelRef
from .sinks import Fields, FileSink, FunctionSink, Writable, is_used, open_sink, require_apart
from .sources import Rows, Source, open_source
from .tries import Chunk

# How often what is done is written to disk and to the journal, in seconds.
SYNC = 5.0

# Told how many rows are done, and of how many; the latter is None where that is not known.
Progress = Callable[[int, int | None], None]


@dataclass(frozen=True)
class Mapped:
    """What a long run gave.

    Args:
        rows: of the source.
        evaluated: rows that this call evaluated; the others were done before.
        failed: numbers of the rows that failed, int64.
        seconds: that this call took.
    """

    rows: int
    evaluated: int
    failed: np.ndarray
    seconds: float


def map_rows(
    model: Model | str | os.PathLike[str],
    source: object,
    sink: object,
    *,
    executor: object = None,
    workers: int | None = None,
    chunk: int | None = None,
    operation: str = "forward",
    rows: int | None = None,
    resume: bool = True,
    progress: bool | Progress = True,
) -> Mapped:
    """Evaluate rows from files and write what they give to files, on all cores or many machines.

    Rows that fail are NaN in the results, true in `@failed`, and raise nothing. A run that was killed goes on where it
    was when it is called again with the same arguments.

    Args:
        model: a model, or the path of its artifact.
        source: a folder with a file `INPUT.npy` for each input; a Zarr group or its path; a dict from name of the input
            to an array or the path of a `.npy` file; or an iterable of such dicts, each a block of rows. An array is
            `(rows, *sub_batch, *base)`, or without the first axis for a value that all rows have in common.
        sink: a folder for files `OUTPUT.npy`, `@failed.npy` and `@failed_rows.npy`; the path of a Zarr group
            (`*.zarr`); or a function that takes the results as dicts of arrays, in the order of the rows.
        executor: any with `submit` in the way of concurrent.futures, or a `dask.distributed.Client`; its workers must
            see the artifact, the source and the sink under the same paths. Processes of this machine if not given.
        workers: number of these; one per core that this process may use, if not given.
        chunk: rows that a process gets at a time; what suits the model if not given.
        operation: `forward`, or `jacobian` for the compiled derivative blocks as well, as `OUTPUT@INPUT`.
        rows: of a source that is an iterable, how many it gives; needed where the sink is files.
        resume: whether to go on from the journal of an earlier run in the sink; else its results are replaced.
        progress: whether to show a progress bar on a terminal, or a function to tell.

    Returns:
        How many rows there were, and which failed.

    Raises:
        InputError: an argument has no such value, arrays do not fit, the sink cannot be written, or is another run's.
        ArtifactError: the model cannot be loaded, here or by a worker.
        AOTIError: a worker died at each try of a chunk, or the executor has broken.
    """
    begun = time.perf_counter()
    if operation not in OPERATIONS:
        raise InputError(f"operation is {operation!r}, expected one of {', '.join(OPERATIONS)}.")
    _require_rows(rows)
    require_executor(executor, workers)
    loaded = loaded_model(model, {})
    size = chunks.sizes(loaded, chunk).most
    given = open_source(source, loaded, rows)
    target = open_sink(sink)
    if given.blocks is not None and rows is None and not isinstance(target, FunctionSink):
        raise InputError("rows is needed for a source that is an iterable and a sink of files: how many rows it gives.")
    with torch.no_grad():
        tried = evaluate_rows(loaded, operation, given.first, 1)
    fields = {name: (array.dtype.name, array.shape[1:]) for name, array in tried.items()}
    run = _Run(recipe(loaded), operation, given, target, size)
    with ExitStack() as stack:
        tell = stack.enter_context(_shown(progress, given.rows if given.rows >= 0 else None))
        if isinstance(target, FunctionSink):
            runner = stack.enter_context(runner_for(executor, workers, run.model))
            run.go(runner, None, None, tell)
            failed = np.concatenate([*target.numbers, np.empty(0, np.int64)])
        else:
            require_apart(target, given.files, fields)
            if resume and is_used(target, fields) and not os.path.lexists(target.journal):
                raise InputError(
                    f"sink {target.folder}: there are results, but no journal of a run. Give another sink, or "
                    "resume=False to replace them."
                )
            journal = Journal(target.journal, _identity(loaded, operation, given, size, fields), resume=resume)
            stack.callback(journal.close)
            target.prepare(fields, given.rows, size, anew=not journal.resumed)
            if not journal.resumed:
                journal.begin()
            runner = stack.enter_context(runner_for(executor, workers, run.model))
            try:
                run.go(runner, journal, target.results(journal.header), tell)
            finally:
                run.sync(journal, target)
            failed = np.flatnonzero(target.failed())
            target.finish(failed)
    return Mapped(run.rows, run.evaluated, failed, time.perf_counter() - begun)


class _Run:
    """The chunks of a run, made as there is room for them."""

    def __init__(
        self, model: ModelRef, operation: str, source: Source, sink: FileSink | FunctionSink, size: int
    ) -> None:
        self.model, self._operation, self._source, self._sink, self._size = model, operation, source, sink, size
        self.rows = self.evaluated = 0
        self._synced = time.monotonic()

    def go(self, runner: Runner, journal: Journal | None, results: Writable | None, tell: Progress) -> None:
        """Have all rows done that are not done yet."""
        source = self._source
        probe = Part(self.model, self._operation, 0, 1, source.readable, None, results)
        # Before any work: does a worker see the model, the source and the sink?
        runner.run(require_visible, [Chunk(slice(0, 1), lambda _: probe, lambda _: None)])
        if journal is not None and source.blocks is None:
            # And are the rows that are done still the same?
            runner.run(read_part, self._known(journal))
        runner.run(evaluate_part, self._chunks(journal, results, tell))
        if source.rows >= 0 and self.rows != source.rows:
            raise InputError(f"source gave {self.rows} rows, expected {source.rows} (rows=).")

    def sync(self, journal: Journal, sink: FileSink) -> None:
        """Have on disk, and then in the journal, what is done."""
        if journal.is_behind:
            sink.sync()
            journal.flush()
        self._synced = time.monotonic()

    def _known(self, journal: Journal) -> Iterator[Chunk[Done]]:
        for start, stop, rows in self._parts():
            if (start, stop) in journal.done:

                def compare(found: Done, start: int = start, stop: int = stop) -> None:
                    journal.require_same_rows(start, stop, found.digest)

                part = Part(self.model, self._operation, start, stop, self._source.readable, rows, None)
                yield Chunk(slice(start, stop), lambda _, part=part: part, compare)  # type: ignore[misc]

    def _chunks(self, journal: Journal | None, results: Writable | None, tell: Progress) -> Iterator[Chunk[Done]]:
        total = self._source.rows if self._source.rows >= 0 else None
        done = 0
        for start, stop, rows in self._parts():
            self.rows = stop
            if journal is not None and (start, stop) in journal.done:
                if self._source.blocks is not None and rows is not None:
                    journal.require_same_rows(start, stop, digest(rows))
                done += stop - start
                tell(done, total)
                continue

            def finish(found: Done, start: int = start, stop: int = stop) -> None:
                nonlocal done
                done += stop - start
                self.evaluated += stop - start
                if journal is not None and not isinstance(self._sink, FunctionSink):
                    journal.note(start, stop, failed=found.failed, digest=found.digest)
                    if time.monotonic() - self._synced > SYNC:
                        self.sync(journal, self._sink)
                elif isinstance(self._sink, FunctionSink) and found.results is not None:
                    self._sink.take(start, found.results)
                tell(done, total)

            part = Part(self.model, self._operation, start, stop, self._source.readable, rows, results)
            yield Chunk(slice(start, stop), lambda _, part=part: part, finish)  # type: ignore[misc]

    def _parts(self) -> Iterator[tuple[int, int, Rows | None]]:
        source = self._source
        if source.blocks is None:
            for start in range(0, source.rows, self._size):
                stop = min(start + self._size, source.rows)
                yield start, stop, source.part(start, stop)
            return
        start = 0
        for block in source.blocks:
            stop = start + len(next(iter(block.values())))
            if 0 <= source.rows < stop:
                raise InputError(f"source gives more than {source.rows} rows (rows=).")
            yield start, stop, block
            start = stop


def _identity(model: Model, operation: str, source: Source, size: int, fields: Fields) -> dict[str, Any]:
    """What a run is, so that another one is told from it."""
    parameters = hashlib.sha256()
    for name, value in model.named_parameters().items():
        parameters.update(name.encode() + value.detach().contiguous().numpy().tobytes())
    settings = model.solver
    return {
        "model": model.digest,
        "parameters": parameters.hexdigest(),
        "solver": None if settings is None else dataclasses.asdict(settings),
        "operation": operation,
        "rows": source.rows,
        "chunk": None if source.blocks is not None else size,
        "source": source.identity,
        "results": {name: [dtype, list(tail)] for name, (dtype, tail) in sorted(fields.items())},
    }


def _require_rows(rows: object) -> None:
    if rows is None:
        return
    if isinstance(rows, bool) or not isinstance(rows, int):
        raise InputTypeError(f"rows is {rows!r}, expected a whole number.")
    if rows < 1:
        raise InputError(f"rows is {rows}, expected at least 1.")


@contextmanager
def _shown(progress: bool | Progress, total: int | None) -> Iterator[Progress]:
    """A function that shows how many rows are done."""
    if callable(progress):
        yield progress
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    with Bar(*columns, *times, console=console, disable=not (progress and console.is_terminal), transient=True) as bar:
        task = bar.add_task("rows", total=total)
        yield lambda done, _: bar.update(task, completed=done)


__all__ = ["Mapped", "map_rows"]
