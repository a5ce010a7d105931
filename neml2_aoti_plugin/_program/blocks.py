"""How many rows are evaluated at a time.

A block's vectors and matrices are to stay in a core's cache while Newton's method goes over them again and again; yet
it must have rows enough that the work in Python, which hardly depends on their number, is a small part. Its size does
not depend on the number of threads.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

from .._artifact.schema import ImplicitInfo
from .._solve.tables import VECTOR
from ..errors import InputError

# The environment variable that says how many rows, in place of what is found here.
BLOCK_ROWS = "NEML2_AOTI_PLUGIN_BLOCK_ROWS"

# What the matrices and vectors of a block may take, and how many rows it has in any case: whole vectors.
BYTES = 1 << 20
MIN_ROWS, MAX_ROWS = 256, 1024
# Blocks of fewer rows are not worth another thread.
LEAST_ROWS = 128


def block_rows(segments: Iterable[ImplicitInfo]) -> int:
    """Rows to solve at a time."""
    given = os.environ.get(BLOCK_ROWS, "").strip()
    if given:
        if not given.isdecimal() or int(given) == 0:
            raise InputError(
                f"the environment variable {BLOCK_ROWS} is {given!r}, expected a number of rows, at least 1."
            )
        return int(given)
    entries = 1
    for segment in segments:
        u = sum(v.size for v in segment.unknown_variables)
        g = sum(v.size for group in segment.givens for v in group.variables)
        entries = max(entries, u * u + 4 * u + g)
    return min(max(BYTES // (8 * entries), MIN_ROWS), MAX_ROWS) // VECTOR * VECTOR


def cut(rows: int, block: int) -> Iterator[slice]:
    """Cut a batch into blocks of about the same size, of whole vectors; a batch of up to one and a half is one."""
    if rows <= block + block // 2:
        yield slice(0, rows)
        return
    size = -(-rows // -(-rows // block))
    size = -(-size // VECTOR) * VECTOR
    yield from (slice(start, min(start + size, rows)) for start in range(0, rows, size))
