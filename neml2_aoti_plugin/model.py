"""`Model`: a compiled model over raw tensors."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import errors
from .artifact.layout import locate
from .artifact.parse import read_metadata
from .artifact.passport import check
from .artifact.schema import Parameter, Shape, Variable
from .errors import DerivativeNotCompiledError, InputError, InputTypeError, UnknownNameError
from .runtime.boundary import Boundary
from .runtime.failure import convergence_error
from .runtime.program import Evaluation, Program
from .runtime.tangents import Columns, Seed
from .settings import NewtonSettings

Tensors = dict[str, Tensor]
Blocks = dict[str, dict[str, Tensor]]

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
        self._program = Program(metadata, place.leaf, place.device, self.mode == "lockstep")
        self._boundary = Boundary(metadata, place.device, place.dtype, self._program.dtype, str(self.artifact))
        self._parameters = {p.name: p for p in metadata.parameters}
        self._boundary_parameter = {p.name: metadata.aliases.parameters.get(p.name, p.name) for p in metadata.parameters}
        self._authored_parameter = {new: old for old, new in self._boundary_parameter.items()}
        self._store = {p.name: _stored(p, place.dtype, place.device) for p in metadata.parameters}
        self._settings: NewtonSettings | None = None
        self._wanted = [v.name for v in metadata.outputs]

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
        into, out = self._metadata.aliases.inputs, self._metadata.aliases.outputs
        return [(out.get(o, o), into.get(i, i)) for o, i in self._metadata.derivatives]

    @property
    def parameter_derivative_pairs(self) -> list[tuple[str, str]]:
        """The (output, parameter) pairs whose derivatives were compiled."""
        out = self._metadata.aliases.outputs
        return [(out.get(o, o), self._boundary_parameter[p]) for o, p in self._metadata.parameter_derivatives]

    def __repr__(self) -> str:
        leaf = f"{self.device}/{str(self.dtype).removeprefix('torch.')}"
        return f"Model({str(self.artifact)!r}, {leaf}: {', '.join(self.input_names)} -> {', '.join(self.output_names)})"

    # -- parameters -------------------------------------------------------------------------------------------------

    @property
    def parameter_base_shapes(self) -> dict[str, list[int]]:
        """Base shape of each promoted parameter."""
        return {name: list(self._parameters[old].base_shape) for name, old in sorted(self._authored_parameter.items())}

    def named_parameters(self) -> Tensors:
        """The promoted parameters by name; changing a tensor in place takes effect on the next call."""
        return {name: self._store[old] for name, old in sorted(self._authored_parameter.items())}

    def set_parameter(self, name: str, value: Tensor | float) -> None:
        """Replace the value of a promoted parameter by a copy.

        Args:
            name: of the parameter.
            value: `(*batch, *base)`, or a number for a scalar parameter.

        Raises:
            UnknownNameError: the model has no such parameter.
            InputError: the value has the wrong shape, dtype or device.
        """
        authored = self._parameter_name(name)
        self._store[authored] = self._admit_parameter(name, value).clone()

    def _parameter_name(self, name: str) -> str:
        if name in self._authored_parameter:
            return self._authored_parameter[name]
        there = ", ".join(sorted(self._authored_parameter)) or "none"
        raise UnknownNameError(
            f"{name!r} is not a promoted parameter of {self.artifact}; there are: {there}. Only parameters promoted at compile "
            f"time can be set: neml2-compile INPUT --model {self.artifact.name} -p NAME."
        )

    def _admit_parameter(self, name: str, value: object) -> Tensor:
        parameter = self._parameters[self._authored_parameter[name]]
        own = self._store[parameter.name].dtype
        if isinstance(value, (bool, int, float)):
            value = torch.full(parameter.base_shape, value, dtype=own, device=self.device)
        if isinstance(value, Tensor) and not own.is_floating_point and value.dtype == own:
            tensor = value.detach()
        else:
            self._boundary.check_type(value, name, "parameter")
            assert isinstance(value, Tensor)
            tensor = value.detach()
        rank = tensor.ndim - len(parameter.base_shape)
        if rank < 0 or tuple(tensor.shape[rank:]) != parameter.base_shape:
            raise InputError(
                f"parameter {name!r} has shape {tuple(tensor.shape)}, expected (*batch, "
                f"{', '.join(map(str, parameter.base_shape))}): its base shape is {parameter.base_shape}."
            )
        return tensor

    def _snapshot(self, overrides: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """The parameters in force for one call, by authored name."""
        found = {name: tensor.detach().clone() for name, tensor in self._store.items()}
        for name, tensor in found.items():
            self._admit_parameter(self._boundary_parameter[name], tensor)
        for name, value in (overrides or {}).items():
            found[self._parameter_name(name)] = self._admit_parameter(name, value)
        return found

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
        self._settings = NewtonSettings(
            *_newton_arguments(atol, rtol, miters, ls_type, ls_max_iters, ls_cutback, ls_c, substep_del_tol)
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
        found, batch = self._evaluate(inputs, param_overrides)
        self._raise_failures(found, batch)
        return self._outputs(found, batch), batch

    def solve(self, inputs: Mapping[str, Tensor], param_overrides: Mapping[str, Tensor] | None = None) -> Solution:
        """Evaluate the outputs of the rows that converge, without raising for the others.

        Args:
            inputs: as for `forward`.
            param_overrides: as for `forward`.

        Returns:
            Outputs, which rows converged, and the Newton updates of each.
        """
        found, batch = self._evaluate(inputs, param_overrides)
        outputs = self._outputs(found, batch)
        report = found.report
        if report is None:
            converged = torch.ones(batch, dtype=torch.bool, device=self.device)
            return Solution(outputs, converged, torch.zeros(batch, dtype=torch.int64, device=self.device))
        converged = report.converged.reshape(batch)
        if not bool(converged.all()):
            lost = ~converged
            for name, value in outputs.items():
                mask = lost.reshape(lost.shape + (1,) * (value.ndim - lost.ndim))
                outputs[name] = value.masked_fill(mask, torch.nan)
        return Solution(outputs, converged, report.iterations.reshape(batch))

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
        pairs = self._pairs()
        outs = list(dict.fromkeys(o for o, _ in pairs))
        for name in tangents:
            if name not in self._boundary.by_name:
                raise UnknownNameError(f"tangent {name!r} is not an input of {self.artifact}: {', '.join(self.input_names)}.")
            for out in outs:
                if (out, self._boundary.by_name[name].variable.name) not in pairs:
                    raise self._not_compiled(self._output_name(out), name)
        with torch.no_grad():
            state, batch, parameters = self._admit(inputs, param_overrides)
            rows = prod(batch)
            seeds: dict[str, Columns] = {}
            for name, tangent in tangents.items():
                variable = self._boundary.by_name[name].variable
                checked, own = self._boundary.batch_of(tangent, name, variable, "tangent")
                if torch.broadcast_shapes(own, batch) != torch.Size(batch):
                    raise InputError(f"tangent {name!r} has batch {list(own)}, which does not broadcast to {list(batch)}.")
                flat = self._boundary.flatten(checked, own, batch, rows, variable)
                seeds[variable.name] = {("direction", ""): flat.reshape((rows, variable.size, 1))}
            found = self._program.evaluate(state, parameters, rows, self._wanted, self._settings, seeds)
            self._raise_failures(found, batch)
            along = {}
            for out in outs:
                value = found.values[out]
                column = found.tangents[out].get(("direction", ""))
                flat = torch.zeros_like(value) if column is None else column.expand(rows, -1, -1).reshape(value.shape)
                along[self._output_name(out)] = self._unflatten(flat, batch)
            return self._outputs(found, batch), along

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
        pairs = self._pairs()
        with torch.no_grad():
            state, batch, parameters = self._admit(inputs, param_overrides)
            direct = self._program.single_forward_blocks(state, parameters, prod(batch), pairs)
            if direct is not None:
                values, blocks = direct
                shaped = self._site_blocks(blocks, pairs, batch)
                return self._outputs(Evaluation(values, {}, None), batch), shaped
            wrt = dict.fromkeys(i for _, i in pairs)
            seeds: dict[str, Columns] = {name: {("input", name): None} for name in wrt}
            found = self._program.evaluate(state, parameters, prod(batch), self._wanted, self._settings, seeds)
            self._raise_failures(found, batch)
            return self._outputs(found, batch), self._blocks(found, batch, pairs, "input", self._input_variables())

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
        pairs = self._parameter_pairs()
        with torch.no_grad():
            state, batch, parameters = self._admit(inputs, param_overrides)
            by = dict.fromkeys(p for _, p in pairs)
            found = self._program.evaluate(state, parameters, prod(batch), self._wanted, self._settings, {}, by)
            self._raise_failures(found, batch)
            shapes = {p.name: Variable(p.name, p.base_shape) for p in self._metadata.parameters}
            return self._outputs(found, batch), self._blocks(found, batch, pairs, "parameter", shapes)

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
        pairs = self._parameter_pairs()
        self._check_cotangent_names(cotangents, pairs)
        outputs, blocks = self.param_jacobian(inputs, param_overrides)
        gradients: Tensors = {}
        for out, parameter in pairs:
            name, public = self._boundary_parameter[parameter], self._output_name(out)
            variable = self._boundary.output_by_name[public].variable
            cotangent = self._cotangent(public, cotangents[public], outputs[public], variable)
            block = blocks[public][name]
            base = len(self._parameters[parameter].base_shape)
            lead = outputs[public].ndim
            weighted = block * cotangent.reshape(cotangent.shape + (1,) * base)
            batch_rank = lead - len(variable.base_shape)
            axes = tuple(range(batch_rank, lead))
            term = weighted.sum(axes) if axes else weighted
            gradients[name] = gradients[name] + term if name in gradients else term
        in_force = {self._boundary_parameter[n]: t for n, t in self._snapshot(param_overrides).items()}
        return {name: g.sum_to_size(in_force[name].shape) for name, g in sorted(gradients.items())}

    # -- the way of a call ------------------------------------------------------------------------------------------

    def _evaluate(
        self, inputs: Mapping[str, Tensor], overrides: Mapping[str, Tensor] | None
    ) -> tuple[Evaluation, Shape]:
        with torch.no_grad():
            state, batch, parameters = self._admit(inputs, overrides)
            return self._program.evaluate(state, parameters, prod(batch), self._wanted, self._settings), batch

    def _admit(
        self, inputs: Mapping[str, Tensor], overrides: Mapping[str, Tensor] | None
    ) -> tuple[Tensors, Shape, Tensors]:
        """Inputs and parameters by authored name, with one flat batch axis where they have a batch."""
        if not self._store and not overrides:
            state, batch = self._boundary.admit(inputs)
            return state, batch, {}
        parameters = self._snapshot(overrides)
        batches = {
            name: tuple(t.shape[: t.ndim - len(self._parameters[name].base_shape)]) for name, t in parameters.items()
        }
        state, batch = self._boundary.admit(inputs, [b for b in batches.values() if b])
        rows = prod(batch)
        compute = self._boundary.compute_dtype
        for name, value in parameters.items():
            if batches[name]:
                base = self._parameters[name].base_shape
                value = value.expand(batch + base).reshape((rows, *base))
            parameters[name] = value.to(compute) if value.is_floating_point() else value
        return state, batch, parameters

    def _outputs(self, found: Evaluation, batch: Shape) -> Tensors:
        return {port.name: self._unflatten(found.values[port.variable.name], batch) for port in self._boundary.outputs}

    def _unflatten(self, value: Tensor, batch: Shape) -> Tensor:
        """Bring a result to the caller's batch shape and dtype."""
        if value.dtype != self.dtype and value.is_floating_point():
            value = value.to(self.dtype)
        if len(batch) == 1 and value.shape[0] == batch[0]:
            return value if value.is_contiguous() else value.contiguous()
        rows = prod(batch)
        if value.shape[0] != rows:
            value = value.expand((rows, *value.shape[1:]))
        return value.reshape(batch + tuple(value.shape[1:])).contiguous()

    def _raise_failures(self, found: Evaluation, batch: Shape) -> None:
        report = found.report
        if report is None or bool(report.converged.all()):
            return
        raise convergence_error(report, batch, self._program, self._settings, self._metadata.aliases)

    # -- derivatives ------------------------------------------------------------------------------------------------

    def _pairs(self) -> dict[tuple[str, str], None]:
        if not self._metadata.derivatives:
            raise DerivativeNotCompiledError(
                f"{self.artifact} was compiled without derivatives by inputs. Compile it with them: "
                f"neml2-compile INPUT --model {self.artifact.name} -d OUT:IN (or -d : for all)."
            )
        return dict.fromkeys(self._metadata.derivatives)

    def _parameter_pairs(self) -> dict[tuple[str, str], None]:
        if not self._metadata.parameter_derivatives:
            there = ", ".join(sorted(self._authored_parameter)) or "none"
            raise DerivativeNotCompiledError(
                f"{self.artifact} was compiled without derivatives by parameters (promoted: {there}). Compile it with them: "
                f"neml2-compile INPUT --model {self.artifact.name} -p NAME -d OUT:NAME."
            )
        return dict.fromkeys(self._metadata.parameter_derivatives)

    def _not_compiled(self, out: str, wrt: str) -> DerivativeNotCompiledError:
        compiled = ", ".join(f"{o}:{i}" for o, i in self.derivative_pairs)
        return DerivativeNotCompiledError(
            f"d({out})/d({wrt}) was not compiled into {self.artifact}; there are: {compiled}. Compile it: "
            f"neml2-compile INPUT --model {self.artifact.name} -d {out}:{wrt}."
        )

    def _output_name(self, authored: str) -> str:
        return self._metadata.aliases.outputs.get(authored, authored)

    def _input_variables(self) -> dict[str, Variable]:
        return {v.name: v for v in self._metadata.inputs}

    def _blocks(
        self,
        found: Evaluation,
        batch: Shape,
        pairs: Mapping[tuple[str, str], None],
        kind: str,
        wrt: Mapping[str, Variable],
    ) -> Blocks:
        """Derivatives by boundary names, `(*batch, *out_shape, *in_shape)`; pairs that do not depend are zero."""
        names = self._boundary_parameter if kind == "parameter" else self._metadata.aliases.inputs
        rows = prod(batch)
        blocks: Blocks = {}
        for out, by in pairs:
            value, variable = found.values[out], wrt[by]
            seed: Seed = (kind, by)
            column = found.tangents[out].get(seed)
            shape = (rows, *value.shape[1:], *variable.natural_shape)
            block = value.new_zeros(shape) if column is None else column.expand(rows, -1, -1).reshape(shape)
            blocks.setdefault(self._output_name(out), {})[names.get(by, by)] = self._unflatten(block, batch)
        return blocks

    def _site_blocks(
        self, blocks: Mapping[tuple[str, str], Tensor], pairs: Mapping[tuple[str, str], None], batch: Shape
    ) -> Blocks:
        """Blocks of a single forward segment: without a batch where they do not depend on it."""
        found: Blocks = {}
        for out, by in pairs:
            block, constant = blocks[out, by], blocks[out, by].shape[0] == 1
            shaped = self._unflatten(block[0], ()) if constant and not batch else None
            if shaped is None:
                shaped = self._to_caller(block[0]) if constant else self._unflatten(block, batch)
            found.setdefault(self._output_name(out), {})[self._metadata.aliases.inputs.get(by, by)] = shaped
        return found

    def _to_caller(self, value: Tensor) -> Tensor:
        return value.to(self.dtype).contiguous()

    def _check_cotangent_names(self, cotangents: Mapping[str, Tensor], pairs: Mapping[tuple[str, str], None]) -> None:
        needed = list(dict.fromkeys(self._output_name(o) for o, _ in pairs))
        absent = [name for name in needed if name not in cotangents]
        unknown = [name for name in cotangents if name not in self._boundary.output_by_name]
        if absent or unknown:
            raise UnknownNameError(
                f"cotangents of {self.artifact}: missing {absent}, unknown {unknown}; outputs with compiled parameter "
                f"derivatives are: {', '.join(needed)}."
            )

    def _cotangent(self, name: str, cotangent: Tensor, output: Tensor, variable: Variable) -> Tensor:
        self._boundary.check_type(cotangent, name, "cotangent")
        try:
            return cotangent.detach().expand(output.shape)
        except RuntimeError:
            raise InputError(
                f"cotangent {name!r} has shape {tuple(cotangent.shape)}, which does not broadcast to the output's "
                f"{tuple(output.shape)}."
            ) from None


def _mode(mode: str | None) -> str:
    found = mode or os.environ.get(MODE) or "rowwise"
    if found not in MODES:
        source = "mode" if mode else f"the environment variable {MODE}"
        raise InputError(f"{source} is {found!r}, expected one of {', '.join(MODES)}.")
    return found


def _stored(parameter: Parameter, dtype: torch.dtype, device: torch.device) -> Tensor:
    own = dtype
    if parameter.dtype is not None:
        named = getattr(torch, parameter.dtype.removeprefix("torch."), None)
        if not isinstance(named, torch.dtype):
            raise errors.ArtifactError(f"parameter {parameter.name!r} has dtype {parameter.dtype!r}, which torch does not have.")
        own = dtype if named.is_floating_point else named
    return torch.tensor(parameter.values, dtype=torch.float64).to(own).reshape(parameter.shape).to(device)


def _newton_arguments(
    atol: float,
    rtol: float,
    miters: int,
    ls_type: str,
    ls_max_iters: int,
    ls_cutback: float,
    ls_c: float,
    substep_del_tol: float,
) -> tuple[Any, ...]:
    """Check Newton settings; give them in the order of the fields of `NewtonSettings`."""
    rules: tuple[tuple[str, Any, Callable[[Any], bool], str], ...] = (
        ("atol", atol, lambda x: x >= 0, "zero or more"),
        ("rtol", rtol, lambda x: x >= 0, "zero or more"),
        ("miters", miters, lambda x: x == int(x) >= 0, "a whole number, zero or more"),
        ("ls_type", ls_type, lambda x: x in ("BACKTRACKING", "STRONG_WOLFE"), "BACKTRACKING or STRONG_WOLFE"),
        ("ls_max_iters", ls_max_iters, lambda x: x == int(x) >= 0, "a whole number, zero or more"),
        ("ls_cutback", ls_cutback, lambda x: x > 1, "more than 1"),
        ("ls_c", ls_c, lambda x: x >= 0, "zero or more"),
        ("substep_del_tol", substep_del_tol, lambda x: x >= 0, "zero or more"),
    )
    for name, value, holds, wanted in rules:
        try:
            fits = bool(holds(value))
        except (TypeError, ValueError) as error:
            raise InputTypeError(f"{name} is {value!r}, expected {wanted}.") from error
        if not fits:
            raise InputError(f"{name} is {value!r}, expected {wanted}.")
    return atol, rtol, int(miters), ls_type, int(ls_max_iters), ls_cutback, ls_c, substep_del_tol
