"""Which derivatives points can give, why they cannot give others, and gradients through one update."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..errors import DerivativeNotCompiledError, InputError
from ..model import Model
from ._plane_stress import PlaneStress
from ._roles import Base, Pair


@dataclass(frozen=True)
class Derivatives:
    """The derivatives of outputs by driven inputs and promoted parameters; in plane stress condensed ones."""

    model: Model
    driven: tuple[str, ...]
    plane_stress: PlaneStress | None

    def of_tangent(self, pairs: Sequence[Pair] | None) -> tuple[Pair, ...]:
        """The pairs of the tangent: those that the caller wants, or all that there are by driven inputs.

        Those by promoted parameters are evaluated only where the caller names them, since each has its price.
        """
        if pairs is None:
            return tuple(
                pair for pair in self.model.derivative_pairs if pair[1] in self.driven and not self._missing(pair)
            )
        for pair in pairs:
            self.require(pair)
        return tuple((out, by) for out, by in dict.fromkeys(map(tuple, pairs)))

    def by(self, names: Iterable[str]) -> tuple[Pair, ...]:
        """All that there are by some inputs and parameters."""
        return tuple((out, by) for out in self.model.output_names for by in names if not self._missing((out, by)))

    def require(self, pair: Pair) -> None:
        """Raise why there is no derivative, if there is none."""
        by = pair[-1] if isinstance(pair, tuple | list) and pair else None
        if by in self.model.inputs and by not in self.driven:
            raise DerivativeNotCompiledError(
                f"{by!r} is kept by the points; the tangent of points is by a driven input ({', '.join(self.driven)}) "
                f"or a promoted parameter. Or Points(..., driven=[{by!r}])."
            )
        self.model.require_pairs([pair])
        for out, by in self._missing(pair):
            raise DerivativeNotCompiledError(
                f"in plane stress d({pair[0]})/d({pair[1]}) takes d({out})/d({by}) too, which was not compiled into "
                f"{self.model.artifact}. Compile it: neml2-compile ... -d {out}:{by}."
            )

    def require_evaluated(self, pairs: Sequence[Pair] | None, out: str, by: str | None) -> None:
        """Raise why a derivative, or that by any input, is not among those of an update; None where it had none."""
        if pairs is None:
            raise InputError("this update left derivatives out. Call update(..., tangent=True).")
        if not self.model.derivative_pairs:
            self.model.require_pairs()
        pair = (out, by if by is not None else self.driven[0])
        self.require(pair)
        raise InputError(
            f"the tangent has the pairs {list(pairs)} only. Name the others: Points(..., pairs=[{pair!r}])."
        )

    def _missing(self, pair: Pair) -> list[Pair]:
        """What a derivative takes and was not compiled."""
        there = {*self.model.derivative_pairs, *self.model.parameter_derivative_pairs}
        takes = [pair] if self.plane_stress is None else self.plane_stress.takes(pair)
        return [one for one in takes if one not in there]


# -- gradients --------------------------------------------------------------------------------------------------------

# All is as the caller writes it, so that one node serves every notation and dimension. The state is no part of it.

# Raises why there is no derivative of an output by an input or parameter.
Refuse = Callable[[Pair], object]


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
                    ctx.refuse((out, by))
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
