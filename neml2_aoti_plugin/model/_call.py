"""A loaded model as functions of plain tensors: admit what a caller gives, evaluate, give results in its terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor, nn

from .._artifact.locate import Place
from .._artifact.package import Package
from .._artifact.schema import ExplicitInfo, Metadata, Shape
from .._checks import require_names
from .._program.program import Program, SolveReport
from .._program.values import PER_SITE, Columns, Seed
from .._solve.outcome import Outcome, failed_where, not_finite_rows
from ..errors import InputError
from ..settings import NewtonSettings
from ._admission import Boundary
from ._derivatives import DIRECTION, By, Derivatives, Pair
from ._guard import require_unrecorded
from ._outcomes import Blocks, GivenTensors, Solution, Tensors, convergence_error
from ._parameters import PromotedParameters
from ._plan import plans_of

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
    report: SolveReport | None

    @property
    def blocks(self) -> Blocks:
        """The derivatives by output and by name of the other."""
        found: Blocks = {}
        for (out, (_, name)), block in self.derivatives.items():
            found.setdefault(out, {})[name] = block
        return found

    @property
    def solution(self) -> Solution:
        """The rows that converged, with NaN in the others, and how each fared."""
        batch, device = self.call.batch, next(iter(self.outputs.values())).device
        own = {pair: block for pair, block in self.derivatives.items() if pair not in self.shared}
        lost = not_finite_rows([*self.outputs.values(), *own.values()], batch)
        if not_finite_rows((self.derivatives[pair] for pair in self.shared), ()) is not None:
            lost = torch.ones(batch, dtype=torch.bool, device=device)
        if self.report is None:
            outcome = torch.zeros(batch, dtype=torch.int64, device=device)
            iterations = outcome.clone()
        else:
            statistics, _ = self.report.statistics()
            outcome, iterations = statistics.outcome.reshape(batch), statistics.iterations.reshape(batch)
        outcome = failed_where(outcome, lost)
        converged, kept = outcome == Outcome.CONVERGED, self
        if lost is not None or (self.report is not None and not self.report.all_converged):
            outputs = {name: _masked(x, converged) for name, x in self.outputs.items()}
            masked = {pair: _masked(x, converged) for pair, x in own.items()}
            kept = replace(self, outputs=outputs, derivatives={**self.derivatives, **masked})
        return Solution(kept.outputs, converged, iterations, outcome, kept.blocks)


def _masked(value: Tensor, converged: Tensor) -> Tensor:
    """NaN in the rows that have not converged."""
    return value.masked_fill(~converged.reshape(converged.shape + (1,) * (value.ndim - converged.ndim)), torch.nan)


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
        # Of a model of one explicit segment, which has blocks per site; and those that do not depend on the row.
        spec = metadata.segments[0]
        self._alone = spec if len(metadata.segments) == 1 and isinstance(spec, ExplicitInfo) else None
        pairs = self._alone.jacobian.pairs if self._alone is not None and self._alone.jacobian is not None else ()
        self._constant = {(pair.out, pair.wrt) for pair in pairs if pair.constant}

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
        tangents: Mapping[str, Tensor] | None = None,
        matrices: bool = False,
        expand: bool = True,
        or_fail: bool = True,
    ) -> Evaluated:
        """Evaluate the outputs and the derivatives of compiled pairs; rows that fail raise, unless told otherwise.

        Blocks are `(*batch, *out_shape, *by_shape)`, zero where the output does not depend. Those by inputs of a model
        of one explicit segment are as its graph gives them: per site, `(*batch, *sub_batch, *out_base, *in_base)`, and,
        unless `expand`, without batch axes where they do not depend on the row. Matrices are `(*batch, entries,
        entries)`. Pairs with `DIRECTION` are by the direction of `tangents`.
        """
        boundary, known = self.boundary, self.derivatives.known
        with torch.no_grad():
            call = self.admit(inputs, overrides)
            per_site = self._alone is not None and not matrices
            inside: dict[By, Seed] = {}
            for by in dict.fromkeys(by for _, by in pairs):
                inside[by] = (PER_SITE if per_site and by[0] == "input" else by[0], known[by][0])
            seeds: dict[str, Columns] = {
                name: {(kind, name): None} for kind, name in inside.values() if kind in (PER_SITE, "input")
            }
            for name, tangent in (tangents or {}).items():
                seeds[boundary.inputs[name].name] = {DIRECTION: self._direction(tangent, name, call)}
            parameters = [name for kind, name in inside.values() if kind == "parameter"]
            with BelowAutograd():
                found = self.program.evaluate(
                    call.state,
                    call.parameters,
                    call.rows,
                    self._wanted,
                    self.settings,
                    seeds if pairs else None,
                    parameters,
                )
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
            if or_fail and found.report is not None:
                lost = not_finite_rows(derivatives.values(), call.batch)
                if lost is not None or not found.report.all_converged:
                    raise self._convergence_error(found.report, call, lost)
            outputs = {n: boundary.unflatten(found.values[v.name], call.batch) for n, v in boundary.outputs.items()}
            return Evaluated(call, outputs, derivatives, shared, found.report)

    def _direction(self, tangent: Tensor, name: str, call: Admitted) -> Tensor:
        """The tangent of an input as columns, `(rows, entries, 1)`."""
        variable = self.boundary.inputs[name]
        checked, own = self.boundary.batch_of(tangent, name, variable, "tangent")
        pairs = zip(own[::-1], call.batch[::-1], strict=False)
        if len(own) > len(call.batch) or any(a not in (1, b) for a, b in pairs):
            raise InputError(f"tangent {name!r} has batch {list(own)}, which does not broadcast to {list(call.batch)}.")
        return self.boundary.flatten(checked, own, call.batch, variable).reshape((call.rows, variable.size, 1))

    def _convergence_error(self, report: SolveReport, call: Admitted, lost: Tensor | None) -> RuntimeError:
        """The error for rows that have not converged, or, where `lost`, have a derivative that is not finite."""
        inputs = {self.boundary.input_names[name]: value for name, value in call.state.items()}
        parameters = {}
        for name, spec in self.promoted.specs.items():
            value = call.parameters[spec.name]
            parameters[name] = value.unsqueeze(0) if value.ndim == len(spec.base_shape) else value
        given, aliases = GivenTensors(inputs, parameters), self.metadata.aliases
        return convergence_error(report, lost, call.batch, self.program, self.settings, aliases, given)

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
        derivatives = self.derivatives
        outs = dict.fromkeys(out for out, _ in derivatives.require("input"))
        what = f"tangents of {self.boundary.where}"
        require_names(tangents, self.boundary.inputs, what, "inputs", hints=derivatives.of_parameters)
        for out, by in ((out, ("input", name)) for name in tangents for out in outs):
            # A direction along an input must find every pair that it needs; a missing one must not count as zero.
            if (out, by) not in derivatives.compiled:
                raise derivatives.missing(out, by)
        found = self.evaluate(inputs, overrides, [(out, DIRECTION) for out in outs], tangents=tangents)
        return found.outputs, {out: found.derivatives[out, DIRECTION] for out in outs}


def _cotangent(boundary: Boundary, name: str, cotangent: Tensor, shape: Shape) -> Tensor:
    """Check the cotangent of an output, and give it in the output's shape."""
    checked = boundary.check(cotangent, name, "cotangent")
    try:
        return checked.detach().expand(shape)
    except RuntimeError:
        raise InputError(
            f"cotangent {name!r} has shape {tuple(cotangent.shape)}, which does not broadcast to the output's {shape}."
        ) from None
