"""Calls that torch's automatic differentiation and `torch.vmap` follow, through the compiled derivatives.

The derivatives are evaluated together with the outputs, so that no second solve is needed, and are outputs of the same
autograd node: so the first derivatives can be contracted by torch's own operations, and a second derivative, for which
there are no graphs, is noticed and refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

from .._artifact.schema import Shape
from ..errors import DerivativeNotCompiledError
from ._admission import INITIAL_GUESS
from ._call import Caller
from ._derivatives import By, Pair
from ._guard import require_unrecorded
from ._outcomes import Tensors


def evaluate(
    caller: Caller,
    inputs: Mapping[str, Tensor],
    overrides: Mapping[str, Tensor] | None = None,
    pairs: Sequence[Pair] = (),
) -> tuple[Tensors, list[Tensor], Shape]:
    """Outputs; a matrix `(*batch, entries of the output, entries of the other)` for each pair; and the batch shape.

    torch differentiates and maps outputs and matrices where it wants to.
    """
    if not _is_followed(caller, inputs, overrides):
        found = caller.evaluate(inputs, overrides, pairs, matrices=True)
        return found.outputs, [found.derivatives[pair] for pair in pairs], found.call.batch
    boundary, compiled = caller.boundary, caller.derivatives.compiled
    require_unrecorded(boundary.where)
    boundary.require_names(inputs)
    arguments: dict[By, Any] = {("input", name): inputs[name] for name in boundary.inputs}
    arguments.update({("parameter", name): x for name, x in caller.promoted.in_force(overrides).items()})
    outs, wanted = tuple(boundary.outputs), list(pairs)
    for by in [by for by, value in arguments.items() if _is_differentiated(value)]:
        wanted.extend((o, by) for o in outs if (o, by) in compiled and (o, by) not in wanted)
    arguments.update({(INITIAL_GUESS, name): inputs[name] for name in boundary.guesses if name in inputs})
    followed = _Followed(caller, tuple(arguments), outs, tuple(wanted))
    values = _Compiled.apply(followed, *arguments.values())  # type: ignore[no-untyped-call]
    outputs = dict(zip(outs, values, strict=False))
    return outputs, list(values[len(outs) : len(outs) + len(pairs)]), followed.batch_of(tuple(arguments.values()))


def _is_followed(caller: Caller, inputs: Mapping[str, Any], overrides: Mapping[str, Any] | None) -> bool:
    """Whether torch wants to differentiate a call or to map it."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    if not torch.is_grad_enabled():
        return False
    # A caller's mistakes, such as a list for a dict, are left to the checks of the plain call. Results do not depend on
    # initial guesses.
    guesses = caller.boundary.guesses
    named = inputs.items() if isinstance(inputs, Mapping) else ()
    values = [*(value for name, value in named if name not in guesses), *(overrides or {}).values()]
    if caller.promoted.specs:
        values.extend(caller.promoted.values.values())
    return any(isinstance(value, Tensor) and value.requires_grad for value in values)


def _is_differentiated(value: object) -> bool:
    """Whether a derivative by this value may be asked for."""
    if not isinstance(value, Tensor):
        return False
    while _functorch.is_functorch_wrapped_tensor(value):
        if _functorch.is_gradtrackingtensor(value):
            return True
        value = _functorch.get_unwrapped(value)
    if value.requires_grad and torch.is_grad_enabled():
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(value).tangent is not None


@dataclass(frozen=True, eq=False)
class _Followed:
    """What one followed call evaluates: the outputs `outs`, and behind them the matrices of `pairs`."""

    caller: Caller
    # Inputs, parameters and initial guesses, in the order of the tensor arguments.
    bys: tuple[By, ...]
    outs: tuple[str, ...]
    pairs: tuple[Pair, ...]

    def natural(self, by: By) -> Shape:
        """Shape of an argument without batch axes."""
        return self.caller.derivatives.known[by][1]

    def rank(self, by: By, axes: int) -> int:
        """Number of batch axes of an argument of so many axes."""
        return max(axes - len(self.natural(by)), 0)

    def batch_of(self, values: Sequence[Any]) -> Shape:
        """The common batch shape of the arguments."""
        tensors = [(by, v) for by, v in zip(self.bys, values, strict=True) if isinstance(v, Tensor)]
        return tuple(torch.broadcast_shapes(*(tuple(v.shape[: self.rank(by, v.ndim)]) for by, v in tensors)))

    def matrix(self, saved: Sequence[Tensor], out: str, by: By) -> Tensor:
        """The matrix of a pair, `(*batch, entries, entries)`, among those that were saved."""
        if (out, by) not in self.pairs:
            raise self.caller.derivatives.missing(out, by)
        return saved[self.pairs.index((out, by))]


class _Compiled(torch.autograd.Function):
    """The autograd node of a followed call, with its outputs and matrices."""

    @staticmethod
    def forward(followed: _Followed, *values: Tensor) -> tuple[Tensor, ...]:
        """Evaluate for plain tensors."""
        named = dict(zip(followed.bys, values, strict=True))
        inputs = {name: value for (kind, name), value in named.items() if kind != "parameter"}
        parameters = {name: value for (kind, name), value in named.items() if kind == "parameter"}
        evaluated = followed.caller.evaluate(inputs, parameters, followed.pairs, matrices=True)
        found = [evaluated.outputs[name] for name in followed.outs]
        found += [evaluated.derivatives[pair] for pair in followed.pairs]
        # torch holds the tangents of a view to the layout of the view.
        return tuple(value.clone() if value._is_view() else value for value in found)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep the matrices."""
        ctx.followed = followed = inputs[0]
        ctx.input_shapes = [v.shape if isinstance(v, Tensor) else None for v in inputs[1:]]
        ctx.output_shapes = [v.shape for v in output[: len(followed.outs)]]
        matrices = output[len(followed.outs) :]
        ctx.save_for_backward(*matrices)
        ctx.save_for_forward(*matrices)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """Contract the cotangents of the outputs with the matrices."""
        followed: _Followed = ctx.followed
        if any(c is not None for c in cotangents[len(followed.outs) :]):
            raise DerivativeNotCompiledError(
                f"a second derivative of {followed.caller.boundary.where} was asked for; neml2-compile compiles first "
                "derivatives only."
            )
        saved = ctx.saved_tensors
        given = [(out, c) for out, c in zip(followed.outs, cotangents, strict=False) if c is not None]
        gradients: list[Tensor | None] = [None]
        for by, shape, needed in zip(followed.bys, ctx.input_shapes, ctx.needs_input_grad[1:], strict=True):
            total: Tensor | None = None
            for out, cotangent in given if needed and by[0] != INITIAL_GUESS else ():
                matrix = followed.matrix(saved, out, by)
                line = cotangent.reshape((*matrix.shape[:-2], 1, matrix.shape[-2]))
                term = torch.matmul(line, matrix).squeeze(-2)
                total = term if total is None else total + term
            if total is not None:
                total = total.reshape((*total.shape[:-1], *followed.natural(by))).sum_to_size(shape)
            gradients.append(total)
        return tuple(gradients)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        """Contract the matrices with tangents of the arguments."""
        followed: _Followed = ctx.followed
        saved = ctx.saved_tensors
        # Results do not depend on initial guesses.
        moved = [
            (by, t) for by, t in zip(followed.bys, tangents, strict=True) if t is not None and by[0] != INITIAL_GUESS
        ]
        if not moved:
            like = next(t for t in tangents if t is not None)
            zeros = [like.new_zeros(shape) for shape in ctx.output_shapes]
            return (*zeros, *(torch.zeros_like(matrix) for matrix in saved))
        along = []
        # torch switches forward mode off in here. An outer derivative, by which the matrices are NaN, would be zero.
        with forward_ad._set_fwd_grad_enabled(True):
            for out, shape in zip(followed.outs, ctx.output_shapes, strict=True):
                terms = []
                for by, tangent in moved:
                    matrix, batch = followed.matrix(saved, out, by), tangent.shape[: followed.rank(by, tangent.ndim)]
                    column = tangent.expand((*batch, *followed.natural(by))).reshape((*batch, matrix.shape[-1], 1))
                    terms.append(torch.matmul(matrix, column).squeeze(-1))
                along.append(sum(terms[1:], start=terms[0]).reshape(shape))
        # Second derivatives are not there. They can't be refused here, where nobody may want them.
        unknown = (matrix.new_full((), torch.nan).expand(matrix.shape) for matrix in saved)
        return (*along, *unknown)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], followed: _Followed, *values: Any
    ) -> tuple[Any, tuple[int, ...]]:
        """Fold the mapped axis into the batch: bring it to the front of the batch axes of all arguments."""
        mapped = [v if axis is None else v.movedim(axis, 0) for v, axis in zip(values, in_dims[1:], strict=True)]
        arguments = list(zip(followed.bys, mapped, in_dims[1:], strict=True))
        ranks = [followed.rank(by, v.ndim - (a is not None)) for by, v, a in arguments if isinstance(v, Tensor)]
        most = max(ranks, default=0)
        moved = []
        for by, value, axis in arguments:
            if axis is not None:
                natural = followed.natural(by)
                rank = followed.rank(by, value.ndim - 1)
                own = value.shape[1 + rank :]
                # A plain value stands for all sites of a sub-batch.
                sites = (1,) * (len(natural) - len(own))
                value = value.reshape((value.shape[0], *(1,) * (most - rank), *value.shape[1 : 1 + rank], *sites, *own))
                value = value.expand((*value.shape[: 1 + most], *natural)) if sites else value
            moved.append(value)
        found = _Compiled.apply(followed, *moved)  # type: ignore[no-untyped-call]
        return found, (0,) * len(found)
