"""Symmetric tensors as vectors of six: Mandel's notation, Voigt's two, and components 3 x 3.

All vectors have the order of `ORDER`: xx, yy, zz, yz, xz, xy. What differs is the factor on the shears yz, xz and xy:

| form | factor | a product of two is |
|---|---|---|
| `mandel` | sqrt(2) | the double contraction, by one vector of either kind |
| `voigt strain` | 2 (engineering shear strains) | the double contraction, with a `voigt stress` |
| `voigt stress` | 1 | the double contraction, with a `voigt strain` |
| `tensor` | 1; components `(..., 3, 3)` | the double contraction, over both axes |

neml2's type `SR2` is in Mandel's notation. The factors are those of P. Helnwein, Some remarks on the compressed matrix
representation of symmetric second-order and fourth-order tensors, Comput. Methods Appl. Mech. Engrg. 190 (2001) 2753.

All functions take NumPy arrays or torch tensors of any leading axes, and give the same kind and dtype; autograd follows
those of torch.
"""

from __future__ import annotations

from math import prod, sqrt
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .errors import InputError, InputTypeError

Form = Literal["mandel", "voigt strain", "voigt stress", "tensor"]
Array = TypeVar("Array", NDArray[Any], Tensor)

FORMS: tuple[Form, ...] = get_args(Form)
ORDER = ("xx", "yy", "zz", "yz", "xz", "xy")

# Of the nine components, row by row: those above and below the diagonal for each entry of a vector, and the other way.
_ABOVE, _BELOW = [0, 4, 8, 5, 2, 1], [0, 4, 8, 7, 6, 3]
_ENTRIES = [0, 5, 4, 5, 1, 3, 4, 3, 2]

# What an entry for a shear is, over the component.
_SHEARS: dict[Form, float] = {"mandel": sqrt(2.0), "voigt strain": 2.0, "voigt stress": 1.0, "tensor": 1.0}
# The same for what is differentiated by. Of a 3 x 3 tensor, each shear is there twice.
_SHEARS_BY: dict[Form, float] = {**_SHEARS, "tensor": 2.0}

# Two components of a shear may differ by so much, over the largest component: the rounding of a caller's arithmetic.
SYMMETRIC = 1e-9


def convert(values: Array, source: Form, target: Form) -> Array:
    """Bring symmetric tensors from one form to another.

    Args:
        values: `(..., 6)`, or `(..., 3, 3)` where `source` is `tensor`.
        source: form of `values`.
        target: form of the result.

    Returns:
        `(..., 6)` or `(..., 3, 3)`; `values` itself where the forms are the same.

    Raises:
        InputError: there is no such form, the shape is another one, or a 3 x 3 tensor is not symmetric.
        InputTypeError: `values` is neither a NumPy array nor a torch tensor.
    """
    return _converted_alone(values, source, target, _SHEARS, "a symmetric tensor")


def convert_gradient(values: Array, source: Form, target: Form) -> Array:
    """Bring derivatives by a symmetric tensor to those by another form of it.

    Args:
        values: `(..., 6)`, or `(..., 3, 3)` where `source` is `tensor`.
        source: form of the tensor by which was differentiated.
        target: form of the tensor by which the result is the derivative. By a 3 x 3 tensor it is symmetric: each
            component of a shear has half of the derivative.

    Returns:
        `(..., 6)` or `(..., 3, 3)`; `values` itself where the forms are the same.

    Raises:
        InputError: as for `convert`.
        InputTypeError: as for `convert`.
    """
    # A derivative goes the other way.
    factors = {form: 1.0 / factor for form, factor in _SHEARS_BY.items()}
    return _converted_alone(values, source, target, factors, "a derivative by a symmetric tensor")


def convert_tangent(values: Array, source: Form | tuple[Form, Form], target: Form | tuple[Form, Form]) -> Array:
    """Bring fourth-order tangents, derivatives of one symmetric tensor by another, from one form to another.

    A stiffness in Voigt's notation is `("voigt stress", "voigt strain")`; its entries are the components C_ijkl. A
    tangent in components, 3 x 3 x 3 x 3, has both minor symmetries.

    Args:
        values: `(..., *out, *by)`, each of both `6` or, in the form `tensor`, `3, 3`.
        source: forms of what was differentiated and of by what; one form stands for both.
        target: the same of the result.

    Returns:
        `(..., *out, *by)`; `values` itself where the forms are the same.

    Raises:
        InputError: as for `convert`.
        InputTypeError: as for `convert`.
    """
    (out, by), (new_out, new_by) = ((form, form) if isinstance(form, str) else form for form in (source, target))
    _require(values, _shape(out) + _shape(by), f"a tangent in the forms {out!r} by {by!r}")
    if (out, by) == (new_out, new_by):
        return values
    values = convert_gradient(values, by, new_by)
    return values if out == new_out else _converted(values, out, new_out, _SHEARS, len(_shape(new_by)))


def require_symmetric(values: NDArray[Any] | Tensor) -> None:
    """Refuse 3 x 3 tensors that are not symmetric; entries that are not finite are let pass.

    Args:
        values: `(..., 3, 3)`.

    Raises:
        InputError: a tensor is not symmetric to `SYMMETRIC` of its largest component.
    """
    if isinstance(values, Tensor):
        found = values.detach()
        largest, off = found.abs().amax((-2, -1)), (found - found.mT).abs().amax((-2, -1))
        places = (off > SYMMETRIC * largest).nonzero().tolist()
    else:
        with np.errstate(invalid="ignore"):
            largest, off = np.abs(values).max((-2, -1)), np.abs(values - values.swapaxes(-2, -1)).max((-2, -1))
            places = np.argwhere(off > SYMMETRIC * largest).tolist()
    if places:
        place = tuple(places[0])
        where = f" at {list(place)}" if place else ""
        raise InputError(
            f"a 3 x 3 tensor{where} is not symmetric: two components of a shear differ by {float(off[place]):.3e}, "
            f"where the largest component is {float(largest[place]):.3e}. Give the symmetric part, 0.5 * (grad + "
            "grad.T); a shear is half of the engineering shear strain."
        )


def _shape(form: Form) -> tuple[int, ...]:
    """Shape of one tensor."""
    if form not in FORMS:
        raise InputError(f"{form!r} is no form of a symmetric tensor; there are: {', '.join(FORMS)}.")
    return (3, 3) if form == "tensor" else (6,)


def _require(values: object, base: tuple[int, ...], what: str) -> None:
    if not isinstance(values, (np.ndarray, Tensor)):
        raise InputTypeError(
            f"{what} was given as a {type(values).__name__}, expected a NumPy array or a torch tensor: "
            "numpy.asarray(values)."
        )
    if tuple(values.shape[max(values.ndim - len(base), 0) :]) != base:
        raise InputError(
            f"{what} has shape {tuple(values.shape)}, expected (..., {', '.join(map(str, base))}); the forms are "
            f"{', '.join(FORMS)}."
        )


def _converted_alone(values: Array, source: Form, target: Form, shears: dict[Form, float], what: str) -> Array:
    _require(values, _shape(source), f"{what} in the form {source!r}")
    _shape(target)
    return values if source == target else _converted(values, source, target, shears, 0)


def _converted(values: Array, source: Form, target: Form, shears: dict[Form, float], behind: int) -> Array:
    """Convert the axes of a symmetric tensor that have `behind` axes behind them."""
    if source == "tensor" and behind == 0:
        require_symmetric(values)
    own = len(_shape(source))
    shape: tuple[int, ...] = tuple(values.shape)
    lead: tuple[int, ...] = shape[: len(shape) - behind - own]
    after: tuple[int, ...] = shape[len(shape) - behind :]
    # Three axes; more are slow.
    found = values.reshape((prod(lead), 9 if source == "tensor" else 6, prod(after)))
    if source == "tensor":
        # The mean of both components, so that autograd gives both their part.
        found = 0.5 * (_taken(found, _ABOVE) + _taken(found, _BELOW))
    found = _scaled(found, shears[target] / shears[source])
    if target == "tensor":
        found = _taken(found, _ENTRIES)
    return found.reshape((*lead, *_shape(target), *after))


def _taken(values: Array, entries: list[int]) -> Array:
    """Entries of the middle axis."""
    if isinstance(values, Tensor):
        return values.index_select(1, torch.tensor(entries, device=values.device))
    found: Array = np.take(values, entries, 1)
    return found


def _scaled(values: Array, factor: float) -> Array:
    """Multiply the entries of shears along the middle axis."""
    factors = [[1.0]] * 3 + [[factor]] * 3
    if isinstance(values, Tensor):
        dtype = values.dtype if values.is_floating_point() else torch.float64
        return values * torch.tensor(factors, dtype=dtype, device=values.device)
    found: Array = values * np.asarray(factors, dtype=values.dtype if values.dtype.kind == "f" else np.float64)
    return found
