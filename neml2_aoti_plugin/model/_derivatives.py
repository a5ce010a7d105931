"""The derivative calls of a model: which were compiled, seeds, and blocks in the caller's terms."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from .._artifact.schema import Shape, Variable
from .._program.program import Evaluation
from .._program.report import Report
from .._program.tangents import Columns, Seed
from ..errors import DerivativeNotCompiledError, InputError, InputTypeError, UnknownNameError
from ._admission import INITIAL_GUESS
from ._call import Admitted, BelowAutograd, Caller, Tensors
from ._recompile import compile_command

Blocks = dict[str, dict[str, Tensor]]
Pairs = tuple[tuple[str, str], ...]

# What is differentiated by, as callers know it: ("input", name) or ("parameter", name). Autograd's plans hold first
# iterates in the same form, (INITIAL_GUESS, name).
By = tuple[str, str]

DIRECTION: Seed = ("direction", "")


def input_pairs(caller: Caller, chosen: Sequence[tuple[str, str]] | None = None) -> Pairs:
    """The compiled (output, input) pairs by authored name: all, or those that are chosen by boundary names.

    Args:
        caller: of the model.
        chosen: as for `Model.jacobian`; all if not given.

    Raises:
        DerivativeNotCompiledError: none was compiled, or one that was chosen was not.
        UnknownNameError: a name is not that of an output or input.
        InputTypeError: `chosen` is no sequence of pairs of names.
    """
    pairs = caller.metadata.derivatives
    if not pairs and chosen is None:
        metadata = caller.metadata
        every = [(out.name, wrt.name) for out in metadata.outputs for wrt in metadata.inputs]
        raise DerivativeNotCompiledError(
            f"{caller.boundary.where} was compiled without derivatives by inputs. Compile it with them: "
            f"{compile_command(metadata, caller.boundary, every)}"
        )
    if chosen is None:
        return pairs
    found = []
    for pair in chosen:
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(isinstance(name, str) for name in pair):
            raise InputTypeError(f"pairs hold {pair!r}, expected pairs of names such as ('stress', 'strain').")
        out, by = pair
        for name, known, kind in (
            (out, caller.boundary.output_by_name, "output"),
            (by, caller.boundary.by_name, "input"),
        ):
            if name not in known:
                raise UnknownNameError(
                    f"pairs hold {pair!r}, but {name!r} is no {kind} of {caller.boundary.where}; the {kind}s are: "
                    f"{', '.join(known)}.{_by_parameter(caller, name)}"
                )
        if not compiled(caller, out, ("input", by)):
            raise not_compiled(caller, out, ("input", by))
        found.append((caller.boundary.output_by_name[out].variable.name, caller.boundary.by_name[by].variable.name))
    return tuple(dict.fromkeys(found))


def _by_parameter(caller: Caller, name: str) -> str:
    """Where to find derivatives by what is no input but a promoted parameter."""
    if name not in caller.promoted.specs:
        return ""
    return f" {name!r} is a promoted parameter: call param_jacobian(inputs, params=[{name!r}]), or param_vjp."


def parameter_pairs(caller: Caller, params: Sequence[str] | None = None) -> Pairs:
    """The compiled (output, parameter) pairs by authored name, for some parameters; raises where there are none."""
    pairs = caller.metadata.parameter_derivatives
    if not pairs:
        metadata = caller.metadata
        promoted = ", ".join(caller.promoted.specs) or "none"
        names = [parameter.name for parameter in metadata.parameters] or ["PARAMETER"]
        every = [(out.name, name) for out in metadata.outputs for name in names]
        raise DerivativeNotCompiledError(
            f"{caller.boundary.where} was compiled without derivatives by parameters (promoted: {promoted}). Compile "
            f"it with them: {compile_command(metadata, caller.boundary, every)}"
        )
    if params is None:
        return pairs
    chosen: list[tuple[str, str]] = []
    for name in params:
        if name in caller.boundary.by_name:
            raise UnknownNameError(
                f"params hold {name!r}, which is an input of {caller.boundary.where}. Call jacobian for derivatives by "
                "inputs."
            )
        caller.promoted.require(name)
        found = [(o, p) for o, p in pairs if p == caller.promoted.specs[name].name]
        if not found:
            raise not_compiled(caller, caller.output_name(caller.metadata.outputs[0].name), ("parameter", name))
        chosen.extend(found)
    return tuple(chosen)


def not_compiled(caller: Caller, out: str, by: By) -> DerivativeNotCompiledError:
    """The error for a derivative that has no graph, by boundary names."""
    kind, name = by
    names = caller.input_name if kind == "input" else caller.promoted.public.__getitem__
    pairs = caller.metadata.derivatives if kind == "input" else caller.metadata.parameter_derivatives
    compiled = ", ".join(f"{caller.output_name(o)}:{names(i)}" for o, i in pairs)
    known = caller.boundary.by_name[name].variable if kind == "input" else caller.promoted.specs[name]
    missing = [(caller.boundary.output_by_name[out].variable.name, known.name)]
    return DerivativeNotCompiledError(
        f"d({out})/d({name}) was not compiled into {caller.boundary.where}; there are: {compiled or 'none'}. "
        f"Compile it: {compile_command(caller.metadata, caller.boundary, missing)}"
    )


def compiled(caller: Caller, out: str, by: By) -> bool:
    """Whether a derivative has graphs, by boundary names."""
    kind, name = by
    authored_out = caller.boundary.output_by_name[out].variable.name
    if kind == "input":
        return (authored_out, caller.boundary.by_name[name].variable.name) in caller.metadata.derivatives
    return (authored_out, caller.promoted.specs[name].name) in caller.metadata.parameter_derivatives


def linearise(
    caller: Caller,
    inputs: Mapping[str, Tensor],
    overrides: Mapping[str, Tensor] | None,
    pairs: Sequence[tuple[str, By]],
) -> tuple[Tensors, list[Tensor], Shape]:
    """Evaluate the outputs and some derivatives as matrices.

    Args:
        caller: of the model.
        inputs: as for `Model.forward`.
        overrides: as for `Model.forward`.
        pairs: outputs and what to differentiate them by; compiled ones.

    Returns:
        Outputs; a matrix `(*batch, entries of the output, entries of the other)` for each pair; and the batch shape.
    """
    call = caller.admit(inputs, overrides)
    bys = dict.fromkeys(by for _, by in pairs)
    seeds: dict[str, Columns] = {}
    parameters: list[str] = []
    inside: dict[By, Seed] = {}
    for kind, name in bys:
        if kind == "input":
            authored = caller.boundary.by_name[name].variable.name
            seeds[authored] = {(kind, authored): None}
        else:
            authored = caller.promoted.specs[name].name
            parameters.append(authored)
        inside[kind, name] = (kind, authored)
    found = caller.evaluate(call, seeds, parameters) if bys else caller.evaluate(call)
    matrices = []
    for out, by in pairs:
        authored = caller.boundary.output_by_name[out].variable.name
        value, column = found.values[authored], found.tangents[authored].get(inside[by])
        entries = prod(value.shape[1:]), prod(natural_shape(caller, by))
        shape = (call.rows, *entries)
        matrix = value.new_zeros(shape) if column is None else column.expand(shape)
        matrices.append(caller.boundary.unflatten(matrix, call.batch))
    caller.require_convergence(found, call, matrices)
    return caller.outputs(found.values, call.batch), matrices, call.batch


def natural_shape(caller: Caller, by: By) -> Shape:
    """Shape of an input, a parameter or an initial guess without its batch axes."""
    kind, name = by
    if kind == "input":
        return caller.boundary.by_name[name].variable.natural_shape
    if kind == INITIAL_GUESS:
        return caller.boundary.iterates[name].variable.natural_shape
    return caller.promoted.specs[name].base_shape


def jvp(
    caller: Caller,
    inputs: Mapping[str, Tensor],
    tangents: Mapping[str, Tensor],
    overrides: Mapping[str, Tensor] | None,
) -> tuple[Tensors, Tensors]:
    """See `Model.jvp`."""
    pairs = input_pairs(caller)
    outs = tuple(dict.fromkeys(o for o, _ in pairs))
    _check_directions(caller, tangents, outs, pairs)
    call = caller.admit(inputs, overrides)
    seeds: dict[str, Columns] = {}
    for name, flat in flat_tangents(caller, tangents, call).items():
        variable = caller.boundary.by_name[name].variable
        seeds[variable.name] = {DIRECTION: flat.reshape((call.rows, variable.size, 1))}
    found = caller.evaluate(call, seeds)
    along = {}
    for out in outs:
        value, column = found.values[out], found.tangents[out].get(DIRECTION)
        flat = torch.zeros_like(value) if column is None else column.expand(call.rows, -1, -1).reshape(value.shape)
        along[caller.output_name(out)] = caller.boundary.unflatten(flat, call.batch)
    caller.require_convergence(found, call, along.values())
    return caller.outputs(found.values, call.batch), along


def require_directions(caller: Caller, tangents: Iterable[str]) -> None:
    """Refuse directions along which `jvp` has no derivative."""
    pairs = input_pairs(caller)
    _check_directions(caller, tangents, dict.fromkeys(o for o, _ in pairs), pairs)


def flat_tangents(caller: Caller, tangents: Mapping[str, Tensor], call: Admitted) -> Tensors:
    """Check the directions of a `jvp`; give them by boundary name, `(rows, *sub_batch, *base)`."""
    found = {}
    for name, tangent in tangents.items():
        variable = caller.boundary.by_name[name].variable
        checked, own = caller.boundary.batch_of(tangent, name, variable, "tangent")
        if not _broadcasts(own, call.batch):
            raise InputError(f"tangent {name!r} has batch {list(own)}, which does not broadcast to {list(call.batch)}.")
        found[name] = caller.boundary.flatten(checked, own, call.batch, call.rows, variable)
    return found


def _check_directions(caller: Caller, tangents: Iterable[str], outs: Iterable[str], pairs: Pairs) -> None:
    """A direction along an input must find every pair it needs; a missing one must not count as zero."""
    compiled = frozenset(pairs)
    for name in tangents:
        port = caller.boundary.by_name.get(name)
        if port is None:
            raise UnknownNameError(
                f"tangent {name!r} is not an input of {caller.boundary.where}; the inputs are: "
                f"{', '.join(caller.boundary.by_name)}.{_by_parameter(caller, name)}"
            )
        for out in outs:
            if (out, port.variable.name) not in compiled:
                raise not_compiled(caller, caller.output_name(out), ("input", name))


def _broadcasts(own: Shape, batch: Shape) -> bool:
    return len(own) <= len(batch) and all(a in (1, b) for a, b in zip(own[::-1], batch[::-1], strict=False))


def jacobian(
    caller: Caller,
    inputs: Mapping[str, Tensor],
    overrides: Mapping[str, Tensor] | None,
    pairs: Sequence[tuple[str, str]] | None = None,
    *,
    expand: bool = False,
) -> tuple[Tensors, Blocks]:
    """See `Model.jacobian`."""
    chosen = input_pairs(caller, pairs)
    call = caller.admit(inputs, overrides)
    outputs, blocks, _ = with_blocks(caller, call, chosen, expand=expand, required=True)
    return outputs, blocks


def with_blocks(
    caller: Caller, call: Admitted, pairs: Pairs, *, expand: bool, required: bool = False
) -> tuple[Tensors, Blocks, Report | None]:
    """Outputs and derivative blocks by inputs in one evaluation, by boundary names.

    Args:
        caller: of the model.
        call: the admitted arguments.
        pairs: compiled ones, by authored names.
        expand: whether constant blocks have the batch axes too.
        required: whether rows that do not converge are an error.

    Returns:
        Outputs, blocks, and how the solves fared.
    """
    if caller.plan is not None:
        with BelowAutograd():
            outputs, all_blocks = caller.plan.jacobian_of(call, expand=expand)
        blocks: Blocks = {}
        for authored_out, authored_by in pairs:
            out, by = caller.output_name(authored_out), caller.input_name(authored_by)
            blocks.setdefault(out, {})[by] = all_blocks[out][by]
        return outputs, blocks, None
    seeds: dict[str, Columns] = {wrt: {("input", wrt): None} for wrt in dict.fromkeys(i for _, i in pairs)}
    found = caller.evaluate(call, seeds)
    variables = {v.name: v for v in caller.metadata.inputs}
    names = caller.metadata.aliases.inputs
    blocks = blocks_of(caller, found, call.batch, pairs, "input", variables, names)
    if required:
        caller.require_convergence(found, call, tensors_of(blocks))
    return caller.outputs(found.values, call.batch), blocks, found.report


def param_jacobian(
    caller: Caller,
    inputs: Mapping[str, Tensor],
    overrides: Mapping[str, Tensor] | None,
    params: Sequence[str] | None = None,
) -> tuple[Tensors, Blocks, Tensors]:
    """See `Model.param_jacobian`; gives the parameters in force as well."""
    pairs = parameter_pairs(caller, params)
    call = caller.admit(inputs, overrides)
    evaluation = caller.evaluate(call, {}, dict.fromkeys(p for _, p in pairs))
    variables = {p.name: Variable(p.name, p.base_shape) for p in caller.metadata.parameters}
    blocks = blocks_of(caller, evaluation, call.batch, pairs, "parameter", variables, caller.promoted.public)
    caller.require_convergence(evaluation, call, tensors_of(blocks))
    return caller.outputs(evaluation.values, call.batch), blocks, call.in_force


def blocks_of(
    caller: Caller,
    found: Evaluation,
    batch: Shape,
    pairs: Pairs,
    kind: str,
    wrt: Mapping[str, Variable],
    names: Mapping[str, str],
) -> Blocks:
    """Derivative blocks by boundary names, `(*batch, *out_shape, *wrt_shape)`; zero for pairs that do not depend.

    Args:
        caller: of the model.
        found: an evaluation with derivatives by seeds `(kind, name)`.
        batch: the caller's batch shape.
        pairs: authored names.
        kind: of the seeds.
        wrt: the variables by which.
        names: their boundary names, where they differ.
    """
    blocks: Blocks = {}
    for out, by in pairs:
        value, column = found.values[out], found.tangents[out].get((kind, by))
        rows = value.shape[0]
        shape = (rows, *value.shape[1:], *wrt[by].natural_shape)
        if column is not None and column.shape[0] != rows:
            column = column.expand(rows, -1, -1)
        block = value.new_zeros(shape) if column is None else column.reshape(shape)
        blocks.setdefault(caller.output_name(out), {})[names.get(by, by)] = caller.boundary.unflatten(block, batch)
    return blocks


def tensors_of(blocks: Blocks) -> Iterator[Tensor]:
    """All blocks, whatever of and by."""
    return (block for row in blocks.values() for block in row.values())


def param_vjp(
    caller: Caller,
    inputs: Mapping[str, Tensor],
    cotangents: Mapping[str, Tensor],
    overrides: Mapping[str, Tensor] | None,
    params: Sequence[str] | None = None,
) -> Tensors:
    """See `Model.param_vjp`."""
    pairs = parameter_pairs(caller, params)
    require_cotangents(caller, cotangents, pairs)
    outputs, blocks, in_force = param_jacobian(caller, inputs, overrides, params)
    gradients: Tensors = {}
    for out, parameter in pairs:
        public, name = caller.output_name(out), caller.promoted.public[parameter]
        cotangent = expanded_cotangent(caller, public, cotangents[public], tuple(outputs[public].shape))
        block = blocks[public][name]
        base = block.ndim - cotangent.ndim
        weighted = block * cotangent.reshape(cotangent.shape + (1,) * base)
        batch_rank = cotangent.ndim - len(caller.boundary.output_by_name[public].variable.base_shape)
        axes = tuple(range(batch_rank, cotangent.ndim))
        term = weighted.sum(axes) if axes else weighted
        gradients[name] = gradients[name] + term if name in gradients else term
    return {name: gradient.sum_to_size(in_force[name].shape) for name, gradient in sorted(gradients.items())}


def require_cotangents(caller: Caller, cotangents: Mapping[str, Tensor], pairs: Pairs) -> None:
    """Refuse cotangents that lack an output with one of the pairs, or are of none."""
    needed = list(dict.fromkeys(caller.output_name(o) for o, _ in pairs))
    absent = [name for name in needed if name not in cotangents]
    unknown = [name for name in cotangents if name not in caller.boundary.output_by_name]
    if absent or unknown:
        raise UnknownNameError(
            f"cotangents of {caller.boundary.where}: missing {absent}, unknown {unknown}; outputs with compiled "
            f"parameter derivatives are: {', '.join(needed)}."
        )


def expanded_cotangent(caller: Caller, name: str, cotangent: Tensor, shape: Shape) -> Tensor:
    """Check the cotangent of an output, and give it in the output's shape."""
    checked = caller.boundary.check(cotangent, name, "cotangent")
    try:
        return checked.detach().expand(shape)
    except RuntimeError:
        raise InputError(
            f"cotangent {name!r} has shape {tuple(cotangent.shape)}, which does not broadcast to the output's {shape}."
        ) from None
