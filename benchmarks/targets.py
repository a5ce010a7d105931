"""The targets that the measurements are held against."""

from __future__ import annotations

from dataclasses import dataclass

from .cases import FLOOR, HETEROGENEOUS, NATIVE, PLUGIN, SUBJECTS, Case
from .results import Store

# Time per row at the most rows may be so much of that at 1,000, to count as flat.
FLAT = 1.1


@dataclass(frozen=True)
class Target:
    """A limit on a ratio, for a heterogeneous batch.

    Args:
        title: what is compared.
        model: entry of the stub catalogue.
        quantity: of the case.
        peer: that the plugin is compared with.
        limits: by number of rows.
    """

    title: str
    model: str
    quantity: str
    peer: str
    limits: dict[int, float]


@dataclass(frozen=True)
class Judged:
    """A target at one number of rows.

    Args:
        target: the target.
        rows: number of rows.
        limit: of the ratio.
        ratio: that was measured; None if it was not.
        quartiles: of the ratio over the rounds.
        reason: why it was not measured.
        floor: the floor's ratio to the same peer, which no runtime of these graphs can go below.
    """

    target: Target
    rows: int
    limit: float
    ratio: float | None
    quartiles: tuple[float, float] | None = None
    reason: str = ""
    floor: float | None = None

    @property
    def met(self) -> bool:
        """Whether the ratio was measured and is within the limit, at the two decimals that are shown."""
        return self.ratio is not None and round(self.ratio, 2) <= self.limit


IMPLICIT_LIMITS = {1: 0.70, 100: 0.70, 10_000: 0.45, 100_000: 0.25, 1_000_000: 0.25}
FORWARD_LIMITS = {1: 0.80, 10_000: 1.0, 100_000: 1.0, 1_000_000: 1.0}
FLOOR_ROWS = (100, 1_000, 10_000, 100_000, 1_000_000)
ALL_ROWS = (1, 10, *FLOOR_ROWS)


def targets() -> list[Target]:
    """All targets on ratios of the plugin to another peer."""
    found = []
    for name, subject in SUBJECTS.items():
        limits = IMPLICIT_LIMITS if subject.implicit else FORWARD_LIMITS
        reached = {n: limit for n, limit in limits.items() if n <= subject.most}
        found.append(Target("outputs, to the C++ runtime", name, "forward", NATIVE, reached))
    for name, subject in SUBJECTS.items():
        reached = {n: 0.6 for n in ALL_ROWS if n <= subject.most_jacobian}
        if reached:
            found.append(Target("derivatives, to the C++ runtime", name, "jacobian", NATIVE, reached))
    for name, subject in SUBJECTS.items():
        reached = {n: 1.15 for n in FLOOR_ROWS if n <= subject.most}
        found.append(Target("outputs, to the floor", name, "forward", FLOOR, reached))
    found.append(Target("typed call, to the C++ shim", "elasticity", "typed", NATIVE, {1: 0.3}))
    found.append(Target("driver, 100 steps, to the C++ shim", "viscoplasticity", "driver", NATIVE, {1: 0.7}))
    for name, subject in SUBJECTS.items():
        if subject.implicit and subject.most >= 1_000_000:
            found.append(Target("peak memory, to the C++ runtime", name, "memory", NATIVE, {1_000_000: 0.25}))
    return found


def judge(store: Store, target: Target) -> list[Judged]:
    """Hold what was measured against a target."""
    return [_judge_at(store, target, rows, limit) for rows, limit in target.limits.items()]


def _judge_at(store: Store, target: Target, rows: int, limit: float) -> Judged:
    found = store.get(Case(target.model, HETEROGENEOUS, target.quantity, rows))
    if found is None:
        return Judged(target, rows, limit, None, reason="not measured")
    if target.quantity == "memory":
        mine, theirs = found.growth.get(PLUGIN), found.growth.get(target.peer)
        if mine is not None and theirs:
            return Judged(target, rows, limit, mine / theirs)
        return Judged(target, rows, limit, None, reason=found.trouble or found.skipped.get(target.peer, "nothing"))
    ratio = found.ratio(PLUGIN, target.peer)
    reason = "" if ratio is not None else found.trouble or found.skipped.get(target.peer, "no such peer")
    floor = found.ratio(FLOOR, target.peer) if target.peer != FLOOR else None
    return Judged(target, rows, limit, ratio, found.spread(PLUGIN, target.peer), reason, floor)


def growth_of_time(store: Store, name: str) -> tuple[int, float] | None:
    """The most rows that were timed, and the time per row there over that at 1,000."""
    subject = SUBJECTS[name]
    timed = {}
    for rows in ALL_ROWS:
        found = store.get(Case(name, HETEROGENEOUS, "forward", rows)) if rows <= subject.most else None
        seconds = found.time(PLUGIN) if found else None
        if seconds is not None:
            timed[rows] = seconds / rows
    most = max(timed, default=0)
    return (most, timed[most] / timed[1_000]) if most > 1_000 and 1_000 in timed else None
