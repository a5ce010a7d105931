"""Read the metadata's newest JSON form into the objects of `schema`.

Beside the keys that neml2 3.1.0 writes, this form has those that `upgrade` leaves of older files: a fused
`step_package` (with `step_returns`), fused `ift_package` and `param_ift_package`, pairs with an `output` index, per
segment `newton` settings, and `parameters_among_inputs` where only the package tells in which order a graph takes them.
"""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

from ..errors import ArtifactError, InputError
from ..settings import KrylovSettings, NewtonSettings, newton_settings
from . import schema as s
from .consistency import check_boundary, check_names, check_shapes
from .folder import Folder, folder_at
from .order import with_argument_order
from .package import read_signature
from .reading import (
    Node,
    any_number,
    at_most,
    choice,
    file_name,
    flag,
    names,
    number,
    read_json,
    shape,
    text,
    whole,
)
from .typeonly import BASE_SHAPES
from .upgrade import released_form, upgrade

ROLES = ("old_state", "old_force", "cur_force", "incremental", "static", "unknown")


def read_metadata(file: Path, folder: Folder | None = None, *, solver: dict[str, Any] | None = None) -> s.Metadata:
    """Read a metadata file of any released schema.

    Args:
        file: the file.
        folder: of its artifact; the one that the file is in, if not given.
        solver: Newton settings that take the place of the file's, such as those of a stub's `[Solvers]` block.

    Returns:
        The metadata in the newest form.

    Raises:
        ArtifactError: the file is damaged, or of a schema that is not known.
        ArtifactNotFoundError: there is no such file.
        InputError: a Newton setting is not one.
    """
    folder = folder or folder_at(file.parent)
    document, digest = read_json(file, folder)
    form = released_form(document, str(file))
    written = document["schema_version"]
    try:
        found = metadata(Node(upgrade(document, str(file)), "", str(file)), written)
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
    ordered = with_argument_order(found, file.parent, lambda package: read_signature(package, folder))
    return with_solver(replace(ordered, digest=digest), solver or {})


def with_solver(found: s.Metadata, solver: dict[str, Any]) -> s.Metadata:
    """The metadata with other Newton settings in all implicit segments, by the field names of `NewtonSettings`."""
    known = [field.name for field in fields(NewtonSettings)]
    unknown = [name for name in solver if name not in known]
    if unknown:
        raise InputError(f"solver has no setting {', '.join(unknown)}; there are {', '.join(known)}.")
    checked = newton_settings(**solver)
    given = {name: getattr(checked, name) for name in solver}
    changed = (
        replace(part, newton=replace(part.newton, **given)) if isinstance(part, s.ImplicitSegment) else part
        for part in found.segments
    )
    return replace(found, segments=tuple(changed))


def metadata(node: Node, written: int) -> s.Metadata:
    """Read the whole document; `written` is the schema that the file was written in."""
    choice("composed")(node.at("type"))
    config = node.get("solver_config", lambda n: n, Node({}, "solver_config", node.file))
    inputs, outputs = (tuple(variable(item) for item in node.at(key).items()) for key in ("inputs", "outputs"))
    parameters = tuple(parameter(item) for item in node.at("parameters").items())
    segments = tuple(segment(item, config) for item in node.at("segments").items())
    for key, items in (("segments", segments), ("outputs", outputs)):
        if not items:
            raise node.at(key).fail("at least one")
    found = s.Metadata(
        inputs=inputs,
        outputs=outputs,
        parameters=parameters,
        segments=segments,
        derivatives=couples(node.at("derivatives")),
        parameter_derivatives=couples(node.at("parameter_derivatives")),
        aliases=node.get("boundary_aliases", aliases, s.Aliases()),
        schema=written,
    )
    check_boundary(found, node.file)
    check_names(found, node.file)
    check_shapes(found, node.file)
    return found


def variable(node: Node) -> s.Variable:
    """Read a master input or output, or a variable of an implicit segment."""
    found = s.Variable(
        name=text(node.at("name")),
        base_shape=shape(node.at("base_shape")),
        sub_batch_shape=node.get("sub_batch_shape", shape, ()),
        type=node.get("var_type", text, ""),
    )
    # The shape is told up to three times; a graph that is given another reads beyond its tensors.
    of_type = BASE_SHAPES.get(found.type)
    if of_type is not None and tuple(of_type) != found.base_shape:
        raise node.at("base_shape").fail(f"{of_type}, the shape of a {found.type}")
    if node.get("var_size", whole, found.width) not in (found.width, found.size):
        raise node.at("var_size").fail(f"{found.width}, the number of entries of the shape {list(found.base_shape)}")
    return found


def parameter(node: Node) -> s.Parameter:
    """Read a promoted parameter with its value."""
    name = text(node.at("name"))
    if "values" not in node:
        raise ArtifactError(
            f"{node.file}: parameter {name!r} has no inline 'values'; values stored elsewhere were never released and "
            "are not supported. Compile the model again with neml2-compile."
        )
    stored = shape(node.at("shape"))
    values = tuple(any_number(item) for item in node.at("values").items())
    wanted = 1
    for size in stored:
        wanted *= size
    if len(values) != wanted:
        raise node.at("values").fail(f"{wanted} numbers, the size of shape {list(stored)}")
    base = node.get("param_base_shape", shape, stored)
    if stored[len(stored) - len(base) :] != base:
        raise node.at("param_base_shape").fail(f"the trailing axes of the stored shape {list(stored)}")
    return s.Parameter(name, base, stored, values, node.get("dtype", text, None))


def couples(node: Node) -> tuple[tuple[str, str], ...]:
    """Read `[[out, wrt], ...]`."""
    found = []
    for item in node.items():
        pair = item.items()
        if len(pair) != 2:
            raise item.fail("a pair [out, wrt]")
        found.append((text(pair[0]), text(pair[1])))
    return tuple(dict.fromkeys(found))


def aliases(node: Node) -> s.Aliases:
    """Read the renames of the boundary."""
    kinds = {key: {old: text(new) for old, new in value.entries()} for key, value in node.entries()}
    for kind, renames in kinds.items():
        if len(set(renames.values())) != len(renames):
            raise node.at(kind).fail("boundary names that are all different")
    return s.Aliases(**{key: kinds.get(key, {}) for key in ("inputs", "outputs", "parameters")})


def segment(node: Node, config: Node) -> s.Segment:
    """Read one segment."""
    kind = choice("forward", "implicit")(node.at("kind"))
    return forward(node) if kind == "forward" else implicit(node, config)


def forward(node: Node) -> s.ForwardSegment:
    """Read a forward segment."""
    outputs = names(node.at("outputs"))
    jacobian = parameter_jacobian = adjoint = None
    if "jvp_package" in node:
        found = pairs(node.at("jacobian_pairs"), "in_var")
        jacobian = s.PairGraph(file_name(node.at("jvp_package")), found, skip=len(outputs))
    if "param_jacobian_package" in node:
        found = pairs(node.at("param_jacobian_pairs"), "param")
        parameter_jacobian = s.PairGraph(file_name(node.at("param_jacobian_package")), found)
    if "param_vjp_package" in node:
        adjoint = s.AdjointGraph(
            file_name(node.at("param_vjp_package")),
            names(node.at("param_vjp_params")),
            names(node.at("param_vjp_outputs")),
        )
    return s.ForwardSegment(
        value=file_name(node.at("package")),
        inputs=names(node.at("inputs")),
        outputs=outputs,
        parameters=node.get("param_inputs", names, ()),
        jacobian=jacobian,
        parameter_jacobian=parameter_jacobian,
        parameter_vjp=adjoint,
        parameters_among_inputs="parameters_among_inputs" in node and bool(node.at("parameters_among_inputs").value),
    )


def pairs(node: Node, wrt: str, *, matrix: bool = False) -> tuple[s.Pair, ...]:
    """Read derivative pairs.

    Args:
        node: the list.
        wrt: the key of the variable by which: `in_var` or `param`.
        matrix: whether the blocks are cut out of one matrix by their offsets, whatever the entries say.

    Returns:
        The pairs, with the place of each.
    """
    found = []
    for i, item in enumerate(node.items()):
        cut = matrix or "output" in item
        found.append(
            s.Pair(
                out=text(item.at("out_var")),
                wrt=text(item.at(wrt)),
                out_base_shape=shape(item.at("out_base_shape")),
                wrt_base_shape=shape(item.at("param_base_shape" if wrt == "param" else "in_base_shape")),
                output=0 if matrix else item.get("output", whole, i),
                row=item.get("row_offset", whole, 0) if cut else None,
                column=item.get("col_offset", whole, 0) if cut else None,
                wrt_sub_batch_shape=item.get("in_sub_batch_shape", shape, ()),
                constant=item.get("batch_independent", flag, False),
            )
        )
    return tuple(found)


def implicit(node: Node, config: Node) -> s.ImplicitSegment:
    """Read an implicit segment; `config` is the model's solver configuration."""
    unknowns, residuals, givens = (
        tuple(group(item) for item in node.at(f"{kind}_group_infos").items())
        for kind in ("unknown", "residual", "given")
    )
    if not any(g.variables for g in unknowns):
        raise node.at("unknown_group_infos").fail("at least one unknown")
    roles = tuple(
        s.Given(variable(item), cast(s.Role, item.get("role", choice(*ROLES), "static")), item.get("pair", text, None))
        for item in node.at("givens").items()
    )
    if not roles:
        raise node.at("givens").fail("at least one given")
    return s.ImplicitSegment(
        residual=file_name(node.at("residual_package")),
        step=step(node, config),
        unknowns=unknowns,
        residuals=residuals,
        givens=givens,
        roles=roles,
        newton=newton(node.get("newton", lambda n: n, config)),
        parameters=node.get("param_inputs", names, ()),
        sensitivity=input_sensitivity(node),
        parameter_sensitivity=parameter_sensitivity(node),
        predictor=predictor(node) if "predictor_package" in node else None,
        max_substepping_level=node.get("max_substepping_level", at_most(30), 0),
    )


def group(node: Node) -> s.GroupInfo:
    """Read one group."""
    structure = cast(s.Structure, node.get("structure", choice("dense", "block"), "dense"))
    variables = tuple(variable(item) for item in node.at("per_var_info").items())
    sub_batch: s.Shape = node.get("sub_batch_shape", shape, ()) if structure == "block" else ()
    for member in variables if structure == "block" else ():
        if member.sub_batch_shape != sub_batch:
            raise node.at("per_var_info").fail(f"variables with the block group's sub-batch shape {list(sub_batch)}")
    return s.GroupInfo(structure, variables, sub_batch)


def newton(node: Node) -> NewtonSettings:
    """Read Newton settings; absent ones take neml2's defaults."""
    reader = {
        "ls_type": choice("BACKTRACKING", "STRONG_WOLFE"),
        "miters": at_most(10**5),
        "ls_max_iters": at_most(10**4),
    }
    # `chord_steps` is a setting of this runtime, which no release of neml2 writes.
    names = [f.name for f in fields(NewtonSettings) if f.name in node and f.name != "chord_steps"]
    given = {name: reader.get(name, number)(node.at(name)) for name in names}
    try:
        return newton_settings(**given)
    except InputError as error:
        raise ArtifactError(
            f"{node.file}: {node.path}: {error} The metadata is damaged or was edited; compile the model again with "
            "neml2-compile."
        ) from error


def krylov(node: Node) -> KrylovSettings:
    """Read the settings of an iterative linear solve."""
    reader = {
        "method": choice("gmres", "bicgstab"),
        "cache_strategy": choice("none", "chord", "max_its"),
        "abs_tol": number,
        "rel_tol": number,
        "restart": at_most(10**5),
    }
    written = [f.name for f in fields(KrylovSettings) if f.name in node and f.name != "absolute_floor"]
    given = {name: reader.get(name, at_most(10**6))(node.at(name)) for name in written}
    return KrylovSettings(**given)  # type: ignore[arg-type]


def step(node: Node, config: Node) -> s.DirectStep | s.KrylovStep | s.FusedStep:
    """Tell how the segment makes Newton steps."""
    if "step_package" in node:
        returns = node.get("step_returns", choice("increment", "iterate"), "increment")
        return s.FusedStep(file_name(node.at("step_package")), returns == "iterate")
    if "matvec_package" in node:
        setup, apply = (node.get(f"precond_{part}_package", file_name, None) for part in ("setup", "apply"))
        if (setup is None) != (apply is None):
            raise node.fail("both graphs of the preconditioner or neither")
        return s.KrylovStep(
            file_name(node.at("matvec_package")), config.get("krylov", krylov, KrylovSettings()), setup, apply
        )
    return s.DirectStep(file_name(node.at("jacobian_package")), file_name(node.at("solve_package")))


def _krylov_settings(node: Node, key: str) -> KrylovSettings | None:
    """The iterative solver of a sensitivity; None where it is direct."""
    if key not in node:
        return None
    solver = node.at(key)
    if choice("direct", "krylov")(solver.at("kind")) == "direct":
        return None
    return solver.get("krylov", krylov, KrylovSettings())


def input_sensitivity(node: Node) -> s.DirectSensitivity | s.KrylovSensitivity | s.FusedSensitivity | None:
    """Tell how the segment differentiates its unknowns by its givens; None where it cannot."""
    if "ift_package" in node:
        return s.FusedSensitivity(file_name(node.at("ift_package")), pairs(node.at("jacobian_pairs"), "in_var"))
    if "jacobian_given_package" not in node:
        return None
    jacobian, given = file_name(node.at("jacobian_package")), file_name(node.at("jacobian_given_package"))
    settings = _krylov_settings(node, "input_sensitivity")
    if settings is not None:
        return s.KrylovSensitivity(jacobian, given, settings, pairs(node.at("jacobian_pairs"), "in_var", matrix=True))
    return s.DirectSensitivity(
        jacobian, given, file_name(node.at("solve_ift_package")), pairs(node.at("jacobian_pairs"), "in_var")
    )


def parameter_sensitivity(
    node: Node,
) -> s.DirectParameterSensitivity | s.KrylovParameterSensitivity | s.FusedSensitivity | None:
    """Tell how the segment differentiates its unknowns by promoted parameters; None where it cannot."""
    if "param_ift_package" in node:
        return s.FusedSensitivity(
            file_name(node.at("param_ift_package")), pairs(node.at("param_jacobian_pairs"), "param")
        )
    if "dr_dparam_package" not in node:
        return None
    graph = file_name(node.at("dr_dparam_package"))
    settings = _krylov_settings(node, "param_sensitivity")
    if settings is not None:
        found = pairs(node.at("param_jacobian_pairs"), "param", matrix=True)
        return s.KrylovParameterSensitivity(graph, settings, found)
    return s.DirectParameterSensitivity(
        graph, file_name(node.at("solve_param_package")), pairs(node.at("param_jacobian_pairs"), "param")
    )


def predictor(node: Node) -> s.Predictor:
    """Read the predictor."""
    inputs, outputs = names(node.at("predictor_inputs")), names(node.at("predictor_outputs"))
    feedback = None
    if "predictor_feedback" in node:
        loop = node.at("predictor_feedback")
        into = s.Variable(
            text(loop.at("input")), loop.get("base_shape", shape, ()), loop.get("sub_batch_shape", shape, ())
        )
        feedback = s.Feedback(into, text(loop.at("output")), at_most(10**4)(loop.at("iterations")))
        if feedback.iterations == 0:
            raise loop.at("iterations").fail("at least one pass")
        if into.name not in inputs:
            raise loop.at("input").fail(f"one of the predictor's inputs {', '.join(inputs)}")
        if feedback.output not in outputs:
            raise loop.at("output").fail(f"one of the predictor's outputs {', '.join(outputs)}")
    return s.Predictor(file_name(node.at("predictor_package")), inputs, outputs, feedback)
