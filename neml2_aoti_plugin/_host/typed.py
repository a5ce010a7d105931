"""neml2's typed tensors at the boundary of a compiled model: to raw ones and back, and its first-order chain rule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import neml2
import torch
from neml2 import types as neml2_types
from neml2.types import TensorWrapper
from torch import Tensor

from .._artifact.schema import Shape, Variable
from ..errors import ArtifactError, InputError, InputTypeError
from ..model._outcomes import Blocks, Tensors

Wrapper = type[TensorWrapper]
# Of each variable, tangents by the name of what they are taken by.
ChainRule = dict[str, dict[str, TensorWrapper]]


def wrapper_class(variable: Variable, name: str) -> Wrapper:
    """The typed wrapper of a variable, whose `name` is that at the boundary."""
    found = getattr(neml2_types, variable.type, None)
    if not (isinstance(found, type) and issubclass(found, TensorWrapper)):
        raise ArtifactError(
            f"variable {name!r} has type {variable.type!r}, which neml2 {neml2.__version__} does not have. Install the "
            "neml2 release that compiled the model, or compile it again."
        )
    return found


def class_of_base_shape(shape: Shape) -> Wrapper | None:
    """A typed wrapper with a base shape, for parameters, whose types no artifact tells; None if there is none.

    neml2 asks for it to find a child's parameters and their base shapes, and for nothing else.
    """
    classes = (getattr(neml2_types, name) for name in ("Scalar", *neml2_types.__all__))
    return next((c for c in classes if isinstance(c, type) and getattr(c, "BASE_SHAPE", None) == shape), None)


def has_typed(values: Mapping[str, TensorWrapper | Tensor]) -> bool:
    """Whether a caller deals in typed tensors."""
    return any(isinstance(value, TensorWrapper) for value in values.values())


def unwrap(
    values: Mapping[str, TensorWrapper | Tensor],
    variables: Mapping[str, Variable],
    spec: Mapping[str, Wrapper],
    kind: str,
    where: object,
) -> Tensors:
    """Raw tensors `(*batch, *sub_batch, *base)` of typed ones; raw ones and unknown names pass."""
    return {
        name: _raw(value, name, variables[name], spec[name], kind, where)
        if isinstance(value, TensorWrapper) and name in variables
        else value
        for name, value in values.items()
    }


def _raw(value: TensorWrapper, name: str, variable: Variable, wanted: Wrapper, kind: str, where: object) -> Tensor:
    """See `unwrap`, for one value; it has no chain-rule axes, and no other sub-batch than was compiled."""
    if not isinstance(value, wanted):
        raise InputTypeError(f"{kind} {name!r} is a {type(value).__name__}, expected a {wanted.__name__}.")
    if value.k_ndim:
        raise InputError(f"{kind} {name!r} carries {value.k_ndim} chain-rule axes, expected a plain {wanted.__name__}.")
    data: Tensor = value.data
    base, sub = len(variable.base_shape), variable.sub_batch_shape
    if value.sub_batch_ndim and not sub:
        raise InputError(
            f"{kind} {name!r} has sub-batch shape {tuple(value.sub_batch_shape)}, but {where} was compiled for none "
            f"and would take the sites for something else. Declare it in [Settings] example_batch_shape ('{name} = (2; "
            f"{', '.join(map(str, value.sub_batch_shape))})') and compile again."
        )
    if not sub:
        return data
    lead = data.shape[: data.ndim - base - value.sub_batch_ndim]
    of_base = data.shape[data.ndim - base :]
    if value.sub_batch_ndim == 0:
        # A plain value stands for all sites, as in eager neml2.
        return data.reshape((*lead, *(1,) * len(sub), *of_base)).expand((*lead, *sub, *of_base))
    if tuple(value.sub_batch_shape) != sub:
        raise InputError(
            f"{kind} {name!r} has sub-batch shape {tuple(value.sub_batch_shape)}, expected {sub}, for which {where} "
            "was compiled."
        )
    return data.expand((*lead, *sub, *of_base))


def wrap(values: Mapping[str, Tensor], spec: Mapping[str, Wrapper], rank: int) -> dict[str, TensorWrapper]:
    """Typed tensors of raw ones, with `rank` batch axes; axes between batch and base are the sub-batch."""
    return {
        name: spec[name](value, sub_batch_ndim=max(value.ndim - rank - spec[name].BASE_NDIM, 0))
        for name, value in values.items()
    }


def wrap_blocks(
    blocks: Blocks, inputs: Mapping[str, Wrapper], outputs: Mapping[str, Wrapper], rank: int
) -> dict[str, dict[str, neml2_types.Tensor]]:
    """Derivative blocks, with `rank` batch axes or none, as neml2's tensors of free base shape."""
    return {
        out: {
            name: neml2_types.Tensor(
                block, batch_ndim=rank if block.ndim - outputs[out].BASE_NDIM - inputs[name].BASE_NDIM >= rank else 0
            )
            for name, block in row.items()
        }
        for out, row in blocks.items()
    }


# -- the chain rule ---------------------------------------------------------------------------------------------------


def push_forward(
    v: Mapping[str, Mapping[str, TensorWrapper]],
    matrices: Mapping[tuple[str, str], Tensor],
    inputs: Mapping[str, Variable],
    outputs: Mapping[str, TensorWrapper],
) -> ChainRule:
    """Tangents of the outputs for tangents of the inputs, by the matrices `(*batch, entries, entries)` of their pairs.

    Each tangent of an input is `(*K, *batch, *sub_batch, *base)` with any number of leading chain-rule axes, and those
    of the outputs have the axes of their seeds.
    """
    found: ChainRule = {}
    for (out, name), matrix in matrices.items():
        value = outputs[out]
        for leaf, seed in v[name].items():
            column = _columns(seed, name, inputs[name], matrix.ndim - 2)
            along = torch.matmul(matrix, column).squeeze(-1)
            sub_and_base = value.data.shape[value.data.ndim - value.sub_batch_ndim - type(value).BASE_NDIM :]
            axes: dict[str, Any] = {"k_ndim": seed.k_ndim, "k_state": seed.k_state, "k_pairing": seed.k_pairing}
            data = along.reshape((*along.shape[:-1], *sub_and_base))
            tangent = type(value)(data, sub_batch_ndim=value.sub_batch_ndim, **axes)
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
