"""A suggestion for the size of the next step, from what the last one cost."""

from __future__ import annotations

from math import sqrt

# As many Newton updates as this at the hardest point keep the step as it is. What a viscoplastic law takes from its
# predictor in a step of moderate size is 5 or 6, so that such a step grows a little.
TARGET = 8
# After a failure, and the limits elsewhere.
CUT, LEAST, MOST = 0.5, 0.5, 2.0


def step_factor(updates: int, *, failed: bool) -> float:
    """What to multiply the step with.

    Args:
        updates: Newton updates of the hardest point, in the update of this step that took the most.
        failed: whether a point failed.

    Returns:
        `CUT` after a failure, to take the same step anew; else the square root of `TARGET` over the updates, for the
        next step, between `LEAST` and `MOST`.
    """
    if failed:
        return CUT
    return min(max(sqrt(TARGET / updates), LEAST), MOST) if updates else MOST
