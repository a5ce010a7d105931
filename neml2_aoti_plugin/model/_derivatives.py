"""Derivatives of a model: which were compiled, one evaluation of chosen ones, and what callers get of it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from .._artifact.schema import Metadata, Shape
from .._artifact.stub import drivers_of
from .._checks import require_names
from .._program.program import Evaluation
from .._program.values import PER_SITE, Columns, Seed
from ..errors import DerivativeNotCompiledError, InputError, InputTypeError
from ._admission import INITIAL_GUESS, Boundary
from ._call import Admitted, Caller
from ._outcomes import Blocks, Tensors

# What is differentiated by, as callers know it: ("input", name) or ("parameter", name). Autograd's plans hold initial
# guesses in the same form, (INITIAL_GUESS, name).
By = tuple[str, str]
# An output, and what it is differentiated by.
Pair = tuple[str, By]

DIRECTION: Seed = ("direction", "")

# From this schema on, neml2 names the block of a model that is one block in the names of its parameters.
QUALIFIED = 7


# -- which derivatives ------------------------------------------------------------------------------------------------


def pairs_by(caller: Caller, kind: Literal["input", "parameter"]) -> list[Pair]:
    """The compiled pairs by inputs or by parameters; an error that tells how to compile them where there are none."""
    metadata, boundary = caller.metadata, caller.boundary
    if kind == "input" and metadata.derivatives:
        return [(boundary.output_names[o], (kind, boundary.input_names[i])) for o, i in metadata.derivatives]
    if kind == "parameter" and metadata.parameter_derivatives:
        names = caller.promoted.public
        return [(boundary.output_names[o], (kind, names[p])) for o, p in metadata.parameter_derivatives]
    if kind == "input":
        what, by = "inputs", [variable.name for variable in metadata.inputs]
    else:
        what = f"parameters (promoted: {', '.join(caller.promoted.specs) or 'none'})"
        by = [parameter.name for parameter in metadata.parameters] or ["PARAMETER"]
    every = [(out.name, name) for out in metadata.outputs for name in by]
    raise DerivativeNotCompiledError(
        f"{boundary.where} was compiled without derivatives by {what}. Compile it with them: "
        f"{compile_command(metadata, boundary, every)}"
    )


def input_pairs(
    caller: Caller, chosen: Sequence[tuple[str, str]] | None = None, *, or_parameters: bool = False
) -> list[Pair]:
    """The compiled pairs by inputs, or those that are chosen, each of which must be one.

    With `or_parameters` those that are chosen may be by promoted parameters, too.
    """
    if chosen is None:
        return pairs_by(caller, "input")
    found: list[Pair] = []
    for pair in chosen:
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(isinstance(name, str) for name in pair):
            raise InputTypeError(f"pairs hold {pair!r}, expected pairs of names such as ('stress', 'strain').")
        out, by = pair
        what = f"{pair!r} in pairs of {caller.boundary.where}"
        require_names([out], caller.boundary.outputs, what, "outputs")
        parameter = or_parameters and by in caller.promoted.specs and by not in caller.boundary.inputs
        kind = "parameter" if parameter else "input"
        if kind == "input":
            require_names([by], caller.boundary.inputs, what, "inputs", hints=_of_parameters(caller))
        if not is_compiled(caller, out, (kind, by)):
            raise not_compiled(caller, out, (kind, by))
        found.append((out, (kind, by)))
    return list(dict.fromkeys(found))


def parameter_pairs(caller: Caller, params: Sequence[str] | None) -> list[Pair]:
    """The compiled pairs by parameters, or those by the parameters that are chosen, each of which must have one."""
    pairs = pairs_by(caller, "parameter")
    if params is None:
        return pairs
    inputs = {
        name: f"{name!r} is an input: call jacobian for derivatives by inputs." for name in caller.boundary.inputs
    }
    caller.promoted.require(params, inputs)
    chosen = []
    for name in params:
        found = [(out, by) for out, by in pairs if by[1] == name]
        if not found:
            raise not_compiled(caller, next(iter(caller.boundary.outputs)), ("parameter", name))
        chosen.extend(found)
    return chosen


def is_compiled(caller: Caller, out: str, by: By) -> bool:
    """Whether a derivative has graphs."""
    kind = caller.metadata.derivatives if by[0] == "input" else caller.metadata.parameter_derivatives
    return (caller.boundary.outputs[out].name, _authored(caller, by)) in kind


def not_compiled(caller: Caller, out: str, by: By) -> DerivativeNotCompiledError:
    """The error for a derivative that has no graph."""
    metadata, boundary = caller.metadata, caller.boundary
    names = boundary.input_names if by[0] == "input" else caller.promoted.public
    pairs = metadata.derivatives if by[0] == "input" else metadata.parameter_derivatives
    there = ", ".join(f"{boundary.output_names[o]}:{names[i]}" for o, i in pairs)
    missing = [(boundary.outputs[out].name, _authored(caller, by))]
    return DerivativeNotCompiledError(
        f"d({out})/d({by[1]}) was not compiled into {boundary.where}; there are: {there or 'none'}. "
        f"Compile it: {compile_command(metadata, boundary, missing)}"
    )


def _of_parameters(caller: Caller) -> dict[str, str]:
    """Where to find derivatives by what is no input but a promoted parameter."""
    return {
        name: f"{name!r} is a promoted parameter: call param_jacobian(inputs, params=[{name!r}]), or param_vjp."
        for name in caller.promoted.specs
    }


def _authored(caller: Caller, by: By) -> str:
    """The name inside the model of an input or a parameter."""
    kind, name = by
    return caller.boundary.inputs[name].name if kind == "input" else caller.promoted.specs[name].name


def natural_shape(caller: Caller, by: By) -> Shape:
    """Shape of an input, a parameter or an initial guess without its batch axes."""
    kind, name = by
    if kind == "parameter":
        return caller.promoted.specs[name].base_shape
    variables = caller.boundary.guesses if kind == INITIAL_GUESS else caller.boundary.inputs
    return variables[name].natural_shape


# -- one evaluation ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluated:
    """Outputs and derivatives in the caller's batch shape.

    Args:
        outputs: by name, `(*batch, *sub_batch, *base)`.
        derivatives: by pair, as blocks or as matrices.
        shared: pairs whose blocks have no batch axes, since they do not depend on the row.
        found: the evaluation.
    """

    outputs: Tensors
    derivatives: dict[Pair, Tensor]
    shared: set[tuple[str, str]]
    found: Evaluation

    @property
    def blocks(self) -> Blocks:
        """The derivatives by output and by name of the other."""
        found: Blocks = {}
        for (out, (_, name)), block in self.derivatives.items():
            found.setdefault(out, {})[name] = block
        return found


def evaluate(
    caller: Caller, call: Admitted, pairs: Sequence[Pair], *, matrices: bool = False, expand: bool = True
) -> Evaluated:
    """Evaluate the outputs and the derivatives of compiled pairs.

    Blocks are `(*batch, *out_shape, *by_shape)`, zero where the output does not depend. Those by inputs of a model of
    one explicit segment are as its graph gives them: per site, `(*batch, *sub_batch, *out_base, *in_base)`, and, unless
    `expand`, without batch axes where they do not depend on the row. Matrices are `(*batch, entries, entries)`.
    """
    per_site = caller.alone and not matrices
    seeds: dict[str, Columns] = {}
    parameters: list[str] = []
    inside: dict[By, Seed] = {}
    for by in dict.fromkeys(by for _, by in pairs):
        authored = _authored(caller, by)
        inside[by] = (PER_SITE, authored) if per_site and by[0] == "input" else (by[0], authored)
        if by[0] == "input":
            seeds[authored] = {inside[by]: None}
        else:
            parameters.append(authored)
    found = caller.evaluate(call, seeds, parameters) if pairs else caller.evaluate(call)
    derivatives: dict[Pair, Tensor] = {}
    shared: set[tuple[str, str]] = set()
    for out, by in pairs:
        output = caller.boundary.outputs[out]
        value, column = found.values[output.name], found.tangents[output.name].get(inside[by])
        if per_site and by[0] == "input":
            base = output.base_shape + caller.boundary.inputs[by[1]].base_shape
            block = value.new_zeros((1, *base)) if column is None else column
            if not expand and block.shape[0] == 1 and (output.name, inside[by][1]) in caller.constant:
                derivatives[out, by] = caller.boundary.to_caller(block[0]).contiguous()
                shared |= {(out, by[1])} if call.batch else set()
                continue
        else:
            entries = tuple(value.shape[1:]), natural_shape(caller, by)
            shape = (prod(entries[0]), prod(entries[1])) if matrices else entries[0] + entries[1]
            # `(rows or 1, entries, entries)`
            block = value.new_zeros((1, *shape)) if column is None else column.reshape((-1, *shape))
        derivatives[out, by] = caller.boundary.unflatten(block, call.batch)
    return Evaluated(caller.outputs(found.values, call.batch), derivatives, shared, found)


def linearise(
    caller: Caller,
    inputs: Mapping[str, Tensor],
    overrides: Mapping[str, Tensor] | None,
    pairs: Sequence[Pair],
) -> tuple[Tensors, list[Tensor], Shape]:
    """Outputs; a matrix `(*batch, entries of the output, entries of the other)` for each pair; and the batch shape."""
    call = caller.admit(inputs, overrides)
    evaluated = evaluate(caller, call, pairs, matrices=True)
    matrices = [evaluated.derivatives[pair] for pair in pairs]
    caller.require_convergence(evaluated.found, call, matrices)
    return evaluated.outputs, matrices, call.batch


# -- the calls --------------------------------------------------------------------------------------------------------


def jacobian(
    caller: Caller,
    inputs: Mapping[str, Tensor],
    overrides: Mapping[str, Tensor] | None,
    pairs: Sequence[Pair],
    *,
    expand: bool = True,
) -> tuple[Tensors, Blocks]:
    """Outputs, and the blocks of compiled pairs; see `Model.jacobian` and `Model.param_jacobian`."""
    call = caller.admit(inputs, overrides)
    evaluated = evaluate(caller, call, pairs, expand=expand)
    caller.require_convergence(evaluated.found, call, evaluated.derivatives.values())
    return evaluated.outputs, evaluated.blocks


def param_vjp(
    caller: Caller,
    inputs: Mapping[str, Tensor],
    cotangents: Mapping[str, Tensor],
    overrides: Mapping[str, Tensor] | None,
    params: Sequence[str] | None,
) -> Tensors:
    """See `Model.param_vjp`."""
    boundary = caller.boundary
    pairs = parameter_pairs(caller, params)
    needed = dict.fromkeys(out for out, _ in pairs)
    require_names(cotangents, boundary.outputs, f"cotangents of {boundary.where}", "outputs", needed=needed)
    call = caller.admit(inputs, overrides)
    evaluated = evaluate(caller, call, pairs)
    caller.require_convergence(evaluated.found, call, evaluated.derivatives.values())
    gradients: Tensors = {}
    for (out, (_, name)), block in evaluated.derivatives.items():
        cotangent = _cotangent(boundary, out, cotangents[out], tuple(evaluated.outputs[out].shape))
        weighted = block * cotangent.reshape(cotangent.shape + (1,) * (block.ndim - cotangent.ndim))
        axes = tuple(range(cotangent.ndim - len(boundary.outputs[out].base_shape), cotangent.ndim))
        term = weighted.sum(axes) if axes else weighted
        gradients[name] = gradients[name] + term if name in gradients else term
    return {name: gradient.sum_to_size(call.in_force[name].shape) for name, gradient in sorted(gradients.items())}


def _cotangent(boundary: Boundary, name: str, cotangent: Tensor, shape: Shape) -> Tensor:
    """Check the cotangent of an output, and give it in the output's shape."""
    checked = boundary.check(cotangent, name, "cotangent")
    try:
        return checked.detach().expand(shape)
    except RuntimeError:
        raise InputError(
            f"cotangent {name!r} has shape {tuple(cotangent.shape)}, which does not broadcast to the output's {shape}."
        ) from None


def jvp(
    caller: Caller,
    inputs: Mapping[str, Tensor],
    tangents: Mapping[str, Tensor],
    overrides: Mapping[str, Tensor] | None,
) -> tuple[Tensors, Tensors]:
    """See `Model.jvp`."""
    boundary = caller.boundary
    outs = dict.fromkeys(out for out, _ in input_pairs(caller))
    what, hints = f"tangents of {boundary.where}", _of_parameters(caller)
    require_names(tangents, boundary.inputs, what, "inputs", hints=hints)
    for name in tangents:
        for out in outs:
            # A direction along an input must find every pair that it needs; a missing one must not count as zero.
            if not is_compiled(caller, out, ("input", name)):
                raise not_compiled(caller, out, ("input", name))
    call = caller.admit(inputs, overrides)
    seeds: dict[str, Columns] = {}
    for name, tangent in tangents.items():
        variable = boundary.inputs[name]
        checked, own = boundary.batch_of(tangent, name, variable, "tangent")
        if not _broadcasts(own, call.batch):
            raise InputError(f"tangent {name!r} has batch {list(own)}, which does not broadcast to {list(call.batch)}.")
        flat = boundary.flatten(checked, own, call.batch, variable)
        seeds[variable.name] = {DIRECTION: flat.reshape((call.rows, variable.size, 1))}
    found = caller.evaluate(call, seeds)
    along = {}
    for out in outs:
        authored = boundary.outputs[out].name
        value, column = found.values[authored], found.tangents[authored].get(DIRECTION)
        flat = torch.zeros_like(value) if column is None else column.expand(call.rows, -1, -1).reshape(value.shape)
        along[out] = boundary.unflatten(flat, call.batch)
    caller.require_convergence(found, call, along.values())
    return caller.outputs(found.values, call.batch), along


def _broadcasts(own: Shape, batch: Shape) -> bool:
    return len(own) <= len(batch) and all(a in (1, b) for a, b in zip(own[::-1], batch[::-1], strict=False))


# -- how to compile what is missing -----------------------------------------------------------------------------------


def compile_command(metadata: Metadata, boundary: Boundary, missing: Iterable[tuple[str, str]] = ()) -> str:
    """The command that compiles a model again, with derivatives `missing` by authored names, as a line for a shell.

    The input file, which the artifact does not name, is `INPUT.i`. A driver that the stub has is named in place of the
    model; where neml2-compile would not take one, because names are changed at the boundary, the stub is left alone.
    """
    model = boundary.model
    # In the layout of schema 7 the metadata is in a folder of the device.
    folder = Path(boundary.where).parent if metadata.schema == QUALIFIED else Path(boundary.where)
    # Up to schema 3 the stub is beside the metadata.
    stubs = (folder.parent / f"{model}_aoti.i", folder / f"{model}_aoti.i")
    driver = next((name for stub in stubs for name in drivers_of(stub, model)), None)
    aliases = metadata.aliases
    renamed = bool(aliases.inputs or aliases.outputs or aliases.parameters)
    inputs = [variable.name for variable in metadata.inputs]
    outputs = [variable.name for variable in metadata.outputs]
    wanted = set(missing)
    promoted = [parameter.name for parameter in metadata.parameters]
    promoted += sorted({by for _, by in wanted} - {*inputs, *promoted})
    pairs = {*metadata.derivatives, *(pair for pair in wanted if pair[1] in inputs)}
    by_parameter = {*metadata.parameter_derivatives, *(pair for pair in wanted if pair[1] not in inputs)}
    command = ["neml2-compile", "INPUT.i", *(["--driver", driver] if driver and not renamed else ["--model", model])]
    for name in promoted:
        command += ["-p", _qualified(name, metadata, model)]
    for text in _input_flags(pairs, outputs, inputs):
        command += ["-d", text]
    for out in outputs:
        for name in promoted:
            if (out, name) in by_parameter:
                command += ["-d", f"{out}:{_qualified(name, metadata, model)}"]
    for option, names in (
        ("--rename-input", aliases.inputs),
        ("--rename-output", aliases.outputs),
        ("--rename-parameter", aliases.parameters),
    ):
        for inside, outside in names.items():
            command += [option, f"{inside}:{outside}"]
    dtype = str(boundary.dtype).removeprefix("torch.")
    command += ["--device", boundary.device.type] if boundary.device.type != "cpu" else []
    command += ["--dtype", dtype] if dtype != "float64" else []
    command += ["--no-stub"] if driver and renamed else []
    return shlex.join([*command, "--output-dir", str(folder.parent)])


def _input_flags(pairs: set[tuple[str, str]], outputs: list[str], inputs: list[str]) -> list[str]:
    """What `-d` says for (output, input) pairs, as briefly as it can."""
    if pairs and all((out, name) in pairs for out in outputs for name in inputs):
        return [":"]
    found = []
    for out in outputs:
        own = [name for name in inputs if (out, name) in pairs]
        found += [f"{out}:"] if own == inputs else [f"{out}:{name}" for name in own]
    return found


def _qualified(name: str, metadata: Metadata, model: str) -> str:
    """A parameter's name as neml2 3.1.0 takes it."""
    return f"{model}.{name}" if metadata.schema < QUALIFIED and "." not in name else name
