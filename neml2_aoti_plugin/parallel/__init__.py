"""Many rows: more than memory holds, from files to files, here or on many machines."""

from ._rows import Mapped, map_rows

__all__ = ["Mapped", "map_rows"]
