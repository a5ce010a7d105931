"""Draw docs/performance.png: the plugin's time over the C++ runtime's against rows, a panel for each model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .cases import HETEROGENEOUS, HOMOGENEOUS, NATIVE, PLUGIN, ROWS, SUBJECTS, Case
from .results import Ratios, Store
from .targets import targets

# Label, colour, marker and line by kind of batch and quantity; they are told apart without colour as well.
STYLES = {
    (HETEROGENEOUS, "forward"): ("outputs, heterogeneous rows", "#0072b2", "o", "-"),
    (HOMOGENEOUS, "forward"): ("outputs, homogeneous rows", "#009e73", "s", "--"),
    (HETEROGENEOUS, "jacobian"): ("outputs and derivatives", "#d55e00", "^", "-."),
}
COLUMNS = 3
# The axis of the ratio, and what is marked on it.
RANGE, MARKS = (0.08, 2.2), (0.1, 0.2, 0.33, 0.5, 1.0, 2.0)


def draw(store: Store, file: Path) -> None:
    """Draw the ratios with their quartiles, and the targets."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = -(-(len(SUBJECTS) + 1) // COLUMNS)
    figure, grid = pyplot.subplots(
        lines, COLUMNS, figsize=(4.2 * COLUMNS, 3.6 * lines), sharex=True, layout="constrained"
    )
    panels = list(grid.flat)
    handles: dict[str, Any] = {}
    target: Any = None
    for panel, name in zip(panels, SUBJECTS, strict=False):
        for (batch, quantity), (label, colour, marker, line) in STYLES.items():
            points = _points(store, name, batch, quantity)
            if points:
                rows = [n for n, _ in points]
                medians = [r.median for _, r in points]
                errors = [[r.median - r.low for _, r in points], [r.high - r.median for _, r in points]]
                style = {"color": colour, "marker": marker, "linestyle": line, "markersize": 5, "capsize": 2}
                handles[label] = panel.errorbar(rows, medians, yerr=errors, **style)
            marks = _limits(name, batch, quantity)
            if marks:
                style = {"color": colour, "marker": "_", "markersize": 14, "linestyle": "", "markeredgewidth": 2}
                target = panel.plot(*zip(*marks, strict=True), **style)[0]
        panel.axhline(1.0, color="#777777", linewidth=0.8)
        panel.set(xscale="log", yscale="log", title=name, xlim=(0.7, 1.5e6), ylim=RANGE)
        panel.set_yticks(MARKS, [f"{mark:g}" for mark in MARKS])
        panel.set_yticks([], minor=True)
        panel.set_xlabel("rows")
        panel.set_ylabel("time / time of the C++ runtime")
        panel.tick_params(labelbottom=True)
        panel.grid(True, which="major", alpha=0.3)
    for panel in panels[len(SUBJECTS) :]:
        panel.axis("off")
    if handles:
        handles["target, in the colour of its line"] = target
        panels[len(SUBJECTS)].legend(handles.values(), handles, loc="center left", frameon=False)
    threads = store.header.get("threads")
    figure.suptitle(
        f"The plugin beside neml2's C++ runtime, {threads} thread{'s' if threads != 1 else ''}; less is faster"
    )
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _points(store: Store, name: str, batch: str, quantity: str) -> list[tuple[int, Ratios]]:
    """Rows, and the ratios there."""
    found = [(rows, store.get(Case(name, batch, quantity, rows))) for rows in ROWS]
    ratios = [(rows, one.ratios(PLUGIN, NATIVE)) for rows, one in found if one is not None]
    return [(rows, one) for rows, one in ratios if one is not None]


def _limits(name: str, batch: str, quantity: str) -> list[tuple[int, float]]:
    """Rows, and the targets there."""
    what = (name, batch, quantity, (PLUGIN, NATIVE))
    mine = [t for t in targets() if (t.model, t.batch, t.quantity, t.peers) == what]
    return [pair for target in mine for pair in target.limits.items()]
