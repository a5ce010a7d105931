"""Autograd through one update: outputs by driven inputs and parameters, by the derivatives of the same update.

All is as the caller writes it, so that one node serves every notation and dimension. The state is no part of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..errors import DerivativeNotCompiledError, InputError
from ._roles import Base, Pair

# Raises why there is no derivative of an output by an input or parameter.
Refuse = Callable[[str, str], object]


class _Node(torch.autograd.Function):
    """Outputs `(n, *out)` by values, by blocks `(n, *out, *by)`."""

    @staticmethod
    def forward(
        ctx: Any,
        outputs: Mapping[str, Tensor],
        blocks: Mapping[Pair, Tensor],
        bys: tuple[str, ...],
        refuse: Refuse,
        *values: Tensor,
    ) -> tuple[Tensor, ...]:
        """Give copies of the outputs, which become part of the graph."""
        ctx.outs, ctx.pairs, ctx.bys, ctx.refuse = tuple(outputs), tuple(blocks), bys, refuse
        ctx.shapes = [value.shape for value in values]
        # Torch notices when a caller writes to a tangent that a gradient still needs.
        ctx.save_for_backward(*blocks.values())
        ctx.set_materialize_grads(False)
        return tuple(value.clone() for value in outputs.values())

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """Contract the cotangents of the outputs with the derivatives."""
        if torch.is_grad_enabled():
            # The derivatives are constants here, by which a second derivative would lack a term without a word.
            raise DerivativeNotCompiledError(
                "a gradient through Points was asked for with create_graph=True, and neml2-compile compiles first "
                "derivatives only."
            )
        blocks = dict(zip(ctx.pairs, ctx.saved_tensors, strict=True))
        given = {out: c for out, c in zip(ctx.outs, cotangents, strict=True) if c is not None}
        gradients: list[Tensor | None] = [None] * 4
        for by, shape, needed in zip(ctx.bys, ctx.shapes, ctx.needs_input_grad[4:], strict=True):
            total: Tensor | None = None
            for out, cotangent in given.items() if needed else ():
                if (out, by) not in blocks:
                    ctx.refuse(out, by)
                block = blocks[out, by]
                base, n = block.shape[cotangent.ndim :], len(block)
                row = cotangent.reshape(n, 1, prod(cotangent.shape[1:]))
                # A point that the loss leaves out, such as one that failed, would be NaN times zero.
                used = (row != 0.0).any(-1, keepdim=True)
                matrix = torch.where(used, block.reshape(n, row.shape[-1], prod(base)), 0.0)
                term = (row @ matrix).reshape(n, *base)
                total = term if total is None else total + term
            gradients.append(None if total is None else total.sum_to_size(shape))
        return tuple(gradients)


def attached(
    outputs: Mapping[str, Tensor],
    blocks: Mapping[Pair, Tensor],
    values: Mapping[str, Tensor],
    shape_of: Callable[[str], Base],
    refuse: Refuse,
) -> dict[str, Tensor]:
    """The outputs of an update as parts of a graph, by values that autograd follows, of `shape_of` each at a point."""
    for (out, by), block in blocks.items():
        if tuple(block.shape) != (*outputs[out].shape, *shape_of(by)):
            raise InputError(
                f"autograd does not follow {by!r} through Points, since its derivatives are per site of a sub-batch. "
                "Call under torch.no_grad(); Model.forward is followed."
            )
    found = _Node.apply(outputs, blocks, tuple(values), refuse, *values.values())  # type: ignore[no-untyped-call]
    return dict(zip(outputs, found, strict=True))
