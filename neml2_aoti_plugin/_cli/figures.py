"""Pictures, as PNG, SVG or PDF; matplotlib is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .._files import draft, require_writable
from ..errors import InputError

FORMATS = (".png", ".svg", ".pdf")
DPI = 150


def require_drawable(path: Path) -> None:
    """Refuse a picture whose ending is another, or that cannot be written, ahead of long work."""
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"{path}: ends with {path.suffix!r}, expected one of {', '.join(FORMATS)}.")
    # What is missing is reported now as well.
    import matplotlib  # noqa: F401

    require_writable(path)


def literal(text: str) -> str:
    """A name as matplotlib shows it: `$` begins no formula there, and `_` at the beginning hides no label."""
    return ("\u2009" if text.startswith("_") else "") + text.replace("$", r"\$")


@contextmanager
def figure(path: Path, width: float = 6.4, height: float = 4.6) -> Iterator[Any]:
    """Give the axes of a figure, in inches, which is written to the file at the end."""
    require_drawable(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with draft(path) as scratch:
        drawn = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(drawn)
        axes = drawn.subplots()
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        yield axes
        drawn.savefig(scratch, dpi=DPI, format=path.suffix.lower().removeprefix("."))
