"""Write docs/performance.md from stored results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from .agreement import DERIVATIVE_TOLERANCE, EAGER_TOLERANCE, TOLERANCE
from .cases import (
    COMPILED,
    COPY,
    EAGER,
    FLOOR,
    HETEROGENEOUS,
    HOMOGENEOUS,
    LAST_TEST,
    NATIVE,
    PLUGIN,
    ROWS,
    SUBJECTS,
    Case,
)
from .results import Found, Store
from .targets import FLAT, Judged, growth_of_time, judge, targets

# Written by hand: what limits what, and what was tried. Its text goes into the page as it is.
NOTES = Path(__file__).resolve().parent / "notes.md"
MIB = 2**20


def page(store: Store, picture: str) -> str:
    """The page.

    Args:
        store: the results.
        picture: name of the plot, beside the page.
    """
    judged = [one for target in targets() for one in judge(store, target)]
    parts = [
        _head(store),
        _summary(judged),
        "## Targets",
        _targets(store, judged),
        f"![Time per row against rows, a panel for each model]({picture})",
        _notes(),
        "## Time for outputs",
        *(_times(store, name, batch) for name in SUBJECTS for batch in (HETEROGENEOUS, HOMOGENEOUS)),
        "## Time for derivatives",
        *(_derivatives(store, name) for name, subject in SUBJECTS.items() if subject.most_jacobian),
        "## One row: typed call and driver",
        _once(store),
        "## Peak memory",
        _memory(store),
        "## Numbers",
        _numbers(store),
        "## Left out",
        _left_out(store),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, its first column to the left and the others to the right."""
    lines = [f"| {' | '.join(head)} |", "|---|" + "--:|" * (len(head) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _head(store: Store) -> str:
    header = store.header
    begun, ended = header.get("begun", "?"), header.get("ended")
    sources = f"commit {header.get('commit', '?')}" + (" with changes" if header.get("changed") else "")
    machine, versions, graphs = header.get("machine", {}), header.get("versions", {}), header.get("graphs", {})
    many = sum(one["graphs"] for one in graphs.values())
    parallel = sum(one["parallel"] for one in graphs.values())
    wrappers = "optimised" if header.get("optimised") else "NOT OPTIMISED: the times below mean nothing"
    facts = [
        ("machine", f"{machine.get('processor')}, {machine.get('cores')} cores, {machine.get('memory')}"),
        ("caches", f"{machine.get('caches')}"),
        ("system", f"{machine.get('system')}"),
        ("threads", f"{header.get('threads')} (`torch.set_num_threads`), for all peers"),
        ("graphs", f"{many}, of which {parallel} have kernels on several threads; wrappers {wrappers}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("plugin", f"{sources}, sources {header.get('sources')}"),
        ("measured", f"begun {begun}, " + (f"ended {ended}" if ended else "not ended: the tables are not complete")),
        ("load", f"{header.get('load')}: the highest load average of one minute that was seen after a case"),
    ]
    return "\n".join(
        [
            "# Performance",
            "",
            "Made by",
            "",
            f"    {header.get('command', 'python -m benchmarks')}",
            "",
            "which `make benchmark` calls. The page is written anew from the stored results with `--report-only`.",
            "",
            table(("", ""), facts).replace("--:|", "---|"),
            "",
            "In each case all peers are in one process, on the same artifact and the same rows, and are called in",
            "turn. A ratio is the median over the rounds of the plugin's time over the other's in the same round.",
            "",
            "- *Heterogeneous* rows are random states of the stub's own history, with strain rates spread over 6",
            "  decades. *Homogeneous* rows are all one state of it.",
            f"- *{NATIVE}* is neml2's own runtime, *eager* is neml2 without compiling. *neml2.compile* is eager neml2",
            "  after that call; of an implicit model it compiles the residual.",
            f"- *{FLOOR}* is the time of the compiled graphs alone, called by torch's bare loader: for a solve, the",
            "  Jacobian graph and the solve graph, for each update, on the rows that need it, in blocks of the size",
            f"  that is fastest. *{LAST_TEST}* is the Jacobian graph once for each row, which a solve needs besides",
            "  to know that it has ended.",
            f"- *{COPY}* copies inputs and outputs once.",
        ]
    )


def _summary(judged: list[Judged]) -> str:
    met = sum(one.met for one in judged)
    missing = sum(one.ratio is None for one in judged)
    over = [one for one in judged if one.ratio is not None and not one.met]
    lines = [f"Of {len(judged)} targets {met} are met, {len(over)} are not, and {missing} were not measured."]
    lines += [
        f"- {one.target.model}, {one.target.title}, {one.rows:,} row{'s' if one.rows > 1 else ''}: "
        f"{one.ratio:.2f}, which is {one.ratio - one.limit:.2f} over {one.limit:.2f}."
        for one in over
        if one.ratio is not None
    ]
    return "\n".join([lines[0], "", *lines[1:]]) if over else lines[0]


def _targets(store: Store, judged: list[Judged]) -> str:
    rows = [(one.target.title, one.target.model, f"{one.rows:,}", f"{one.limit:.2f}", *_verdict(one)) for one in judged]
    for name in SUBJECTS:
        grown = growth_of_time(store, name)
        if grown is not None:
            verdict = "met" if grown[1] <= FLAT else f"{grown[1] - FLAT:.2f} over"
            title = "outputs, time per row to that at 1,000"
            rows.append((title, name, f"{grown[0]:,}", f"{FLAT:.2f}", f"{grown[1]:.2f}", "", "", verdict))
    told = (
        "The column *floor* is the floor's own ratio to the same peer: no runtime that makes these graph calls comes "
        "below it."
    )
    return f"{table(('ratio', 'model', 'rows', 'target', 'measured', 'quartiles', 'floor', ''), rows)}\n\n{told}"


def _verdict(one: Judged) -> tuple[str, str, str, str]:
    if one.ratio is None:
        return "-", "", "", one.reason if one.reason.startswith("not measured") else f"not measured: {one.reason}"
    quartiles = f"{one.quartiles[0]:.2f} to {one.quartiles[1]:.2f}" if one.quartiles else ""
    verdict = "met" if one.met else f"**{one.ratio - one.limit:.2f} over**"
    return f"{one.ratio:.2f}", quartiles, "" if one.floor is None else f"{one.floor:.2f}", verdict


def _notes() -> str:
    return NOTES.read_text(encoding="utf-8").strip() if NOTES.exists() else ""


def _found(store: Store, name: str, batch: str, quantity: str) -> list[tuple[int, Found]]:
    listed = [(n, store.get(Case(name, batch, quantity, n))) for n in ROWS]
    return [(n, found) for n, found in listed if found is not None]


def _times(store: Store, name: str, batch: str) -> str:
    found = _found(store, name, batch, "forward")
    if not found:
        return ""
    bounds = (FLOOR, LAST_TEST) if SUBJECTS[name].implicit else (FLOOR,)
    peers = (NATIVE, *bounds, COPY, EAGER, COMPILED)
    head = ("rows", "updates", "plugin", *(f"/ {peer}" for peer in peers[: 1 + len(bounds)]), *peers)
    if len(bounds) == 2:
        head = tuple("/ (floor + last test)" if cell == f"/ {LAST_TEST}" else cell for cell in head)
    rows = []
    for n, one in found:
        ratios = [ratio(one.ratio(PLUGIN, NATIVE)), ratio(one.ratio(PLUGIN, FLOOR))]
        ratios += [ratio(_to_both(one))] if len(bounds) == 2 else []
        rows.append((f"{n:,}", _updates(one), duration(one.time(PLUGIN)), *ratios, *(cell(one, p) for p in peers)))
    return f"### {name} ({SUBJECTS[name].title}), {batch}\n\n{table(head, rows)}"


def _to_both(one: Found) -> float | None:
    mine, floor, test = (one.time(peer) for peer in (PLUGIN, FLOOR, LAST_TEST))
    return None if mine is None or floor is None or test is None else mine / (floor + test)


def _updates(one: Found) -> str:
    """The mean and the largest number of Newton updates."""
    if len(one.updates) < 2:
        return "-"
    total = sum(one.updates)
    return f"{sum(k * n for k, n in enumerate(one.updates)) / total:.1f}, at most {len(one.updates) - 1}"


def _derivatives(store: Store, name: str) -> str:
    found = _found(store, name, HETEROGENEOUS, "jacobian")
    if not found:
        return ""
    rows = [
        (f"{n:,}", duration(o.time(PLUGIN)), ratio(o.ratio(PLUGIN, NATIVE)), cell(o, NATIVE), cell(o, EAGER))
        for n, o in found
    ]
    return f"### {name}, heterogeneous\n\n{table(('rows', 'plugin', f'/ {NATIVE}', NATIVE, EAGER), rows)}"


def _once(store: Store) -> str:
    rows = []
    for name, subject in SUBJECTS.items():
        for quantity in subject.once:
            one = store.get(Case(name, HETEROGENEOUS, quantity, 1))
            if one is not None:
                what = {"typed": "call through `AOTIModel`", "driver": "TransientDriver, 100 steps"}[quantity]
                times = (duration(one.time(PLUGIN)), ratio(one.ratio(PLUGIN, NATIVE)), cell(one, NATIVE))
                rows.append((what, name, *times, cell(one, EAGER)))
    return table(("", "model", "plugin", f"/ {NATIVE}", f"{NATIVE} shim", EAGER), rows) if rows else ""


def _memory(store: Store) -> str:
    rows = []
    for name in SUBJECTS:
        for n, one in _found(store, name, HETEROGENEOUS, "memory"):
            mine, theirs = one.growth.get(PLUGIN), one.growth.get(NATIVE)
            both = ratio(mine / theirs) if mine is not None and theirs else "-"
            grown = [mib(one.growth.get(peer)) for peer in (PLUGIN, NATIVE, EAGER)]
            rows.append((name, f"{n:,}", mib(one.size.get("inputs")), mib(one.size.get("outputs")), *grown, both))
    head = ("model", "rows", "inputs", "outputs", PLUGIN, NATIVE, EAGER, f"plugin / {NATIVE}")
    told = (
        "Each number is from a process of its own: by how many MiB its peak grew in one call for outputs, on "
        "heterogeneous rows, after a call on few rows had loaded the graphs. Inputs are there before; outputs count."
    )
    return f"{told}\n\n{table(head, rows)}" if rows else ""


def _numbers(store: Store) -> str:
    checked = [one for one in store.cases.values() if NATIVE in one.deviations]
    if not checked:
        return ""
    derived = [one for one in checked if "/jacobian/" in one.key]
    worst = max((one.deviations[NATIVE] for one in checked if one not in derived), default=0.0)
    worst_derived = max((one.deviations[NATIVE] for one in derived), default=0.0)
    judged, stable = sum(one.judged for one in checked), all(one.stable for one in checked)
    eager = max((one.deviations.get(EAGER, 0.0) for one in checked), default=0.0)
    failed = [one for one in checked if one.trouble]
    lines = [
        f"Before anything was timed, in {len(checked)} cases, each row was compared. The plugin and the C++ runtime",
        f"differ by at most {worst:.1e} of the largest entry of a row in outputs (limit {TOLERANCE:.0e}), and by at",
        f"most {worst_derived:.1e} in derivatives (limit {DERIVATIVE_TOLERANCE:.0e}); {judged:,} rows that differed by "
        f"more than {TOLERANCE:.0e} were solved",
        "again by the C++ runtime with a tighter tolerance, since it leaves its slowest rows where its tolerance is",
        f"met. Eager neml2 differs by at most {eager:.1e} (limit {EAGER_TOLERANCE:.0e}). Two calls of the plugin gave",
        f"the same bits in {'all cases' if stable else 'NOT ALL cases'}.",
        *(f"- {one.key}: {one.trouble}" for one in failed),
    ]
    unstable = [one.key for one in checked if one.stable is False]
    lines += [f"- not the same bits: {', '.join(unstable)}"] if unstable else []
    return "\n".join(lines)


def _left_out(store: Store) -> str:
    lines = []
    for key, one in store.cases.items():
        if one.trouble:
            lines.append(f"- `{key}`: {one.trouble}.")
        lines += [f"- `{key}`, {peer}: {reason}." for peer, reason in one.skipped.items() if not one.trouble]
    return "\n".join(lines) or "Nothing."


def cell(one: Found, peer: str) -> str:
    """Time of a peer, or that it was left out."""
    return duration(one.time(peer)) if peer in one.seconds else "left out" if peer in one.skipped else "-"


def ratio(value: float | None) -> str:
    """A ratio."""
    return "-" if value is None else f"{value:.2f}"


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
