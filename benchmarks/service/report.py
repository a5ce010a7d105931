"""The measured part of docs/service.md, and its picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from .. import machine
from ..markdown import mib, table
from .load import WORKERS, Case, Load
from .soak import BAD, TOLERANCE, Soak
from .states import ROWS, STUB

HEAD = ("workers", "gathered", "data", "clients", "requests/s", "p50 ms", "p95 ms", "p99 ms", "processor us", "errors")
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
# Of one-row requests on two cores; binary.
CLIENTS, PER_SECOND, P99_MS, BEYOND_MS = 64, 4_000.0, 50.0, 0.5


def write_page(file: Path, text: str) -> None:
    """Put the measured part in its place on the page."""
    page = file.read_text(encoding="utf-8")
    before, begin, rest = page.partition(BEGIN)
    _, end, behind = rest.partition(END)
    if not (begin and end):
        raise RuntimeError(f"{file} has no part between {BEGIN} and {END}")
    file.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{behind}", encoding="utf-8")


def measured(loads: Sequence[Load], soak: Soak | None, seconds: float, command: str) -> str:
    """The measured part as text; the long run is None if it was not made."""
    about = machine.description()
    commit = machine.sources(machine.ROOT)["commit"]
    cases = _by_case(loads)
    rounds = len(next(iter(cases.values())))
    parts = [
        f"Made by `{command}` at commit {commit}, on {about['processor']}, {about['cores']} cores, which the service "
        f"and its clients share; load at the end {machine.load()}. The model is {STUB}, with optimised wrappers. A "
        f"request has one row, one of {ROWS} that differ in state and rate. Each line is the median of {rounds} rounds "
        f"of {seconds:g} s of wrk, with the least and the most in brackets; *processor* is the service's own time for "
        f"each request. The call itself, again and again in a process of its own, takes "
        f"{_told([load.call for load in loads], 2)} ms.",
        table(HEAD, [_line(rounds) for rounds in cases.values()]),
        _targets(cases),
        "A target is undecided where it lies between the least and the most.",
        "![requests per second and latency](service.png)",
    ]
    if soak is not None:
        parts.append(_soaked(soak))
    return "\n\n".join(parts)


def _by_case(loads: Sequence[Load]) -> dict[Case, list[Load]]:
    """All rounds of each case: one worker first, those gathered first, JSON first, few clients first."""
    cases: dict[Case, list[Load]] = {}
    for load in sorted(loads, key=lambda load: (load.workers, not load.gathered, load.binary, load.clients)):
        cases.setdefault(load.case, []).append(load)
    return cases


def _told(values: Sequence[float], digits: int) -> str:
    """The median, with the least and the most."""
    return f"{median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def _line(rounds: Sequence[Load]) -> list[str]:
    one = rounds[0]
    return [
        str(one.workers),
        "yes" if one.gathered else "no",
        "binary" if one.binary else "JSON",
        str(one.clients),
        _told([load.per_second for load in rounds], 0),
        *(_told([getattr(load, name) for load in rounds], 2) for name in ("p50", "p95", "p99")),
        _told([load.cpu for load in rounds], 0),
        str(sum(load.failed for load in rounds)),
    ]


def _targets(cases: dict[Case, list[Load]]) -> str:
    # A worker for each of the two cores; a single client uses one.
    both = max(workers for workers, _, _, _ in cases)
    many, one = cases[both, True, True, CLIENTS], cases[1, True, True, 1]
    most = max(clients for _, _, _, clients in cases)
    failed = sum(load.failed for rounds in cases.values() for load in rounds if load.clients == most)
    times = {
        workers: [
            a.per_second / b.per_second
            for a, b in zip(cases[workers, True, True, CLIENTS], cases[workers, False, True, CLIENTS], strict=True)
        ]
        for workers in (1, both)
    }
    rates, slowest = [load.per_second for load in many], [load.p99 for load in many]
    beyond = [load.p50 - load.call for load in one]
    rows = [
        (f"{CLIENTS} clients, 1 worker, to no gathering", "", _told(times[1], 1), ""),
        (f"{CLIENTS} clients, {both} workers, to no gathering", "", _told(times[both], 1), ""),
        (
            f"{CLIENTS} clients, {both} workers, requests/s",
            f"at least {PER_SECOND:,.0f}",
            _told(rates, 0),
            _at_least(rates, PER_SECOND),
        ),
        (
            f"{CLIENTS} clients, {both} workers, p99, ms",
            f"below {P99_MS:g}",
            _told(slowest, 1),
            _at_most(slowest, P99_MS),
        ),
        (
            "1 client, 1 worker, p50 beyond the call, ms",
            f"at most {BEYOND_MS:g}",
            _told(beyond, 2),
            _at_most(beyond, BEYOND_MS),
        ),
        (f"{most} clients, errors", "none", str(failed), "**not met**" if failed else "met"),
    ]
    return table(("target (binary)", "asked", "measured", ""), rows)


def _at_least(values: Sequence[float], target: float) -> str:
    return "met" if min(values) >= target else "**not met**" if max(values) < target else "undecided"


def _at_most(values: Sequence[float], target: float) -> str:
    return _at_least([-value for value in values], -target)


def _soaked(soak: Soak) -> str:
    tenth = soak.memory[len(soak.memory) // 10]
    wrong = ", ".join(f"{what} ({count})" for what, count in soak.wrong.items()) or "nothing"
    return (
        f"A long run: {soak.requests:,} requests in {soak.seconds:.0f} s, one in {BAD} a bad one. {soak.good:,} "
        "good ones were answered with the right numbers, the largest difference from the row alone being "
        f"{soak.worst:.1e} of the largest entry ({TOLERANCE:g} is allowed); {soak.bad:,} bad ones were refused with "
        f"the right status; wrong was {wrong}. The service had {mib(tenth)} MiB after a tenth of the requests, and "
        f"{mib(soak.memory[-1])} MiB at the end."
    )


def draw(loads: Sequence[Load], file: Path) -> None:
    """Draw requests per second and the 99th percentile of the latency against clients."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.0, 3.6), layout="constrained")
    styles = {(True, True): "o-", (True, False): "o--", (False, True): "s-", (False, False): "s--"}
    cases = _by_case(loads)
    for (binary, gathered), style in styles.items():
        mine = [rounds for case, rounds in cases.items() if case[:3] == (WORKERS[-1], gathered, binary)]
        label = f"{'binary' if binary else 'JSON'}, {'gathered' if gathered else 'not gathered'}"
        clients = [rounds[0].clients for rounds in mine]
        left.plot(clients, [median(load.per_second for load in rounds) for rounds in mine], style, label=label)
        right.plot(clients, [median(load.p99 for load in rounds) for rounds in mine], style, label=label)
    for panel, name in ((left, "requests per second"), (right, "p99 of the latency, ms")):
        panel.set(xscale="log", yscale="log", xlabel="clients", ylabel=name)
        panel.set_xticks([load.clients for load in loads], [str(load.clients) for load in loads])
        panel.grid(True, which="major", alpha=0.3)
    left.legend(frameon=False)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
