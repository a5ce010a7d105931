"""A compiled model as frozen objects, read from the metadata's JSON in the form that `upgrade` leads every schema to.

A field stands for the JSON key of its name, or of the one that `key` gives. Names are the authored ones throughout;
`Aliases` leads from them to the names at the boundary. Files are bare names inside the leaf folder.

Beside the keys that neml2 3.1.0 writes there are those of older files: a fused `step_package` (with `step_returns`),
fused `ift_package` and `param_ift_package`, and `parameters_among_inputs` where only packages show in which order
graphs take them. `upgrade` gives each pair its place, and each implicit segment its `newton` settings.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Annotated

import msgspec
from msgspec import field as key

from ..settings import KrylovSettings, NewtonSettings
from .document import DocumentForm, Name, PackageName, Role, Structure, Unfit, Whole, one_of
from .document import Shape as Shape
from .files import NAME, named

BASE_SHAPES: dict[str, list[int]] = {"Scalar": [], "Quaternion": [4], "SR2": [6], "R2": [3, 3], "SSR4": [6, 6]}
# `Rot` became `MRP` in 3.0.6.
BASE_SHAPES |= {kind: [3] for kind in ("Vec", "WR2", "Rot", "MRP", "MillerIndex")}


class Variable(DocumentForm, frozen=True):
    """A variable with its shape: `(*batch, *sub_batch_shape, *base_shape)`."""

    name: Name
    base_shape: Shape  # axes that its type owns
    sub_batch_shape: Shape = ()  # sizes of its site axes
    # Name of neml2's wrapper class; empty where the file does not say.
    type: Name = key(name="var_type", default="")
    var_size: Whole | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        # The file has the shape up to three times; a graph that is given another reads beyond its tensors.
        of_type = BASE_SHAPES.get(self.type)
        if of_type is not None and tuple(of_type) != self.base_shape:
            raise Unfit("base_shape", f"{of_type}, the shape of a {self.type}")
        if self.var_size not in (None, self.width, self.size):
            raise Unfit("var_size", f"{self.width}, the number of entries of the shape {list(self.base_shape)}")

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


class Given(Variable, frozen=True):
    """A given of an implicit segment and what substepping does with it."""

    role: Role = "static"
    pair: Name | None = None  # the force at the other end of the step


class Parameter(DocumentForm, frozen=True):
    """A promoted parameter as stored, by its qualified name."""

    name: Name
    shape: Shape  # of the stored value; `(*batch, *base_shape)`
    values: tuple[float | bool, ...]  # row-major; NaN and the infinities are numbers here
    own_base_shape: Shape | None = key(name="param_base_shape", default=None)
    dtype: Name | None = None  # name of its dtype where that is not the model's

    @cached_property
    def base_shape(self) -> Shape:
        """Axes that its type owns."""
        wanted = prod(self.shape)
        if len(self.values) != wanted:
            raise Unfit("values", f"{wanted} numbers, the size of shape {list(self.shape)}")
        base = self.shape if self.own_base_shape is None else self.own_base_shape
        if self.shape[len(self.shape) - len(base) :] != base:
            raise Unfit("param_base_shape", f"the trailing axes of the stored shape {list(self.shape)}")
        return base


class DerivativePair(DocumentForm, frozen=True, kw_only=True):
    """Where the derivative of one variable by another variable or a parameter lies in the outputs of a graph."""

    out: Name = key(name="out_var")
    wrt: Name = key(name="in_var")
    out_base_shape: Shape
    wrt_base_shape: Shape = key(name="in_base_shape")
    output: Whole  # index of the graph's output
    # First row and column of the block in that output's matrix; None when the output is the block.
    row: Whole | None = key(name="row_offset", default=None)
    column: Whole | None = key(name="col_offset", default=None)
    wrt_sub_batch_shape: Shape = key(name="in_sub_batch_shape", default=())
    # Whether the block is known not to depend on the row.
    constant: bool = key(name="batch_independent", default=False)

    @cached_property
    def rows(self) -> int:
        """Number of rows of the block at one site."""
        return prod(self.out_base_shape)

    @cached_property
    def columns(self) -> int:
        """Number of columns of the block at one site."""
        return prod(self.wrt_base_shape)


class ParameterPair(DerivativePair, frozen=True, kw_only=True):
    """A pair with a parameter."""

    wrt: Name = key(name="param")
    wrt_base_shape: Shape = key(name="param_base_shape")


@dataclass(frozen=True)
class PairGraph:
    """A graph whose outputs, after `skip` leading ones, hold derivative blocks."""

    file: str
    pairs: tuple[DerivativePair, ...]
    skip: int = 0


class GroupInfo(DocumentForm, frozen=True):
    """Variables that enter the graphs of an implicit segment as one tensor."""

    variables: tuple[Variable, ...] = key(name="per_var_info")
    structure: Structure = "dense"
    sites: Shape = key(name="sub_batch_shape", default=())

    @cached_property
    def sub_batch_shape(self) -> Shape:
        """Sizes of its site axes; nothing for a dense group."""
        if self.structure == "dense":
            return ()
        if any(variable.sub_batch_shape != self.sites for variable in self.variables):
            raise Unfit("per_var_info", f"variables with the block group's sub-batch shape {list(self.sites)}")
        return self.sites


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
class SolvedSensitivity:
    """`du/dg` or `du/dp` from a graph of Jacobians and a linear solve: by a graph, or an iterative one."""

    file: str
    solver: str | KrylovSettings
    pairs: tuple[DerivativePair, ...]
    # For givens `dr/du` has a graph of its own; for parameters it is dense, and comes with `dr/dp`.
    jacobian: str = ""


class Feedback(Variable, frozen=True, kw_only=True):
    """The input to which an output of a predictor is fed back that is run several times."""

    name: Name = key(name="input")
    base_shape: Shape = ()
    output: Name
    iterations: Annotated[int, msgspec.Meta(ge=1, le=10**4)]


@dataclass(frozen=True)
class Predictor:
    """The graph that gives unknowns their initial guess."""

    file: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    feedback: Feedback | None = None


class LinearConfig(DocumentForm, frozen=True):
    """How the linear systems of a sensitivity are solved."""

    kind: Annotated[str, one_of("direct", "krylov")]
    krylov: KrylovSettings = KrylovSettings()


@dataclass(frozen=True)
class SolverConfig(NewtonSettings):
    """How the nonlinear systems of a model are solved, and the linear ones where that is iterative."""

    krylov: KrylovSettings = field(default_factory=KrylovSettings)


class _Segment(DocumentForm, frozen=True, kw_only=True, tag_field="kind"):
    parameters: tuple[Name, ...] = key(name="param_inputs", default=())
    jacobian_pairs: tuple[DerivativePair, ...] | None = None
    param_jacobian_pairs: tuple[ParameterPair, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, written in zip(self.__struct_fields__, self.__struct_encode_fields__, strict=True):
            value = getattr(self, name)
            texts = [item for item in value if isinstance(item, str)] if isinstance(value, tuple) else []
            if len(set(texts)) != len(texts):
                raise Unfit(written, "names that are all different")

    @cached_property
    def files(self) -> frozenset[str]:
        """Names of its packages."""
        texts = (value for value in msgspec.structs.astuple(self) if isinstance(value, str))
        return frozenset(text for text in texts if text.endswith(".pt2"))


class ExplicitInfo(_Segment, frozen=True, kw_only=True, tag="forward"):
    """A part of the model that one graph evaluates; `forward` in the metadata."""

    value: PackageName = key(name="package")
    inputs: tuple[Name, ...]
    outputs: tuple[Name, ...]
    jvp_package: PackageName | None = None
    param_jacobian_package: PackageName | None = None
    param_vjp_package: PackageName | None = None
    param_vjp_params: tuple[Name, ...] | None = None
    param_vjp_outputs: tuple[Name, ...] | None = None
    parameters_among_inputs: bool = False  # while the order of its arguments is not known yet
    # Names of inputs and parameters in the order in which the graphs take them; when empty, they take the inputs first.
    arguments: tuple[Name, ...] = ()

    @cached_property
    def jacobian(self) -> PairGraph | None:
        """The graph of derivatives by inputs; it gives the outputs first."""
        if self.jvp_package is None:
            return None
        return PairGraph(self.jvp_package, self.need("jacobian_pairs"), len(self.outputs))

    @cached_property
    def parameter_jacobian(self) -> PairGraph | None:
        """The graph of derivatives by parameters."""
        if self.param_jacobian_package is None:
            return None
        return PairGraph(self.param_jacobian_package, self.need("param_jacobian_pairs"))

    @cached_property
    def parameter_vjp(self) -> tuple[str, tuple[str, ...], tuple[str, ...]] | None:
        """The graph that contracts cotangents with derivatives, the parameters by which, and the outputs of which."""
        if self.param_vjp_package is None:
            return None
        return self.param_vjp_package, self.need("param_vjp_params"), self.need("param_vjp_outputs")

    @cached_property
    def taken(self) -> tuple[str, ...]:
        """Names of inputs and parameters in the order in which the graphs take them."""
        listed = self.inputs + self.parameters
        if self.arguments and sorted(self.arguments) != sorted(listed):
            raise Unfit("arguments", "the names of inputs and parameters")
        return self.arguments or listed

    @cached_property
    def order(self) -> tuple[int, ...] | None:
        """Place of each argument of the graphs in inputs and parameters; None where it is its own."""
        listed = self.inputs + self.parameters
        return None if self.taken == listed else tuple(listed.index(name) for name in self.taken)


class ImplicitInfo(_Segment, frozen=True, kw_only=True, tag="implicit"):
    """A part of the model that a Newton solve evaluates: find the unknowns at which the residual vanishes."""

    residual: PackageName = key(name="residual_package")
    unknowns: tuple[GroupInfo, ...] = key(name="unknown_group_infos")
    residuals: tuple[GroupInfo, ...] = key(name="residual_group_infos")
    givens: tuple[GroupInfo, ...] = key(name="given_group_infos")
    roles: Annotated[tuple[Given, ...], msgspec.Meta(min_length=1)] = key(name="givens")
    newton: NewtonSettings = NewtonSettings()
    krylov: KrylovSettings = KrylovSettings()
    # A damaged number would keep a solve busy for years.
    max_substepping_level: Annotated[int, msgspec.Meta(ge=0, le=30)] = 0
    step_package: PackageName | None = None
    step_returns: Annotated[str, one_of("increment", "iterate")] = "increment"
    jacobian_package: PackageName | None = None
    solve_package: PackageName | None = None
    matvec_package: PackageName | None = None
    precond_setup_package: PackageName | None = None
    precond_apply_package: PackageName | None = None
    ift_package: PackageName | None = None
    jacobian_given_package: PackageName | None = None
    solve_ift_package: PackageName | None = None
    input_sensitivity: LinearConfig = LinearConfig("direct")
    param_ift_package: PackageName | None = None
    dr_dparam_package: PackageName | None = None
    solve_param_package: PackageName | None = None
    param_sensitivity: LinearConfig = LinearConfig("direct")
    predictor_package: PackageName | None = None
    predictor_inputs: tuple[Name, ...] | None = None
    predictor_outputs: tuple[Name, ...] | None = None
    predictor_feedback: Feedback | None = None

    @cached_property
    def unknown_variables(self) -> tuple[Variable, ...]:
        """All unknowns, group after group."""
        found = tuple(variable for group in self.unknowns for variable in group.variables)
        if not found:
            raise Unfit("unknown_group_infos", "at least one unknown")
        return found

    @cached_property
    def step(self) -> DirectStep | KrylovStep | FusedStep:
        """What a Newton step is made by."""
        if self.step_package is not None:
            return FusedStep(self.step_package, self.step_returns == "iterate")
        if self.matvec_package is None:
            return DirectStep(self.need("jacobian_package"), self.need("solve_package"))
        setup, apply = self.precond_setup_package, self.precond_apply_package
        if (setup is None) != (apply is None):
            raise Unfit("precond_setup_package", "both graphs of the preconditioner or neither")
        return KrylovStep(self.matvec_package, self.krylov, setup, apply)

    @cached_property
    def sensitivity(self) -> PairGraph | SolvedSensitivity | None:
        """What derivatives by givens are made by; None where none were compiled."""
        if self.ift_package is not None:
            return PairGraph(self.ift_package, self.need("jacobian_pairs"))
        if self.jacobian_given_package is None:
            return None
        solver = self._solver("input_sensitivity", "solve_ift_package")
        pairs, jacobian = self.need("jacobian_pairs"), self.need("jacobian_package")
        return SolvedSensitivity(self.jacobian_given_package, solver, pairs, jacobian)

    @cached_property
    def parameter_sensitivity(self) -> PairGraph | SolvedSensitivity | None:
        """What derivatives by parameters are made by; None where none were compiled."""
        if self.param_ift_package is not None:
            return PairGraph(self.param_ift_package, self.need("param_jacobian_pairs"))
        if self.dr_dparam_package is None:
            return None
        solver = self._solver("param_sensitivity", "solve_param_package")
        return SolvedSensitivity(self.dr_dparam_package, solver, self.need("param_jacobian_pairs"))

    def _solver(self, config: str, package: str) -> str | KrylovSettings:
        linear: LinearConfig = getattr(self, config)
        found: str | KrylovSettings = linear.krylov if linear.kind == "krylov" else self.need(package)
        return found

    @cached_property
    def predictor(self) -> Predictor | None:
        """What gives the initial guess, if a graph does."""
        if self.predictor_package is None:
            return None
        inputs, outputs = self.need("predictor_inputs"), self.need("predictor_outputs")
        feedback = self.predictor_feedback
        if feedback is not None and feedback.name not in inputs:
            raise Unfit("predictor_feedback.input", f"one of the predictor's inputs {', '.join(inputs)}")
        if feedback is not None and feedback.output not in outputs:
            raise Unfit("predictor_feedback.output", f"one of the predictor's outputs {', '.join(outputs)}")
        return Predictor(self.predictor_package, inputs, outputs, feedback)


Segment = ExplicitInfo | ImplicitInfo


class Aliases(DocumentForm, frozen=True):
    """Authored name to boundary name, where the two differ."""

    inputs: dict[str, str] = key(default_factory=dict)
    outputs: dict[str, str] = key(default_factory=dict)
    parameters: dict[str, str] = key(default_factory=dict)

    def __post_init__(self) -> None:
        for kind in self.__struct_fields__:
            renames = getattr(self, kind)
            # Not by their type, since complaints would not say which of them is wrong.
            for old, new in renames.items():
                if not NAME.fullmatch(new):
                    raise Unfit(f"{kind}.{old if NAME.fullmatch(old) else named(old)}", "a name", new)
            if len(set(renames.values())) != len(renames):
                raise Unfit(kind, "boundary names that are all different")


class Metadata(DocumentForm, frozen=True, kw_only=True):
    """All that is in the metadata file."""

    type: Annotated[str, one_of("composed")] = "composed"
    inputs: tuple[Variable, ...]
    outputs: Annotated[tuple[Variable, ...], msgspec.Meta(min_length=1)]
    parameters: tuple[Parameter, ...]
    segments: Annotated[tuple[Segment, ...], msgspec.Meta(min_length=1)]
    derivatives: tuple[tuple[Name, Name], ...]
    parameter_derivatives: tuple[tuple[Name, Name], ...]
    aliases: Aliases = key(name="boundary_aliases", default=Aliases())
    # That of old files stands in their segments.
    solver_config: SolverConfig = SolverConfig()
    schema: int = key(name="schema_version")  # in which the file was written
    digest: str  # of the file, for the question whether it is still the same

    @property
    def files(self) -> frozenset[str]:
        """Names of all packages."""
        return frozenset().union(*(segment.files for segment in self.segments))
