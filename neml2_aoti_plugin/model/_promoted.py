"""The promoted parameters of a model: parameters of a torch module, and what is in force during one call."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .._artifact.schema import Metadata, Parameter, Shape
from ..errors import ArtifactError, InputError, UnknownNameError
from ..settings import shown_value
from ._admission import Boundary
from ._memory import with_memory

# What models keep in attributes of their own.
RESERVED = frozenset(
    {
        *("artifact", "initial_guesses", "inputs", "mode", "outputs", "input_spec", "input_sub_batch", "output_spec"),
        *("_boundary", "_caller", "_given", "_metadata", "_origin", "_plan", "_solver"),
        *("_declared", "_hit_name", "_inner", "_iterate_spec", "_output_wrappers", "_wrappers"),
    }
)


class Group(nn.Module):
    """A part of the qualified names of parameters: `elasticity` in `elasticity.E`."""


class PromotedParameters:
    """The promoted parameters of a model by boundary name; their values live in a torch module.

    Args:
        metadata: of the artifact.
        boundary: what tensors the model takes.
        owner: the module that has the parameters under their qualified names; those that it lacks are added to it.
    """

    def __init__(self, metadata: Metadata, boundary: Boundary, owner: nn.Module) -> None:
        self._boundary = boundary
        rename = metadata.aliases.parameters
        self.specs = {
            rename.get(p.name, p.name): p for p in sorted(metadata.parameters, key=lambda p: rename.get(p.name, p.name))
        }
        self.public = {p.name: name for name, p in self.specs.items()}
        for name in self.specs:
            _require_free(name, owner, boundary.where)
        self._homes = {name: _home(owner, name) for name in self.specs}
        for name, spec in self.specs.items():
            node, leaf = self._homes[name]
            present = node._parameters.get(leaf)
            # A parameter outlives the block that it was made in: one of torch.inference_mode could not be set outside.
            with torch.inference_mode(False):
                if leaf not in node._parameters:
                    value = _stored(spec, boundary.dtype, boundary.device)
                    node._parameters[leaf] = nn.Parameter(value, requires_grad=False)
                elif present is not None and present.is_inference():
                    node._parameters[leaf] = nn.Parameter(present.clone(), requires_grad=present.requires_grad)

    @property
    def values(self) -> dict[str, nn.Parameter]:
        """The parameters by name, as the module has them now."""
        found = {}
        for name, (node, leaf) in self._homes.items():
            value = node._parameters.get(leaf)
            # A parametrised value (torch.nn.utils.parametrize) is an attribute only.
            found[name] = value if value is not None else getattr(node, leaf)
        return found

    def home(self, name: str) -> tuple[nn.Module, str]:
        """The module that has a parameter, and the parameter's name there."""
        return self._homes[name]

    def set(self, name: str, value: Tensor | float) -> None:
        """Set a value; see `CompiledModule.set_parameter`."""
        self.require(name)
        admitted, present = self.admit(name, value), self.values[name]
        if admitted.shape == present.shape:
            with torch.no_grad():
                present.copy_(admitted)
            return
        node, leaf = self._homes[name]
        with torch.inference_mode(False):
            node._parameters[leaf] = nn.Parameter(admitted.clone(), requires_grad=present.requires_grad)

    def require(self, name: str) -> None:
        """Refuse a name that no promoted parameter has."""
        if name in self.specs:
            return
        there = ", ".join(self.specs) or "none"
        raise UnknownNameError(
            f"{name!r} is not a promoted parameter of {self._boundary.where}; there are: {there}. Only parameters "
            "promoted at compile time can be set: neml2-compile ... -p PARAMETER."
        )

    def admit(self, name: str, value: object) -> Tensor:
        """Check a value: `(*batch, *base)` of the stored dtype, or a number for all entries."""
        spec, own = self.specs[name], self.values[name].dtype
        if isinstance(value, (bool, int, float)):
            try:
                number = float(value) if own.is_floating_point else value
                return torch.full(spec.base_shape, number, dtype=own, device=self._boundary.device)
            except (OverflowError, RuntimeError):
                # Python says the one, and torch the other.
                raise InputError(
                    f"parameter {name!r} was given {shown_value(value)}, which is too large for {own}."
                ) from None
        if isinstance(value, Tensor) and value.dtype == own and not own.is_floating_point:
            value = with_memory(value, name, "parameter")
        else:
            value = self._boundary.check(value, name, "parameter")
        if batch_of(value, spec) is None:
            wanted = ", ".join(("*batch", *map(str, spec.base_shape)))
            raise InputError(
                f"parameter {name!r} has shape {tuple(value.shape)}, expected ({wanted}): its base shape is "
                f"{spec.base_shape}."
            )
        return value.detach()

    def in_force(self, overrides: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """The values for one call, by boundary name: those of the module, with `overrides` in their place."""
        for name in overrides or ():
            self.require(name)
        return {**self.values, **(overrides or {})}

    def snapshot(self, overrides: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """Checked copies of the values for one call, by boundary name."""
        # A copy, because another thread may change a value in place while a solve goes on.
        return {name: self.admit(name, value).clone() for name, value in self.in_force(overrides).items()}


def batch_of(value: Tensor, spec: Parameter) -> Shape | None:
    """The batch shape of a parameter's value; None where its trailing axes are not the base shape."""
    rank = value.ndim - len(spec.base_shape)
    return tuple(value.shape[:rank]) if rank >= 0 and tuple(value.shape[rank:]) == spec.base_shape else None


def _require_free(name: str, owner: nn.Module, where: str) -> None:
    """Refuse a name under which the module would find something else than the parameter."""
    first = name.partition(".")[0]
    taken = first in owner.__dict__ or first in RESERVED
    if taken:
        raise ArtifactError(
            f"{where}: the parameter {name!r} would take the place of the attribute {first!r} of the model. Give it "
            "another name: compile the model again with neml2-compile --rename-parameter."
        )


def _home(owner: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module below `owner` that has a parameter, made where it is absent, and its name there."""
    *path, leaf = name.split(".")
    for part in path:
        # Not by add_module, which refuses names that are attributes of the model, such as `forward`.
        owner = owner._modules.setdefault(part, Group())  # type: ignore[assignment]
    return owner, leaf


def _stored(spec: Parameter, dtype: torch.dtype, device: torch.device) -> Tensor:
    own = dtype
    if spec.dtype is not None:
        named = getattr(torch, spec.dtype.removeprefix("torch."), None)
        if not isinstance(named, torch.dtype):
            raise ArtifactError(f"parameter {spec.name!r} has dtype {spec.dtype!r}, which torch does not have.")
        own = dtype if named.is_floating_point else named
    return torch.tensor(spec.values, dtype=torch.float64).to(own).reshape(spec.shape).to(device)
