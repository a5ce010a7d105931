"""Time several calls in turn: one round of each, and another, so that all see the same machine.

In a round each is called as often as is timed, and then as often again, which is timed: so it finds the caches as it
leaves them itself, whoever came before it.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping

# A sample is made of as many calls as take this long.
SAMPLE_SECONDS = 3e-3
MOST_CALLS = 1000
# Longer than it takes to load a model.
LONG = 5.0
LEAST_ROUNDS, MOST_ROUNDS = 3, 41


def once(call: Callable[[], object]) -> float:
    """Seconds of one call; its result is let go within them."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(
    calls: Mapping[str, Callable[[], object]], seconds: float, took: Mapping[str, float]
) -> dict[str, list[float]]:
    """Time calls in turn until the time is over; the seconds that each took in each round.

    All rounds are of all calls, and at least `LEAST_ROUNDS` are made. `took` is what the first calls took, which may
    have loaded something besides.
    """
    deadline = time.monotonic() + seconds
    counts = {}
    for name, call in calls.items():
        # A short first call is made again, to be timed without what it loaded.
        again = took[name] if took.get(name, 0.0) > LONG else once(call)
        counts[name] = max(1, min(MOST_CALLS, int(SAMPLE_SECONDS / max(again, 1e-7))))
    found: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    gc.disable()
    try:
        for number in range(MOST_ROUNDS):
            if number >= LEAST_ROUNDS and time.monotonic() > deadline:
                break
            for name, call in calls.items():
                _sample(call, counts[name])
                found[name].append(_sample(call, counts[name]))
    finally:
        gc.enable()
    return found


def _sample(call: Callable[[], object], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count
