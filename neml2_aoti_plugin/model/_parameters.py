"""The promoted parameters of a model: in its torch module, in force during one call, and in a file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .._artifact.schema import Metadata, Parameter, Shape
from .._checks import require_names, shown_value
from .._tensor_files import Header, read_tensors, write_tensors
from ..errors import ArtifactError, InputError
from ._admission import Boundary
from ._memory import with_memory

# What models keep in attributes of their own.
RESERVED = frozenset(
    {
        *("artifact", "initial_guesses", "inputs", "mode", "outputs", "input_spec", "input_sub_batch", "output_spec"),
        *("_caller", "_given", "_origin", "_solver"),
        *("_declared", "_hit_name", "_guess_spec", "_output_wrappers", "_wrappers"),
    }
)

# A file of values says for which artifact they are, by its metadata file: the same for all devices and dtypes, and for
# a compile of the same input by the same neml2 on another machine.
FILE_KIND = "parameters 1"
WHAT = "a file of parameters (Model.save_parameters, or neml2-aoti params --out)"
MODEL, DIGEST = "model", "metadata_sha256"


class ParameterGroup(nn.Module):
    """A part of the qualified names of parameters: `elasticity` in `elasticity.E`."""

    def __init__(self, name: str) -> None:
        super().__init__()
        # By which neml2's adapter to pyzag finds the parameters of a model's parts.
        self._hit_name = name


class PromotedParameters:
    """The promoted parameters of a model by boundary name.

    Their values live in the torch module `owner`, under their qualified names; those that it lacks are added to it.
    """

    def __init__(self, metadata: Metadata, boundary: Boundary, owner: nn.Module) -> None:
        self._boundary, self._digest = boundary, metadata.digest
        named = {metadata.aliases.parameters.get(p.name, p.name): p for p in metadata.parameters}
        self.specs = dict(sorted(named.items()))
        self.public = {p.name: name for name, p in self.specs.items()}
        # The module that has each parameter, and the parameter's name there.
        self.homes = {name: _home(owner, name, boundary.where) for name in self.specs}
        for name, spec in self.specs.items():
            node, leaf = self.homes[name]
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
        for name, (node, leaf) in self.homes.items():
            value = node._parameters.get(leaf)
            # A parametrised value (torch.nn.utils.parametrize) is an attribute only; pyzag's adapter makes it typed.
            value = value if value is not None else getattr(node, leaf)
            found[name] = value if isinstance(value, Tensor) else value.data
        return found

    def set(self, name: str, value: Tensor | float) -> None:
        """Set a value; see `CompiledModule.set_parameter`."""
        self.require([name])
        admitted, present = self.admit(name, value), self.values[name]
        if admitted.shape == present.shape:
            with torch.no_grad():
                present.copy_(admitted)
            return
        node, leaf = self.homes[name]
        with torch.inference_mode(False):
            node._parameters[leaf] = nn.Parameter(admitted.clone(), requires_grad=present.requires_grad)

    def require(self, names: Iterable[str], hints: Mapping[str, str] | None = None) -> None:
        """Refuse names that no promoted parameter has."""
        more = "Only parameters promoted at compile time can be set: neml2-compile ... -p PARAMETER."
        what = f"promoted parameters of {self._boundary.where}"
        require_names(list(names), self.specs, what, "promoted parameters", hints=hints or {}, more=more)

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
        if not _ends_in(tuple(value.shape), spec.base_shape):
            raise InputError(
                f"parameter {name!r} has shape {tuple(value.shape)}, expected {_expected(spec)}: its base shape is "
                f"{spec.base_shape}."
            )
        return value.detach()

    def in_force(self, overrides: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """The values for one call, by boundary name: those of the module, with `overrides` in their place."""
        self.require(overrides or ())
        return {**self.values, **(overrides or {})}

    def snapshot(self, overrides: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """Checked copies of the values for one call, by boundary name."""
        # A copy, because another thread may change a value in place while a solve goes on.
        return {name: self.admit(name, value).clone() for name, value in self.in_force(overrides).items()}

    def save(self, path: Path) -> None:
        """Write the values to a file, for the artifact with this metadata file."""
        model = self._boundary.model
        if not self.specs:
            raise InputError(
                f"the model {model!r} has no promoted parameters to write. Promote them at compile time: "
                "neml2-compile ... -p PARAMETER."
            )
        values = {name: value.detach().to(torch.float64) for name, value in self.values.items()}
        write_tensors(path, FILE_KIND, values, {MODEL: model, DIGEST: self._digest})

    def load(self, path: str | os.PathLike[str], *, same_artifact: bool) -> None:
        """Set all values from a file, or none; one for the artifact of that metadata file, unless told otherwise."""
        where = self._boundary.where

        def check(header: Header) -> Iterable[str]:
            header.require_kind(FILE_KIND, WHAT)
            if same_artifact and header.notes.get(DIGEST) != self._digest:
                raise InputError(
                    f"{path}: holds parameters of another artifact (model {header.notes.get(MODEL)!r}), not of "
                    f"{where}. Take that artifact; or, if the values are meant for this one all the same: "
                    f"neml2-aoti params {where} --from {path} --out NEW.safetensors"
                )
            require_names(header.claims, self.specs, str(path), "model's promoted parameters", needed=self.specs)
            for name, spec in self.specs.items():
                shape = header.claims[name].shape
                if 0 in shape or not _ends_in(shape, spec.base_shape):
                    raise InputError(
                        f"{path}: {name!r} has shape {shape}, expected {_expected(spec)}, and no empty batch."
                    )
            return self.specs

        values = {}
        for name, value in read_tensors(path, WHAT, check).items():
            own = self.values[name]
            values[name] = value.to(own.device, own.dtype)
            # A parameter may hold whole numbers, or fewer digits.
            same = values[name].isfinite() if own.is_floating_point() else values[name].cpu().to(value.dtype) == value
            if not bool(same.all()):
                raise InputError(f"{path}: {name!r} holds numbers that {own.dtype} does not have.")
        for name, value in values.items():
            self.set(name, value)


def is_parameter_file(path: Path) -> bool:
    """Whether a file is one of parameters, of whatever artifact."""

    def check(header: Header) -> Iterable[str]:
        header.require_kind(FILE_KIND, WHAT)
        return ()

    try:
        read_tensors(path, WHAT, check)
    except InputError:
        return False
    return True


def _ends_in(shape: Shape, base: Shape) -> bool:
    """Whether the trailing axes of a value are the base shape."""
    return len(shape) >= len(base) and shape[len(shape) - len(base) :] == base


def _expected(spec: Parameter) -> str:
    return f"({', '.join(('*batch', *map(str, spec.base_shape)))})"


def _home(owner: nn.Module, name: str, where: str) -> tuple[nn.Module, str]:
    """The module below `owner` that has a parameter, made where it is absent, and its name there."""
    first = name.partition(".")[0]
    if first in owner.__dict__ or first in RESERVED:
        raise ArtifactError(
            f"{where}: the parameter {name!r} would take the place of the attribute {first!r} of the model. Give it "
            "another name: compile the model again with neml2-compile --rename-parameter."
        )
    *path, leaf = name.split(".")
    for part in path:
        # Not by add_module, which refuses names that are attributes of the model, such as `forward`.
        owner = owner._modules.setdefault(part, ParameterGroup(part))  # type: ignore[assignment]
    return owner, leaf


def _stored(spec: Parameter, dtype: torch.dtype, device: torch.device) -> Tensor:
    own = dtype
    if spec.dtype is not None:
        named = getattr(torch, spec.dtype.removeprefix("torch."), None)
        if not isinstance(named, torch.dtype):
            raise ArtifactError(f"parameter {spec.name!r} has dtype {spec.dtype!r}, which torch does not have.")
        own = dtype if named.is_floating_point else named
    return torch.tensor(spec.values, dtype=torch.float64).to(own).reshape(spec.shape).to(device)
