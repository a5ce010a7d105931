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
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import numpy as np

from .._checks import whole_number
from ..errors import AOTIError, InputError, InputTypeError
from ..model import Model
from ..model._operations import operation as operation_named
from ._journal import Journal
from ._sinks import Fields, FunctionSink, Sink, ZarrSink, open_sink, require_free, require_prepared
from ._sources import Chunk, Rows, Source, open_source
from ._tasks import OPERATIONS, Task, digest, evaluate, evaluate_rows, loaded_model, read

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
            require_free(target, given.files(), fields, resume=resume)
            identity = _identity(loaded, operation, given, size, fields)
            journal = Journal(target.journal, identity, partial(target.sync, fields), resume=resume)
            stack.callback(journal.close)
            if journal.resumed:
                require_prepared(target, fields, given.rows)
            else:
                target.prepare(fields, given.rows, size)
                journal.begin()
        run = _Run(runner, operation, given, size, target, journal, stack.enter_context(_shown(progress, given.rows)))
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
    size: int
    sink: Sink
    journal: Journal | None
    progress: Progress
    # Rows of the source so far; those evaluated here; those done, here or before.
    rows: int = 0
    evaluated: int = 0
    done: int = 0

    def go(self) -> None:
        """Have all rows done that are not done yet."""
        if self.journal is not None and self.journal.done and self.source.arrays is not None:
            # Before any row is evaluated: are the rows that are done still the same?
            self.runner.run(read, self._known(self.journal))
        try:
            self.runner.run(evaluate, self._coming())
        finally:
            if self.journal is not None:
                self.journal.flush()

    def _known(self, journal: Journal) -> Iterator[_Coming[str]]:
        for chunk in self.source.chunks(self.size):
            if journal.has(chunk):
                yield self._task(chunk), partial(journal.require_same, chunk)

    def _coming(self) -> Iterator[_Coming[tuple[str, Rows | None]]]:
        for chunk in self.source.chunks(self.size):
            self.rows = chunk.stop
            if self.journal is None or not self.journal.has(chunk):
                yield self._task(chunk), partial(self._take, chunk)
                continue
            if self.source.arrays is None:
                # Blocks come only once; the rows of arrays were looked at before.
                self.journal.require_same(chunk, digest(chunk.read()))
            self._report(chunk)

    def _task(self, chunk: Chunk) -> Task:
        sink = None if isinstance(self.sink, FunctionSink) else self.sink
        if self.source.arrays is None and isinstance(sink, ZarrSink):
            # Blocks of rows need not be chunks of a Zarr array, which only one process at a time may write to.
            sink = None
        header = b"" if self.journal is None else self.journal.header
        return Task(self.runner.model, self.operation, chunk, sink, header)

    def _take(self, chunk: Chunk, found: tuple[str, Rows | None]) -> None:
        known, results = found
        if results is not None:
            self.sink.write(chunk.start, results)
        self.evaluated += chunk.stop - chunk.start
        if self.journal is not None:
            self.journal.note(chunk, known)
        self._report(chunk)

    def _report(self, chunk: Chunk) -> None:
        self.done += chunk.stop - chunk.start
        self.progress(self.done, self.source.rows)


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
_Found = TypeVar("_Found")
_Coming = tuple[Task, Callable[[_Found], None]]


@dataclass(frozen=True)
class _Runner:
    """An executor, or none where the calling thread does it all, and the model, pickled for other processes."""

    model: Model | bytes
    executor: Any = None
    workers: int = 1

    def run(self, function: Callable[[Task], _Found], coming: Iterable[_Coming[_Found]]) -> None:
        """Have all tasks done, as there is room; the first error ends it, and then none is going on any more."""
        if self.executor is None:
            for task, take in coming:
                take(function(task))
            return
        running: dict[Future[_Found], Callable[[_Found], None]] = {}
        tasks = iter(coming)
        try:
            while True:
                for task, take in islice(tasks, AHEAD * self.workers - len(running)):
                    running[self.executor.submit(function, task)] = take
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
        yield _Runner(model)
        return
    if not callable(getattr(executor, "submit", None)):
        raise InputTypeError(
            f"executor is a {type(executor).__name__}, expected one with submit() in the way of concurrent.futures, or "
            "a dask.distributed.Client."
        )
    recipe = pickle.dumps(model)
    if type(executor).__module__.partition(".")[0] == "distributed" and hasattr(executor, "get_executor"):
        from .dask import cluster

        with cluster(executor, recipe) as (found, workers):
            yield _Runner(recipe, found, workers)
        return
    # Those of the standard library do not say how many workers they have; they are for this machine.
    own = isinstance(executor, (ThreadPoolExecutor, ProcessPoolExecutor))
    said = (getattr(executor, name, None) for name in ("max_workers", "num_workers"))
    known = (count for count in said if isinstance(count, int) and count > 0)
    yield _Runner(recipe, executor, next(known, (os.cpu_count() or 1) if own else UNKNOWN))
