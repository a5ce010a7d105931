"""`map_rows`: more rows than memory, here or on many machines, with a journal to go on from."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pickle
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np

from .._checks import whole_number
from ..errors import AOTIError, InputError, InputTypeError
from ..model import Model
from ..model._operations import operation as operation_named
from ._journal import Journal
from ._sinks import Fields, FolderSink, FunctionSink, Sink, open_sink, require_free, require_prepared
from ._sources import Arrays, Rows, Source, open_source
from ._tasks import OPERATIONS, Result, Task, digest, evaluate, evaluate_rows, loaded_model, read

# How often what is done is written to disk and to the journal, in seconds.
SYNC = 5.0
# Rows of a chunk, of a model that solves something, which are blocks for some dozen threads; and of one that does not.
IMPLICIT, EXPLICIT = 1 << 14, 1 << 16
# Tasks that are sent ahead for each worker, so that none waits for the caller; and workers, where an executor does not
# say how many it has.
AHEAD, UNKNOWN = 2, 64

# Called with how many rows are done, and of how many; the latter is None where that is not known.
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
        progress: whether to show a progress bar on a terminal, or a function to call with the rows done and all rows.

    Returns:
        How many rows there were, and which failed.

    Raises:
        InputError: an argument has no such value, arrays do not fit, the sink cannot be written, or is another run's.
        ArtifactError: the model cannot be loaded, here or by a worker.
        AOTIError: the executor has broken.
    """
    begun = time.perf_counter()
    operation_named(operation, OPERATIONS)
    rows, chunk = (None if n is None else whole_number(n, name, 1) for n, name in ((rows, "rows"), (chunk, "chunk")))
    loaded = loaded_model(model)
    with ExitStack() as stack:
        runner = stack.enter_context(_runner(executor, loaded))
        size = chunk or (EXPLICIT if loaded.solver is None else IMPLICIT)
        given = open_source(source, loaded, rows)
        target = open_sink(sink)
        first = evaluate_rows(loaded, operation, given.first, 1)
        fields = {name: (array.dtype.name, array.shape[1:]) for name, array in first.items()}
        journal = None
        if not isinstance(target, FunctionSink):
            if given.rows is None:
                raise InputError("rows is needed for an iterable as source and files as sink: how many rows it gives.")
            require_free(target, given.files, fields, resume=resume)
            journal = Journal(target.journal, _identity(loaded, operation, given, size, fields), resume=resume)
            stack.callback(journal.close)
            if journal.resumed:
                require_prepared(target, fields, given.rows)
            else:
                target.prepare(fields, given.rows, size)
                journal.begin()
        shown = stack.enter_context(_shown(progress, given.rows))
        run = _Run(runner, operation, given, target, size, fields, journal, shown)
        run.go()
        failed = target.finish()
    return Mapped(run.rows, run.evaluated, failed, time.perf_counter() - begun)


# -- the run -----------------------------------------------------------------------------------------------------------


@dataclass
class _Run:
    """The chunks of a run, made into tasks as there is room for them."""

    runner: _Runner
    operation: str
    source: Source
    sink: Sink
    size: int
    fields: Fields
    journal: Journal | None
    progress: Progress
    # Rows of the source so far; those evaluated here; those done, here or before.
    rows: int = 0
    evaluated: int = 0
    done: int = 0
    synced: float = field(default_factory=time.monotonic)

    def go(self) -> None:
        """Have all rows done that are not done yet."""
        if self.journal is not None and self.journal.done and self.source.arrays is not None:
            # Before any row is evaluated: are the rows that are done still the same?
            self.runner.run(read, self._known(self.journal))
        try:
            self.runner.run(evaluate, self._coming())
        finally:
            self._sync()

    def _known(self, journal: Journal) -> Iterator[_Chunk[str]]:
        for start, stop, rows in self.source.chunks(self.size):
            if (start, stop) in journal.done:
                yield self._task(start, stop, rows), partial(journal.require_same_rows, start, stop)

    def _coming(self) -> Iterator[_Chunk[Result]]:
        for start, stop, rows in self.source.chunks(self.size):
            self.rows = stop
            if self.journal is None or (start, stop) not in self.journal.done:
                yield self._task(start, stop, rows), partial(self._finish, start, stop)
                continue
            if self.source.arrays is None and not isinstance(rows, Arrays):
                # Blocks come only once; the rows of arrays were looked at before.
                self.journal.require_same_rows(start, stop, digest(rows))
            self._report(stop - start)

    def _task(self, start: int, stop: int, rows: Arrays | Rows) -> Task:
        sink = None if isinstance(self.sink, FunctionSink) else self.sink
        if self.source.arrays is None and not isinstance(sink, FolderSink):
            # Blocks of rows need not be chunks of a Zarr array, which only one process at a time may write to.
            sink = None
        header = b"" if self.journal is None else self.journal.header
        return Task(self.runner.model, self.operation, start, stop, rows, sink, header)

    def _finish(self, start: int, stop: int, found: Result) -> None:
        if found.results is not None:
            self.sink.write(start, found.results)
        self.evaluated += stop - start
        if self.journal is not None:
            self.journal.note(start, stop, found.digest)
            if time.monotonic() - self.synced > SYNC:
                self._sync()
        self._report(stop - start)

    def _report(self, rows: int) -> None:
        self.done += rows
        self.progress(self.done, self.source.rows)

    def _sync(self) -> None:
        """Have on disk, and then in the journal, what is done."""
        if self.journal is not None and self.journal.waiting and not isinstance(self.sink, FunctionSink):
            self.sink.sync(self.fields)
            self.journal.flush()
        self.synced = time.monotonic()


def _identity(model: Model, operation: str, source: Source, size: int, fields: Fields) -> dict[str, Any]:
    """What distinguishes a run from another one; its rows are known by the digests of the chunks."""
    parameters = hashlib.sha256()
    for name, value in model.named_parameters().items():
        parameters.update(f"{name} {list(value.shape)} ".encode() + value.detach().contiguous().numpy().tobytes())
    settings = model.solver
    return {
        "model": model.digest,
        "parameters": parameters.hexdigest(),
        "solver": None if settings is None else dataclasses.asdict(settings),
        "operation": operation,
        "rows": source.rows,
        "chunk": None if source.arrays is None else size,
        "source": {name: [array.dtype.name, list(array.shape)] for name, array in sorted(source.first.items())},
        "results": {name: [dtype, list(tail)] for name, (dtype, tail) in sorted(fields.items())},
    }


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


# -- executors ---------------------------------------------------------------------------------------------------------

# What a task gives; and a task with what takes that.
_Given = TypeVar("_Given")
_Chunk = tuple[Task, Callable[[_Given], None]]


class _Here:
    """An executor that is the calling thread."""

    def submit(self, function: Callable[[Task], _Given], task: Task) -> Future[_Given]:
        found: Future[_Given] = Future()
        found.set_result(function(task))
        return found


@dataclass(frozen=True)
class _Runner:
    """An executor, how many tasks it is given at a time, and the model, pickled for other processes."""

    executor: Any
    most: int
    model: Model | bytes

    def run(self, function: Callable[[Task], _Given], chunks: Iterable[_Chunk[_Given]]) -> None:
        """Have all chunks done, taken one after the other as there is room; the first error ends it.

        When it has ended, nothing of these chunks is going on. Whether a task is attempted again is up to the executor.
        """
        running: dict[Future[_Given], Callable[[_Given], None]] = {}
        coming = iter(chunks)
        try:
            while True:
                while len(running) < self.most and (chunk := next(coming, None)) is not None:
                    running[self.executor.submit(function, chunk[0])] = chunk[1]
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    running.pop(future)(future.result())
        except BrokenExecutor as error:
            raise AOTIError(
                f"the executor has lost a worker and takes no more work ({error}). What was done is kept: call "
                "map_rows again with a new executor, and it goes on from the journal."
            ) from error
        finally:
            for future in running:
                future.cancel()
            # What has begun still writes to the sink, which is the next run's afterwards.
            wait(running)


@contextmanager
def _runner(executor: object, model: Model) -> Iterator[_Runner]:
    """What runs the tasks: this thread, an executor of the user's, or Dask's client."""
    if executor is None:
        yield _Runner(_Here(), 1, model)
        return
    if not callable(getattr(executor, "submit", None)):
        raise InputTypeError(
            f"executor is a {type(executor).__name__}, expected one with submit() in the way of concurrent.futures, or "
            "a dask.distributed.Client."
        )
    recipe = pickle.dumps(model)
    if type(executor).__module__.partition(".")[0] == "distributed" and hasattr(executor, "get_executor"):
        from .dask import cluster

        with cluster(executor, recipe) as (found, count):
            yield _Runner(found, AHEAD * count, recipe)
        return
    yield _Runner(executor, AHEAD * _workers_of(executor), recipe)


def _workers_of(executor: object) -> int:
    """How many workers an executor has, as far as it says."""
    for name in ("max_workers", "num_workers"):
        found = getattr(executor, name, None)
        if isinstance(found, int) and found > 0:
            return found
    # Those of the standard library do not say it; they are for this machine.
    own = isinstance(executor, (ThreadPoolExecutor, ProcessPoolExecutor))
    return os.cpu_count() or 1 if own else UNKNOWN
