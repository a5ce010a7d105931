"""Draw docs/performance.png: time per row against rows, a panel for each model."""

from __future__ import annotations

from pathlib import Path

from .cases import COMPILED, COPY, EAGER, FLOOR, HETEROGENEOUS, NATIVE, PLUGIN, ROWS, SUBJECTS, Case
from .results import Store

# Colour, marker and line of each peer; they are told apart without colour as well.
STYLES = {
    PLUGIN: ("#0072b2", "o", "-"),
    NATIVE: ("#d55e00", "s", "-"),
    EAGER: ("#009e73", "^", "-"),
    COMPILED: ("#cc79a7", "v", "-"),
    FLOOR: ("#000000", "", "--"),
    COPY: ("#777777", "", ":"),
}
COLUMNS = 3


def draw(store: Store, file: Path) -> None:
    """Draw the times for outputs on heterogeneous rows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = -(-(len(SUBJECTS) + 1) // COLUMNS)
    figure, grid = pyplot.subplots(
        lines, COLUMNS, figsize=(4.2 * COLUMNS, 3.6 * lines), sharex=True, layout="constrained"
    )
    panels = list(grid.flat)
    handles = {}
    for panel, name in zip(panels, SUBJECTS, strict=False):
        for peer, (colour, marker, line) in STYLES.items():
            points = _points(store, name, peer)
            if points:
                x, y = zip(*points, strict=True)
                style = {"color": colour, "marker": marker, "linestyle": line, "markersize": 5}
                handles[peer] = panel.plot(x, y, **style, zorder=3 if peer == PLUGIN else 2)[0]
        panel.set(xscale="log", yscale="log", title=name, xlim=(0.7, 1.5e6))
        panel.set_xlabel("rows")
        panel.set_ylabel("µs per row")
        panel.tick_params(labelbottom=True)
        panel.grid(True, which="major", alpha=0.3)
    for panel in panels[len(SUBJECTS) :]:
        panel.axis("off")
    if handles:
        panels[len(SUBJECTS)].legend(handles.values(), handles, loc="center left", frameon=False)
    figure.suptitle(f"Outputs of heterogeneous batches, {store.header.get('threads')} threads, torch 2.12.1")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _points(store: Store, name: str, peer: str) -> list[tuple[int, float]]:
    """Rows, and microseconds per row."""
    found = [(rows, store.get(Case(name, HETEROGENEOUS, "forward", rows))) for rows in ROWS]
    times = [(rows, one.time(peer)) for rows, one in found if one is not None]
    return [(rows, 1e6 * seconds / rows) for rows, seconds in times if seconds is not None]
