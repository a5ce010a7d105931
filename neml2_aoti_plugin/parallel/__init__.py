"""Many rows on all cores, and on many machines: rows are independent, so they are spread over processes."""

from .pool import Pool
from .rows import Mapped, map_rows

__all__ = ["Mapped", "Pool", "map_rows"]
