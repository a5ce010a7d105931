"""One call of a model, spread over processes: arguments go out chunk by chunk, and results come back to their rows."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import AOTIError
from ..model import Model
from ..model.failure import capturing, error_for
from ..settings import NewtonSettings
from ..solve.outcome import Outcome, RowStatistics
from . import exchange
from .exchange import Arrays, Entry
from .flat import Arguments, Results
from .folder import RowsFolder, no_room
from .remote import FARED, ModelRef, Order, Reply, evaluate
from .tries import Chunk
from .workers import Workers


class SpreadCall:
    """One call.

    Args:
        model: in this process.
        ref: the same for the workers.
        operation: a name of `remote.OPERATIONS`.
        given: its arguments.
        options: its keyword arguments.
        parts: the rows of each chunk.
    """

    def __init__(
        self,
        model: Model,
        ref: ModelRef,
        operation: str,
        given: Arguments,
        options: dict[str, Any],
        parts: list[slice],
    ) -> None:
        self._model, self._ref, self._operation = model, ref, operation
        self._given, self._options, self._parts = given, options, parts
        self._settings: NewtonSettings | None = model._caller.settings
        self._results = Results(given.call.rows, len(parts))
        # How rows fared, of chunks with rows that have failed, by the index of the chunk.
        self._failed: dict[int, dict[str, Tensor]] = {}
        # Gradients by parameters that the rows have in common are sums over them.
        self._summed = {key[1] for key in given.common if key[0] == "parameter"}
        # Files of chunks that are on their way.
        self._taken: set[Path] = set()

    def run(self, workers: Workers) -> Arrays:
        """Have it done.

        Args:
            workers: the processes.

        Returns:
            The results by what they are, with the caller's batch shape.

        Raises:
            ConvergenceError: rows did not converge.
            AOTIError: a worker died at each try, or there is no room for the rows on their way.
        """
        folder = workers.rows_folder
        try:
            workers.run(evaluate, (self._chunk(index, rows, folder) for index, rows in enumerate(self._parts)))
        except AOTIError:
            # Among them an artifact that is not there, which is an OSError as well.
            raise
        except OSError as error:
            raise no_room(folder.path, error) from error
        finally:
            # Of a call that has failed. What a process may still write to is not written over.
            for left in self._taken:
                with suppress(OSError):
                    left.unlink(missing_ok=True)
        if self._failed:
            self._raise()
        return {**self._results.shaped(self._given.call.batch), **self._results.sums()}

    def _chunk(self, index: int, rows: slice, folder: RowsFolder) -> Chunk[Reply]:
        arguments = results = Path()
        written: tuple[Entry, ...] | None = None

        def take() -> Path:
            file = folder.take()
            self._taken.add(file)
            return file

        def order(tries: int) -> Order:
            nonlocal arguments, results, written
            if written is None:
                arguments = take()
                written = exchange.write(arguments, self._given.of(rows))
            # Another one for each try: a process that is about to be killed may still write to the earlier one.
            results = take()
            return Order(self._ref, self._operation, self._settings, arguments, written, self._options, results)

        def finish(reply: Reply) -> None:
            self._take(reply, results, index, rows)
            for file in (arguments, results):
                self._taken.discard(file)
                folder.give_back(file)

        return Chunk(rows, order, finish)

    def _take(self, reply: Reply, file: Path, index: int, rows: slice) -> None:
        if reply.failed:
            fared = exchange.mapped(file, reply.entries)
            self._failed[index] = {name: fared["fared", name].clone() for name in FARED}
            return

        def place(entry: Entry) -> Tensor:
            if entry.key[0] == "gradient" and entry.key[1] in self._summed:
                return self._results.place_sum(entry, index)
            return self._results.place(entry, reply, rows)

        exchange.read(file, reply.entries, place)

    def _raise(self) -> None:
        """One error for the whole batch."""
        call, caller = self._given.call, self._model._caller
        if capturing():
            # Its error carries the iterates of all rows, also of those that converge.
            with torch.no_grad():
                self._evaluate_here()
        first = next(iter(self._failed.values()))
        record = torch.zeros((call.rows, 2), dtype=torch.int64)
        record[:, 0] = int(Outcome.CONVERGED)
        norms = torch.zeros((call.rows, 2), dtype=first["norms"].dtype)
        segments = torch.full((call.rows,), -1, dtype=torch.int64)
        for index, fared in self._failed.items():
            rows = self._parts[index]
            record[rows], norms[rows], segments[rows] = (fared[name] for name in FARED)
        statistics = RowStatistics(record, norms, False)
        raise error_for(
            statistics,
            segments,
            call.batch,
            caller.program,
            self._settings,
            caller.given(call),
        )

    def _evaluate_here(self) -> None:
        """Evaluate the call in this process, which raises for rows that fail."""
        call, caller = self._given.call, self._model._caller
        caller.require_convergence(caller.evaluate(call), call)
