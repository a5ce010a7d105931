"""How the implicit segments of an evaluation fared, row by row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from .._solve.newton import Solved
from .._solve.outcome import RowStatistics, blank, first_failure
from .packing import Packing


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
