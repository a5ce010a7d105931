"""A loaded model as functions of plain tensors: admit what a caller gives, evaluate, give results in its terms."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from .._artifact.locate import Place
from .._artifact.package import Package
from .._artifact.schema import ExplicitInfo, Metadata, Shape
from .._checks import require_names
from .._program.program import Evaluation, Program, Report
from .._program.values import PER_SITE, Columns, Seed
from .._solve.outcome import not_finite_rows
from ..errors import InputError
from ..settings import NewtonSettings
from ._admission import Boundary
from ._derivatives import By, Derivatives, Pair
from ._guard import require_unrecorded
from ._outcomes import Blocks, Given, Solution, Tensors, convergence_error, solution
from ._parameters import PromotedParameters
from ._plan import plans_of

DIRECTION: Seed = ("direction", "")

# Nothing is recorded during a call; torch need not even look. Operators in Python take half the time then.
BelowAutograd: Callable[[], AbstractContextManager[None]] = getattr(torch._C, "_AutoDispatchBelowAutograd", nullcontext)


@dataclass(frozen=True)
class Admitted:
    """Checked arguments of a call."""

    # Inputs, and initial guesses where there are any, by authored name, `(rows, *sub_batch, *base)`.
    state: Tensors
    # By authored name, `base_shape` or `(rows, *base_shape)`.
    parameters: Tensors
    # Parameters by boundary name as they were given, `(*batch, *base)`.
    in_force: Tensors
    # The caller's.
    batch: Shape

    @property
    def rows(self) -> int:
        """Size of the flat batch axis."""
        return prod(self.batch)


@dataclass(frozen=True)
class Evaluated:
    """Outputs and derivatives in the caller's batch shape, and how the solves fared."""

    call: Admitted
    # By name, `(*batch, *sub_batch, *base)`.
    outputs: Tensors
    # By pair, as blocks or as matrices.
    derivatives: dict[Pair, Tensor]
    # Pairs whose blocks have no batch axes, since they do not depend on the row.
    shared: set[Pair]
    report: Report | None

    @property
    def blocks(self) -> Blocks:
        """The derivatives by output and by name of the other."""
        found: Blocks = {}
        for (out, (_, name)), block in self.derivatives.items():
            found.setdefault(out, {})[name] = block
        return found

    @property
    def solution(self) -> Solution:
        """The rows that converged, and how each fared."""
        shared = {(out, name) for out, (_, name) in self.shared}
        return solution(self.outputs, self.blocks, shared, self.report, self.call.batch)


class Caller:
    """A loaded leaf with the calls that `Model` and `AOTIModel` make of it; what they return is detached."""

    def __init__(
        self, metadata: Metadata, place: Place, packages: Mapping[str, Package], owner: nn.Module, *, lockstep: bool
    ) -> None:
        self.metadata = metadata
        self.program = Program(metadata, packages, place.device, lockstep)
        self.boundary = Boundary(metadata, place, self.program.dtype)
        self.promoted = PromotedParameters(metadata, self.boundary, owner)
        self.derivatives = Derivatives(metadata, self.boundary, self.promoted)
        self.plans = plans_of(self.program, self.boundary)
        # In place of the artifact's own.
        self.settings: NewtonSettings | None = None
        self._wanted = [v.name for v in metadata.outputs]
        # Whether the model is one explicit segment, and its pairs by authored names that do not depend on the row.
        spec = metadata.segments[0]
        self._alone = len(metadata.segments) == 1 and isinstance(spec, ExplicitInfo)
        self._constant: frozenset[tuple[str, str]] = frozenset()
        if self._alone and isinstance(spec, ExplicitInfo) and spec.jacobian is not None:
            self._constant = frozenset((pair.out, pair.wrt) for pair in spec.jacobian.pairs if pair.constant)

    # -- one evaluation ---------------------------------------------------------------------------------------------

    def admit(self, inputs: Mapping[str, Tensor], overrides: Mapping[str, Tensor] | None) -> Admitted:
        """Check inputs and overrides."""
        if not self.promoted.specs and not overrides:
            state, batch = self.boundary.admit(inputs)
            return Admitted(state, {}, {}, batch)
        require_unrecorded(self.boundary.where)
        in_force = self.promoted.snapshot(overrides)
        specs = self.promoted.specs
        batches = {name: tuple(t.shape[: t.ndim - len(specs[name].base_shape)]) for name, t in in_force.items()}
        state, batch = self.boundary.admit(inputs, {name: b for name, b in batches.items() if b})
        rows, parameters = prod(batch), {}
        for name, value in in_force.items():
            spec = specs[name]
            if batches[name]:
                value = value.expand(batch + spec.base_shape).reshape((rows, *spec.base_shape))
            parameters[spec.name] = value.to(self.boundary.compute_dtype) if value.is_floating_point() else value
        return Admitted(state, parameters, in_force, batch)

    def evaluate(
        self,
        inputs: Mapping[str, Tensor],
        overrides: Mapping[str, Tensor] | None = None,
        pairs: Sequence[Pair] = (),
        *,
        matrices: bool = False,
        expand: bool = True,
        or_fail: bool = True,
    ) -> Evaluated:
        """Evaluate the outputs and the derivatives of compiled pairs; rows that fail raise, unless told otherwise.

        Blocks are `(*batch, *out_shape, *by_shape)`, zero where the output does not depend. Those by inputs of a model
        of one explicit segment are as its graph gives them: per site, `(*batch, *sub_batch, *out_base, *in_base)`, and,
        unless `expand`, without batch axes where they do not depend on the row. Matrices are `(*batch, entries,
        entries)`.
        """
        boundary, known = self.boundary, self.derivatives.known
        with torch.no_grad():
            call = self.admit(inputs, overrides)
            per_site = self._alone and not matrices
            inside: dict[By, Seed] = {}
            for by in dict.fromkeys(by for _, by in pairs):
                inside[by] = (PER_SITE if per_site and by[0] == "input" else by[0], known[by][0])
            seeds: dict[str, Columns] = {
                name: {(kind, name): None} for kind, name in inside.values() if kind != "parameter"
            }
            parameters = [name for kind, name in inside.values() if kind == "parameter"]
            found = self._run(call, seeds if pairs else None, parameters)
            derivatives: dict[Pair, Tensor] = {}
            shared: set[Pair] = set()
            for out, by in pairs:
                variable, seed = boundary.outputs[out], inside[by]
                value, column = found.values[variable.name], found.tangents[variable.name].get(seed)
                if seed[0] == PER_SITE:
                    base = variable.base_shape + boundary.inputs[by[1]].base_shape
                    block = value.new_zeros((1, *base)) if column is None else column
                    if not expand and block.shape[0] == 1 and (variable.name, seed[1]) in self._constant:
                        derivatives[out, by] = boundary.to_caller(block[0]).contiguous()
                        shared |= {(out, by)} if call.batch else set()
                        continue
                else:
                    entries = tuple(value.shape[1:]), known[by][1]
                    shape = (prod(entries[0]), prod(entries[1])) if matrices else entries[0] + entries[1]
                    # `(rows or 1, entries, entries)`
                    block = value.new_zeros((1, *shape)) if column is None else column.reshape((-1, *shape))
                derivatives[out, by] = boundary.unflatten(block, call.batch)
            if or_fail:
                self._require_convergence(found.report, call, derivatives.values())
            return Evaluated(call, self._outputs(found, call), derivatives, shared, found.report)

    def _run(self, call: Admitted, tangents: Mapping[str, Columns] | None = None, by: Iterable[str] = ()) -> Evaluation:
        """Evaluate the outputs, and derivatives by the seeds of `tangents` and by parameters `by` (authored names)."""
        with BelowAutograd():
            return self.program.evaluate(
                call.state, call.parameters, call.rows, self._wanted, self.settings, tangents, by
            )

    def _outputs(self, found: Evaluation, call: Admitted) -> Tensors:
        """Outputs by boundary name in the caller's batch shape and dtype."""
        to_caller = self.boundary.unflatten
        return {name: to_caller(found.values[v.name], call.batch) for name, v in self.boundary.outputs.items()}

    def _require_convergence(self, report: Report | None, call: Admitted, derivatives: Iterable[Tensor]) -> None:
        """Raise `ConvergenceError` if a row has not converged, or has a derivative `(*batch, ...)` that is not finite.

        A model without implicit segments never raises.
        """
        if report is None:
            return
        lost = not_finite_rows(derivatives, call.batch)
        if lost is None and report.all_converged:
            return
        inputs = {self.boundary.input_names[name]: value for name, value in call.state.items()}
        parameters = {}
        for name, spec in self.promoted.specs.items():
            value = call.parameters[spec.name]
            parameters[name] = value.unsqueeze(0) if value.ndim == len(spec.base_shape) else value
        given, aliases = Given(inputs, parameters), self.metadata.aliases
        raise convergence_error(report, lost, call.batch, self.program, self.settings, aliases, given)

    # -- the calls; see those of `Model` ----------------------------------------------------------------------------

    def jacobian(
        self,
        inputs: Mapping[str, Tensor],
        overrides: Mapping[str, Tensor] | None = None,
        pairs: Sequence[tuple[str, str]] | None = None,
        *,
        expand: bool = False,
    ) -> tuple[Tensors, Blocks]:
        """Outputs and blocks."""
        if self.plans is not None and not overrides and pairs is None and not expand:
            planned = self.plans.jacobian(inputs)
            if planned is not None:
                return planned
        found = self.evaluate(inputs, overrides, self.derivatives.chosen(pairs), expand=expand)
        return found.outputs, found.blocks

    def param_vjp(
        self,
        inputs: Mapping[str, Tensor],
        cotangents: Mapping[str, Tensor],
        overrides: Mapping[str, Tensor] | None = None,
        params: Sequence[str] | None = None,
    ) -> Tensors:
        """Gradients by parameter."""
        boundary = self.boundary
        pairs = self.derivatives.by_parameters(params)
        needed = dict.fromkeys(out for out, _ in pairs)
        require_names(cotangents, boundary.outputs, f"cotangents of {boundary.where}", "outputs", needed=needed)
        found = self.evaluate(inputs, overrides, pairs)
        gradients: Tensors = {}
        for (out, (_, name)), block in found.derivatives.items():
            cotangent = _cotangent(boundary, out, cotangents[out], tuple(found.outputs[out].shape))
            weighted = block * cotangent.reshape(cotangent.shape + (1,) * (block.ndim - cotangent.ndim))
            axes = tuple(range(cotangent.ndim - len(boundary.outputs[out].base_shape), cotangent.ndim))
            term = weighted.sum(axes) if axes else weighted
            gradients[name] = gradients[name] + term if name in gradients else term
        return {name: x.sum_to_size(found.call.in_force[name].shape) for name, x in sorted(gradients.items())}

    def jvp(
        self,
        inputs: Mapping[str, Tensor],
        tangents: Mapping[str, Tensor],
        overrides: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensors, Tensors]:
        """Outputs, and their derivatives along a direction."""
        boundary, derivatives = self.boundary, self.derivatives
        outs = dict.fromkeys(out for out, _ in derivatives.require("input"))
        what = f"tangents of {boundary.where}"
        require_names(tangents, boundary.inputs, what, "inputs", hints=derivatives.of_parameters)
        for name in tangents:
            for out in outs:
                # A direction along an input must find every pair that it needs; a missing one must not count as zero.
                if (out, ("input", name)) not in derivatives.compiled:
                    raise derivatives.missing(out, ("input", name))
        with torch.no_grad():
            call = self.admit(inputs, overrides)
            seeds: dict[str, Columns] = {}
            for name, tangent in tangents.items():
                variable = boundary.inputs[name]
                checked, own = boundary.batch_of(tangent, name, variable, "tangent")
                if not _broadcasts(own, call.batch):
                    raise InputError(
                        f"tangent {name!r} has batch {list(own)}, which does not broadcast to {list(call.batch)}."
                    )
                flat = boundary.flatten(checked, own, call.batch, variable)
                seeds[variable.name] = {DIRECTION: flat.reshape((call.rows, variable.size, 1))}
            found, along = self._run(call, seeds), {}
            for out in outs:
                authored = boundary.outputs[out].name
                value, column = found.values[authored], found.tangents[authored].get(DIRECTION)
                flat = torch.zeros_like(value) if column is None else column.expand(call.rows, -1, -1)
                along[out] = boundary.unflatten(flat.reshape(value.shape), call.batch)
            self._require_convergence(found.report, call, along.values())
            return self._outputs(found, call), along


def _cotangent(boundary: Boundary, name: str, cotangent: Tensor, shape: Shape) -> Tensor:
    """Check the cotangent of an output, and give it in the output's shape."""
    checked = boundary.check(cotangent, name, "cotangent")
    try:
        return checked.detach().expand(shape)
    except RuntimeError:
        raise InputError(
            f"cotangent {name!r} has shape {tuple(cotangent.shape)}, which does not broadcast to the output's {shape}."
        ) from None


def _broadcasts(own: Shape, batch: Shape) -> bool:
    return len(own) <= len(batch) and all(a in (1, b) for a, b in zip(own[::-1], batch[::-1], strict=False))
