"""The derivative calls of a model: which were compiled, seeds, and blocks in the caller's terms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .artifact.schema import Shape, Variable
from .errors import DerivativeNotCompiledError, InputError, UnknownNameError
from .runtime.call import Caller, Tensors
from .runtime.program import Evaluation
from .runtime.tangents import Columns, Seed

Blocks = dict[str, dict[str, Tensor]]
Pairs = tuple[tuple[str, str], ...]

DIRECTION: Seed = ("direction", "")


def input_pairs(caller: Caller) -> Pairs:
    """The compiled (output, input) pairs by authored name; raises where there are none."""
    pairs = caller.metadata.derivatives
    if not pairs:
        raise DerivativeNotCompiledError(
            f"{caller.boundary.where} was compiled without derivatives by inputs. Compile it with them: "
            "neml2-compile INPUT --model NAME -d OUT:IN (or -d : for all)."
        )
    return pairs


def parameter_pairs(caller: Caller) -> Pairs:
    """The compiled (output, parameter) pairs by authored name; raises where there are none."""
    pairs = caller.metadata.parameter_derivatives
    if not pairs:
        promoted = ", ".join(caller.promoted.specs) or "none"
        raise DerivativeNotCompiledError(
            f"{caller.boundary.where} was compiled without derivatives by parameters (promoted: {promoted}). "
            "Compile it with "
            "them: neml2-compile INPUT --model NAME -p PARAMETER -d OUT:PARAMETER."
        )
    return pairs


def not_compiled(caller: Caller, out: str, wrt: str) -> DerivativeNotCompiledError:
    """The error for a pair (boundary names) that has no graph."""
    compiled = ", ".join(f"{caller.output_name(o)}:{caller.input_name(i)}" for o, i in caller.metadata.derivatives)
    return DerivativeNotCompiledError(
        f"d({out})/d({wrt}) was not compiled into {caller.boundary.where}; there are: {compiled or 'none'}. "
        "Compile it: "
        f"neml2-compile INPUT --model NAME -d {out}:{wrt}."
    )


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
    for name, tangent in tangents.items():
        variable = caller.boundary.by_name[name].variable
        checked, own = caller.boundary.batch_of(tangent, name, variable, "tangent")
        if not _broadcasts(own, call.batch):
            raise InputError(f"tangent {name!r} has batch {list(own)}, which does not broadcast to {list(call.batch)}.")
        flat = caller.boundary.flatten(checked, own, call.batch, call.rows, variable)
        seeds[variable.name] = {DIRECTION: flat.reshape((call.rows, variable.size, 1))}
    found = caller.evaluate(call, seeds)
    caller.require_convergence(found, call.batch)
    along = {}
    for out in outs:
        value, column = found.values[out], found.tangents[out].get(DIRECTION)
        flat = torch.zeros_like(value) if column is None else column.expand(call.rows, -1, -1).reshape(value.shape)
        along[caller.output_name(out)] = caller.unflatten(flat, call.batch)
    return caller.outputs(found.values, call.batch), along


def _check_directions(caller: Caller, tangents: Iterable[str], outs: Iterable[str], pairs: Pairs) -> None:
    """A direction along an input must find every pair it needs; a missing one must not count as zero."""
    compiled = frozenset(pairs)
    for name in tangents:
        port = caller.boundary.by_name.get(name)
        if port is None:
            raise UnknownNameError(
                f"tangent {name!r} is not an input of {caller.boundary.where}; the inputs are: "
                f"{', '.join(caller.boundary.by_name)}."
            )
        for out in outs:
            if (out, port.variable.name) not in compiled:
                raise not_compiled(caller, caller.output_name(out), name)


def _broadcasts(own: Shape, batch: Shape) -> bool:
    return len(own) <= len(batch) and all(a in (1, b) for a, b in zip(own[::-1], batch[::-1], strict=False))


def jacobian(
    caller: Caller, inputs: Mapping[str, Tensor], overrides: Mapping[str, Tensor] | None
) -> tuple[Tensors, Blocks]:
    """See `Model.jacobian`."""
    pairs = input_pairs(caller)
    call = caller.admit(inputs, overrides)
    direct = caller.program.single_forward_blocks(call.state, call.parameters, call.rows, pairs)
    if direct is not None:
        values, found, constant = direct
        blocks: Blocks = {}
        for (out, wrt), block in found.items():
            once = (out, wrt) in constant and block.shape[0] == 1
            shaped = caller.to_caller(block[0]).contiguous() if once else caller.unflatten(block, call.batch)
            blocks.setdefault(caller.output_name(out), {})[caller.input_name(wrt)] = shaped
        return caller.outputs(values, call.batch), blocks
    seeds: dict[str, Columns] = {wrt: {("input", wrt): None} for wrt in dict.fromkeys(i for _, i in pairs)}
    evaluation = caller.evaluate(call, seeds)
    caller.require_convergence(evaluation, call.batch)
    variables = {v.name: v for v in caller.metadata.inputs}
    names = caller.metadata.aliases.inputs
    return caller.outputs(evaluation.values, call.batch), blocks_of(
        caller, evaluation, call.batch, pairs, "input", variables, names
    )


def param_jacobian(
    caller: Caller, inputs: Mapping[str, Tensor], overrides: Mapping[str, Tensor] | None
) -> tuple[Tensors, Blocks, Tensors]:
    """See `Model.param_jacobian`; gives the parameters in force as well."""
    pairs = parameter_pairs(caller)
    call = caller.admit(inputs, overrides)
    evaluation = caller.evaluate(call, {}, dict.fromkeys(p for _, p in pairs))
    caller.require_convergence(evaluation, call.batch)
    variables = {p.name: Variable(p.name, p.base_shape) for p in caller.metadata.parameters}
    blocks = blocks_of(caller, evaluation, call.batch, pairs, "parameter", variables, caller.promoted.public)
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
        block = value.new_zeros(shape) if column is None else column.expand(rows, -1, -1).reshape(shape)
        blocks.setdefault(caller.output_name(out), {})[names.get(by, by)] = caller.unflatten(block, batch)
    return blocks


def param_vjp(
    caller: Caller,
    inputs: Mapping[str, Tensor],
    cotangents: Mapping[str, Tensor],
    overrides: Mapping[str, Tensor] | None,
) -> Tensors:
    """See `Model.param_vjp`."""
    pairs = parameter_pairs(caller)
    needed = list(dict.fromkeys(caller.output_name(o) for o, _ in pairs))
    absent = [name for name in needed if name not in cotangents]
    unknown = [name for name in cotangents if name not in caller.boundary.output_by_name]
    if absent or unknown:
        raise UnknownNameError(
            f"cotangents of {caller.boundary.where}: missing {absent}, unknown {unknown}; outputs with compiled "
            "parameter "
            f"derivatives are: {', '.join(needed)}."
        )
    outputs, blocks, in_force = param_jacobian(caller, inputs, overrides)
    gradients: Tensors = {}
    for out, parameter in pairs:
        public, name = caller.output_name(out), caller.promoted.public[parameter]
        cotangent = _cotangent(caller, public, cotangents[public], outputs[public])
        block = blocks[public][name]
        base = block.ndim - cotangent.ndim
        weighted = block * cotangent.reshape(cotangent.shape + (1,) * base)
        batch_rank = cotangent.ndim - len(caller.boundary.output_by_name[public].variable.base_shape)
        axes = tuple(range(batch_rank, cotangent.ndim))
        term = weighted.sum(axes) if axes else weighted
        gradients[name] = gradients[name] + term if name in gradients else term
    return {name: gradient.sum_to_size(in_force[name].shape) for name, gradient in sorted(gradients.items())}


def _cotangent(caller: Caller, name: str, cotangent: Tensor, output: Tensor) -> Tensor:
    caller.boundary.check_type(cotangent, name, "cotangent")
    try:
        return cotangent.detach().expand(output.shape)
    except RuntimeError:
        raise InputError(
            f"cotangent {name!r} has shape {tuple(cotangent.shape)}, which does not broadcast to the output's "
            f"{tuple(output.shape)}."
        ) from None
