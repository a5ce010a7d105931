"""A leaf made ready to run: its segments with their graphs, evaluated over rows."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from .. import _log as log
from .._artifact.package import Package
from .._artifact.schema import ExplicitInfo, ImplicitInfo, Metadata, Variable
from .._graphs.graph import Graph, NativeGraph, PinnedGraph
from .._graphs.threads import cut, one_thread, run_all
from .._solve.outcome import RowStatistics, Solved, blank, first_failure
from .._solve.tables import VECTOR
from ..errors import InputError
from ..settings import NewtonSettings
from . import substepping
from .explicit import ExplicitSegment
from .implicit import MAX_ROWS, ImplicitSegment
from .values import Columns, Packing, Seed, Tangents, Values, dense, put, select

# A block's vectors and matrices are to stay in a core's cache while Newton's method goes over them again and again; yet
# it must have rows enough that the work in Python, which hardly depends on their number, is a small part. Its size does
# not depend on the number of threads.

# The environment variable that says how many rows, in place of what is found here.
BLOCK_ROWS = "NEML2_AOTI_PLUGIN_BLOCK_ROWS"

# What the matrices and vectors of a block may take, and how many rows it has in any case: whole vectors.
BYTES = 1 << 20
MIN_ROWS = 256
# Blocks of fewer rows are not worth another thread.
LEAST_ROWS = 128


def block_rows(segments: Iterable[ImplicitInfo]) -> int:
    """Rows to solve at a time."""
    given = os.environ.get(BLOCK_ROWS, "").strip()
    if given:
        if not given.isdecimal() or int(given) == 0:
            raise InputError(
                f"the environment variable {BLOCK_ROWS} is {given!r}, expected a number of rows, at least 1."
            )
        return int(given)
    entries = 1
    for segment in segments:
        u = sum(v.size for v in segment.unknown_variables)
        g = sum(v.size for group in segment.givens for v in group.variables)
        entries = max(entries, u * u + 4 * u + g)
    return min(max(BYTES // (8 * entries), MIN_ROWS), MAX_ROWS) // VECTOR * VECTOR


@dataclass(frozen=True)
class SegmentOutcome:
    """One segment's solve over some rows."""

    segment: int
    unknowns: Packing
    statistics: RowStatistics
    tried: Solved


@dataclass
class Report:
    """How the implicit segments fared."""

    rows: int
    # The outcomes of some rows, with the place of these in the batch; None for all of it.
    parts: list[tuple[Tensor | slice | None, list[SegmentOutcome]]] = field(default_factory=list)

    @property
    def all_converged(self) -> bool:
        """Whether every segment converged for all rows."""
        return all(outcome.statistics.all_converged for _, outcomes in self.parts for outcome in outcomes)

    def statistics(self) -> tuple[RowStatistics, Tensor]:
        """How each row fared over all segments, and the index of the segment that failed first, else -1, `(rows,)`."""
        place, outcomes = self.parts[0]
        if place is None and len(outcomes) == 1:
            only = outcomes[0]
            return only.statistics, torch.where(only.statistics.converged, -1, only.segment)
        whole = blank(self.rows, outcomes[0].statistics.norm)
        segment = torch.full_like(whole.iterations, -1)
        for place, outcomes in self.parts:
            found, index = first_failure([outcome.statistics for outcome in outcomes])
            where = slice(None) if place is None else place
            whole.record[where], whole.norms[where] = found.record, found.norms
            indices = torch.tensor([o.segment for o in outcomes] + [-1], device=index.device)
            segment[where] = indices[index]
        return whole, segment

    def tried(self) -> Tensor:
        """Rows that converged without substepping, bool, `(rows,)`."""

        def all_of(outcomes: list[SegmentOutcome]) -> Tensor:
            return torch.stack([outcome.tried.statistics.converged for outcome in outcomes]).all(0)

        return self._over(all_of)

    def unknowns(self) -> dict[str, Tensor]:
        """Last iterate of each unknown, without substepping, `(rows, ...)`."""

        def one(name: str, outcomes: list[SegmentOutcome]) -> Tensor:
            found: dict[str, Tensor] = {}
            for outcome in outcomes:
                found.update(outcome.unknowns.unpack(outcome.tried.unknowns))
            return found[name]

        names = dict.fromkeys(name for _, outcomes in self.parts for o in outcomes for name in o.unknowns.names)
        return {name: self._over(partial(one, name)) for name in names}

    def _over(self, of: Callable[[list[SegmentOutcome]], Tensor]) -> Tensor:
        """Put what a part says in its place."""
        whole: Tensor | None = None
        for place, outcomes in self.parts:
            value = of(outcomes)
            if place is None:
                return value
            whole = value.new_empty((self.rows, *value.shape[1:])) if whole is None else whole
            whole[place] = value
        assert whole is not None, "a report has a part"
        return whole


@dataclass
class Evaluation:
    """What an evaluation gives."""

    # The variables that were asked for, `(rows, ...)`.
    values: dict[str, Tensor]
    # Their derivatives by each seed, `(rows, entries, m)`; a seed that does not reach them is absent.
    tangents: dict[str, dict[Seed, Tensor]]
    # How the solves fared; None where the model has none.
    report: Report | None


class Program:
    """The segments of a leaf with their graphs."""

    def __init__(
        self, metadata: Metadata, packages: Mapping[str, Package], device: torch.device, lockstep: bool
    ) -> None:
        self.metadata = metadata
        self.lockstep = lockstep
        self.device = device
        self._packages = packages
        self._graphs: dict[str, Graph] = {}
        self.batch_axes: tuple[int | None, ...] = (None,)
        self.dtype = torch.float64
        self._trace_facts()
        self.segments: list[ExplicitSegment | ImplicitSegment] = []
        implicit = [spec for spec in metadata.segments if not isinstance(spec, ExplicitInfo)]
        given = [given for spec in implicit for given in spec.roles]
        known = {variable.name: variable for variable in (*given, *metadata.outputs)}
        for spec in metadata.segments:
            if isinstance(spec, ExplicitInfo):
                self.segments.append(ExplicitSegment(spec, self.graph, self._takes_rows_of_parameters(spec), known))
            else:
                self.segments.append(ImplicitSegment(spec, self.graph, device, self.dtype, lockstep))
        self._common = {name for segment in self.segments for name in segment.common_parameters}
        self._base_ranks = {p.name: len(p.base_shape) for p in metadata.parameters}
        self.implicit = [s for s in self.segments if isinstance(s, ImplicitSegment)]
        unknowns = {v.name for s in self.implicit for v in s.spec.unknown_variables}
        # Unknowns whose initial guess a caller may give, although they are no inputs.
        self.initial_guesses = frozenset(unknowns - {v.name for v in metadata.inputs})
        # Rows to solve at a time; None for all of them.
        blockwise = self.implicit and not lockstep and device.type == "cpu"
        self.block = block_rows(segment.spec for segment in self.implicit) if blockwise else None

    def graph(self, file: str) -> Graph:
        """The graph of a file of the leaf; one object however often it is named."""
        if file not in self._graphs:
            package = self._packages[file]
            if self.batch_axes != (None,):
                self._graphs[file] = PinnedGraph(package, self.device, self.batch_axes)
                log.emit("model", "info", f"{file}: run by torch's runner, since {self._graphs[file].obstacle()}")
            else:
                self._graphs[file] = (Graph if self.lockstep else NativeGraph)(package, self.device)
        return self._graphs[file]

    def by_runner(self) -> dict[str, str]:
        """The graphs that torch's runner runs for what they are, by name of the package, with the reason.

        Nothing is loaded. Graphs of linear solves are left out: torch's runner always runs them, where they are called.
        """
        specs = [segment.spec for segment in self.implicit]
        parts = [part for spec in specs for part in (spec.step, spec.sensitivity, spec.parameter_sensitivity)]
        solves = {getattr(part, name, None) for part in parts for name in ("solve", "solver")}
        found = {file: graph.obstacle() for file, graph in self._graphs.items() if file not in solves}
        return {file: reason for file, reason in found.items() if reason}

    def _trace_facts(self) -> None:
        """Learn the traced batch axes and the true dtype from the first graph: the metadata does not tell them."""
        first = self.metadata.segments[0]
        if isinstance(first, ExplicitInfo):
            known: dict[str, Variable] = {v.name: v for v in self.metadata.inputs}
            ranks = {i: len(known[name].natural_shape) for i, name in enumerate(first.taken) if name in known}
            file = first.value
        else:
            group = first.unknowns[0]
            ranks = {0: 1 if group.structure == "dense" else len(group.sub_batch_shape) + 1}
            file = first.residual
        signature = self._packages[file].signature
        if signature is None or not ranks or max(ranks) >= len(signature.arguments):
            return
        place, rank = next(iter(ranks.items()))
        argument = signature.arguments[place]
        self.dtype = argument.dtype
        self.batch_axes = argument.extents[: len(argument.extents) - rank]

    def _takes_rows_of_parameters(self, segment: ExplicitInfo) -> bool:
        """Whether an explicit graph takes promoted parameters with the batch axes, or as stored."""
        signature = self.graph(segment.value).signature if segment.parameters else None
        if signature is None or len(signature.arguments) != len(segment.taken):
            return True
        base_ranks = {p.name: len(p.base_shape) for p in self.metadata.parameters}
        return all(
            len(argument.extents) == base_ranks[name] + len(self.batch_axes)
            for argument, name in zip(signature.arguments, segment.taken, strict=True)
            if name in segment.parameters
        )

    def evaluate(
        self,
        state: Mapping[str, Tensor],
        parameters: Mapping[str, Tensor],
        rows: int,
        wanted: Iterable[str],
        settings: NewtonSettings | None = None,
        tangents: Mapping[str, Columns] | None = None,
        by: Iterable[str] = (),
    ) -> Evaluation:
        """Evaluate the segments for all rows.

        `state` has the inputs by authored name, `(rows, *sub_batch, *base)`; `tangents` their derivatives, if these
        are wanted; `by` names parameters to differentiate by; `settings` stand in place of the artifact's.
        """
        values = Values(parameters, self._base_ranks)
        names, seeds = list(wanted), frozenset(by)
        parts = list(self.parts(values, rows))
        if len(parts) == 1 and parts[0][0] is None:
            # An operator of few rows stays in this thread in any case.
            with one_thread() if self.block is not None and rows >= LEAST_ROWS else nullcontext():
                return self._run(dict(state), values, rows, names, settings, tangents, seeds)
        room = _Room(rows, len(parts))

        def task(number: int, index: Tensor | slice, fixed: dict[str, Tensor]) -> None:
            part_state = {name: value[index] for name, value in state.items()}
            part_tangents = None if tangents is None else select(tangents, index)
            count = next(iter(part_state.values())).shape[0] if part_state else rows
            part = self._run(part_state, values.take(index, fixed), count, names, settings, part_tangents, seeds)
            room.write(number, index, part)

        tasks = [
            partial(task, number, index, fixed) for number, (index, fixed) in enumerate(parts) if index is not None
        ]
        if self.block is not None and rows >= LEAST_ROWS * len(tasks):
            run_all(tasks)
        else:
            for one in tasks:
                one()
        return room.whole()

    def parts(self, values: Values, rows: int) -> Iterator[tuple[Tensor | slice | None, dict[str, Tensor]]]:
        """Cut the rows into those that share the parameters which graphs take only once, and into blocks."""
        varying = values.per_row(self._common)
        if not varying or rows == 0:
            fixed = {name: values[name].new_empty(values[name].shape[1:]) for name in varying}
            yield from ((part, fixed) for part in self._blocks(rows, whole=not varying))
            return
        stacked = torch.cat([values[name].reshape(rows, -1).to(torch.float64) for name in varying], -1)
        kinds, kind = torch.unique(stacked, dim=0, return_inverse=True)
        for k in range(kinds.shape[0]):
            members = (kind == k).nonzero().squeeze(-1)
            fixed = {name: values[name][members[0]] for name in varying}
            for part in self._blocks(len(members), whole=False):
                yield members[part], fixed

    def _blocks(self, rows: int, *, whole: bool) -> Iterator[slice | None]:
        parts = [slice(0, rows)] if self.block is None else list(cut(rows, self.block))
        yield from (parts if len(parts) > 1 or not whole else [None])

    def _run(
        self,
        state: dict[str, Tensor],
        values: Values,
        rows: int,
        wanted: list[str],
        settings: NewtonSettings | None,
        tangents: Mapping[str, Columns] | None,
        by: frozenset[str],
    ) -> Evaluation:
        carried: Tangents | None = None if tangents is None else dict(tangents)
        given = self.initial_guesses.intersection(state)
        outcomes: list[SegmentOutcome] = []
        for i, segment in enumerate(self.segments):
            if isinstance(segment, ExplicitSegment):
                if carried is None:
                    segment.run(state, values, rows)
                else:
                    segment.run_with_tangents(state, values, rows, carried, by)
                continue
            used = settings or segment.spec.newton
            if segment.spec.max_substepping_level > 0:
                statistics, tried = substepping.solve(segment, state, values, rows, used, given, carried, by)
            else:
                solved = segment.solve(state, values, rows, used, given, carried)
                statistics, tried = solved.statistics, Solved(solved.unknowns, solved.statistics)
                if carried is not None:
                    carried.update(segment.carry(solved, values, carried, by))
            outcomes.append(SegmentOutcome(i, segment.unknowns, statistics, tried))
        found: dict[str, dict[Seed, Tensor]] = {}
        if carried is not None:
            found = {name: dense(carried.get(name, {}), state[name]) for name in wanted}
        report = Report(rows, [(None, outcomes)]) if outcomes else None
        return Evaluation({name: state[name] for name in wanted}, found, report)


class _Room:
    """Where blocks of rows, evaluated in any order by any thread, put their results."""

    def __init__(self, rows: int, blocks: int) -> None:
        self._rows = rows
        self._lock = threading.Lock()
        self._values: dict[str, Tensor] = {}
        self._tangents: dict[str, dict[Seed, Tensor]] = {}
        self._outcomes: list[tuple[Tensor | slice | None, list[SegmentOutcome]] | None] = [None] * blocks

    def write(self, number: int, index: Tensor | slice, part: Evaluation) -> None:
        """Put the results of a block in their places."""
        with self._lock:
            for name, value in part.values.items():
                if name not in self._values:
                    self._values[name] = value.new_empty((self._rows, *value.shape[1:]))
            for name, columns in part.tangents.items():
                into = self._tangents.setdefault(name, {})
                for seed, column in columns.items():
                    if seed not in into:
                        into[seed] = column.new_zeros((self._rows, *column.shape[1:]))
        for name, value in part.values.items():
            put(self._values[name], index, value)
        for name, columns in part.tangents.items():
            for seed, column in columns.items():
                put(self._tangents[name][seed], index, column)
        if part.report is not None:
            ((_, outcomes),) = part.report.parts
            self._outcomes[number] = index, outcomes

    def whole(self) -> Evaluation:
        """The results of all blocks."""
        # A model without implicit segments has no outcomes.
        outcomes = [one for one in self._outcomes if one is not None]
        return Evaluation(self._values, self._tangents, Report(self._rows, outcomes) if outcomes else None)
