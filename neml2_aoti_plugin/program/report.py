"""How the implicit segments of an evaluation fared, row by row; put together when it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..solve.rows import Rows
from .implicit import ImplicitStage


class Outcome(NamedTuple):
    """One segment's solve over some rows.

    Args:
        segment: its index.
        stage: the segment.
        rows: how its rows fared.
        tried: how they did without substeps.
    """

    segment: int
    stage: ImplicitStage
    rows: Rows
    tried: Rows


@dataclass
class Report:
    """How the implicit segments fared.

    Args:
        rows: of the whole batch.
        parts: the outcomes of some rows, with the place of these in the batch; None for all of it.
    """

    rows: int
    parts: list[tuple[Tensor | slice | None, list[Outcome]]] = field(default_factory=list)

    @property
    def all_converged(self) -> bool:
        """Whether every segment converged for all rows."""
        return all(outcome.rows.all_converged for _, outcomes in self.parts for outcome in outcomes)

    @cached_property
    def converged(self) -> Tensor:
        """Rows for which every segment converged, `(rows,)`."""
        return self._over(_converged)

    @cached_property
    def tried(self) -> Tensor:
        """Rows that converged without substeps, `(rows,)`."""
        return self._over(lambda outcomes: _all([o.tried.told.converged for o in outcomes]))

    @cached_property
    def iterations(self) -> Tensor:
        """Newton updates over all segments, `(rows,)`."""
        return self._over(lambda outcomes: torch.stack([o.rows.told.iterations for o in outcomes]).sum(0))

    @cached_property
    def segment(self) -> Tensor:
        """Index of the segment that failed first, else -1, `(rows,)`."""
        return self._over(_segment)

    @cached_property
    def norm(self) -> Tensor:
        """Last residual norm of the segment that failed first, else of the last one, `(rows,)`."""
        return self._over(lambda outcomes: _of_failed(outcomes, [o.rows.told.norm for o in outcomes]))

    @cached_property
    def norm0(self) -> Tensor:
        """First residual norm likewise."""
        return self._over(lambda outcomes: _of_failed(outcomes, [o.rows.told.norm0 for o in outcomes]))

    @cached_property
    def unknowns(self) -> dict[str, Tensor]:
        """Last iterate of each unknown, without substeps, `(rows, ...)`."""
        stages = {o.segment: o.stage for _, outcomes in self.parts for o in outcomes}
        names = [v.name for stage in stages.values() for v in stage.spec.unknown_variables]
        return {name: self._over(partial(_unknown, name)) for name in names}

    def _over(self, of: Callable[[list[Outcome]], Tensor]) -> Tensor:
        """Put what a part says in its place."""
        whole: Tensor | None = None
        for place, outcomes in self.parts:
            part = of(outcomes)
            if place is None:
                return part
            if whole is None:
                whole = part.new_empty((self.rows, *part.shape[1:]))
            whole[place] = part
        assert whole is not None, "a batch has at least one part"
        return whole


def _all(values: list[Tensor]) -> Tensor:
    return torch.stack(values).all(0)


def _converged(outcomes: list[Outcome]) -> Tensor:
    return _all([o.rows.told.converged for o in outcomes])


def _segment(outcomes: list[Outcome]) -> Tensor:
    found = torch.full_like(outcomes[0].rows.told.iterations, -1)
    for outcome in reversed(outcomes):
        found = torch.where(outcome.rows.told.converged, found, outcome.segment)
    return found


def _of_failed(outcomes: list[Outcome], values: list[Tensor]) -> Tensor:
    """Of each row the value of the segment that failed first, else of the last one."""
    found = values[-1]
    for outcome, value in zip(reversed(outcomes), reversed(values), strict=True):
        found = torch.where(outcome.rows.told.converged, found, value)
    return found


def _unknown(name: str, outcomes: list[Outcome]) -> Tensor:
    found: dict[str, Tensor] = {}
    for outcome in outcomes:
        found.update(outcome.stage.unknowns.unpack(outcome.tried.unknowns))
    return found[name]
