"""Variables in the caller's notation and dimension: symmetric tensors in and out, and their derivatives.

Inside, symmetric tensors are what the model takes: Mandel's notation in three dimensions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from .. import notation as forms
from ..errors import InputError, UnknownNameError

Notation = Literal["mandel", "voigt", "tensor"]
Dimension = Literal[3, "plane strain", "plane stress"]

NOTATIONS: tuple[Notation, ...] = get_args(Notation)
DIMENSIONS: tuple[Dimension, ...] = get_args(Dimension)

SYMMETRIC = (6,)
# Entries of a vector of six that lie in the plane, and those that do not.
IN_PLANE, OUT_OF_PLANE = [0, 1, 5], [2, 3, 4]

Base = tuple[int, ...]


@dataclass(frozen=True)
class Forms:
    """How a caller writes the variables.

    Args:
        bases: base shapes in the model, by variable.
        forms: form of each symmetric tensor.
        reduced: symmetric tensors of which callers give and get the components in the plane only.
    """

    bases: dict[str, Base]
    forms: dict[str, forms.Form]
    reduced: frozenset[str]

    def shape(self, name: str, *, whole: bool = False) -> Base:
        """Base shape of a variable as the caller writes it.

        Args:
            name: of the variable.
            whole: whether in three dimensions in any case.
        """
        if name not in self.forms:
            return self.bases[name]
        plane = name in self.reduced and not whole
        if self.forms[name] == "tensor":
            return (2, 2) if plane else (3, 3)
        return (len(IN_PLANE),) if plane else SYMMETRIC

    def inward(self, name: str, value: Tensor, *, whole: bool = False) -> Tensor:
        """Bring a caller's value, `(..., *shape)`, to the model's form."""
        form = self.forms.get(name)
        if form is None:
            return value
        if name in self.reduced and not whole:
            base = self.shape(name, whole=True)
            embedded = value.new_zeros((*value.shape[: value.ndim - len(base)], *base))
            if form == "tensor":
                embedded[..., :2, :2] = value
            else:
                embedded[..., IN_PLANE] = value
            value = embedded
        return forms.convert(value, form, "mandel")

    def outward(self, name: str, value: Tensor, *, whole: bool = False) -> Tensor:
        """Bring a value `(..., *base)` to the caller's form; the same object where there is nothing to do."""
        form = self.forms.get(name)
        if form is None:
            return value
        found = forms.convert(value, "mandel", form)
        return found if whole else self._in_plane(found, name, 0)

    def tangent(self, out: str, by: str, block: Tensor) -> Tensor:
        """Bring a derivative, `(..., *out base, *by base)`, to the caller's forms."""
        form_out, form_by = self.forms.get(out), self.forms.get(by)
        if form_out is not None and form_by is not None:
            block = forms.convert_tangent(block, "mandel", (form_out, form_by))
        elif form_by is not None:
            block = forms.convert_gradient(block, "mandel", form_by)
        elif form_out is not None:
            behind, axes = len(self.bases[by]), len(self.shape(out))
            moved = forms.convert(block.movedim(-1 - behind, -1), "mandel", form_out)
            last = range(moved.ndim - axes, moved.ndim)
            block = moved.movedim(tuple(last), tuple(k - behind for k in last))
        return self._in_plane(self._in_plane(block, by, 0), out, len(self.shape(by)))

    def _in_plane(self, value: Tensor, name: str, behind: int) -> Tensor:
        """The components that the caller gets of a variable whose axes have `behind` axes behind them."""
        if name not in self.reduced:
            return value
        last = value.ndim - 1 - behind
        if self.forms[name] == "tensor":
            return value.narrow(last, 0, 2).narrow(last - 1, 0, 2)
        return value.index_select(last, torch.tensor(IN_PLANE, device=value.device))


def forms_of(
    bases: dict[str, Base],
    notation: Notation,
    strains: Iterable[str],
    stresses: Iterable[str],
    *,
    plane: bool,
    whole: Iterable[str],
    where: str,
) -> Forms:
    """Find the form of each symmetric tensor.

    Args:
        bases: base shapes in the model, by variable.
        notation: the caller's.
        strains: symmetric tensors that Voigt's notation writes as strains.
        stresses: those that it writes as stresses.
        plane: whether callers give and get components in the plane only.
        whole: symmetric tensors with all components even so.
        where: the artifact, for messages.

    Raises:
        InputError: there is no such notation, or it can't be told which form a variable has in it.
        UnknownNameError: a name is not that of a symmetric tensor.
    """
    if notation not in NOTATIONS:
        raise InputError(f"notation is {notation!r}, expected one of {', '.join(NOTATIONS)}.")
    symmetric = [name for name, base in bases.items() if base == SYMMETRIC]
    strains, stresses, whole = tuple(strains), tuple(stresses), tuple(whole)
    for names, argument in ((strains, "strains"), (stresses, "stresses"), (whole, "whole")):
        for name in names:
            if name not in symmetric:
                raise UnknownNameError(
                    f"{argument}= names {name!r}, which is no symmetric tensor of {where}; there are: "
                    f"{', '.join(symmetric)}."
                )
    reduced = frozenset(symmetric).difference(whole) if plane else frozenset()
    if notation != "voigt":
        return Forms(bases, dict.fromkeys(symmetric, notation), reduced)
    found: dict[str, forms.Form] = {}
    for name in symmetric:
        strain = name in strains or ("strain" in name and name not in stresses)
        stress = name in stresses or ("stress" in name and name not in strains)
        if strain == stress:
            raise InputError(
                f"{where}: it can't be told whether Voigt's notation writes {name!r} as a strain, with shears doubled, "
                f"or as a stress. Tell it: Points(..., strains=[{name!r}]) or stresses=[{name!r}]."
            )
        found[name] = "voigt strain" if strain else "voigt stress"
    return Forms(bases, found, reduced)
