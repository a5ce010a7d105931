"""The catalogue of stubs: which model of which input is compiled, with which flags, and what for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Stub:
    """One entry of the catalogue.

    Args:
        name: Name of the entry, the argument of `stubs.build.compiled`.
        file: Input file, relative to this folder.
        model: Name of the `[Models]` block that is compiled.
        purpose: What the entry is for, in one sentence.
        flags: Further arguments of neml2-compile.
        driver: Name of the `[Drivers]` block that the compiled stub carries.
        appendix: File with a `[Drivers]` block to append to the compiled stub; for an entry with renames, which
            neml2-compile compiles only without a driver.
        wide: Only the wide test suite uses it, which has more time to compile.
    """

    name: str
    file: str
    model: str
    purpose: str
    flags: tuple[str, ...] = ()
    driver: str = "driver"
    appendix: str | None = None
    wide: bool = False

    @property
    def path(self) -> Path:
        """Path of the input file."""
        return FOLDER / self.file

    @property
    def appendix_path(self) -> Path | None:
        """Path of the appendix, if there is one."""
        return FOLDER / self.appendix if self.appendix else None

    @property
    def by_parameters(self) -> bool:
        """Whether derivatives by promoted parameters are compiled."""
        options = list(zip(self.flags, self.flags[1:], strict=False))
        return any(("-p", value.rpartition(":")[2]) in options for option, value in options if option == "-d")


ALL_PAIRS = ("-d", ":")

# Models of explicit segments alone.
EXPLICIT = ("elasticity", "promoted", "cohesive")

ELASTICITY = Stub(
    name="elasticity",
    file="elasticity.i",
    model="elasticity",
    flags=ALL_PAIRS,
    purpose="The smallest artifact: one explicit segment with one constant derivative block.",
)

_ENTRIES = (
    ELASTICITY,
    Stub(
        name="viscoplasticity",
        file="viscoplasticity.i",
        model="viscoplasticity",
        flags=("-d", "stress:strain"),
        purpose="One implicit segment: 7 unknowns, constant predictor, line search and the tangent stress:strain.",
    ),
    Stub(
        name="composed",
        file="composed.i",
        model="composed",
        flags=ALL_PAIRS,
        purpose="Three segments, explicit, implicit, explicit, so that derivatives must be chained across them.",
        wide=True,
    ),
    Stub(
        name="crystal",
        file="crystal.i",
        model="crystal",
        purpose="A crystal with an orientation as input, whose 12 slip systems are a sub-batch inside the residual.",
        wide=True,
    ),
    Stub(
        name="promoted",
        file="promoted.i",
        model="promoted",
        flags=(
            *("-p", "promoted.E", "-p", "promoted.nu"),
            *ALL_PAIRS,
            *("-d", "stress:promoted.E", "-d", "stress:promoted.nu"),
        ),
        purpose="One explicit segment with two promoted parameters, their Jacobian and their adjoint.",
    ),
    Stub(
        name="chaboche",
        file="chaboche.i",
        model="chaboche",
        purpose="One implicit segment with 19 unknowns and a linear predictor that needs values two steps back.",
        wide=True,
    ),
    Stub(
        name="rate_independent",
        file="rate_independent.i",
        model="rate_independent",
        purpose="Plasticity without rate: a complementarity function with a kink in the residual, among 8 unknowns.",
        wide=True,
    ),
    Stub(
        name="porous",
        file="porous.i",
        model="porous",
        purpose="A porous metal whose voids grow: flow directions from second derivatives, and a residual with cosh.",
        wide=True,
    ),
    Stub(
        name="mixed_control",
        file="mixed_control.i",
        model="mixed_control",
        purpose="Some strains and some stresses prescribed: unknowns of different units, chosen row by row.",
        wide=True,
    ),
    Stub(
        name="kocks_mecking",
        file="kocks_mecking.i",
        model="kocks_mecking",
        purpose="A kink and a steep power law, switched by rate and temperature, under mixed control, no line search.",
        wide=True,
    ),
    Stub(
        name="promoted_implicit",
        file="promoted_implicit.i",
        model="promoted_implicit",
        flags=(
            *("-p", "residual.creep.eta", "-p", "residual.creep.n"),
            *ALL_PAIRS,
            *("-d", "stress:residual.creep.eta", "-d", "stress:residual.creep.n"),
        ),
        purpose="One implicit segment with one scalar unknown and two promoted parameters in its residual.",
        wide=True,
    ),
    Stub(
        name="rates",
        file="rates.i",
        model="rates",
        flags=ALL_PAIRS,
        purpose="Two implicit segments, and an explicit one after them that divides by the time step.",
        wide=True,
    ),
    Stub(
        name="cohesive",
        file="cohesive.i",
        model="cohesive",
        flags=ALL_PAIRS,
        purpose="One explicit segment from vectors to vectors and a scalar, with a rate that divides by the time step.",
        wide=True,
    ),
    Stub(
        name="calibration",
        file="viscoplasticity.i",
        model="viscoplasticity",
        flags=(
            *("-p", "residual.overstress.sy", "-p", "residual.hardening.K"),
            *ALL_PAIRS,
            *("-d", ":residual.overstress.sy", "-d", ":residual.hardening.K"),
        ),
        purpose="Viscoplasticity with all derivatives, for the gradient of a loss over many steps by two parameters.",
    ),
    Stub(
        name="krylov",
        file="krylov.i",
        model="krylov",
        flags=ALL_PAIRS,
        purpose="Newton with GMRES without preconditioner; no predictor; the derivatives are Krylov solves as well.",
        wide=True,
    ),
    Stub(
        name="krylov_precond",
        file="krylov.i",
        model="krylov",
        flags=(
            *("-d", "creep_strain:strain"),
            "Models/krylov/solver:=newton_preconditioned",
            "Models/krylov/input_sensitivity_solver:=lu",
        ),
        purpose="Newton with line search, GMRES with a block-Jacobi preconditioner that is kept, direct derivatives.",
        wide=True,
    ),
    Stub(
        name="bicgstab",
        file="viscoplasticity.i",
        model="viscoplasticity",
        flags=("Models/viscoplasticity/solver:=newton_bicgstab",),
        purpose="Newton with BiCGStab and a Jacobi preconditioner that is rebuilt when it gets poor; no derivatives.",
        wide=True,
    ),
    Stub(
        name="substepping",
        file="substepping.i",
        model="substepping",
        flags=ALL_PAIRS,
        purpose="Steps of which some points need cuts; the strain before the step is an input of no graph.",
    ),
    Stub(
        name="predictor_loop",
        file="predictor_loop.i",
        model="predictor_loop",
        purpose="A predictor graph that is run several times, with one output fed back into an input.",
        wide=True,
    ),
    Stub(
        name="cross_group",
        file="cross_group.i",
        model="cross_group",
        flags=("-d", "strain:stress"),
        purpose="Two groups of unknowns, one kept per branch (block) and one dense, solved by a Schur complement.",
    ),
    Stub(
        name="renamed",
        file="promoted.i",
        model="promoted",
        flags=(
            *("-p", "promoted.E"),
            *ALL_PAIRS,
            *("-d", "stress:promoted.E"),
            *("--rename-input", "strain:eps", "--rename-output", "stress:sigma"),
            *("--rename-parameter", "promoted.E:youngs_modulus"),
        ),
        appendix="renamed_driver.i",
        purpose="An input, an output and a promoted parameter have other names at the boundary than inside.",
        wide=True,
    ),
    replace(
        ELASTICITY,
        name="elasticity_float32",
        flags=(*ALL_PAIRS, "--dtype", "float32"),
        purpose="An artifact labelled float32, whose graphs neml2-compile nevertheless writes for float64.",
        wide=True,
    ),
    replace(
        ELASTICITY,
        name="elasticity_stiff",
        flags=(*ALL_PAIRS, "--dtype", "float32", "Models/elasticity/coefficients:='410000 0.29'"),
        purpose="A leaf of another source with the same metadata, which it would stand beside without a trace.",
        wide=True,
    ),
    replace(
        ELASTICITY,
        name="elasticity_static",
        flags=(*ALL_PAIRS, "--no-dynamic-batch", "--example-batch-shape", "(3,)"),
        purpose="Graphs that are pinned to the batch size of the example, 3, which the metadata do not tell.",
        wide=True,
    ),
    replace(
        ELASTICITY,
        name="elasticity_rank2",
        flags=("--example-batch-shape", "(2, 3)"),
        purpose="Graphs with two batch axes, only the first of them dynamic, which the metadata do not tell.",
        wide=True,
    ),
)

CATALOGUE: dict[str, Stub] = {entry.name: entry for entry in _ENTRIES}
