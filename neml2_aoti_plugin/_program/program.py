"""A leaf made ready to run: its segments with their graphs, evaluated over rows."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import _log as log
from .._artifact.package import Package
from .._artifact.schema import ExplicitInfo, ImplicitInfo, Metadata
from .._graphs.graph import Graph, NativeGraph, PinnedGraph
from .._graphs.threads import cut, one_thread, run_all
from .._solve.outcome import RowStatistics, Solved, first_failure
from .._solve.tables import VECTOR
from ..errors import InputError
from ..settings import NewtonSettings
from . import substepping
from .explicit import ExplicitSegment
from .implicit import MAX_ROWS, ImplicitSegment
from .values import Columns, Packing, Seed, State, Tangents, Values, dense, select

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


def _traced(metadata: Metadata, packages: Mapping[str, Package]) -> tuple[torch.dtype, tuple[int | None, ...]]:
    """The true dtype and the traced batch axes, from the first graph: the metadata does not tell them."""
    first = metadata.segments[0]
    if isinstance(first, ExplicitInfo):
        known = {v.name: v for v in metadata.inputs}
        ranks = {i: len(known[name].natural_shape) for i, name in enumerate(first.taken) if name in known}
        file = first.value
    else:
        group = first.unknowns[0]
        ranks = {0: 1 if group.structure == "dense" else len(group.sub_batch_shape) + 1}
        file = first.residual
    signature = packages[file].signature
    if signature is None or not ranks or max(ranks) >= len(signature.arguments):
        return torch.float64, (None,)
    place, rank = next(iter(ranks.items()))
    argument = signature.arguments[place]
    return argument.dtype, argument.extents[: len(argument.extents) - rank]


def _files_to_run(metadata: Metadata) -> frozenset[str]:
    """The packages of the graphs that are called; what contracts cotangents in a graph is not."""
    return metadata.files - {spec.param_vjp_package for spec in metadata.segments if isinstance(spec, ExplicitInfo)}


@dataclass(frozen=True)
class SegmentOutcome:
    """One segment's solve over some rows: how they fared, and what they came to before any increment was cut."""

    segment: int
    unknowns: Packing
    statistics: RowStatistics
    tried: Solved


@dataclass(frozen=True)
class SolveReport:
    """How the implicit segments fared."""

    rows: int
    # The outcomes of some rows, with the place of these in the batch; None for all of it.
    parts: list[tuple[Tensor | slice | None, list[SegmentOutcome]]]

    @property
    def all_converged(self) -> bool:
        """Whether every segment converged for all rows."""
        return all(outcome.statistics.all_converged for _, outcomes in self.parts for outcome in outcomes)

    def statistics(self) -> tuple[RowStatistics, Tensor]:
        """How each row fared over all segments, and the index of the segment that failed first, else -1, `(rows,)`."""
        place, outcomes = self.parts[0]
        if place is None and len(outcomes) == 1:
            only = outcomes[0].statistics
            return only, torch.where(only.converged, -1, outcomes[0].segment)
        record, norms, segment = self._joined(_first_failure)
        return RowStatistics(record, norms, self.all_converged), segment

    def tried(self) -> Tensor:
        """Rows that converged without substepping, bool, `(rows,)`."""
        return self._joined(lambda found: [torch.stack([o.tried.statistics.converged for o in found]).all(0)])[0]

    def unknowns(self) -> dict[str, Tensor]:
        """Last iterate of each unknown, without substepping, `(rows, ...)`."""
        names = [name for outcome in self.parts[0][1] for name in outcome.unknowns.names]
        tensors = self._joined(lambda found: [x for o in found for x in o.unknowns.unpack(o.tried.unknowns).values()])
        return dict(zip(names, tensors, strict=True))

    def _joined(self, of: Callable[[list[SegmentOutcome]], list[Tensor]]) -> list[Tensor]:
        """What the parts say, each in its place."""
        whole: list[Tensor] = []
        for place, outcomes in self.parts:
            found = of(outcomes)
            if place is None:
                return found
            whole = whole or [x.new_empty((self.rows, *x.shape[1:])) for x in found]
            for x, into in zip(found, whole, strict=True):
                into[place] = x
        return whole


def _first_failure(outcomes: list[SegmentOutcome]) -> list[Tensor]:
    """Record and norms of rows over all segments, and the index of the segment that failed first, else -1."""
    found, index = first_failure([outcome.statistics for outcome in outcomes])
    indices = torch.tensor([outcome.segment for outcome in outcomes] + [-1], device=index.device)
    return [found.record, found.norms, indices[index]]


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation gives."""

    # The variables that were asked for, `(rows, ...)`.
    values: dict[str, Tensor]
    # Their derivatives by each seed, `(rows, entries, m)`; a seed that does not reach them is absent.
    tangents: dict[str, dict[Seed, Tensor]]
    # How the solves fared; None where the model has none.
    report: SolveReport | None


class Program:
    """The segments of a leaf with their graphs."""

    def __init__(
        self, metadata: Metadata, packages: Mapping[str, Package], device: torch.device, lockstep: bool
    ) -> None:
        self.metadata, self.device = metadata, device
        self._base_ranks = {p.name: len(p.base_shape) for p in metadata.parameters}
        self.dtype, self.batch_axes = _traced(metadata, packages)
        # The graphs by name of the package; one object however often it is named.
        self.graphs: dict[str, Graph] = {}
        implicit = [spec for spec in metadata.segments if isinstance(spec, ImplicitInfo)]
        for file in sorted(_files_to_run(metadata)):
            if self.batch_axes != (None,):
                self.graphs[file] = graph = PinnedGraph(packages[file], device, self.batch_axes)
                log.emit("model", "info", f"{file}: run by torch's runner, since {graph.obstacle()}")
            else:
                self.graphs[file] = (Graph if lockstep else NativeGraph)(packages[file], device)
        self.segments: list[ExplicitSegment | ImplicitSegment] = []
        known = {v.name: v for v in (*(given for spec in implicit for given in spec.roles), *metadata.outputs)}
        for spec in metadata.segments:
            if isinstance(spec, ExplicitInfo):
                self.segments.append(ExplicitSegment(spec, self.graphs, self._takes_rows_of_parameters(spec), known))
            else:
                self.segments.append(ImplicitSegment(spec, self.graphs, device, self.dtype, lockstep))
        self._common = {name for segment in self.segments for name in segment.common_parameters}
        self.implicit = [s for s in self.segments if isinstance(s, ImplicitSegment)]
        unknowns = {v.name for spec in implicit for v in spec.unknown_variables}
        # Unknowns whose initial guess a caller may give, although they are no inputs.
        self.initial_guesses = frozenset(unknowns - {v.name for v in metadata.inputs})
        # Rows to solve at a time; None for all of them.
        self.block = block_rows(implicit) if implicit and not lockstep and device.type == "cpu" else None

    def by_runner(self) -> dict[str, str]:
        """The graphs that torch's runner runs for what they are, by name of the package, with the reason.

        Nothing is loaded. Graphs of linear solves are left out: torch's runner always runs them, where they are called.
        """
        specs = [segment.spec for segment in self.implicit]
        parts = [part for spec in specs for part in (spec.step, spec.sensitivity, spec.parameter_sensitivity)]
        solves = {getattr(part, name, None) for part in parts for name in ("solve", "solver")}
        found = {file: graph.obstacle() for file, graph in self.graphs.items() if file not in solves}
        return {file: reason for file, reason in found.items() if reason}

    def _takes_rows_of_parameters(self, segment: ExplicitInfo) -> bool:
        """Whether an explicit graph takes promoted parameters with the batch axes, or as stored."""
        signature = self.graphs[segment.value].signature if segment.parameters else None
        if signature is None or len(signature.arguments) != len(segment.taken):
            return True
        return all(
            len(argument.extents) == self._base_ranks[name] + len(self.batch_axes)
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
        run = partial(self._run, wanted=list(wanted), settings=settings, by=frozenset(by))
        parts = self._parts(values, rows)
        if not parts:
            # An operator of few rows stays in this thread in any case.
            with one_thread() if self.block is not None and rows >= LEAST_ROWS else nullcontext():
                return run(dict(state), values, rows, tangents)
        room = _Room(rows)

        def task(index: Tensor | slice, fixed: dict[str, Tensor]) -> None:
            some = {name: value[index] for name, value in state.items()}
            count = len(next(iter(some.values()))) if some else rows
            room.write(index, run(some, values.take(index, fixed), count, tangents and select(tangents, index)))

        tasks = [partial(task, *part) for part in parts]
        if self.block is not None and rows >= LEAST_ROWS * len(tasks):
            run_all(tasks)
        else:
            for one in tasks:
                one()
        return room.whole()

    def _parts(self, values: Values, rows: int) -> list[tuple[Tensor | slice, dict[str, Tensor]]]:
        """Cut the rows into those that share the parameters which graphs take only once, and into blocks.

        With each part the values of these parameters; nothing where all rows are one part.
        """
        names = values.per_row(self._common)
        if not names:
            blocks = [] if self.block is None else list(cut(rows, self.block))
            return [(block, {}) for block in blocks] if len(blocks) > 1 else []
        varying = dict(zip(names, values.common(names), strict=True))
        if rows == 0:
            return [(slice(0, 0), {name: value.new_empty(value.shape[1:]) for name, value in varying.items()})]
        stacked = torch.cat([value.reshape(rows, -1).to(torch.float64) for value in varying.values()], -1)
        kinds, kind = torch.unique(stacked, dim=0, return_inverse=True)
        parts: list[tuple[Tensor | slice, dict[str, Tensor]]] = []
        for k in range(len(kinds)):
            members = (kind == k).nonzero().squeeze(-1)
            fixed = {name: value[members[0]] for name, value in varying.items()}
            parts += [(members[block], fixed) for block in cut(len(members), self.block or rows)]
        return parts

    def _run(
        self,
        state: State,
        values: Values,
        rows: int,
        tangents: Mapping[str, Columns] | None,
        *,
        wanted: list[str],
        settings: NewtonSettings | None,
        by: frozenset[str],
    ) -> Evaluation:
        """Evaluate the segments for one part of the rows; `state` is filled."""
        carried: Tangents | None = None if tangents is None else dict(tangents)
        given = self.initial_guesses.intersection(state)
        outcomes: list[SegmentOutcome] = []
        for i, segment in enumerate(self.segments):
            if isinstance(segment, ExplicitSegment):
                segment.run(state, values, rows, carried, by)
                continue
            used = settings or segment.spec.newton
            if segment.spec.max_substepping_level > 0:
                statistics, tried = substepping.solve(segment, state, values, rows, used, given, carried, by)
            else:
                solved = segment.solve(state, values, rows, used, given, carried)
                statistics, tried = solved.statistics, Solved(solved.unknowns, solved.statistics)
                if carried is not None:
                    carried.update(segment.sensitivity.carry(solved, values, carried, by))
            outcomes.append(SegmentOutcome(i, segment.unknowns, statistics, tried))
        found: dict[str, dict[Seed, Tensor]] = {}
        if carried is not None:
            found = {name: dense(carried.get(name, {}), state[name]) for name in wanted}
        return Evaluation(
            {name: state[name] for name in wanted}, found, SolveReport(rows, [(None, outcomes)]) if outcomes else None
        )


class _Room:
    """Where blocks of rows, evaluated in any order by any thread, put their results."""

    def __init__(self, rows: int) -> None:
        self._rows, self._lock = rows, threading.Lock()
        self._values: dict[str, Tensor] = {}
        self._tangents: dict[str, dict[Seed, Tensor]] = {}
        self._outcomes: list[tuple[Tensor | slice | None, list[SegmentOutcome]]] = []

    def write(self, index: Tensor | slice, part: Evaluation) -> None:
        """Put the results of a block in their places."""
        targets: list[tuple[Tensor, Tensor]] = []
        with self._lock:
            dicts: list[tuple[dict[Any, Tensor], dict[Any, Tensor]]] = [(self._values, part.values)]
            dicts += [(self._tangents.setdefault(name, {}), columns) for name, columns in part.tangents.items()]
            for into, found in dicts:
                for key, x in found.items():
                    if key not in into:
                        into[key] = x.new_zeros((self._rows, *x.shape[1:]))
                    targets.append((into[key], x))
            if part.report is not None:
                self._outcomes += [(index, outcomes) for _, outcomes in part.report.parts]
        for target, x in targets:
            target[index] = x

    def whole(self) -> Evaluation:
        """The results of all blocks."""
        report = SolveReport(self._rows, self._outcomes) if self._outcomes else None
        return Evaluation(self._values, self._tangents, report)
