"""Pictures, as PNG or SVG; matplotlib is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._files import draft, require_writable
from ..errors import InputError

if TYPE_CHECKING:
    from .verify import Verification

FORMATS = (".png", ".svg", ".pdf")
DPI = 150


def require_drawable(path: Path) -> None:
    """Refuse a picture that cannot be drawn, ahead of long work.

    Args:
        path: of the picture.

    Raises:
        InputError: its ending is another, or it cannot be written.
    """
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"{path}: ends with {path.suffix!r}, expected one of {', '.join(FORMATS)}.")
    # What is missing is told now as well.
    import matplotlib  # noqa: F401

    require_writable(path)


def literal(text: str) -> str:
    """A name as matplotlib shows it: `$` begins no formula there, and `_` at the beginning hides no label."""
    return ("\u2009" if text.startswith("_") else "") + text.replace("$", r"\$")


@contextmanager
def figure(path: Path, width: float = 6.4, height: float = 4.6) -> Iterator[Any]:
    """Give the axes of a figure, which is written to a file at the end.

    Args:
        path: of the file; its ending says which format.
        width: in inches.
        height: in inches.

    Raises:
        InputError: the file cannot be written, or has another ending.
    """
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


def draw_errors(report: Verification, path: Path) -> Verification:
    """Draw the worst error of each quantity, and its tolerance.

    Args:
        report: of a verification.
        path: of the picture.

    Returns:
        The report, with the picture.
    """
    shown = report.comparisons[::-1]
    places = range(len(shown))
    with figure(path, 7.0, 1.2 + 0.32 * max(len(shown), 1)) as axes:
        least = 1e-17
        axes.scatter(
            [max(found.worst, least) for found in shown],
            places,
            color=["C2" if found.passed else "C3" for found in shown],
            zorder=3,
        )
        axes.scatter([found.tolerance for found in shown], places, marker="|", s=120, color="0.4")
        axes.set_yticks(places, [literal(f"{found.quantity} ({found.reference})") for found in shown])
        axes.set_xscale("log")
        axes.set_xlim(left=least / 2)
        axes.set_ylim(-0.6, len(shown) - 0.4)
        axes.set_xlabel("largest error over the largest entry (bars: tolerance)")
        axes.set_title(literal(f"{report.model} ({report.leaf}), {report.rows} points"))
    return replace(report, picture=str(path))
