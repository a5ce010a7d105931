"""What is measured: models, batches, numbers of rows, quantities, and the peers of each."""

from __future__ import annotations

from dataclasses import dataclass

PLUGIN, NATIVE, EAGER, COMPILED = "plugin", "C++", "eager", "neml2.compile"
COPY = "copy"
# The plugin with `torch.set_num_threads(2)`, beside itself with one thread.
TWO_THREADS = "plugin, 2 threads"

# Peers without which a case says nothing; the others are left out where they would take too long.
ESSENTIAL = (PLUGIN, NATIVE, COPY, TWO_THREADS)

HETEROGENEOUS, HOMOGENEOUS = "heterogeneous", "homogeneous"
ROWS = (1, 10, 100, 1_000, 10_000, 100_000, 1_000_000)
QUICK_ROWS = (1, 10, 100, 1_000)
THREADS_ROWS = (100, 1_000, 4_096, 10_000, 100_000, 1_000_000)
# neml2.compile compiles anew for each number of rows, which takes minutes for an implicit model: two models only.
COMPILED_ROWS = {"elasticity": (1, 10_000), "viscoplasticity": (10_000,)}
# About what a case costs besides its calls, in seconds, and how often its calls are made at least.
BASE_SECONDS, LEAST_CALLS = 8.0, 9
# How much longer a call for derivatives takes.
DERIVATIVES = 1.5


@dataclass(frozen=True)
class Subject:
    """A model of the stub catalogue that is measured.

    Args:
        name: of the entry.
        title: what it is, in a few words.
        implicit: whether it has an implicit segment.
        row_seconds: what a row takes in the plugin and in the C++ runtime together, in a large heterogeneous batch; it
            decides how the time is shared out.
        most: largest number of rows for outputs.
        most_homogeneous: largest number of rows that are all the same.
        most_jacobian: largest number of rows for derivatives; 0 where none were compiled.
        once: further quantities, at one row.
        threads: numbers of rows at which it is also timed on two threads.
    """

    name: str
    title: str
    row_seconds: float
    implicit: bool = True
    most: int = 1_000_000
    most_homogeneous: int = 10_000
    most_jacobian: int = 0
    once: tuple[str, ...] = ()
    threads: tuple[int, ...] = ()


SUBJECTS = {
    subject.name: subject
    for subject in (
        Subject(
            "elasticity",
            "explicit",
            1e-7,
            implicit=False,
            most_homogeneous=1_000_000,
            most_jacobian=1_000_000,
            once=("typed",),
            threads=(1_000, 100_000, 1_000_000),
        ),
        Subject(
            "viscoplasticity",
            "implicit, 7 unknowns",
            3.2e-5,
            most_homogeneous=1_000_000,
            most_jacobian=1_000_000,
            once=("typed", "driver"),
            threads=THREADS_ROWS[:-1],
        ),
        Subject("chaboche", "implicit, 19 unknowns", 2.4e-4, most=100_000, most_homogeneous=100_000),
        Subject("composed", "explicit, implicit (7 unknowns), explicit", 5.5e-5, most_jacobian=1_000_000),
        Subject("crystal", "single crystal, 7 unknowns, 12 slip systems as a sub-batch", 1.6e-4, most=10_000),
    )
}


@dataclass(frozen=True)
class Case:
    """One measurement.

    Args:
        model: entry of the stub catalogue.
        batch: whether all rows are the same, or differ in state and rate.
        quantity: `forward`, `jacobian` (outputs and derivatives), `typed` (the call through `AOTIModel`), `driver` (100
            steps of a TransientDriver), `threads` (outputs, two threads beside one) or `memory`.
        rows: number of rows.
    """

    model: str
    batch: str
    quantity: str
    rows: int

    @property
    def key(self) -> str:
        """Its name in the results."""
        return f"{self.model}/{self.batch}/{self.quantity}/{self.rows}"

    @property
    def peers(self) -> tuple[str, ...]:
        """The peers that it is measured on, the plugin first."""
        if self.quantity == "forward":
            compiled = self.batch == HETEROGENEOUS and self.rows in COMPILED_ROWS.get(self.model, ())
            return (PLUGIN, NATIVE, COPY, EAGER, *((COMPILED,) if compiled else ()))
        if self.quantity == "threads":
            return (PLUGIN, TWO_THREADS)
        return (PLUGIN, NATIVE) if self.quantity in ("typed", "memory") else (PLUGIN, NATIVE, EAGER)

    @property
    def weight(self) -> float:
        """Its share of the time: about the seconds that it needs at least."""
        per_row = SUBJECTS[self.model].row_seconds
        if self.quantity == "jacobian":
            per_row *= DERIVATIVES
        elif self.batch == HOMOGENEOUS or self.quantity == "threads":
            # Without the C++ runtime, which goes on until the slowest row has converged; or with few updates in it.
            per_row *= 0.3
        calls = 2 if self.quantity == "memory" else LEAST_CALLS
        return BASE_SECONDS + calls * per_row * self.rows


def cases_of(name: str, batch: str, rows: tuple[int, ...]) -> list[Case]:
    """The timed cases of a model and a kind of batch, in the order of their rows."""
    subject = SUBJECTS[name]
    most = subject.most if batch == HETEROGENEOUS else subject.most_homogeneous
    found = [Case(name, batch, "forward", n) for n in rows if n <= most]
    if batch == HETEROGENEOUS:
        found += [Case(name, batch, "jacobian", n) for n in rows if n <= subject.most_jacobian]
        found += [Case(name, batch, quantity, 1) for quantity in subject.once]
        found += [Case(name, batch, "threads", n) for n in THREADS_ROWS if n in subject.threads and n <= max(rows)]
    return found


def memory_case_of(name: str) -> Case:
    """The case of a model whose memory is measured: the most rows, for fewer need hardly any."""
    return Case(name, HETEROGENEOUS, "memory", SUBJECTS[name].most)
