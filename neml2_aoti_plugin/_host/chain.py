"""neml2's first-order chain rule for a compiled model: tangents of the inputs, contracted with compiled derivatives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from neml2.types import TensorWrapper
from torch import Tensor

from .._artifact.schema import Shape, Variable
from ..errors import InputError
from .typed import Wrapper

# Of each variable, tangents by the name of what they are taken by.
ChainRule = dict[str, dict[str, TensorWrapper]]


def seeded(v: Mapping[str, Mapping[str, TensorWrapper]], inputs: Mapping[str, Variable]) -> list[str]:
    """Names of the inputs that have tangents, in the model's order.

    Args:
        v: tangents of the inputs.
        inputs: of the model.
    """
    return [name for name in inputs if v.get(name)]


def push_forward(
    v: Mapping[str, Mapping[str, TensorWrapper]],
    matrices: Mapping[tuple[str, str], Tensor],
    inputs: Mapping[str, Variable],
    outputs: Mapping[str, TensorWrapper],
) -> ChainRule:
    """Tangents of the outputs for tangents of the inputs.

    Args:
        v: tangents of the inputs, each `(*K, *batch, *sub_batch, *base)` with any number of leading chain-rule axes.
        matrices: derivatives by (output, input), `(*batch, entries, entries)`.
        inputs: of the model.
        outputs: their typed values.

    Returns:
        Tangents of the outputs, each with the chain-rule axes of its seed.

    Raises:
        InputError: a tangent has chain-rule axes that are tied to sub-batch axes.
    """
    found: ChainRule = {}
    for (out, name), matrix in matrices.items():
        value = outputs[out]
        for leaf, seed in v[name].items():
            column = _columns(seed, name, inputs[name], matrix.ndim - 2)
            along = torch.matmul(matrix, column).squeeze(-1)
            lead = along.shape[:-1]
            sub_and_base = value.data.shape[value.data.ndim - value.sub_batch_ndim - type(value).BASE_NDIM :]
            tangent = _like(value, along.reshape((*lead, *sub_and_base)), seed)
            row = found.setdefault(out, {})
            row[leaf] = row[leaf] + tangent if leaf in row else tangent
    return found


def _columns(seed: TensorWrapper, name: str, variable: Variable, rank: int) -> Tensor:
    """A tangent as columns `(*K, *batch, entries, 1)` with `rank` batch axes."""
    if any(state != "full" for state in seed.k_state):
        raise InputError(
            f"the tangent of {name!r} has chain-rule axes that are tied to sub-batch axes (k_state={seed.k_state}); a "
            "compiled model takes full ones."
        )
    data: Tensor = seed.data
    k, natural = seed.k_ndim, variable.natural_shape
    base = len(variable.base_shape)
    own: Shape = tuple(data.shape[k : data.ndim - base - seed.sub_batch_ndim])
    sites = tuple(data.shape[data.ndim - base - seed.sub_batch_ndim : data.ndim - base])
    sites = sites or (1,) * len(variable.sub_batch_shape)
    shaped = data.reshape((*data.shape[:k], *(1,) * (rank - len(own)), *own, *sites, *data.shape[data.ndim - base :]))
    lead = shaped.shape[: shaped.ndim - len(natural)]
    return shaped.expand((*lead, *natural)).reshape((*lead, variable.size, 1))


def _like(value: TensorWrapper, data: Tensor, seed: TensorWrapper) -> TensorWrapper:
    """A tangent of an output, with the chain-rule axes of a seed."""
    wrapper: Wrapper = type(value)
    axes: dict[str, Any] = {"k_ndim": seed.k_ndim, "k_state": seed.k_state, "k_pairing": seed.k_pairing}
    return wrapper(data, sub_batch_ndim=value.sub_batch_ndim, **axes)
