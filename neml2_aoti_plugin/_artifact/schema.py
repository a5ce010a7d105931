"""A compiled model as frozen objects: the newest form, into which every released schema is read.

Names are the authored ones throughout; `Aliases` leads from them to the names at the boundary. Files are bare names
inside the leaf folder.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any, Literal

from ..errors import ArtifactError
from ..settings import KrylovSettings, NewtonSettings

Shape = tuple[int, ...]
Structure = Literal["dense", "block"]
Role = Literal["old_state", "old_force", "cur_force", "incremental", "static", "unknown"]

AGAIN = "The metadata is damaged or was edited; compile the model again with neml2-compile."


@dataclass(frozen=True)
class Variable:
    """A variable with its shape: `(*batch, *sub_batch_shape, *base_shape)`."""

    name: str
    # Axes that its type owns.
    base_shape: Shape
    # Sizes of its site axes.
    sub_batch_shape: Shape = ()
    # Name of neml2's wrapper class; empty where the file does not say.
    type: str = ""

    @cached_property
    def natural_shape(self) -> Shape:
        """Shape without the batch."""
        return self.sub_batch_shape + self.base_shape

    @cached_property
    def width(self) -> int:
        """Number of entries at one site."""
        return prod(self.base_shape)

    @cached_property
    def size(self) -> int:
        """Number of entries over all sites."""
        return prod(self.natural_shape)


@dataclass(frozen=True)
class Parameter:
    """A promoted parameter as stored, by its qualified name."""

    name: str
    base_shape: Shape
    # Of the stored value; `(*batch, *base_shape)`.
    shape: Shape
    # Row-major.
    values: tuple[float, ...] = field(repr=False)
    # Name of its dtype where that is not the model's.
    dtype: str | None = None


@dataclass(frozen=True)
class Pair:
    """Where the derivative of one variable by another variable or a parameter lies in the outputs of a graph."""

    out: str
    wrt: str
    out_base_shape: Shape
    wrt_base_shape: Shape
    # Index of the graph's output.
    output: int
    # First row and column of the block in that output's matrix; None when the output is the block.
    row: int | None = None
    column: int | None = None
    wrt_sub_batch_shape: Shape = ()
    # Whether the block is known not to depend on the row.
    constant: bool = False

    @cached_property
    def rows(self) -> int:
        """Number of rows of the block at one site."""
        return prod(self.out_base_shape)

    @cached_property
    def columns(self) -> int:
        """Number of columns of the block at one site."""
        return prod(self.wrt_base_shape)


@dataclass(frozen=True)
class PairGraph:
    """A graph whose outputs, after `skip` leading ones, hold derivative blocks."""

    file: str
    pairs: tuple[Pair, ...]
    skip: int = 0


@dataclass(frozen=True)
class AdjointGraph:
    """A graph that contracts one cotangent per output with the derivatives by the parameters."""

    file: str
    parameters: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class ExplicitInfo:
    """A part of the model that one graph evaluates; `forward` in the metadata."""

    value: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    parameters: tuple[str, ...] = ()
    jacobian: PairGraph | None = None
    parameter_jacobian: PairGraph | None = None
    parameter_vjp: AdjointGraph | None = None
    # Names of inputs and parameters in the order in which the graphs take them; when empty, they take the inputs first.
    arguments: tuple[str, ...] = ()
    # While that order is not known yet.
    parameters_among_inputs: bool = False

    @cached_property
    def taken(self) -> tuple[str, ...]:
        """Names of inputs and parameters in the order in which the graphs take them."""
        return self.arguments or self.inputs + self.parameters

    @cached_property
    def order(self) -> tuple[int, ...] | None:
        """Place of each argument of the graphs in inputs and parameters; None where it is its own."""
        listed = self.inputs + self.parameters
        return None if self.taken == listed else tuple(listed.index(name) for name in self.taken)


@dataclass(frozen=True)
class GroupInfo:
    """Variables that enter the graphs of an implicit segment as one tensor."""

    structure: Structure
    variables: tuple[Variable, ...]
    sub_batch_shape: Shape = ()


@dataclass(frozen=True)
class Given:
    """A given of an implicit segment and what substepping does with it."""

    variable: Variable
    role: Role = "static"
    # The force at the other end of the step.
    pair: str | None = None


@dataclass(frozen=True)
class DirectStep:
    """Newton steps from a Jacobian graph and a solve graph."""

    jacobian: str
    solve: str


@dataclass(frozen=True)
class KrylovStep:
    """Newton steps from matrix-vector products, with a preconditioner or without."""

    matvec: str
    settings: KrylovSettings
    precond_setup: str | None = None
    precond_apply: str | None = None


@dataclass(frozen=True)
class FusedStep:
    """Newton steps from one graph; it returns the increment, or the new iterate when `returns_iterate`."""

    file: str
    returns_iterate: bool = False


@dataclass(frozen=True)
class GivenSensitivity:
    """`du/dg` from the Jacobians by unknowns and givens; the solver is a graph, or the settings of an iterative one."""

    jacobian: str
    jacobian_given: str
    solver: str | KrylovSettings
    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class ParameterSensitivity:
    """`du/dp` from a graph of dense `dr/du` and `dr/dp`; the solver is as for givens."""

    dr_dparam: str
    solver: str | KrylovSettings
    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class FusedSensitivity:
    """`du/dg` or `du/dp` from one graph."""

    file: str
    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class Feedback:
    """A predictor that is run several times, one of its outputs fed back to one of its inputs."""

    input: Variable
    output: str
    iterations: int


@dataclass(frozen=True)
class Predictor:
    """The graph that gives unknowns their initial guess."""

    file: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    feedback: Feedback | None = None


@dataclass(frozen=True)
class ImplicitInfo:
    """A part of the model that a Newton solve evaluates: find the unknowns at which the residual vanishes."""

    residual: str
    step: DirectStep | KrylovStep | FusedStep
    unknowns: tuple[GroupInfo, ...]
    residuals: tuple[GroupInfo, ...]
    givens: tuple[GroupInfo, ...]
    roles: tuple[Given, ...]
    newton: NewtonSettings
    parameters: tuple[str, ...] = ()
    sensitivity: GivenSensitivity | FusedSensitivity | None = None
    parameter_sensitivity: ParameterSensitivity | FusedSensitivity | None = None
    predictor: Predictor | None = None
    max_substepping_level: int = 0

    @cached_property
    def unknown_variables(self) -> tuple[Variable, ...]:
        """All unknowns, group after group."""
        return tuple(variable for group in self.unknowns for variable in group.variables)


Segment = ExplicitInfo | ImplicitInfo


@dataclass(frozen=True)
class Aliases:
    """Authored name to boundary name, where the two differ."""

    inputs: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)
    parameters: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Metadata:
    """All that is in the metadata file."""

    inputs: tuple[Variable, ...]
    outputs: tuple[Variable, ...]
    parameters: tuple[Parameter, ...]
    segments: tuple[Segment, ...]
    derivatives: tuple[tuple[str, str], ...]
    parameter_derivatives: tuple[tuple[str, str], ...]
    aliases: Aliases = field(default_factory=Aliases)
    # In which the file was written.
    schema: int = 14
    # Of the file, for the question whether it is still the same.
    digest: str = field(default="", compare=False, repr=False)


# -- what one place says of a name must hold in all others -------------------------------------------------------------


def require_consistent(found: Metadata, file: str) -> None:
    """Refuse metadata that does not agree with itself."""
    _check_boundary(found, file)
    _check_names(found, file)
    _check_shapes(found, file)


def _check_names(found: Metadata, file: str) -> None:
    """Every name that is used must stand for something, and every value exist before it is read."""
    parameters = {p.name for p in found.parameters}
    inputs, outputs = {v.name for v in found.inputs}, {v.name for v in found.outputs}
    known = set(inputs)
    for i, part in enumerate(found.segments):
        where = f"{file}: segments[{i}]"
        missing = set(part.parameters) - parameters
        if missing:
            raise ArtifactError(f"{where} takes {sorted(missing)}, which are not among the promoted parameters.")
        if isinstance(part, ExplicitInfo):
            _need(part.inputs, known, where)
            _check_pairs(part.jacobian, part.outputs, part.inputs, where)
            _check_pairs(part.parameter_jacobian, part.outputs, part.parameters, where)
            known |= set(part.outputs)
            continue
        unknowns = {v.name for v in part.unknown_variables}
        for what, groups in (("unknown", part.unknowns), ("given", part.givens)):
            names = [v.name for group in groups for v in group.variables]
            if len(set(names)) != len(names):
                raise ArtifactError(f"{where} has two {what}s of one name among {', '.join(names)}. {AGAIN}")
        givens = [v.name for g in part.givens for v in g.variables]
        _need(givens, known, where)
        _check_pairs(part.sensitivity, unknowns, givens, where)
        _check_pairs(part.parameter_sensitivity, unknowns, part.parameters, where)
        if part.predictor is not None:
            fed_back = {part.predictor.feedback.input.name} if part.predictor.feedback else set()
            _need(part.predictor.inputs, known | unknowns | fed_back, where)
        # What a predictor gives besides unknowns is a guess, which nothing else may take for a value.
        known |= unknowns
        _need((given.variable.name for given in part.roles), known, where)
        _need((given.pair for given in part.roles if given.pair is not None), known, where)
    missing = outputs - known
    if missing:
        raise ArtifactError(f"{file}: no segment computes the outputs {sorted(missing)}.")
    strange = {i for _, i in found.derivatives} - inputs
    strange |= {o for o, _ in (*found.derivatives, *found.parameter_derivatives)} - outputs
    if strange:
        raise ArtifactError(f"{file}: derivatives name {sorted(strange)}, which are no inputs or outputs of the model.")
    strange = {p for _, p in found.parameter_derivatives} - parameters
    if strange:
        raise ArtifactError(f"{file}: parameter_derivatives name {sorted(strange)}, which are not promoted.")


def _need(wanted: Iterable[str], known: set[str], where: str) -> None:
    for name in wanted:
        if name not in known:
            raise ArtifactError(
                f"{where} needs input {name!r} which is not in the model's inputs or earlier outputs. {AGAIN}"
            )


def _check_pairs(
    graph: PairGraph | GivenSensitivity | ParameterSensitivity | FusedSensitivity | None,
    computed: Collection[str],
    taken: Collection[str],
    where: str,
) -> None:
    """The derivatives of a segment must be those of what it computes by what it takes."""
    for pair in graph.pairs if graph is not None else ():
        if pair.out not in computed or pair.wrt not in taken:
            of, by = ", ".join(sorted(computed)), ", ".join(taken)
            raise ArtifactError(
                f"{where} has a derivative of {pair.out!r} by {pair.wrt!r}, where it computes {of} from {by}. {AGAIN}"
            )


def _check_boundary(found: Metadata, file: str) -> None:
    """What callers know by a name must be one thing."""
    renames = found.aliases
    for kind, names, to in (
        ("inputs", [v.name for v in found.inputs], renames.inputs),
        ("outputs", [v.name for v in found.outputs], renames.outputs),
        ("parameters", [p.name for p in found.parameters], renames.parameters),
    ):
        seen: dict[str, str] = {}
        for name in names:
            public = to.get(name, name)
            if public in seen:
                which = (
                    f"{seen[public]!r} and {name!r}, which are both called {public!r}" if to else f"{public!r} twice"
                )
                raise ArtifactError(f"{file}: among the {kind} there are {which}. {AGAIN}")
            seen[public] = name
    parameters = {renames.parameters.get(p.name, p.name) for p in found.parameters}
    for name in sorted(parameters):
        path = name.split(".")
        if not all(path):
            raise ArtifactError(
                f"{file}: {name!r} is no name of a parameter: a part between its dots is empty. {AGAIN}"
            )
        above = parameters.intersection(".".join(path[:k]) for k in range(1, len(path)))
        if above:
            raise ArtifactError(
                f"{file}: {min(above)!r} is a parameter and a part of the name of another one, {name!r}. {AGAIN}"
            )


def _check_shapes(found: Metadata, file: str) -> None:
    """A variable must have one shape wherever it is spoken of: each place is taken for what it holds."""
    variables, pairs = [*found.inputs], list[Pair]()
    for part in found.segments:
        blocks: list[Any]
        if isinstance(part, ExplicitInfo):
            blocks = [part.jacobian, part.parameter_jacobian]
        else:
            blocks = [part.sensitivity, part.parameter_sensitivity]
            variables += [v for group in (*part.unknowns, *part.givens) for v in group.variables]
            variables += [given.variable for given in part.roles]
            if part.predictor is not None and part.predictor.feedback is not None:
                variables.append(part.predictor.feedback.input)
        pairs += [pair for graph in blocks if graph is not None for pair in graph.pairs]
    shapes: dict[str, Shape] = {}
    for v in variables:
        if shapes.setdefault(v.name, v.natural_shape) != v.natural_shape:
            raise ArtifactError(
                f"{file}: {v.name!r} has the shape {v.natural_shape} here, {shapes[v.name]} there. {AGAIN}"
            )
    bases = {v.name: v.base_shape for v in (*found.outputs, *variables)}
    bases |= {p.name: p.base_shape for p in found.parameters}
    # Outputs are listed without their site axes, and the derivatives of old files with them among the base axes.
    claims = [("output", v.name, v.base_shape) for v in found.outputs]
    for pair in pairs:
        claims += [("derivative of", pair.out, pair.out_base_shape), ("derivative by", pair.wrt, pair.wrt_base_shape)]
    for what, name, base in claims:
        if base not in (bases.get(name, base), shapes.get(name)):
            raise ArtifactError(
                f"{file}: the {what} {name!r} has the base shape {base}, elsewhere it is {bases[name]}. {AGAIN}"
            )
