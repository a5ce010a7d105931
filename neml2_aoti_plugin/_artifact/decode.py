"""The metadata's newest JSON form, read into the objects of `schema`.

Beside the keys that neml2 3.1.0 writes, the forms have those that `upgrade` leaves of older files: a fused
`step_package` (with `step_returns`), fused `ift_package` and `param_ift_package`, pairs with an `output` index, per
segment `newton` settings, and `parameters_among_inputs` where only packages show in which order graphs take them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import msgspec

from ..errors import ArtifactError
from ..settings import KrylovSettings, NewtonSettings, changed_settings, newton_settings
from . import schema as s
from .document import (
    Finite,
    Form,
    Name,
    Names,
    PackageName,
    Shape,
    Unfit,
    Whole,
    at_most,
    convert,
    one_of,
    read_document,
)
from .files import NAME, Folder, named
from .upgrade import BASE_SHAPES, NEWEST, released_form, upgrade


def read_metadata(file: Path, folder: Folder | None = None, *, solver: dict[str, Any] | None = None) -> s.Metadata:
    """Read a metadata file of any released schema, in the folder of its artifact, into the newest form.

    `solver` are Newton settings that take the place of the file's, such as those of a stub's `[Solvers]` block.
    """
    document, digest = read_document(file, folder)
    form = released_form(document, str(file))
    written = document["schema_version"]
    try:
        found = metadata(upgrade(document, str(file)), str(file), written)
    except RecursionError as error:
        raise ArtifactError(
            f"{file}: nested too deeply for a metadata file. Compile the model again with neml2-compile."
        ) from error
    except ArtifactError as error:
        if form == written:
            raise
        raise ArtifactError(
            f"{file}: written in schema {written}, which no neml2 release wrote; read like schema {form} it does not "
            f"fit: {error}"
        ) from error
    return with_solver(replace(found, digest=digest), solver or {})


def with_solver(found: s.Metadata, solver: dict[str, Any]) -> s.Metadata:
    """The metadata with other Newton settings in all implicit segments, by the field names of `NewtonSettings`."""
    checked = changed_settings(NewtonSettings(), solver, "the model")
    given = {name: getattr(checked, name) for name in solver}
    changed = (
        replace(part, newton=replace(part.newton, **given)) if isinstance(part, s.ImplicitInfo) else part
        for part in found.segments
    )
    return replace(found, segments=tuple(changed))


def metadata(document: dict[str, Any], file: str, written: int = NEWEST) -> s.Metadata:
    """A document in the newest form as objects; `written` is the schema that the file was written in."""
    found = replace(convert(document, _Document, file).found, schema=written)
    s.require_consistent(found, file)
    return found


# -- forms; each makes its object as it is decoded, so that complaints have the path ---------------------------------


class _Object(Form):
    def __post_init__(self) -> None:
        super().__post_init__()
        self.found  # noqa: B018

    @cached_property
    def found(self) -> Any:
        raise NotImplementedError


class _Variable(_Object):
    name: Name
    base_shape: Shape
    sub_batch_shape: Shape | None = None
    var_type: Name | None = None
    var_size: Whole | None = None

    @cached_property
    def found(self) -> s.Variable:
        found = s.Variable(self.name, self.base_shape, self.sub_batch_shape or (), self.var_type or "")
        # The file has the shape up to three times; a graph that is given another reads beyond its tensors.
        of_type = BASE_SHAPES.get(found.type)
        if of_type is not None and tuple(of_type) != found.base_shape:
            raise Unfit("base_shape", f"{of_type}, the shape of a {found.type}")
        if self.var_size not in (None, found.width, found.size):
            raise Unfit("var_size", f"{found.width}, the number of entries of the shape {list(found.base_shape)}")
        return found


class _Given(_Variable):
    role: Annotated[str, one_of(*get_args(s.Role))] | None = None
    pair: Name | None = None

    @property
    def given(self) -> s.Given:
        return s.Given(self.found, cast(s.Role, self.role or "static"), self.pair)


class _Parameter(_Object):
    name: Name
    shape: Shape
    # NaN and the infinities are numbers here.
    values: tuple[float | bool, ...] | None = None
    param_base_shape: Shape | None = None
    dtype: Name | None = None

    @cached_property
    def found(self) -> s.Parameter:
        if self.values is None:
            raise Unfit("values", "numbers; values that are stored elsewhere were never released", None)
        wanted = prod(self.shape)
        if len(self.values) != wanted:
            raise Unfit("values", f"{wanted} numbers, the size of shape {list(self.shape)}")
        base = self.shape if self.param_base_shape is None else self.param_base_shape
        if self.shape[len(self.shape) - len(base) :] != base:
            raise Unfit("param_base_shape", f"the trailing axes of the stored shape {list(self.shape)}")
        return s.Parameter(self.name, base, self.shape, tuple(map(float, self.values)), self.dtype)


class _Pair(Form, kw_only=True):
    out_var: Name
    out_base_shape: Shape
    output: Whole | None = None
    row_offset: Whole | None = None
    col_offset: Whole | None = None
    in_sub_batch_shape: Shape | None = None
    batch_independent: bool | None = None


class _InputPair(_Pair, kw_only=True):
    in_var: Name
    in_base_shape: Shape

    @property
    def by(self) -> tuple[str, Shape]:
        return self.in_var, self.in_base_shape


class _ParameterPair(_Pair, kw_only=True):
    param: Name
    param_base_shape: Shape

    @property
    def by(self) -> tuple[str, Shape]:
        return self.param, self.param_base_shape


def _pairs(found: tuple[_InputPair | _ParameterPair, ...], *, matrix: bool = False) -> tuple[s.Pair, ...]:
    """Pairs with the place of each; of a `matrix`, blocks are cut by their offsets, whatever the entries say."""
    pairs = []
    for i, item in enumerate(found):
        cut = matrix or item.output is not None
        wrt, wrt_base_shape = item.by
        pairs.append(
            s.Pair(
                out=item.out_var,
                wrt=wrt,
                out_base_shape=item.out_base_shape,
                wrt_base_shape=wrt_base_shape,
                output=0 if matrix else i if item.output is None else item.output,
                row=item.row_offset or 0 if cut else None,
                column=item.col_offset or 0 if cut else None,
                wrt_sub_batch_shape=item.in_sub_batch_shape or (),
                constant=bool(item.batch_independent),
            )
        )
    return tuple(pairs)


class _Group(_Object):
    per_var_info: tuple[_Variable, ...]
    structure: Annotated[str, one_of("dense", "block")] | None = None
    sub_batch_shape: Shape | None = None

    @cached_property
    def found(self) -> s.GroupInfo:
        variables = tuple(item.found for item in self.per_var_info)
        if self.structure != "block":
            return s.GroupInfo("dense", variables)
        sites = self.sub_batch_shape or ()
        if any(variable.sub_batch_shape != sites for variable in variables):
            raise Unfit("per_var_info", f"variables with the block group's sub-batch shape {list(sites)}")
        return s.GroupInfo("block", variables, sites)


class _Newton(_Object):
    """Newton settings; absent ones take neml2's defaults."""

    atol: Finite | None = None
    rtol: Finite | None = None
    miters: Annotated[int, at_most(10**5)] | None = None
    ls_type: Annotated[str, one_of("BACKTRACKING", "STRONG_WOLFE")] | None = None
    ls_max_iters: Annotated[int, at_most(10**4)] | None = None
    ls_cutback: Finite | None = None
    ls_c: Finite | None = None
    substep_del_tol: Finite | None = None

    @cached_property
    def found(self) -> NewtonSettings:
        given = {key: getattr(self, key) for key in _Newton.__struct_fields__}
        return newton_settings(**{key: value for key, value in given.items() if value is not None})


class _Krylov(_Object):
    """Settings of an iterative linear solve."""

    method: Annotated[str, one_of("gmres", "bicgstab")] | None = None
    restart: Annotated[int, at_most(10**5)] | None = None
    max_its: Annotated[int, at_most(10**6)] | None = None
    abs_tol: Finite | None = None
    rel_tol: Finite | None = None
    cache_strategy: Annotated[str, one_of("none", "chord", "max_its")] | None = None
    cache_max_its: Annotated[int, at_most(10**6)] | None = None

    @cached_property
    def found(self) -> KrylovSettings:
        given = {key: getattr(self, key) for key in self.__struct_fields__}
        return KrylovSettings(**{key: value for key, value in given.items() if value is not None})


class _Config(_Newton):
    """The model's solver configuration."""

    krylov: _Krylov | None = None


class _Linear(Form):
    """How the linear systems of a sensitivity are solved."""

    kind: Annotated[str, one_of("direct", "krylov")]
    krylov: _Krylov | None = None


def _iterative(of: _Linear | None) -> KrylovSettings | None:
    """The settings of an iterative solve; None for a direct one."""
    if of is None or of.kind == "direct":
        return None
    return of.krylov.found if of.krylov is not None else KrylovSettings()


class _Feedback(_Object):
    input: Name
    output: Name
    iterations: Annotated[int, msgspec.Meta(ge=1, le=10**4)]
    base_shape: Shape | None = None
    sub_batch_shape: Shape | None = None

    @cached_property
    def found(self) -> s.Feedback:
        into = s.Variable(self.input, self.base_shape or (), self.sub_batch_shape or ())
        return s.Feedback(into, self.output, self.iterations)


class _Segment(_Object, kw_only=True, tag_field="kind"):
    param_inputs: Names | None = None
    jacobian_pairs: tuple[_InputPair, ...] | None = None
    param_jacobian_pairs: tuple[_ParameterPair, ...] | None = None


class _Explicit(_Segment, kw_only=True, tag="forward"):
    package: PackageName
    inputs: Names
    outputs: Names
    jvp_package: PackageName | None = None
    param_jacobian_package: PackageName | None = None
    param_vjp_package: PackageName | None = None
    param_vjp_params: Names | None = None
    param_vjp_outputs: Names | None = None
    parameters_among_inputs: bool | None = None

    @cached_property
    def found(self) -> s.ExplicitInfo:
        outputs = self.names("outputs")
        jacobian = parameter_jacobian = adjoint = None
        if self.jvp_package is not None:
            jacobian = s.PairGraph(self.jvp_package, _pairs(self.need("jacobian_pairs")), skip=len(outputs))
        if self.param_jacobian_package is not None:
            pairs = _pairs(self.need("param_jacobian_pairs"))
            parameter_jacobian = s.PairGraph(self.param_jacobian_package, pairs)
        if self.param_vjp_package is not None:
            by, of = (self.names(f"param_vjp_{what}", required=True) for what in ("params", "outputs"))
            adjoint = s.AdjointGraph(self.param_vjp_package, by, of)
        return s.ExplicitInfo(
            value=self.package,
            inputs=self.names("inputs"),
            outputs=outputs,
            parameters=self.names("param_inputs"),
            jacobian=jacobian,
            parameter_jacobian=parameter_jacobian,
            parameter_vjp=adjoint,
            parameters_among_inputs=bool(self.parameters_among_inputs),
        )


class _Implicit(_Segment, kw_only=True, tag="implicit"):
    residual_package: PackageName
    unknown_group_infos: tuple[_Group, ...]
    residual_group_infos: tuple[_Group, ...]
    given_group_infos: tuple[_Group, ...]
    givens: Annotated[tuple[_Given, ...], msgspec.Meta(min_length=1)]
    newton: _Newton | None = None
    max_substepping_level: Annotated[int, at_most(30)] | None = None
    step_package: PackageName | None = None
    step_returns: Annotated[str, one_of("increment", "iterate")] | None = None
    jacobian_package: PackageName | None = None
    solve_package: PackageName | None = None
    matvec_package: PackageName | None = None
    precond_setup_package: PackageName | None = None
    precond_apply_package: PackageName | None = None
    ift_package: PackageName | None = None
    jacobian_given_package: PackageName | None = None
    solve_ift_package: PackageName | None = None
    input_sensitivity: _Linear | None = None
    param_ift_package: PackageName | None = None
    dr_dparam_package: PackageName | None = None
    solve_param_package: PackageName | None = None
    param_sensitivity: _Linear | None = None
    predictor_package: PackageName | None = None
    predictor_inputs: Names | None = None
    predictor_outputs: Names | None = None
    predictor_feedback: _Feedback | None = None

    @cached_property
    def found(self) -> s.ImplicitInfo:
        """The segment, with default settings where it has none of its own."""
        unknowns = tuple(group.found for group in self.unknown_group_infos)
        if not any(group.variables for group in unknowns):
            raise Unfit("unknown_group_infos", "at least one unknown")
        return s.ImplicitInfo(
            residual=self.residual_package,
            step=self._step(),
            unknowns=unknowns,
            residuals=tuple(group.found for group in self.residual_group_infos),
            givens=tuple(group.found for group in self.given_group_infos),
            roles=tuple(item.given for item in self.givens),
            newton=NewtonSettings() if self.newton is None else self.newton.found,
            parameters=self.names("param_inputs"),
            sensitivity=self._sensitivity(),
            parameter_sensitivity=self._parameter_sensitivity(),
            predictor=self._predictor() if self.predictor_package is not None else None,
            max_substepping_level=self.max_substepping_level or 0,
        )

    def _step(self) -> s.DirectStep | s.KrylovStep | s.FusedStep:
        if self.step_package is not None:
            return s.FusedStep(self.step_package, self.step_returns == "iterate")
        if self.matvec_package is None:
            return s.DirectStep(self.need("jacobian_package"), self.need("solve_package"))
        setup, apply = self.precond_setup_package, self.precond_apply_package
        if (setup is None) != (apply is None):
            raise Unfit("precond_setup_package", "both graphs of the preconditioner or neither")
        return s.KrylovStep(self.matvec_package, KrylovSettings(), setup, apply)

    def _sensitivity(self) -> s.GivenSensitivity | s.FusedSensitivity | None:
        if self.ift_package is not None:
            return s.FusedSensitivity(self.ift_package, _pairs(self.need("jacobian_pairs")))
        if self.jacobian_given_package is None:
            return None
        solver = _iterative(self.input_sensitivity) or self.need("solve_ift_package")
        pairs = _pairs(self.need("jacobian_pairs"), matrix=not isinstance(solver, str))
        return s.GivenSensitivity(self.need("jacobian_package"), self.jacobian_given_package, solver, pairs)

    def _parameter_sensitivity(self) -> s.ParameterSensitivity | s.FusedSensitivity | None:
        if self.param_ift_package is not None:
            return s.FusedSensitivity(self.param_ift_package, _pairs(self.need("param_jacobian_pairs")))
        if self.dr_dparam_package is None:
            return None
        solver = _iterative(self.param_sensitivity) or self.need("solve_param_package")
        pairs = _pairs(self.need("param_jacobian_pairs"), matrix=not isinstance(solver, str))
        return s.ParameterSensitivity(self.dr_dparam_package, solver, pairs)

    def _predictor(self) -> s.Predictor:
        inputs, outputs = (self.names(f"predictor_{what}", required=True) for what in ("inputs", "outputs"))
        feedback = self.predictor_feedback.found if self.predictor_feedback is not None else None
        if feedback is not None and feedback.input.name not in inputs:
            raise Unfit("predictor_feedback.input", f"one of the predictor's inputs {', '.join(inputs)}")
        if feedback is not None and feedback.output not in outputs:
            raise Unfit("predictor_feedback.output", f"one of the predictor's outputs {', '.join(outputs)}")
        return s.Predictor(self.need("predictor_package"), inputs, outputs, feedback)


class _Aliases(_Object):
    """Renames of the boundary, checked here to say which of them is wrong."""

    inputs: dict[str, Any] = msgspec.field(default_factory=dict)
    outputs: dict[str, Any] = msgspec.field(default_factory=dict)
    parameters: dict[str, Any] = msgspec.field(default_factory=dict)

    @cached_property
    def found(self) -> s.Aliases:
        for kind in self.__struct_fields__:
            renames = getattr(self, kind)
            for old, new in renames.items():
                if not isinstance(new, str) or not NAME.fullmatch(new):
                    raise Unfit(f"{kind}.{old if NAME.fullmatch(old) else named(old)}", "a name", new)
            if len(set(renames.values())) != len(renames):
                raise Unfit(kind, "boundary names that are all different")
        return s.Aliases(self.inputs, self.outputs, self.parameters)


class _Document(_Object, kw_only=True):
    type: Annotated[str, one_of("composed")]
    inputs: tuple[_Variable, ...]
    outputs: Annotated[tuple[_Variable, ...], msgspec.Meta(min_length=1)]
    parameters: tuple[_Parameter, ...]
    segments: Annotated[tuple[_Explicit | _Implicit, ...], msgspec.Meta(min_length=1)]
    derivatives: tuple[tuple[Name, Name], ...]
    parameter_derivatives: tuple[tuple[Name, Name], ...]
    boundary_aliases: _Aliases | None = None
    solver_config: _Config | None = None

    @cached_property
    def found(self) -> s.Metadata:
        return s.Metadata(
            inputs=tuple(item.found for item in self.inputs),
            outputs=tuple(item.found for item in self.outputs),
            parameters=tuple(item.found for item in self.parameters),
            segments=tuple(map(self._configured, self.segments)),
            derivatives=tuple(dict.fromkeys(self.derivatives)),
            parameter_derivatives=tuple(dict.fromkeys(self.parameter_derivatives)),
            aliases=s.Aliases() if self.boundary_aliases is None else self.boundary_aliases.found,
        )

    def _configured(self, form: _Explicit | _Implicit) -> s.Segment:
        """A segment with the solver configuration of the model."""
        found, config = form.found, self.solver_config
        if config is None or isinstance(found, s.ExplicitInfo):
            return found
        step = found.step
        if isinstance(step, s.KrylovStep) and config.krylov is not None:
            step = replace(step, settings=config.krylov.found)
        own = isinstance(form, _Implicit) and form.newton is not None
        return replace(found, step=step, newton=found.newton if own else config.found)
