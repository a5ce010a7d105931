"""Freed memory kept by a worker process, instead of given back to the system after each chunk.

What goes back comes back page by page, each of them filled with zeros first.
"""

from __future__ import annotations

import ctypes
import sys

# What glibc takes for these settings in mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
# Freed memory up to the first stays with the process; allocations from the second on are mapped by themselves, and go
# back at once (glibc takes no more than this).
KEPT_BYTES, MAPPED_BYTES = 1 << 30, 32 << 20


def keep_freed_memory() -> bool:
    """Have the C library keep freed memory; tells whether it could."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        # Another C library than glibc, which knows no such setting and no such trouble.
        return False
    return bool(mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)) and bool(mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES))
