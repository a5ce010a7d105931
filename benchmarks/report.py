"""Write docs/performance.md from stored results."""

from __future__ import annotations

from pathlib import Path

from .agreement import DERIVATIVE_TOLERANCE, EAGER_TOLERANCE, TOLERANCE
from .cases import COMPILED, COPY, EAGER, HETEROGENEOUS, HOMOGENEOUS, NATIVE, PLUGIN, ROWS, SUBJECTS, Case
from .markdown import duration, mib, table
from .results import Found, Store
from .targets import MET, MISSED, MISSING, NOT_PART, UNDECIDED, Judged, judge, targets

# Written by hand: what limits what, and what was tried. Its text goes into the page as it is.
NOTES = Path(__file__).resolve().parent / "notes.md"
# The numbers of rows in the first table.
GAINS = (1, 1_000, 1_000_000)


def page(store: Store, picture: str) -> str:
    """The page, with the plot of this name beside it."""
    judged = [one for target in targets() for one in judge(store, target)]
    parts = [
        "# Performance",
        _gains(store),
        f"![Ratio to the C++ runtime against rows, a panel for each model]({picture})",
        "## How it was measured",
        _head(store),
        _notes(),
        *_section(
            "Times for outputs",
            *(_times(store, name, batch, "forward") for name in SUBJECTS for batch in (HETEROGENEOUS, HOMOGENEOUS)),
        ),
        *_section(
            "Times for outputs and derivatives",
            *(_times(store, name, HETEROGENEOUS, "jacobian") for name in SUBJECTS),
        ),
        *_section("One row: typed call and driver", _once(store)),
        *_section("Peak memory", _memory(store)),
        *_section("Numbers", _numbers(store)),
        *_section("Targets", _summary(judged), _targets(judged)),
        *_section("Left out", _left_out(store)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _gains(store: Store) -> str:
    """What a user gains: a table of times beside eager neml2 and the C++ runtime."""
    rows = []
    for name, subject in SUBJECTS.items():
        for n, one in _found(store, name, HETEROGENEOUS, "forward"):
            if n in GAINS:
                times = (duration(one.time(PLUGIN)), cell(one, EAGER), cell(one, NATIVE))
                rows.append((f"{name} ({subject.title})", f"{n:,}", *times, faster(one, EAGER), faster(one, NATIVE)))
    head = ("model", "rows", "compiled, by the plugin", EAGER, NATIVE, f"times as fast as {EAGER}", f"as {NATIVE}")
    told = (
        "What a call for outputs takes on one thread, compiled and run by this plugin, beside eager neml2 and neml2's "
        "own C++ runtime. By default a call uses as many threads as torch has: two take about half of the time from "
        "some thousand rows of an implicit model on, and change nothing below one block of rows ([threads]"
        "(howto/rows-and-threads.md#threads)); *Targets* has the ratios."
    )
    return f"{told}\n\n{table(head, rows)}" if rows else ""


def _section(title: str, *parts: str) -> list[str]:
    """Parts under a title; nothing where all are empty."""
    return [f"## {title}", *parts] if any(parts) else []


def _head(store: Store) -> str:
    header = store.header
    begun, ended = header.get("begun", "?"), header.get("ended")
    sources = f"commit {header.get('commit', '?')}" + (" with changes" if header.get("changed") else "")
    machine, versions, graphs = header.get("machine", {}), header.get("versions", {}), header.get("graphs", {})
    many = sum(one["graphs"] for one in graphs.values())
    parallel = sum(one["parallel"] for one in graphs.values())
    wrappers = "optimised" if header.get("optimised") else "NOT OPTIMISED: the times below mean nothing"
    facts = [
        ("command", f"`{header.get('command', 'python -m benchmarks')}`, which `make benchmark` calls"),
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
    return f"""{table(("", ""), facts, left=2)}

In each case all peers are in one process, on the same artifact and the same rows, and their results are compared
first. Then they are called in turn, round by round. Each is called twice in a row and the second call is timed, so that
no peer pays for another's cache misses; short calls are made many times instead of once. A ratio is taken in each
round; the tables have its median over the rounds, and *Targets* also has its minimum and its quartiles.

- *Heterogeneous* rows are random states of the stub's own history, with strain rates spread over 6 decades.
  *Homogeneous* rows are all one state of it.
- *{NATIVE}* is neml2's own runtime, *{EAGER}* is neml2 without compiling. *{COMPILED}* is eager neml2 after that call;
  of an implicit model it compiles the residual.
- *{COPY}* copies inputs and outputs once."""


def _summary(judged: list[Judged]) -> str:
    count = {verdict: sum(one.verdict == verdict for one in judged) for verdict in (MET, MISSED, UNDECIDED, MISSING)}
    return (
        f"Of {len(judged)} targets {count[MET]} are met, {count[MISSED]} are not, {count[UNDECIDED]} are undecided, "
        f"and {count[MISSING]} were not measured. A target is undecided where the quartiles of the measured ratio are "
        "further apart than its median is from the target."
    )


def _targets(judged: list[Judged]) -> str:
    told_of = [one for one in judged if one.reason != NOT_PART]
    rows = [
        (one.target.title, one.target.model, f"{one.rows:,}", f"{one.limit:.2f}", *_verdict(one)) for one in told_of
    ]
    head = ("ratio", "model", "rows", "target", "median", "minimum", "quartiles", "")
    return table(head, rows) if rows else ""


def _verdict(one: Judged) -> tuple[str, str, str, str]:
    if one.ratio is None:
        return "-", "", "", f"{MISSING}: {one.reason}"
    least, quartiles = "", ""
    if one.ratios is not None:
        least, quartiles = f"{one.ratios.least:.2f}", f"{one.ratios.low:.2f} to {one.ratios.high:.2f}"
    gap = one.ratio - one.limit
    told = {
        MET: MET,
        MISSED: f"**{gap:.2f} over**",
        UNDECIDED: f"{UNDECIDED}, {abs(gap):.2f} {'over' if gap > 0 else 'under'}",
    }
    return f"{one.ratio:.2f}", least, quartiles, told[one.verdict]


def _notes() -> str:
    return NOTES.read_text(encoding="utf-8").strip() if NOTES.exists() else ""


def _found(store: Store, name: str, batch: str, quantity: str) -> list[tuple[int, Found]]:
    listed = [(n, store.get(Case(name, batch, quantity, n))) for n in ROWS]
    return [(n, found) for n, found in listed if found is not None]


def _times(store: Store, name: str, batch: str, quantity: str) -> str:
    """The times of a model on a kind of batch; of calls for outputs, also the updates."""
    found = _found(store, name, batch, quantity)
    if not found:
        return ""
    alone = quantity == "forward"
    peers = tuple(p for p in (NATIVE, COPY, EAGER, COMPILED) if any(p in one.seconds for _, one in found))
    head = ("rows", *(("updates",) if alone else ()), PLUGIN, f"/ {NATIVE}", *peers)
    rows = []
    for n, one in found:
        times = duration(one.time(PLUGIN)), ratio(one, NATIVE), *(cell(one, peer) for peer in peers)
        rows.append((f"{n:,}", *((_updates(one),) if alone else ()), *times))
    title = f"{name} ({SUBJECTS[name].title})" if alone else name
    return f"### {title}, {batch}\n\n{table(head, rows)}"


def _updates(one: Found) -> str:
    """The mean and the largest number of Newton updates."""
    if len(one.updates) < 2:
        return "-"
    total = sum(one.updates)
    return f"{sum(k * n for k, n in enumerate(one.updates)) / total:.1f}, at most {len(one.updates) - 1}"


def _once(store: Store) -> str:
    rows = []
    for name, subject in SUBJECTS.items():
        for quantity in subject.once:
            one = store.get(Case(name, HETEROGENEOUS, quantity, 1))
            if one is not None:
                what = {"typed": "call through `AOTIModel`", "driver": "TransientDriver, 100 steps"}[quantity]
                times = (duration(one.time(PLUGIN)), ratio(one, NATIVE), cell(one, NATIVE))
                rows.append((what, name, *times, cell(one, EAGER)))
    return table(("", "model", "plugin", f"/ {NATIVE}", f"{NATIVE} shim", EAGER), rows) if rows else ""


def _memory(store: Store) -> str:
    rows = []
    for name in SUBJECTS:
        for n, one in _found(store, name, HETEROGENEOUS, "memory"):
            mine, theirs = one.growth.get(PLUGIN), one.growth.get(NATIVE)
            both = f"{mine / theirs:.2f}" if mine is not None and theirs else "-"
            grown = [mib(one.growth.get(peer)) for peer in (PLUGIN, NATIVE)]
            rows.append((name, f"{n:,}", mib(one.size.get("inputs")), mib(one.size.get("outputs")), *grown, both))
    head = ("model", "rows", "inputs", "outputs", PLUGIN, NATIVE, f"plugin / {NATIVE}")
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
    eager = [one.deviations[EAGER] for one in checked if EAGER in one.deviations]
    failed = [one for one in checked if one.trouble]
    lines = [
        f"Before anything was timed, in {len(checked)} cases, each row was compared. The plugin and the C++ runtime",
        f"differ by at most {worst:.1e} of the largest entry of a row in outputs (limit {TOLERANCE:.0e}), and by at",
        f"most {worst_derived:.1e} in derivatives (limit {DERIVATIVE_TOLERANCE:.0e}); {judged:,} rows that differed by "
        f"more than {TOLERANCE:.0e} were solved",
        "again by the C++ runtime with a tighter tolerance, since it leaves its slowest rows where its tolerance is",
        f"met. Two calls of the plugin gave the same bits in {'all cases' if stable else 'NOT ALL cases'}.",
        *([f"Eager neml2 differs by at most {max(eager):.1e} (limit {EAGER_TOLERANCE:.0e})."] if eager else []),
        *(f"- {one.key}: {one.trouble}" for one in failed),
    ]
    unstable = [one.key for one in checked if one.stable is False]
    lines += [f"- not the same bits: {', '.join(unstable)}"] if unstable else []
    return "\n".join(lines)


def _left_out(store: Store) -> str:
    lines = [f"- `{key}`: {one.trouble}." for key, one in store.cases.items() if one.trouble]
    where: dict[tuple[str, str], list[str]] = {}
    for key, one in store.cases.items():
        for peer, reason in one.skipped.items():
            if not one.trouble:
                where.setdefault((peer, reason), []).append(f"`{key}`")
    for (peer, reason), keys in where.items():
        lines.append(f"- {peer}: {reason} ({', '.join(keys) if len(keys) < 4 else f'{len(keys)} cases'}).")
    return "\n".join(lines) or "Nothing."


def cell(one: Found, peer: str) -> str:
    """Time of a peer, or that it was left out."""
    return duration(one.time(peer)) if peer in one.seconds else "left out" if peer in one.skipped else "-"


def ratio(one: Found, peer: str) -> str:
    """The plugin's time over that of a peer."""
    found = one.ratios(PLUGIN, peer)
    return "-" if found is None else f"{found.median:.2f}"


def faster(one: Found, peer: str) -> str:
    """How many times as fast as a peer the plugin is."""
    found = one.ratios(PLUGIN, peer)
    if found is None:
        return "-"
    times = 1 / found.median
    return f"{times:.0f}" if times >= 10 else f"{times:.2g}"
