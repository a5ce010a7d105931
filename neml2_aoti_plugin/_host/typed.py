"""neml2's typed tensors at the boundary of a compiled model: to raw ones, and back."""

from __future__ import annotations

from collections.abc import Mapping

import neml2
from neml2 import types as neml2_types
from neml2.types import TensorWrapper
from torch import Tensor

from .._artifact.schema import Shape, Variable
from ..errors import ArtifactError, InputError, InputTypeError
from ..model._outcomes import Blocks, Tensors

Wrapper = type[TensorWrapper]


def wrapper_class(variable: Variable, name: str) -> Wrapper:
    """The typed wrapper of a variable.

    Args:
        variable: of the model.
        name: at the boundary, for messages.

    Raises:
        ArtifactError: neml2 has no such type.
    """
    found = getattr(neml2_types, variable.type, None)
    if not (isinstance(found, type) and issubclass(found, TensorWrapper)):
        raise ArtifactError(
            f"variable {name!r} has type {variable.type!r}, which neml2 {neml2.__version__} does not have. Install the "
            "neml2 release that compiled the model, or compile it again."
        )
    return found


def wrapper_of_unknown(variable: Variable, name: str) -> Wrapper:
    """As `wrapper_class`, for an unknown, whose type most artifacts do not tell; any wrapper then.

    Args:
        variable: the unknown.
        name: as callers know it, for messages.
    """
    return wrapper_class(variable, name) if variable.type else TensorWrapper


def class_of_base_shape(shape: Shape) -> Wrapper | None:
    """A typed wrapper with a base shape, for parameters, whose types the artifact does not tell.

    neml2 asks for it to find a child's parameters and their base shapes, and for nothing else.

    Args:
        shape: the base shape.

    Returns:
        The wrapper; None where neml2 has none of that shape.
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
    """Raw tensors `(*batch, *sub_batch, *base)` of typed ones; raw ones and unknown names pass.

    Args:
        values: by name.
        variables: of the model.
        spec: their wrapper classes.
        kind: what the values are, for messages.
        where: the artifact, for messages.

    Raises:
        InputTypeError: a value is of another type.
        InputError: a value has chain-rule axes, or another sub-batch than the model was compiled for.
    """
    return {
        name: raw(value, name, variables[name], spec[name], kind, where)
        if isinstance(value, TensorWrapper) and name in variables
        else value
        for name, value in values.items()
    }


def raw(value: TensorWrapper, name: str, variable: Variable, wanted: Wrapper, kind: str, where: object) -> Tensor:
    """See `unwrap`, for one value."""
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


def batch_rank(inputs: Mapping[str, Tensor], variables: Mapping[str, Variable]) -> int:
    """Number of batch axes that raw inputs have together.

    Args:
        inputs: by name, `(*batch, *sub_batch, *base)`.
        variables: of the model.
    """
    return max((x.ndim - len(variables[name].natural_shape) for name, x in inputs.items()), default=0)


def wrap(values: Mapping[str, Tensor], spec: Mapping[str, Wrapper], rank: int) -> dict[str, TensorWrapper]:
    """Typed tensors of raw ones; axes between batch and base are the sub-batch.

    Args:
        values: by name, `(*batch, *sub_batch, *base)`.
        spec: wrapper classes.
        rank: number of batch axes.
    """
    return {
        name: spec[name](value, sub_batch_ndim=max(value.ndim - rank - spec[name].BASE_NDIM, 0))
        for name, value in values.items()
    }


def wrap_blocks(
    blocks: Blocks, inputs: Mapping[str, Wrapper], outputs: Mapping[str, Wrapper], rank: int
) -> dict[str, dict[str, neml2_types.Tensor]]:
    """Derivative blocks as neml2's tensors of free base shape.

    Args:
        blocks: `(*batch, *out_base, *in_base)`, or without the batch axes.
        inputs: wrapper classes.
        outputs: wrapper classes.
        rank: number of batch axes.
    """
    return {
        out: {
            name: neml2_types.Tensor(
                block, batch_ndim=rank if block.ndim - outputs[out].BASE_NDIM - inputs[name].BASE_NDIM >= rank else 0
            )
            for name, block in row.items()
        }
        for out, row in blocks.items()
    }
