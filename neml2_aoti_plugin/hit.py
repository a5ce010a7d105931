"""`AOTIModel`: the HIT type of a compiled model, typed tensors in and out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from neml2 import types as neml2_types
from neml2.schema import HitSchema, option
from neml2.types import TensorWrapper
from torch import Tensor, nn

from .artifact.schema import Variable
from .artifact.stub import read_stub
from .derivatives import Blocks
from .errors import ArtifactError, DerivativeNotCompiledError, InputError, InputTypeError
from .model import Model
from .runtime.call import Tensors

if TYPE_CHECKING:
    import nmhit


class _Declared(nn.Module):
    """Names of variables inside the compiled graphs, so that neml2's check of declared names finds them."""

    def __init__(self, names: set[str]) -> None:
        super().__init__()
        self.output_spec = dict.fromkeys(sorted(names))


class AOTIModel(nn.Module):
    """A compiled model in the role of a neml2 model.

    Args:
        artifact: the artifact's folder, its metadata file, or a folder inside it.
        device: device to run on; torch's current default device if not given.
        dtype: `float64` or `float32`; if not given, float64 where compiled, else the only one compiled.
        declared: names of variables inside the model that the input file declares shapes for.
        solver: Newton settings in place of the artifact's own, by the field names of `NewtonSettings`.

    Raises:
        ArtifactNotFoundError: there is no artifact, or none for that device and dtype.
        ArtifactError: the artifact is damaged, of an unknown schema, or made for another machine.
    """

    SECTION = "Models"

    hit = HitSchema(
        option(
            "artifact_path",
            str,
            "Folder that neml2-compile wrote, relative to this input file or absolute. The device and dtype are chosen "
            "when the model is loaded.",
            default="",
        ),
        option("meta", str, "In place of artifact_path: the metadata file, from neml2 3.0.0 to 3.0.3.", default=""),
        option("solver", str, "Block in [Solvers] whose settings take the place of the artifact's own.", default=""),
    )

    @classmethod
    def from_hit(cls, node: nmhit.Node, factory: Any) -> AOTIModel:
        """Load the artifact that a `[Models]` block points at.

        Args:
            node: the block.
            factory: neml2's input file, with its path, settings, and the device and dtype that were asked for.
        """
        declared = {name for name in getattr(factory.settings, "example_batch_shape", None) or {} if name != "*"}
        try:
            stub = read_stub(node, Path(factory._path).parent, lambda name: factory._find_in_section("Solvers", name))
            artifact = stub.artifact.resolve()
            return cls(artifact, factory._device, factory._dtype, declared=declared, solver=stub.solver)
        except (ArtifactError, InputError) as error:
            error.args = (f"[Models/{node.path()}] in {factory._path}: {error}",)
            raise

    def __init__(
        self,
        artifact: str | Path,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        *,
        declared: set[str] | None = None,
        solver: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self._inner = Model(artifact, device, dtype, solver=solver)
        self.input_spec = {name: _wrapper_class(v, name) for name, v in self._inner.inputs.items()}
        self.output_spec = {name: _wrapper_class(v, name) for name, v in self._inner.outputs.items()}
        self.input_sub_batch = {name: v.sub_batch_shape for name, v in self._inner.inputs.items()}
        if declared:
            self._declared = _Declared(declared)

    def extra_repr(self) -> str:
        """What `repr` tells of the model."""
        return repr(self._inner)

    def forward(self, *args: TensorWrapper | Tensor, v: Any = None, v2: Any = None, vh: Any = None) -> tuple[Any, ...]:
        """Evaluate the outputs.

        Args:
            args: a typed tensor, or a raw one `(*batch, *sub_batch, *base)`, per input in the order of `input_spec`.
            v: not supported.
            v2: not supported.
            vh: not supported.

        Returns:
            One typed tensor per output, in the order of `output_spec`.

        Raises:
            InputError: an input does not fit.
            ConvergenceError: rows of an implicit segment did not converge.
        """
        if v is not None or v2 is not None or vh is not None:
            raise DerivativeNotCompiledError(
                "a compiled model does not take part in the chain rule (v=, v2=, vh=); use jvp() or jacobian()."
            )
        if len(args) != len(self.input_spec):
            raise InputTypeError(
                f"{len(args)} positional inputs given, expected {len(self.input_spec)}: {', '.join(self.input_spec)}."
            )
        outputs, batch = self._inner.forward_with_batch(self._raw(dict(zip(self.input_spec, args, strict=True))))
        return tuple(
            wrapper(outputs[name], sub_batch_ndim=outputs[name].ndim - len(batch) - wrapper.BASE_NDIM)
            for name, wrapper in self.output_spec.items()
        )

    # -- derivatives ------------------------------------------------------------------------------------------------

    def jvp(
        self,
        inputs: Mapping[str, TensorWrapper | Tensor],
        tangents: Mapping[str, TensorWrapper | Tensor],
        param_overrides: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensors, Tensors]:
        """Outputs and their derivative along a direction, raw; see `Model.jvp`."""
        return self._inner.jvp(self._raw(inputs), self._raw(tangents, "tangent"), param_overrides)

    def jacobian(
        self, inputs: Mapping[str, TensorWrapper | Tensor], param_overrides: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensors, Blocks]:
        """Outputs and compiled derivative blocks, raw; see `Model.jacobian`."""
        return self._inner.jacobian(self._raw(inputs), param_overrides)

    def param_jacobian(
        self, inputs: Mapping[str, TensorWrapper | Tensor], param_overrides: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensors, Blocks]:
        """Outputs and compiled derivative blocks by parameters, raw; see `Model.param_jacobian`."""
        return self._inner.param_jacobian(self._raw(inputs), param_overrides)

    def param_vjp(
        self,
        inputs: Mapping[str, TensorWrapper | Tensor],
        cotangents: Mapping[str, TensorWrapper | Tensor],
        param_overrides: Mapping[str, Tensor] | None = None,
    ) -> Tensors:
        """Gradients by parameters for cotangents of the outputs, raw; see `Model.param_vjp`."""
        plain = {n: c.data if isinstance(c, TensorWrapper) else c for n, c in cotangents.items()}
        return self._inner.param_vjp(self._raw(inputs), plain, param_overrides)

    # -- parameters -------------------------------------------------------------------------------------------------

    def named_parameters(  # type: ignore[override]
        self, prefix: str | None = None, recurse: bool | None = None, remove_duplicate: bool | None = None
    ) -> dict[str, Tensor] | Iterator[tuple[str, Tensor]]:
        """The promoted parameters.

        Args:
            prefix: put before each name, as in `torch.nn.Module`.
            recurse: as in `torch.nn.Module`; a compiled model has no children with parameters.
            remove_duplicate: as in `torch.nn.Module`.

        Returns:
            Without arguments a dict from name to tensor, as neml2's compiled models give it; with any, an iterator of
            names and tensors, as `torch.nn.Module` does. Changing a tensor in place takes effect on the next call.
        """
        found = self._inner.named_parameters()
        if prefix is None and recurse is None and remove_duplicate is None:
            return found
        lead = f"{prefix}." if prefix else ""
        return iter([(f"{lead}{name}", tensor) for name, tensor in found.items()])

    @property
    def parameter_base_shapes(self) -> dict[str, list[int]]:
        """Base shape of each promoted parameter."""
        return self._inner.parameter_base_shapes

    def set_parameter(self, name: str, value: Tensor | TensorWrapper | float) -> None:
        """Replace the value of a promoted parameter; see `Model.set_parameter`."""
        self._inner.set_parameter(name, value.data if isinstance(value, TensorWrapper) else value)

    # -- typed and raw ----------------------------------------------------------------------------------------------

    def _raw(self, inputs: Mapping[str, TensorWrapper | Tensor], kind: str = "input") -> Tensors:
        """Unwrap typed inputs to `(*batch, *sub_batch, *base)`; raw ones pass."""
        variables = self._inner.inputs
        return {
            name: self._unwrapped(name, value, variables[name], kind)
            if isinstance(value, TensorWrapper) and name in variables
            else value
            for name, value in inputs.items()
        }

    def _unwrapped(self, name: str, value: TensorWrapper, variable: Variable, kind: str) -> Tensor:
        wanted = self.input_spec[name]
        if not isinstance(value, wanted):
            raise InputTypeError(f"{kind} {name!r} is a {type(value).__name__}, expected a {wanted.__name__}.")
        if value.k_ndim:
            raise InputError(
                f"{kind} {name!r} carries {value.k_ndim} chain-rule axes, expected a plain {wanted.__name__}."
            )
        data, base, sub = value.data, len(variable.base_shape), variable.sub_batch_shape
        if value.sub_batch_ndim and not sub:
            raise InputError(
                f"{kind} {name!r} has sub-batch shape {tuple(value.sub_batch_shape)}, but {self._inner.artifact} was "
                "compiled for none and would take the sites for something else. Declare it in [Settings] "
                f"example_batch_shape ('{name} = (2; {', '.join(map(str, value.sub_batch_shape))})') and compile again."
            )
        if not sub:
            return data
        lead = data.shape[: data.ndim - base - value.sub_batch_ndim]
        tail = data.shape[data.ndim - base :]
        if value.sub_batch_ndim == 0:
            # A plain value stands for all sites, as in eager neml2.
            return data.reshape((*lead, *(1,) * len(sub), *tail)).expand((*lead, *sub, *tail))
        if tuple(value.sub_batch_shape) != sub:
            raise InputError(
                f"{kind} {name!r} has sub-batch shape {tuple(value.sub_batch_shape)}, expected {sub}, for which "
                f"{self._inner.artifact} was compiled."
            )
        return data.expand((*lead, *sub, *tail))


def _wrapper_class(variable: Variable, name: str) -> type[TensorWrapper]:
    """The typed wrapper of a variable."""
    found = getattr(neml2_types, variable.type, None)
    if not (isinstance(found, type) and issubclass(found, TensorWrapper)):
        raise ArtifactError(
            f"variable {name!r} has type {variable.type!r}, which this neml2 does not have. Install the neml2 "
            "release that "
            "compiled the model, or compile it again."
        )
    return found
