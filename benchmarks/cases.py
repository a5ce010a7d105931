"""What is measured: models, batches, numbers of rows, quantities, and the peers of each."""

from __future__ import annotations

from dataclasses import dataclass

PLUGIN, NATIVE, EAGER, COMPILED = "plugin", "C++", "eager", "neml2.compile"
# Bare graph calls: the updates of each row, and the Jacobian graph once more for the test that ends its solve.
FLOOR, LAST_TEST = "floor", "last test"
COPY = "copy"

# Peers without which a case says nothing; the others are left out where they would take too long.
ESSENTIAL = (PLUGIN, NATIVE, FLOOR, LAST_TEST, COPY)

HETEROGENEOUS, HOMOGENEOUS = "heterogeneous", "homogeneous"
ROWS = (1, 10, 100, 1_000, 10_000, 100_000, 1_000_000)
QUICK_ROWS = (1, 100, 1_000)
# neml2.compile compiles anew for each number of rows, which takes minutes for an implicit model.
COMPILED_ROWS = (1, 10_000)


@dataclass(frozen=True)
class Subject:
    """A model of the stub catalogue that is measured.

    Args:
        name: of the entry.
        title: what it is, in a few words.
        implicit: whether it has an implicit segment.
        most: largest number of rows for outputs.
        most_jacobian: largest number of rows for derivatives; 0 where none were compiled.
        once: further quantities, at one row.
    """

    name: str
    title: str
    implicit: bool = True
    most: int = 1_000_000
    most_jacobian: int = 0
    once: tuple[str, ...] = ()


SUBJECTS = {
    subject.name: subject
    for subject in (
        Subject("elasticity", "forward only", implicit=False, most_jacobian=1_000_000, once=("typed",)),
        Subject("viscoplasticity", "implicit, 7 unknowns", most_jacobian=1_000_000, once=("typed", "driver")),
        Subject("chaboche", "implicit, 19 unknowns"),
        Subject("composed", "forward, implicit (7 unknowns), forward", most_jacobian=100_000),
        Subject("crystal", "single crystal, 7 unknowns, 12 slip systems as a sub-batch", most=10_000),
    )
}


@dataclass(frozen=True)
class Case:
    """One measurement.

    Args:
        model: entry of the stub catalogue.
        batch: whether all rows are the same, or differ in state and rate.
        quantity: `forward`, `jacobian`, `typed` (the call through `AOTIModel`), `driver` (100 steps of a
            TransientDriver) or `memory`.
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
        implicit = SUBJECTS[self.model].implicit
        if self.quantity == "forward":
            tested = (LAST_TEST,) if implicit else ()
            compiled = (COMPILED,) if not implicit or self._worth_compiling else ()
            return (PLUGIN, NATIVE, FLOOR, *tested, COPY, EAGER, *compiled)
        if self.quantity == "driver":
            return (PLUGIN, NATIVE, EAGER)
        return (PLUGIN, NATIVE) if self.quantity == "typed" else (PLUGIN, NATIVE, EAGER)

    @property
    def _worth_compiling(self) -> bool:
        return self.batch == HETEROGENEOUS and self.rows in COMPILED_ROWS

    @property
    def weight(self) -> float:
        """Its share of the time."""
        return {10_000: 2.0, 100_000: 5.0, 1_000_000: 15.0}.get(self.rows, 1.0)


def cases_of(name: str, batch: str, rows: tuple[int, ...]) -> list[Case]:
    """The timed cases of a model and a kind of batch, in the order of their rows."""
    subject = SUBJECTS[name]
    found = [Case(name, batch, "forward", n) for n in rows if n <= subject.most]
    if batch == HETEROGENEOUS:
        found += [Case(name, batch, "jacobian", n) for n in rows if n <= subject.most_jacobian]
        found += [Case(name, batch, quantity, 1) for quantity in subject.once]
    return found


def memory_cases_of(name: str, rows: tuple[int, ...]) -> list[Case]:
    """The cases of a model whose memory is measured: those that need any to speak of."""
    within = [n for n in rows if n <= SUBJECTS[name].most]
    return [Case(name, HETEROGENEOUS, "memory", n) for n in within if n >= 10_000 or n == within[-1]]
