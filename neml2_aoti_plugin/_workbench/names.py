"""What the names of variables say: `x~1` is the value of `x` one step before."""

from __future__ import annotations


def lag(name: str) -> tuple[str, int]:
    """Split `x~2` into `x` and 2; a name without a lag has 0."""
    base, mark, steps = name.rpartition("~")
    return (base, int(steps)) if mark and steps.isdigit() else (name, 0)
