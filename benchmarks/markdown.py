"""Tables, times and sizes as a page shows them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

MIB = 2**20


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A table, its first columns to the left and the others to the right."""
    lines = [f"| {' | '.join(head)} |", "|---" * left + "|--:" * (len(head) - left) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def mib(value: int | None) -> str:
    """A number of bytes in MiB."""
    return "-" if value is None else f"{value / MIB:.1f}"


def duration(seconds: float | None) -> str:
    """A time in a unit that suits it."""
    if seconds is None:
        return "-"
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"
