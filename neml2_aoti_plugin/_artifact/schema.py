"""A compiled model as frozen objects: the newest form, into which every released schema is read.

Names are the authored ones throughout; `Artifact.aliases` leads from them to the names at the boundary. Files are
bare names inside the leaf folder.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Literal

from ..settings import KrylovSettings, NewtonSettings

Shape = tuple[int, ...]
Structure = Literal["dense", "block"]
Role = Literal["old_state", "old_force", "cur_force", "incremental", "static", "unknown"]


@dataclass(frozen=True)
class Variable:
    """A variable with its shape: `(*batch, *sub_batch_shape, *base_shape)`.

    Args:
        name: authored name.
        base_shape: axes that its type owns.
        sub_batch_shape: sizes of its site axes.
        type: name of neml2's wrapper class; empty where the file does not tell.
    """

    name: str
    base_shape: Shape
    sub_batch_shape: Shape = ()
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
    """A promoted parameter as stored.

    Args:
        name: qualified authored name.
        base_shape: axes of its type.
        shape: of the stored value; `(*batch, *base_shape)`.
        values: the stored value, row-major.
        dtype: name of its dtype where that is not the model's.
    """

    name: str
    base_shape: Shape
    shape: Shape
    values: tuple[float, ...] = field(repr=False)
    dtype: str | None = None


@dataclass(frozen=True)
class Pair:
    """Where the derivative of one variable by another lies in the outputs of a graph.

    Args:
        out: the variable that is differentiated.
        wrt: the variable or parameter by which.
        out_base_shape: base shape of `out`.
        wrt_base_shape: base shape of `wrt`.
        output: index of the graph's output.
        row: first row of the block in that output's matrix; None when the output is the block.
        column: first column likewise.
        wrt_sub_batch_shape: sites of `wrt`.
        constant: whether the block is known not to depend on the row.
    """

    out: str
    wrt: str
    out_base_shape: Shape
    wrt_base_shape: Shape
    output: int
    row: int | None = None
    column: int | None = None
    wrt_sub_batch_shape: Shape = ()
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
class ForwardSegment:
    """A part of the model that one graph evaluates.

    `arguments` are the names of inputs and parameters in the order in which the graphs take them; when empty, they take
    the inputs first. While `parameters_among_inputs`, that order is not known yet.
    """

    value: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    parameters: tuple[str, ...] = ()
    jacobian: PairGraph | None = None
    parameter_jacobian: PairGraph | None = None
    parameter_vjp: AdjointGraph | None = None
    arguments: tuple[str, ...] = ()
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
class DirectSensitivity:
    """`du/dg` from the Jacobians by unknowns and givens and a solve graph."""

    jacobian: str
    jacobian_given: str
    solve: str
    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class KrylovSensitivity:
    """`du/dg` from the Jacobians by unknowns and givens and an iterative solve."""

    jacobian: str
    jacobian_given: str
    settings: KrylovSettings
    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class DirectParameterSensitivity:
    """`du/dp` from a graph of dense `dr/du` and `dr/dp` and a solve graph."""

    dr_dparam: str
    solve: str
    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class KrylovParameterSensitivity:
    """`du/dp` from a graph of dense `dr/du` and `dr/dp` and an iterative solve."""

    dr_dparam: str
    settings: KrylovSettings
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
    """The graph that gives unknowns their first iterate."""

    file: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    feedback: Feedback | None = None


@dataclass(frozen=True)
class ImplicitSegment:
    """A part of the model that a Newton solve evaluates: find the unknowns at which the residual vanishes."""

    residual: str
    step: DirectStep | KrylovStep | FusedStep
    unknowns: tuple[GroupInfo, ...]
    residuals: tuple[GroupInfo, ...]
    givens: tuple[GroupInfo, ...]
    roles: tuple[Given, ...]
    newton: NewtonSettings
    parameters: tuple[str, ...] = ()
    sensitivity: DirectSensitivity | KrylovSensitivity | FusedSensitivity | None = None
    parameter_sensitivity: DirectParameterSensitivity | KrylovParameterSensitivity | FusedSensitivity | None = None
    predictor: Predictor | None = None
    max_substepping_level: int = 0

    @cached_property
    def unknown_variables(self) -> tuple[Variable, ...]:
        """All unknowns, group after group."""
        return tuple(variable for group in self.unknowns for variable in group.variables)


Segment = ForwardSegment | ImplicitSegment


@dataclass(frozen=True)
class Aliases:
    """Authored name to boundary name, where the two differ."""

    inputs: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)
    parameters: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Metadata:
    """All that the metadata file tells.

    `digest` is that of the file, for the question whether it is still the same.
    """

    inputs: tuple[Variable, ...]
    outputs: tuple[Variable, ...]
    parameters: tuple[Parameter, ...]
    segments: tuple[Segment, ...]
    derivatives: tuple[tuple[str, str], ...]
    parameter_derivatives: tuple[tuple[str, str], ...]
    aliases: Aliases = field(default_factory=Aliases)
    schema: int = 14
    digest: str = field(default="", compare=False, repr=False)
