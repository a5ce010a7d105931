"""Warn of a column that was given for a batched scalar: its batch broadcasts against another one of the same size."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

from .._artifact.schema import Shape

_OURS = (__name__.partition(".")[0], "torch")


def warn_of_columns(named: Sequence[tuple[str, Shape]], common: Shape) -> None:
    """Warn where a batch like `(N, 1)` meets one like `(N,)`, and makes N times N rows of them.

    That is a grid when it is meant. More often a column was given in the place of one value per row.

    Args:
        named: batch shapes by name.
        common: what they broadcast to.
    """
    for name, column in named:
        for other, batch in named:
            lead = len(column) - len(batch)
            if batch and lead > 0 and column[0] == batch[0] > 1 and column[lead] == 1:
                shown = ", ".join(f"{n} {tuple(b)}" for n, b in named if b)
                warnings.warn(
                    f"{name!r} has the batch shape {tuple(column)} and {other!r} {tuple(batch)}: they broadcast "
                    f"against each other, and all to {tuple(common)} (batch shapes: {shown}). If {name!r} holds one "
                    f"value for each of the {batch[0]} rows, pass it with the batch shape {tuple(batch)}, such as "
                    f"{name}.reshape(({batch[0]}, *base)). If a grid is meant, ignore this warning with "
                    "warnings.filterwarnings, or expand one of the two to the common batch shape.",
                    UserWarning,
                    stacklevel=callers_level(),
                )
                return


def callers_level() -> int:
    """The stack level, as the caller must give it to `warnings.warn`, of the line that called this package."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _OURS:
        frame, level = frame.f_back, level + 1
    return level
