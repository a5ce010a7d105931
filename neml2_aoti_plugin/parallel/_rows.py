"""`map_rows`: more rows than memory, here or on many machines, with a journal to go on from."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from ..errors import InputError, InputTypeError
from ..model import Model
from ._executors import Runner, runner_for
from ._journal import Journal
from ._part import (
    OPERATIONS,
    Done,
    Part,
    digest,
    evaluate_part,
    evaluate_rows,
    loaded_model,
    read_part,
    require_visible,
)
from ._sinks import Fields, FolderSink, FunctionSink, Sink, open_sink, require_free
from ._sources import Arrays, Rows, Source, open_source

# How often what is done is written to disk and to the journal, in seconds.
SYNC = 5.0
# Rows of a chunk: so many blocks, which a model that solves something cuts rows into; and of one that solves nothing.
BLOCKS, EXPLICIT = 16, 1 << 16

# Some rows, and what takes what they gave.
Chunk = tuple[Part, Callable[[Done], None]]
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
    chunk: int | None = None,
    operation: str = "forward",
    rows: int | None = None,
    resume: bool = True,
    progress: bool | Progress = True,
) -> Mapped:
    """Evaluate rows from files and write what they give to files, in this process or on many machines.

    Rows that fail are NaN in the results, true in `@failed`, and raise nothing. A run that was killed goes on where it
    was when it is called again with the same arguments.

    Args:
        model: a model, or the path of its artifact or of its stub.
        source: a folder with a file `INPUT.npy` for each input; a Zarr group or its path; a dict from name of the input
            to an array or the path of a `.npy` file; or an iterable of such dicts, each a block of rows. An array is
            `(rows, *sub_batch, *base)`, or without the first axis for a value that all rows have in common.
        sink: a folder for files `OUTPUT.npy`, `@failed.npy` and `@failed_rows.npy`; the path of a Zarr group
            (`*.zarr`); or a function that takes the results as dicts of arrays, in the order of the rows.
        executor: any with `submit` in the way of concurrent.futures, or a `dask.distributed.Client`; its workers must
            see the artifact, the source and the sink under the same paths. This process if not given.
        chunk: rows that are read, evaluated and written at a time; what suits the model if not given.
        operation: `forward`, or `jacobian` for the compiled derivative blocks as well, as `OUTPUT@INPUT`.
        rows: of a source that is an iterable, how many it gives; needed where the sink is files.
        resume: whether to go on from the journal of an earlier run in the sink; else its results are replaced.
        progress: whether to show a progress bar on a terminal, or a function to tell.

    Returns:
        How many rows there were, and which failed.

    Raises:
        InputError: an argument has no such value, arrays do not fit, the sink cannot be written, or is another run's.
        ArtifactError: the model cannot be loaded, here or by a worker.
        AOTIError: the executor has broken.
    """
    begun = time.perf_counter()
    if operation not in OPERATIONS:
        raise InputError(f"operation is {operation!r}, expected one of {', '.join(OPERATIONS)}.")
    for name, value in (("rows", rows), ("chunk", chunk)):
        _require_count(name, value)
    loaded = loaded_model(model)
    with ExitStack() as stack:
        runner = stack.enter_context(runner_for(executor, loaded))
        size = chunk or _chunk_size(loaded)
        given = open_source(source, loaded, rows)
        target = open_sink(sink)
        if given.arrays is None and rows is None and not isinstance(target, FunctionSink):
            raise InputError("rows is needed for an iterable as source and files as sink: how many rows it gives.")
        tried = evaluate_rows(loaded, operation, given.first, 1)
        fields = {name: (array.dtype.name, array.shape[1:]) for name, array in tried.items()}
        journal = None
        if not isinstance(target, FunctionSink):
            require_free(target, given.files, fields, resume=resume)
            journal = Journal(target.journal, _identity(loaded, operation, given, size, fields), resume=resume)
            stack.callback(journal.close)
            target.prepare(fields, given.rows, size, anew=not journal.resumed)
            if not journal.resumed:
                journal.begin()
        tell = stack.enter_context(_shown(progress, given.rows if given.rows >= 0 else None))
        run = _Run(operation, given, target, size, fields, journal, tell)
        run.go(runner)
        failed = target.finish()
    return Mapped(run.rows, run.evaluated, failed, time.perf_counter() - begun)


@dataclass
class _Run:
    """The chunks of a run, made as there is room for them."""

    operation: str
    source: Source
    sink: Sink
    size: int
    fields: Fields
    journal: Journal | None
    tell: Progress
    rows: int = 0
    evaluated: int = 0
    _done: int = 0
    _synced: float = field(default_factory=time.monotonic)

    def go(self, runner: Runner) -> None:
        """Have all rows done that are not done yet."""
        arrays, journal = self.source.arrays, self.journal
        # Before any work: does a worker see the model, the source and the sink?
        rows = arrays if arrays is not None and arrays.are_stored else self.source.first
        header = b"" if journal is None else journal.header
        runner.run(partial(require_visible, header), [(self._part(runner, 0, 1, rows), lambda _: None)])
        if journal is not None and arrays is not None:
            # And are the rows that are done still the same?
            runner.run(read_part, self._known(runner, journal))
        try:
            runner.run(evaluate_part, self._chunks(runner))
        finally:
            self._sync()

    def _part(self, runner: Runner, start: int, stop: int, rows: Arrays | Rows) -> Part:
        # Blocks of rows need not be chunks of a Zarr array, which only one process at a time may write to.
        apart = isinstance(self.sink, FolderSink) or self.source.arrays is not None
        sink = self.sink if apart and not isinstance(self.sink, FunctionSink) else None
        return Part(runner.model, self.operation, start, stop, rows, sink)

    def _known(self, runner: Runner, journal: Journal) -> Iterator[Chunk]:
        for start, stop, rows in self.source.parts(self.size):
            if (start, stop) in journal.done:

                def compare(found: Done, start: int = start, stop: int = stop) -> None:
                    journal.require_same_rows(start, stop, found.digest)

                yield self._part(runner, start, stop, rows), compare

    def _chunks(self, runner: Runner) -> Iterator[Chunk]:
        for start, stop, rows in self.source.parts(self.size):
            self.rows = stop
            if self.journal is None or (start, stop) not in self.journal.done:
                yield self._part(runner, start, stop, rows), partial(self._finish, start, stop)
                continue
            if self.source.arrays is None and not isinstance(rows, Arrays):
                # Of blocks, which come only once; those of arrays were looked at before.
                self.journal.require_same_rows(start, stop, digest(rows))
            self._tell(stop - start)

    def _finish(self, start: int, stop: int, found: Done) -> None:
        if found.results is not None:
            self.sink.write(start, found.results)
        self.evaluated += stop - start
        if self.journal is not None:
            self.journal.note(start, stop, found.digest)
            if time.monotonic() - self._synced > SYNC:
                self._sync()
        self._tell(stop - start)

    def _tell(self, rows: int) -> None:
        self._done += rows
        self.tell(self._done, self.source.rows if self.source.rows >= 0 else None)

    def _sync(self) -> None:
        """Have on disk, and then in the journal, what is done."""
        if self.journal is not None and self.journal.waiting and not isinstance(self.sink, FunctionSink):
            self.sink.sync(self.fields)
            self.journal.flush()
        self._synced = time.monotonic()


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
        "chunk": None if source.arrays is None else size,
        # What its rows are: the digests of the chunks.
        "source": {name: [array.dtype.name, list(array.shape)] for name, array in sorted(source.first.items())},
        "results": {name: [dtype, list(tail)] for name, (dtype, tail) in sorted(fields.items())},
    }


def _chunk_size(model: Model) -> int:
    """Rows of a chunk that suit a model."""
    program = model._caller.program
    return BLOCKS * program.block if program.implicit and program.block else EXPLICIT


def _require_count(name: str, value: object) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputTypeError(f"{name} is {value!r}, expected a whole number, at least 1.")
    if value < 1:
        raise InputError(f"{name} is {value}, expected at least 1.")


@contextmanager
def _shown(progress: bool | Progress, total: int | None) -> Iterator[Progress]:
    """A function that shows how many rows are done."""
    if callable(progress):
        yield progress
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    with Bar(console=console, disable=not (progress and console.is_terminal), transient=True) as bar:
        task = bar.add_task("rows", total=total)
        yield lambda done, _: bar.update(task, completed=done)
