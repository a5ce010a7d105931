"""How a batch is cut into chunks: large enough to be worth sending, smaller towards the end to end all at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import InputError, InputTypeError

if TYPE_CHECKING:
    from ..model import Model

# Rows that fill the vectors of a graph: only the last chunk of a batch has rows that do not.
MULTIPLE = 64
# The smallest chunk that a large batch ends with, and the least number of rows that is spread at all.
LEAST, WORTH_IT = 1024, 4096
# How many blocks of rows, which a model solves one after the other, the largest chunk has.
BLOCKS = 4
# Each chunk takes this part of what is left for a worker.
PART = 2
# Of a model that solves nothing; it takes longer to send a row than to evaluate it.
EXPLICIT = 1 << 16


@dataclass(frozen=True)
class Sizes:
    """Sizes of chunks for a model, in rows.

    Args:
        least: of the smallest chunks.
        most: of the largest.
        worth_it: the smallest batch that is spread; None where none is.
    """

    least: int
    most: int
    worth_it: int | None


def sizes(model: Model, chunk: int | None) -> Sizes:
    """Sizes for a model.

    Args:
        model: that the rows are for.
        chunk: rows per chunk, as the user wants it; None for what suits the model.

    Raises:
        InputTypeError: `chunk` is no whole number.
        InputError: it is less than 1.
    """
    program = model._caller.program
    if chunk is None:
        if not program.implicit:
            return Sizes(EXPLICIT, EXPLICIT, None)
        # A worker solves a block at a time, as the model itself does, and answers after some of them.
        most = BLOCKS * max(_rounded(program.block or EXPLICIT), MULTIPLE)
        return Sizes(min(LEAST, most), most, WORTH_IT)
    if isinstance(chunk, bool) or not isinstance(chunk, int):
        raise InputTypeError(f"chunk is {chunk!r}, expected a whole number of rows, at least 1.")
    if chunk < 1:
        raise InputError(f"chunk is {chunk}, expected a number of rows, at least 1.")
    return Sizes(chunk, chunk, chunk + 1)


def cut(rows: int, workers: int, size: Sizes) -> list[slice]:
    """Cut a batch.

    Args:
        rows: of the batch.
        workers: that the chunks are for.
        size: of the chunks.

    Returns:
        The chunks in order.
    """
    found = []
    start = 0
    while start < rows:
        left = rows - start
        wanted = -(-left // (PART * workers))
        take = min(size.most, max(size.least, _rounded(wanted) if size.least < size.most else wanted))
        found.append(slice(start, min(start + take, rows)))
        start += take
    return found


def _rounded(rows: int) -> int:
    return -(-rows // MULTIPLE) * MULTIPLE
