"""The targets that the measurements are held against."""

from __future__ import annotations

from dataclasses import dataclass

from .cases import HETEROGENEOUS, HOMOGENEOUS, NATIVE, PLUGIN, ROWS, SUBJECTS, TWO_THREADS, Case
from .results import Found, Ratios, Store

MET, MISSED, UNDECIDED, MISSING = "met", "not met", "undecided", "not measured"
# Why a case was not measured where only some were to be.
NOT_PART = "not part of this run"


@dataclass(frozen=True)
class Target:
    """Limits, by number of rows, on the ratio of two peers' times or peaks of memory; the first must be fast."""

    title: str
    model: str
    batch: str
    quantity: str
    peers: tuple[str, str]
    limits: dict[int, float]


@dataclass(frozen=True)
class Judged:
    """A target at one number of rows; no ratios over the rounds for memory, which is measured once."""

    target: Target
    rows: int
    limit: float
    ratio: float | None
    ratios: Ratios | None = None
    reason: str = ""

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


def _by_rows(*limits: float) -> dict[int, float]:
    """Limits for 1, 10, 100, ... rows."""
    return dict(zip(ROWS, limits, strict=False))


SEVEN_UNKNOWNS = _by_rows(0.24, 0.22, 0.30, 0.40, 0.33, 0.25, 0.20)
OUTPUTS = {
    "viscoplasticity": SEVEN_UNKNOWNS,
    "composed": SEVEN_UNKNOWNS,
    "chaboche": _by_rows(0.30, 0.22, 0.25, 0.20, 0.13),
    "crystal": _by_rows(0.40, 0.50, 0.42, 0.37, 0.31),
    "elasticity": {n: 1.6 if n <= 1_000 else 1.0 for n in ROWS},
}
SEVEN_UNKNOWNS_DERIVATIVES = _by_rows(0.32, 0.30, 0.38, 0.45, 0.40, 0.30, 0.22)
DERIVATIVES = {
    "viscoplasticity": SEVEN_UNKNOWNS_DERIVATIVES,
    "composed": SEVEN_UNKNOWNS_DERIVATIVES,
    "elasticity": {n: 1.6 if n <= 1_000 else 1.0 for n in ROWS},
}
# All rows the same, and one to three updates in the C++ runtime.
FEW_UPDATES = {
    "viscoplasticity": _by_rows(0.45, 0.45, 0.55, 0.70, 0.60, 0.50, 0.33),
    "chaboche": _by_rows(0.38, 0.40, 0.46, 0.50, 0.50),
}
TYPED = {"viscoplasticity": 0.30}
DRIVER = {"viscoplasticity": 0.55}
MEMORY = 0.25
# By model: what two threads may take of the time of one, by rows. Few rows stay in the caller's thread.
TWO_THREADS_LIMITS = {
    "viscoplasticity": {100: 1.0, 1_000: 1.0, 4_096: 0.56, 10_000: 0.56, 100_000: 0.56},
    "elasticity": {1_000: 1.0, 100_000: 1.0, 1_000_000: 0.77},
}

TO_NATIVE = "outputs, to the C++ runtime"


def targets() -> list[Target]:
    """All targets."""
    native = (PLUGIN, NATIVE)
    found = [Target(TO_NATIVE, name, HETEROGENEOUS, "forward", native, limits) for name, limits in OUTPUTS.items()]
    title = "outputs and derivatives, to the C++ runtime"
    found += [Target(title, name, HETEROGENEOUS, "jacobian", native, limits) for name, limits in DERIVATIVES.items()]
    for name, limits in FEW_UPDATES.items():
        found.append(Target("homogeneous outputs, to the C++ runtime", name, HOMOGENEOUS, "forward", native, limits))
    for name, limit in TYPED.items():
        found.append(Target("typed call, to the C++ shim", name, HETEROGENEOUS, "typed", native, {1: limit}))
    for name, limit in DRIVER.items():
        title = "TransientDriver, 100 steps, to the C++ shim"
        found.append(Target(title, name, HETEROGENEOUS, "driver", native, {1: limit}))
    for name, subject in SUBJECTS.items():
        if subject.implicit and subject.most >= 100_000:
            title = "peak memory, to the C++ runtime"
            found.append(Target(title, name, HETEROGENEOUS, "memory", native, {subject.most: MEMORY}))
    peers = (TWO_THREADS, PLUGIN)
    for name, limits in TWO_THREADS_LIMITS.items():
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
    return Judged(target, rows, limit, ratios.median, ratios)


def _reason(found: Found, peers: tuple[str, str]) -> str:
    return found.trouble or next((found.skipped[peer] for peer in peers if peer in found.skipped), "no such peer")
