"""The measured part of docs/service.md, and its picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .. import machine
from ..markdown import mib, table
from .load import Load
from .soak import BAD, TOLERANCE, Soak
from .states import ROWS, STUB

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
# Of one-row requests on two cores; binary.
CLIENTS, TIMES, PER_SECOND, P99_MS, BEYOND_MS = 64, 5.0, 5_000.0, 50.0, 0.4


def write_page(file: Path, text: str) -> None:
    """Put the measured part in its place on the page."""
    page = file.read_text(encoding="utf-8")
    before, begin, rest = page.partition(BEGIN)
    _, end, behind = rest.partition(END)
    if not (begin and end):
        raise RuntimeError(f"{file} has no part between {BEGIN} and {END}")
    file.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{behind}", encoding="utf-8")


def measured(loads: Sequence[Load], soak: Soak | None, seconds: float, call: float, command: str) -> str:
    """The measured part as text.

    Args:
        loads: by wrk.
        soak: the long run; None if it was not made.
        seconds: of each measurement.
        call: seconds of a call of one row in a process of its own.
        command: that measured.
    """
    about = machine.description()
    commit = machine.sources(machine.ROOT)["commit"]
    parts = [
        f"Made by `{command}` at commit {commit}, on {about['processor']}, {about['cores']} cores, which the service "
        f"and its clients share; load at the end {machine.load()}. The model is {STUB}, with optimised wrappers. A "
        f"request has one row, one of {ROWS} that differ in state and rate. Each line is {seconds:g} s of wrk; "
        f"*processor* is the service's own time for each request. The call itself takes {call * 1e3:.2f} ms alone.",
        table(
            ("data", "gathered", "clients", "requests/s", "p50 ms", "p95 ms", "p99 ms", "processor us", "errors"),
            [_line(load) for load in loads],
        ),
        _targets(loads, call),
        "![requests per second and latency](service.png)",
    ]
    if soak is not None:
        parts.append(_soaked(soak))
    return "\n\n".join(parts)


def _line(load: Load) -> list[str]:
    return [
        "binary" if load.binary else "JSON",
        "yes" if load.gathered else "no",
        str(load.clients),
        f"{load.per_second:,.0f}",
        *(f"{x:.2f}" for x in (load.p50, load.p95, load.p99)),
        f"{load.cpu:.0f}",
        str(load.failed),
    ]


def _targets(loads: Sequence[Load], call: float) -> str:
    def find(clients: int, gathered: bool) -> Load:
        return next(x for x in loads if x.binary and (x.clients, x.gathered) == (clients, gathered))

    many, without, one = find(CLIENTS, True), find(CLIENTS, False), find(1, True)
    most = max(load.clients for load in loads)
    failed = sum(load.failed for load in loads if load.clients == most)
    times, beyond = many.per_second / without.per_second, one.p50 - call * 1e3
    rows = [
        (f"{CLIENTS} clients, to no gathering", f"at least {TIMES:g}", f"{times:.1f}", times >= TIMES),
        (
            f"{CLIENTS} clients, requests/s",
            f"at least {PER_SECOND:,.0f}",
            f"{many.per_second:,.0f}",
            many.per_second >= PER_SECOND,
        ),
        (f"{CLIENTS} clients, p99", f"below {P99_MS:g} ms", f"{many.p99:.1f} ms", many.p99 < P99_MS),
        ("1 client, p50 beyond the call", f"at most {BEYOND_MS:g} ms", f"{beyond:.2f} ms", beyond <= BEYOND_MS),
        (f"{most} clients, errors", "none", str(failed), failed == 0),
    ]
    return table(
        ("target (binary)", "asked", "measured", ""),
        [(what, asked, found, "met" if met else "**not met**") for what, asked, found, met in rows],
    )


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
    for (binary, gathered), style in styles.items():
        mine = [load for load in loads if (load.binary, load.gathered) == (binary, gathered)]
        label = f"{'binary' if binary else 'JSON'}, {'gathered' if gathered else 'not gathered'}"
        clients = [load.clients for load in mine]
        left.plot(clients, [load.per_second for load in mine], style, label=label)
        right.plot(clients, [load.p99 for load in mine], style, label=label)
    for panel, name in ((left, "requests per second"), (right, "p99 of the latency, ms")):
        panel.set(xscale="log", yscale="log", xlabel="clients", ylabel=name)
        panel.set_xticks([load.clients for load in loads], [str(load.clients) for load in loads])
        panel.grid(True, which="major", alpha=0.3)
    left.legend(frameon=False)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
