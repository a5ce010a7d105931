"""The promoted parameters of a model: their stored values, and what is in force during one call."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .artifact.schema import Metadata, Parameter, Shape
from .errors import ArtifactError, InputError, UnknownNameError
from .runtime.boundary import Boundary


class PromotedParameters:
    """The store of a model's promoted parameters, by boundary name.

    Args:
        metadata: of the artifact.
        boundary: what tensors the model takes.
    """

    def __init__(self, metadata: Metadata, boundary: Boundary) -> None:
        self._boundary = boundary
        rename = metadata.aliases.parameters
        self.specs = {
            rename.get(p.name, p.name): p for p in sorted(metadata.parameters, key=lambda p: rename.get(p.name, p.name))
        }
        self.public = {p.name: name for name, p in self.specs.items()}
        self.values = {name: _stored(p, boundary.dtype, boundary.device) for name, p in self.specs.items()}

    def set(self, name: str, value: Tensor | float) -> None:
        """Replace a value by a copy; see `Model.set_parameter`."""
        self.values[name] = self.admit(name, value).clone() if name in self.specs else self._unknown(name)

    def _unknown(self, name: str) -> Tensor:
        there = ", ".join(self.specs) or "none"
        raise UnknownNameError(
            f"{name!r} is not a promoted parameter of {self._boundary.where}; there are: {there}. Only "
            "parameters promoted at "
            "compile time can be set: neml2-compile INPUT --model NAME -p PARAMETER."
        )

    def admit(self, name: str, value: object) -> Tensor:
        """Check a value: `(*batch, *base)` of the stored dtype, or a number for all entries."""
        spec, own = self.specs[name], self.values[name].dtype
        if isinstance(value, (bool, int, float)):
            return torch.full(spec.base_shape, value, dtype=own, device=self._boundary.device)
        if not (isinstance(value, Tensor) and value.dtype == own and not own.is_floating_point):
            self._boundary.check_type(value, name, "parameter")
        assert isinstance(value, Tensor)
        if batch_of(value, spec) is None:
            wanted = ", ".join(("*batch", *map(str, spec.base_shape)))
            raise InputError(
                f"parameter {name!r} has shape {tuple(value.shape)}, expected ({wanted}): its base shape is "
                f"{spec.base_shape}."
            )
        return value.detach()

    def snapshot(self, overrides: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """Copy the values in force for one call, by boundary name.

        Args:
            overrides: values for this call only, by boundary name.
        """
        for name in overrides or ():
            if name not in self.specs:
                self._unknown(name)
        given = {**self.values, **(overrides or {})}
        # A copy, because another thread may change a value in place while a solve goes on.
        return {name: self.admit(name, value).clone() for name, value in given.items()}


def batch_of(value: Tensor, spec: Parameter) -> Shape | None:
    """The batch shape of a parameter's value; None where its trailing axes are not the base shape."""
    rank = value.ndim - len(spec.base_shape)
    return tuple(value.shape[:rank]) if rank >= 0 and tuple(value.shape[rank:]) == spec.base_shape else None


def _stored(spec: Parameter, dtype: torch.dtype, device: torch.device) -> Tensor:
    own = dtype
    if spec.dtype is not None:
        named = getattr(torch, spec.dtype.removeprefix("torch."), None)
        if not isinstance(named, torch.dtype):
            raise ArtifactError(f"parameter {spec.name!r} has dtype {spec.dtype!r}, which torch does not have.")
        own = dtype if named.is_floating_point else named
    return torch.tensor(spec.values, dtype=torch.float64).to(own).reshape(spec.shape).to(device)
