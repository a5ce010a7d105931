"""One call of a model: admit the caller's tensors, evaluate, and give results back in the caller's terms."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from .._artifact.schema import ExplicitInfo, Metadata, Shape
from .._program.program import Evaluation, Program
from .._program.values import Columns
from .._solve.outcome import not_finite_rows
from ..settings import NewtonSettings
from ._admission import Boundary
from ._memory import require_unrecorded
from ._outcomes import Given, Tensors, convergence_error
from ._parameters import PromotedParameters

# Nothing is recorded during a call; torch need not even look. Operators in Python take half the time then.
BelowAutograd: Callable[[], AbstractContextManager[None]] = getattr(torch._C, "_AutoDispatchBelowAutograd", nullcontext)


@dataclass(frozen=True)
class Admitted:
    """Checked arguments of a call.

    Args:
        state: inputs, and initial guesses where there are any, by authored name, `(rows, *sub_batch, *base)`.
        parameters: by authored name, `base_shape` or `(rows, *base_shape)`.
        in_force: parameters by boundary name as they were given, `(*batch, *base)`.
        batch: the caller's batch shape.
    """

    state: Tensors
    parameters: Tensors
    in_force: Tensors
    batch: Shape

    @property
    def rows(self) -> int:
        """Size of the flat batch axis."""
        return prod(self.batch)


class Caller:
    """What all calls of a model share."""

    def __init__(self, metadata: Metadata, boundary: Boundary, program: Program, promoted: PromotedParameters) -> None:
        self.metadata = metadata
        self.boundary = boundary
        self.program = program
        self.promoted = promoted
        self.settings: NewtonSettings | None = None
        self._wanted = [v.name for v in metadata.outputs]
        # Whether the model is one explicit segment, and its pairs by authored names that do not depend on the row.
        spec = metadata.segments[0]
        self.alone = len(metadata.segments) == 1 and isinstance(spec, ExplicitInfo)
        self.constant: frozenset[tuple[str, str]] = frozenset()
        if self.alone and isinstance(spec, ExplicitInfo) and spec.jacobian is not None:
            self.constant = frozenset((pair.out, pair.wrt) for pair in spec.jacobian.pairs if pair.constant)

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
        self, call: Admitted, tangents: Mapping[str, Columns] | None = None, by: Iterable[str] = ()
    ) -> Evaluation:
        """Evaluate the outputs, and derivatives by the seeds of `tangents` and by parameters `by` (authored names)."""
        with BelowAutograd():
            return self.program.evaluate(
                call.state, call.parameters, call.rows, self._wanted, self.settings, tangents, by
            )

    def require_convergence(self, found: Evaluation, call: Admitted, derivatives: Iterable[Tensor] = ()) -> None:
        """Raise `ConvergenceError` if a row has not converged, or has a derivative `(*batch, ...)` that is not finite.

        A model without implicit segments never raises.
        """
        report = found.report
        if report is None:
            return
        lost = not_finite_rows(derivatives, call.batch)
        if lost is not None or not report.all_converged:
            given = self._given(call)
            raise convergence_error(report, lost, call.batch, self.program, self.settings, self.metadata.aliases, given)

    def _given(self, call: Admitted) -> Given:
        """What the rows of a call were given."""
        inputs = {self.boundary.input_names[name]: value for name, value in call.state.items()}
        parameters = {}
        for name, spec in self.promoted.specs.items():
            value = call.parameters[spec.name]
            parameters[name] = value.unsqueeze(0) if value.ndim == len(spec.base_shape) else value
        return Given(inputs, parameters)

    def outputs(self, values: Mapping[str, Tensor], batch: Shape) -> Tensors:
        """Outputs by boundary name in the caller's batch shape and dtype."""
        return {name: self.boundary.unflatten(values[v.name], batch) for name, v in self.boundary.outputs.items()}
