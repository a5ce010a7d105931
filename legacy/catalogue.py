"""What is built: the releases of neml2, the scenarios, and which release can build which scenario."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

INPUTS = Path(__file__).resolve().parent / "inputs"

TORCH = "2.13.0"
NMHIT = "0.3.6"


@dataclass(frozen=True)
class Release:
    """One release of neml2: the schema it writes and the pyzag it was published against."""

    version: str
    schema: int
    pyzag: str


@dataclass(frozen=True)
class Scenario:
    """One model with its compile flags.

    `flags` holds (first release, flags as in a shell) in ascending order; of these, the last entry that is not newer
    than a release counts.
    `unable` says why the releases that are not in `releases` are left out.
    """

    name: str
    shows: str
    input: str
    model: str
    releases: tuple[str, ...]
    flags: tuple[tuple[str, str], ...] = ()
    driver: str | None = None
    unable: str = ""


RELEASES: dict[str, Release] = {
    release.version: release
    for release in (
        Release("3.0.0", schema=2, pyzag="1.1.1"),
        Release("3.0.3", schema=3, pyzag="1.1.1"),
        Release("3.0.6", schema=7, pyzag="1.1.3"),
        Release("3.0.7", schema=12, pyzag="1.1.4"),
        Release("3.1.0", schema=14, pyzag="2.0.0"),
    )
}

EVERY = tuple(RELEASES)
FROM_3_0_3 = EVERY[1:]
FROM_3_0_6 = EVERY[2:]
FROM_3_0_7 = EVERY[3:]

SCENARIOS: dict[str, Scenario] = {
    scenario.name: scenario
    for scenario in (
        Scenario(
            "forward",
            shows="one forward graph",
            input="forward.i",
            model="elasticity",
            driver="pull",
            releases=EVERY,
            flags=(("3.0.6", "-d :"),),
        ),
        Scenario(
            "promoted",
            shows="a forward graph with two promoted parameters",
            input="forward.i",
            model="elasticity",
            driver="pull",
            releases=EVERY,
            flags=(
                ("3.0.0", "-p E -p nu"),
                ("3.0.6", "-p elasticity.E -p elasticity.nu -d : -d stress:elasticity.E -d stress:elasticity.nu"),
            ),
        ),
        Scenario(
            "promoted_provider",
            shows="a promoted parameter that schemas 2 and 3 put before the structural input",
            input="provider.i",
            model="gauge",
            releases=EVERY,
            flags=(
                ("3.0.0", "-p young.value"),
                ("3.0.6", "-p young.value -d stress:strain -d stress:young.value"),
            ),
        ),
        Scenario(
            "implicit",
            shows="one implicit update of a scalar, with a line search that is needed",
            input="implicit.i",
            model="creep",
            driver="history",
            releases=EVERY,
            flags=(("3.0.6", "-d :"),),
        ),
        Scenario(
            "multi",
            shows="forward, implicit (SR2 and Scalar unknowns, predictor, line search), forward",
            input="multi.i",
            model="bar",
            driver="heating",
            releases=EVERY,
            flags=(("3.0.6", "-d :"),),
        ),
        Scenario(
            "implicit_param",
            shows="two promoted parameters in the residual, with derivatives",
            input="implicit.i",
            model="creep",
            driver="history",
            releases=FROM_3_0_6,
            flags=(
                (
                    "3.0.6",
                    "-p residual.hardening.R -p residual.hardening.d "
                    "-d x:residual.hardening.R -d x:residual.hardening.d",
                ),
            ),
            unable="refuses to promote a parameter inside an implicit update",
        ),
        Scenario(
            "unreached",
            shows="a pair without a path, and an implicit segment off every path",
            input="unreached.i",
            model="chain",
            releases=FROM_3_0_6,
            flags=(("3.0.6", "-d late:b -d early:f"),),
            unable="has no choice of derivatives",
        ),
        Scenario(
            "unreached_forward",
            shows="a pair without a path, and an explicit segment off every path",
            input="unreached.i",
            model="chain",
            releases=FROM_3_0_6,
            flags=(("3.0.6", "-d late:f -d early:f"),),
            unable="has no choice of derivatives",
        ),
        Scenario(
            "cross_group",
            shows="two groups, one of them a block over three sites, Schur complement",
            input="cross_group.i",
            model="sites",
            releases=FROM_3_0_3,
            flags=(("3.0.6", "-d all:feed -d all:all~1"),),
            unable="cannot be told the sites of a variable",
        ),
        Scenario(
            "cross_group_folded",
            shows="the same with the sites folded into a dense group",
            input="cross_group.i",
            model="sites",
            releases=FROM_3_0_3,
            flags=(
                ("3.0.3", "\"EquationSystems/balance/structure:='dense dense'\""),
                ("3.0.6", "-d all:feed -d all:all~1 \"EquationSystems/balance/structure:='dense dense'\""),
            ),
            unable="cannot be told the sites of a variable",
        ),
        Scenario(
            "pinned",
            shows="a batch that is pinned to two",
            input="forward.i",
            model="elasticity",
            driver="pull",
            releases=FROM_3_0_3,
            flags=(
                ("3.0.3", "--no-dynamic-batch"),
                ("3.0.6", "--no-dynamic-batch -d :"),
            ),
            unable="has no --no-dynamic-batch",
        ),
        Scenario(
            "rank2",
            shows="two batch axes, of which the second is pinned to three",
            input="forward.i",
            model="elasticity",
            driver="pull",
            releases=FROM_3_0_3,
            flags=(
                ("3.0.3", '--example-batch-shape "(2, 3)"'),
                ("3.0.6", '--example-batch-shape "(2, 3)" -d :'),
            ),
            unable="has no --example-batch-shape",
        ),
        Scenario(
            "static_float32",
            shows="the label float32 on graphs that are traced with float64",
            input="forward.i",
            model="elasticity",
            driver="pull",
            releases=("3.0.6", "3.1.0"),
            flags=(("3.0.6", "--dtype float32 -d :"),),
            unable="not wanted: two releases show it",
        ),
        Scenario(
            "power",
            shows="neml2's power operator by name in the graph, from 3.0.6 on",
            input="power.i",
            model="flow",
            releases=EVERY,
        ),
        Scenario(
            "renamed",
            shows="an input, an output and a parameter under other names at the boundary",
            input="forward.i",
            model="elasticity",
            releases=FROM_3_0_7,
            flags=(
                (
                    "3.0.7",
                    "-p elasticity.E -d : --rename-parameter elasticity.E:young "
                    "--rename-input strain:eps --rename-output stress:sigma",
                ),
            ),
            unable="has no renames",
        ),
        Scenario(
            "krylov",
            shows="GMRES with a preconditioner in the Newton iteration, and for the derivatives",
            input="krylov.i",
            model="ties",
            releases=FROM_3_0_7,
            flags=(("3.0.7", "-d :"),),
            unable="has no iterative linear solver",
        ),
        Scenario(
            "substep",
            shows="an increment that may be halved, with an incremental variable",
            input="substep.i",
            model="creep",
            releases=FROM_3_0_7,
            flags=(("3.0.7", "-d x:dstrain"),),
            unable="has no substepping",
        ),
    )
}


def release_named(version: str) -> Release:
    """The release of a version, such as `3.0.6`; ValueError where the catalogue has none."""
    if version not in RELEASES:
        raise ValueError(f"no neml2 release {version!r} in the catalogue; take one of {', '.join(RELEASES)}")
    return RELEASES[version]


def scenario_named(name: str) -> Scenario:
    """The scenario of a name, such as `forward`; ValueError where the catalogue has none."""
    if name not in SCENARIOS:
        raise ValueError(f"no scenario {name!r} in the catalogue; take one of {', '.join(SCENARIOS)}")
    return SCENARIOS[name]


def flags(scenario: Scenario, release: Release) -> tuple[str, ...]:
    """The compile flags of a scenario for one release, which come after the input and the target."""
    order = EVERY.index(release.version)
    chosen: tuple[str, ...] = ()
    for first, some in scenario.flags:
        if EVERY.index(first) <= order:
            chosen = tuple(shlex.split(some))
    return chosen


def arguments(scenario: Scenario, release: Release, output: Path) -> list[str]:
    """The arguments of `neml2-compile`.

    From 3.0.3 on a stub keeps its driver only when compiled for that driver; 3.0.0 always does.
    """
    by_driver = scenario.driver is not None and release.schema >= 3
    target = ["--driver", str(scenario.driver)] if by_driver else ["--model", scenario.model]
    return [str(INPUTS / scenario.input), *target, "--output-dir", str(output), *flags(scenario, release)]


def pairs(releases: Iterable[str] = EVERY, scenarios: Iterable[str] = tuple(SCENARIOS)) -> list[tuple[str, str]]:
    """Every (release, scenario) of these names that can be built, scenario by scenario."""
    versions = [release_named(version).version for version in releases]
    return [(version, name) for name in scenarios for version in scenario_named(name).releases if version in versions]
