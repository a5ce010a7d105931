"""`Model`: a compiled model over raw tensors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import derivatives
from .artifact.layout import locate
from .artifact.parse import read_metadata
from .artifact.passport import check
from .artifact.schema import Shape, Variable
from .derivatives import Blocks
from .errors import InputError
from .promoted import PromotedParameters
from .runtime.boundary import Boundary
from .runtime.call import Caller, Tensors, masked
from .runtime.program import Program
from .settings import newton_settings

MODE = "NEML2_AOTI_PLUGIN_MODE"
MODES = ("rowwise", "lockstep")


@dataclass(frozen=True)
class Solution:
    """Outputs with how each row fared.

    Args:
        outputs: by name, `(*batch, *sub_batch, *base)`; NaN in rows that did not converge.
        converged: `(*batch,)`, bool.
        iterations: number of Newton updates of each row, `(*batch,)`; 0 for a model without implicit segments.
    """

    outputs: Tensors
    converged: Tensor
    iterations: Tensor


class Model:
    """A compiled model: raw tensors in, raw tensors out.

    Inputs are dicts from name to tensor `(*batch, *sub_batch, *base)`, with batch shapes of any rank that broadcast.
    Calls are detached from autograd.

    Args:
        artifact: the artifact's folder, its metadata file, or a folder inside it.
        device: device to run on; torch's current default device if not given.
        dtype: `float64` or `float32`; if not given, float64 where compiled, else the only one compiled.
        mode: `rowwise` (each row of a batch iterates on its own) or `lockstep` (all rows iterate until the slowest has
            converged, with the iterates of neml2's C++ runtime); the environment variable `NEML2_AOTI_PLUGIN_MODE` if
            not given, else `rowwise`.

    Raises:
        ArtifactNotFoundError: there is no artifact, or none for that device and dtype.
        ArtifactError: the artifact is damaged, of an unknown schema, or made for another machine.
        InputError: an argument has no such value.
    """

    def __init__(
        self,
        artifact: str | os.PathLike[str],
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        *,
        mode: str | None = None,
        solver: Mapping[str, Any] | None = None,
    ) -> None:
        place = locate(Path(artifact), device, dtype)
        metadata = read_metadata(place.metadata, solver=dict(solver) if solver else None)
        self.mode = _mode(mode)
        check(metadata, place)
        self.artifact = place.metadata.parent
        self._metadata = metadata
        program = Program(metadata, place.leaf, place.device, self.mode == "lockstep")
        self._boundary = Boundary(metadata, place.device, place.dtype, program.dtype, str(self.artifact))
        self._promoted = PromotedParameters(metadata, self._boundary)
        self._caller = Caller(metadata, self._boundary, program, self._promoted)

    # -- what the model is ------------------------------------------------------------------------------------------

    @property
    def input_names(self) -> list[str]:
        """Names of the inputs, in the model's order."""
        return [port.name for port in self._boundary.inputs]

    @property
    def output_names(self) -> list[str]:
        """Names of the outputs, in the model's order."""
        return [port.name for port in self._boundary.outputs]

    @property
    def input_base_shapes(self) -> list[list[int]]:
        """Base shape of each input, in the order of `input_names`."""
        return [list(port.variable.base_shape) for port in self._boundary.inputs]

    @property
    def output_base_shapes(self) -> list[list[int]]:
        """Base shape of each output, in the order of `output_names`."""
        return [list(port.variable.base_shape) for port in self._boundary.outputs]

    @property
    def inputs(self) -> dict[str, Variable]:
        """The inputs by name, with type, base shape and sub-batch shape."""
        return {port.name: replace(port.variable, name=port.name) for port in self._boundary.inputs}

    @property
    def outputs(self) -> dict[str, Variable]:
        """The outputs by name, with type and base shape."""
        return {port.name: replace(port.variable, name=port.name) for port in self._boundary.outputs}

    @property
    def device(self) -> torch.device:
        """Device that the model runs on."""
        return self._boundary.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of inputs and outputs."""
        return self._boundary.dtype

    @property
    def derivative_pairs(self) -> list[tuple[str, str]]:
        """The (output, input) pairs whose derivatives were compiled."""
        caller = self._caller
        return [(caller.output_name(o), caller.input_name(i)) for o, i in self._metadata.derivatives]

    @property
    def parameter_derivative_pairs(self) -> list[tuple[str, str]]:
        """The (output, parameter) pairs whose derivatives were compiled."""
        public, out = self._promoted.public, self._caller.output_name
        return [(out(o), public[p]) for o, p in self._metadata.parameter_derivatives]

    def __repr__(self) -> str:
        leaf = f"{self.device}/{str(self.dtype).removeprefix('torch.')}"
        return f"Model({str(self.artifact)!r}, {leaf}: {', '.join(self.input_names)} -> {', '.join(self.output_names)})"

    # -- parameters -------------------------------------------------------------------------------------------------

    @property
    def parameter_base_shapes(self) -> dict[str, list[int]]:
        """Base shape of each promoted parameter."""
        return {name: list(spec.base_shape) for name, spec in self._promoted.specs.items()}

    def named_parameters(self) -> Tensors:
        """The promoted parameters by name; changing a tensor in place takes effect on the next call."""
        return dict(self._promoted.values)

    def set_parameter(self, name: str, value: Tensor | float) -> None:
        """Replace the value of a promoted parameter by a copy.

        Args:
            name: of the parameter.
            value: `(*batch, *base)`, or a number for all its entries.

        Raises:
            UnknownNameError: the model has no such parameter.
            InputError: the value has the wrong shape, dtype or device.
        """
        self._promoted.set(name, value)

    # -- solver settings --------------------------------------------------------------------------------------------

    def set_solver_config(
        self,
        atol: float,
        rtol: float,
        miters: int,
        ls_type: str,
        ls_max_iters: int,
        ls_cutback: float,
        ls_c: float,
        substep_del_tol: float = 1e-6,
    ) -> None:
        """Replace the Newton settings of all implicit segments; see `NewtonSettings` for the arguments.

        Raises:
            InputError: a value is out of range.
        """
        self._caller.settings = newton_settings(
            atol=atol,
            rtol=rtol,
            miters=miters,
            ls_type=ls_type,
            ls_max_iters=ls_max_iters,
            ls_cutback=ls_cutback,
            ls_c=ls_c,
            substep_del_tol=substep_del_tol,
        )

    # -- evaluation -------------------------------------------------------------------------------------------------

    def forward(self, inputs: Mapping[str, Tensor], param_overrides: Mapping[str, Tensor] | None = None) -> Tensors:
        """Evaluate the outputs.

        Args:
            inputs: by name, each `(*batch, *sub_batch, *base)`.
            param_overrides: values of promoted parameters for this call only, `(*batch, *base)`.

        Returns:
            Outputs by name in the order of `output_names`, `(*batch, *sub_batch, *base)`.

        Raises:
            ConvergenceError: rows of an implicit segment did not converge.
            InputError: an input or an override does not fit.
        """
        return self.forward_with_batch(inputs, param_overrides)[0]

    def forward_with_batch(
        self, inputs: Mapping[str, Tensor], param_overrides: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensors, Shape]:
        """As `forward`; gives the common batch shape of the inputs as well."""
        with torch.no_grad():
            call = self._caller.admit(inputs, param_overrides)
            found = self._caller.evaluate(call)
            self._caller.require_convergence(found, call.batch)
            return self._caller.outputs(found.values, call.batch), call.batch

    def solve(self, inputs: Mapping[str, Tensor], param_overrides: Mapping[str, Tensor] | None = None) -> Solution:
        """Evaluate the outputs of the rows that converge, without raising for the others.

        Args:
            inputs: as for `forward`.
            param_overrides: as for `forward`.

        Returns:
            Outputs, which rows converged, and the Newton updates of each.
        """
        with torch.no_grad():
            call = self._caller.admit(inputs, param_overrides)
            found = self._caller.evaluate(call)
            outputs, report = self._caller.outputs(found.values, call.batch), found.report
            if report is None:
                converged = torch.ones(call.batch, dtype=torch.bool, device=self.device)
                return Solution(outputs, converged, torch.zeros(call.batch, dtype=torch.int64, device=self.device))
            converged = report.converged.reshape(call.batch)
            if not bool(converged.all()):
                outputs = {name: masked(value, converged) for name, value in outputs.items()}
            return Solution(outputs, converged, report.iterations.reshape(call.batch))

    def jvp(
        self,
        inputs: Mapping[str, Tensor],
        tangents: Mapping[str, Tensor],
        param_overrides: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensors, Tensors]:
        """Evaluate the outputs and their derivatives along a direction of the inputs.

        Args:
            inputs: as for `forward`.
            tangents: direction by input name, `(*batch, *sub_batch, *base)`; zero for inputs that are absent.
            param_overrides: as for `forward`.

        Returns:
            Outputs, and the derivative along the direction of each output that is in a compiled pair.

        Raises:
            DerivativeNotCompiledError: no derivative was compiled, or one that the direction needs was not.
            ConvergenceError: as for `forward`.
            InputError: as for `forward`.
        """
        with torch.no_grad():
            return derivatives.jvp(self._caller, inputs, tangents, param_overrides)

    def jacobian(
        self, inputs: Mapping[str, Tensor], param_overrides: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensors, Blocks]:
        """Evaluate the outputs and the compiled derivative blocks.

        Args:
            inputs: as for `forward`.
            param_overrides: as for `forward`.

        Returns:
            Outputs, and `J[out][in]` for each compiled pair, `(*batch, *out_base, *in_base)`. A block of a model of one
            forward segment that does not depend on the batch is `(*out_base, *in_base)`; one between sub-batched
            variables is per site, `(*batch, *sub_batch, *out_base, *in_base)`.

        Raises:
            DerivativeNotCompiledError: no derivative was compiled.
            ConvergenceError: as for `forward`.
            InputError: as for `forward`.
        """
        with torch.no_grad():
            return derivatives.jacobian(self._caller, inputs, param_overrides)

    def param_jacobian(
        self, inputs: Mapping[str, Tensor], param_overrides: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensors, Blocks]:
        """Evaluate the outputs and the compiled derivative blocks by promoted parameters.

        Args:
            inputs: as for `forward`.
            param_overrides: as for `forward`.

        Returns:
            Outputs, and `P[out][parameter]` for each compiled pair, `(*batch, *out_base, *parameter_base)`.

        Raises:
            DerivativeNotCompiledError: no derivative by a parameter was compiled.
            ConvergenceError: as for `forward`.
            InputError: as for `forward`.
        """
        with torch.no_grad():
            outputs, blocks, _ = derivatives.param_jacobian(self._caller, inputs, param_overrides)
        return outputs, blocks

    def param_vjp(
        self,
        inputs: Mapping[str, Tensor],
        cotangents: Mapping[str, Tensor],
        param_overrides: Mapping[str, Tensor] | None = None,
    ) -> Tensors:
        """Contract cotangents of the outputs with the derivatives by promoted parameters.

        Args:
            inputs: as for `forward`.
            cotangents: by output name, each broadcasting to `(*batch, *out_base)`.
            param_overrides: as for `forward`.

        Returns:
            Gradient by parameter name, of the shape of the value in force: summed over the batch where the value is
            common to it.

        Raises:
            DerivativeNotCompiledError: no derivative by a parameter was compiled.
            UnknownNameError: a cotangent is absent or not that of an output.
            ConvergenceError: as for `forward`.
            InputError: as for `forward`.
        """
        with torch.no_grad():
            return derivatives.param_vjp(self._caller, inputs, cotangents, param_overrides)


def _mode(mode: str | None) -> str:
    found = mode or os.environ.get(MODE) or "rowwise"
    if found not in MODES:
        source = "mode" if mode else f"the environment variable {MODE}"
        raise InputError(f"{source} is {found!r}, expected one of {', '.join(MODES)}.")
    return found
