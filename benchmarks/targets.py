"""The targets that the measurements are held against."""

from __future__ import annotations

from dataclasses import dataclass

from .cases import FLOOR, HETEROGENEOUS, HOMOGENEOUS, NATIVE, PLUGIN, ROWS, SUBJECTS, THREADS_ROWS, TWO_THREADS, Case
from .results import Found, Ratios, Store

MET, MISSED, UNDECIDED, MISSING = "met", "not met", "undecided", "not measured"
# Why a case was not measured where only some were to be.
NOT_PART = "not part of this run"


@dataclass(frozen=True)
class Target:
    """Limits on the ratio of two peers' times, or of their peaks of memory.

    Args:
        title: what is compared.
        model: entry of the stub catalogue.
        batch: kind of batch.
        quantity: of the case.
        peers: the one that must be fast, and the one that it is compared with.
        limits: by number of rows.
    """

    title: str
    model: str
    batch: str
    quantity: str
    peers: tuple[str, str]
    limits: dict[int, float]


@dataclass(frozen=True)
class Judged:
    """A target at one number of rows.

    Args:
        target: the target.
        rows: number of rows.
        limit: of the ratio.
        ratio: that was measured; None if it was not.
        ratios: the same over the rounds; None for memory, which is measured once.
        reason: why it was not measured.
        floor: the ratio of the bare graphs to the same peer, which no runtime of these graphs can go below.
    """

    target: Target
    rows: int
    limit: float
    ratio: float | None
    ratios: Ratios | None = None
    reason: str = ""
    floor: float | None = None

    @property
    def verdict(self) -> str:
        """Whether the target is met, at the two decimals that are shown.

        It is undecided where the quartiles are further from each other than the median is from the limit.
        """
        if self.ratio is None:
            return MISSING
        if self.ratios is not None and self.ratios.spread > abs(self.ratio - self.limit):
            return UNDECIDED
        return MET if round(self.ratio, 2) <= self.limit else MISSED


# Implicit models, of which `MOONSHOT` of the C++ runtime's time is asked at any number of rows in the long run.
IMPLICIT = tuple(name for name, subject in SUBJECTS.items() if subject.implicit)
MOONSHOT = 0.33


def _by_rows(*limits: float) -> dict[int, float]:
    """Limits for 1, 10, 100, ... rows."""
    return dict(zip(ROWS, limits, strict=False))


SEVEN_UNKNOWNS = _by_rows(0.45, 0.40, 0.40, 0.45, 0.38, 0.26, 0.22)
OUTPUTS = {
    "viscoplasticity": SEVEN_UNKNOWNS,
    "composed": SEVEN_UNKNOWNS,
    "chaboche": _by_rows(0.45, 0.38, 0.33, 0.24, 0.14, 0.12),
    "crystal": _by_rows(0.55, 0.50, 0.45, 0.40, 0.30),
    "elasticity": dict.fromkeys(ROWS, 1.0),
}
DERIVATIVES = {
    "viscoplasticity": _by_rows(0.55, 0.50, 0.50, 0.50, 0.45, 0.35, 0.25),
    "composed": _by_rows(0.55, 0.50, 0.50, 0.50, 0.45, 0.35, 0.25),
    "elasticity": dict.fromkeys(ROWS, 1.0),
}
# All rows the same, and one to three updates in the C++ runtime; composed takes eight.
FEW_UPDATES = ("viscoplasticity", "chaboche", "crystal")
FEW_UPDATES_LIMITS = _by_rows(0.65, 0.65, 0.65, 0.65, 0.75, 0.75, 0.75)
BARE_GRAPHS = 1.25
TYPED = {"elasticity": 0.30, "viscoplasticity": 0.45}
DRIVER = {"viscoplasticity": 0.55}
MEMORY = 0.25
TWO_THREADS_LIMIT = 1.0

TO_NATIVE = "outputs, to the C++ runtime"


def targets() -> list[Target]:
    """All targets."""
    native = (PLUGIN, NATIVE)
    found = [Target(TO_NATIVE, name, HETEROGENEOUS, "forward", native, limits) for name, limits in OUTPUTS.items()]
    title = "outputs and derivatives, to the C++ runtime"
    found += [Target(title, name, HETEROGENEOUS, "jacobian", native, limits) for name, limits in DERIVATIVES.items()]
    for name in FEW_UPDATES:
        limits = {n: limit for n, limit in FEW_UPDATES_LIMITS.items() if n <= SUBJECTS[name].most_homogeneous}
        found.append(Target("homogeneous outputs, to the C++ runtime", name, HOMOGENEOUS, "forward", native, limits))
    for name in OUTPUTS:
        limits = {n: BARE_GRAPHS for n in ROWS if 10 <= n <= SUBJECTS[name].most}
        found.append(Target("outputs, to the bare graphs", name, HETEROGENEOUS, "forward", (PLUGIN, FLOOR), limits))
    for name, limit in TYPED.items():
        found.append(Target("typed call, to the C++ shim", name, HETEROGENEOUS, "typed", native, {1: limit}))
    for name, limit in DRIVER.items():
        title = "TransientDriver, 100 steps, to the C++ shim"
        found.append(Target(title, name, HETEROGENEOUS, "driver", native, {1: limit}))
    for name in IMPLICIT:
        most = SUBJECTS[name].most
        if most >= 100_000:
            title = "peak memory, to the C++ runtime"
            found.append(Target(title, name, HETEROGENEOUS, "memory", native, {most: MEMORY}))
    limits = dict.fromkeys(THREADS_ROWS, TWO_THREADS_LIMIT)
    peers = (TWO_THREADS, PLUGIN)
    for name, subject in SUBJECTS.items():
        if subject.threads:
            found.append(Target("outputs on two threads, to one", name, HETEROGENEOUS, "threads", peers, limits))
    return found


def judge(store: Store, target: Target) -> list[Judged]:
    """Hold what was measured against a target."""
    return [_judge_at(store, target, rows, limit) for rows, limit in target.limits.items()]


def _judge_at(store: Store, target: Target, rows: int, limit: float) -> Judged:
    found = store.get(Case(target.model, target.batch, target.quantity, rows))
    if found is None:
        return Judged(target, rows, limit, None, reason=NOT_PART)
    mine, other = target.peers
    if target.quantity == "memory":
        growth, theirs = found.growth.get(mine), found.growth.get(other)
        if growth is not None and theirs:
            return Judged(target, rows, limit, growth / theirs)
        return Judged(target, rows, limit, None, reason=_reason(found, target.peers))
    ratios = found.ratios(mine, other)
    if ratios is None:
        return Judged(target, rows, limit, None, reason=_reason(found, target.peers))
    floor = found.ratios(FLOOR, other) if other != FLOOR else None
    return Judged(target, rows, limit, ratios.median, ratios, floor=floor.median if floor else None)


def _reason(found: Found, peers: tuple[str, str]) -> str:
    return found.trouble or next((found.skipped[peer] for peer in peers if peer in found.skipped), "no such peer")


def moonshot(store: Store) -> tuple[int, int]:
    """How often the outputs of heterogeneous rows of implicit models reach the moonshot, and of how many cases."""
    judged = [one for t in targets() if t.title == TO_NATIVE and t.model in IMPLICIT for one in judge(store, t)]
    measured = [one.ratio for one in judged if one.ratio is not None]
    return sum(ratio <= MOONSHOT for ratio in measured), len(measured)
