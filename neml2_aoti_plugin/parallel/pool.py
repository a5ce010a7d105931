"""`Pool`: a compiled model on all cores of a machine, with the calls of `Model`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ..artifact.schema import Shape
from ..errors import AOTIError
from ..model import Model, Solution, autograd, derivatives
from ..model.call import Tensors
from ..model.derivatives import Blocks
from . import chunks
from .count import require_workers
from .exchange import Arrays
from .flat import Arguments, arguments, blocks_of, named, rows_of
from .recipes import loaded_model, model_ref, require_spreadable
from .spread import SpreadCall
from .workers import Workers


class Pool:
    """A compiled model whose batches are spread over worker processes.

    Its calls take and give what those of `Model` do, for the same rows in the same order, to 1e-12. They raise what
    `Model` raises: one `ConvergenceError` for the whole batch. Small batches, models that solve nothing, and calls that
    autograd follows are evaluated in the caller's process. The processes are started when they are first needed, and
    stay until `close`. Each loads the model once, refuses an artifact that is not the same, and runs on one thread.

    Attributes:
        model: the model in the caller's process; parameters and solver settings that are set there hold for all.
        workers: number of processes.
        processes: these.

    Args:
        model: a model, or the path of its artifact.
        workers: number of processes; one per core that this process may use, if not given.
        chunk: rows that a process gets at a time, and up to which a batch is evaluated in the caller's process; what
            suits the model if not given. With it, models that solve nothing are spread as well.
        options: further arguments of `Model`, where a path is given.

    Raises:
        InputError: the number of workers or of rows is none, or the model is one that cannot be spread.
        AOTIError: joblib is not installed.
        ArtifactError: as for `Model`.
    """

    def __init__(
        self,
        model: Model | str | os.PathLike[str],
        workers: int | None = None,
        *,
        chunk: int | None = None,
        **options: Any,
    ) -> None:
        count = require_workers(workers)
        self.model = loaded_model(model, options)
        self.workers = count
        self._sizes = chunks.sizes(self.model, chunk)
        self.processes = Workers(count)
        self._owns = True

    @classmethod
    def over(cls, model: Model, workers: Workers, chunk: int | None = None) -> Pool:
        """A pool that shares processes with others; `close` leaves them."""
        pool = cls.__new__(cls)
        pool.model, pool.workers = require_spreadable(model), workers.count
        pool._sizes, pool.processes, pool._owns = chunks.sizes(model, chunk), workers, False
        return pool

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = ", closed" if self.processes.closed else ""
        return f"Pool({self.model!r}, workers={self.workers}{state})"

    def close(self) -> None:
        """End the processes and remove what was shared with them; a second call does nothing."""
        if self._owns:
            self.processes.close()

    # -- calls ------------------------------------------------------------------------------------------------------

    def forward(self, inputs: Mapping[str, Tensor], param_overrides: Mapping[str, Tensor] | None = None) -> Tensors:
        """Evaluate the outputs; see `Model.forward`."""
        return self.forward_with_batch(inputs, param_overrides)[0]

    def forward_with_batch(
        self, inputs: Mapping[str, Tensor], param_overrides: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensors, Shape]:
        """As `forward`; gives the common batch shape of the inputs as well."""
        if self._is_small(inputs, param_overrides) or self._is_followed(inputs, param_overrides):
            return self.model.forward_with_batch(inputs, param_overrides)
        given = self._admit(inputs, param_overrides)
        return named(self._run("forward", given), "output"), given.call.batch

    def solve(
        self,
        inputs: Mapping[str, Tensor],
        param_overrides: Mapping[str, Tensor] | None = None,
        *,
        jacobian: bool = False,
        pairs: Sequence[tuple[str, str]] | None = None,
        expand: bool = True,
    ) -> Solution:
        """Evaluate the rows that converge; see `Model.solve`."""
        if self._is_small(inputs, param_overrides):
            return self.model.solve(inputs, param_overrides, jacobian=jacobian, pairs=pairs, expand=expand)
        if jacobian or pairs is not None:
            derivatives.input_pairs(self.model._caller, pairs)
        given = self._admit(inputs, param_overrides)
        found = self._run("solve", given, jacobian=jacobian, pairs=pairs, expand=expand)
        rows = named(found, "row")
        return Solution(
            named(found, "output"), rows["converged"], rows["iterations"], rows["outcome"], blocks_of(found)
        )

    def jacobian(
        self,
        inputs: Mapping[str, Tensor],
        param_overrides: Mapping[str, Tensor] | None = None,
        *,
        pairs: Sequence[tuple[str, str]] | None = None,
        expand: bool = False,
    ) -> tuple[Tensors, Blocks]:
        """Evaluate the outputs and the compiled derivative blocks; see `Model.jacobian`."""
        if self._is_small(inputs, param_overrides):
            return self.model.jacobian(inputs, param_overrides, pairs=pairs, expand=expand)
        derivatives.input_pairs(self.model._caller, pairs)
        found = self._run("jacobian", self._admit(inputs, param_overrides), pairs=pairs, expand=expand)
        return named(found, "output"), blocks_of(found)

    def linearise(
        self,
        inputs: Mapping[str, Tensor],
        pairs: Sequence[tuple[str, str]],
        param_overrides: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensors, list[Tensor], Shape]:
        """Evaluate the outputs and derivatives as matrices; see `Model.linearise`."""
        if self._is_small(inputs, param_overrides) or self._is_followed(inputs, param_overrides):
            return self.model.linearise(inputs, pairs, param_overrides)
        derivatives.input_pairs(self.model._caller, pairs)
        given = self._admit(inputs, param_overrides)
        found = self._run("linearise", given, pairs=list(pairs))
        matrices = named(found, "matrix")
        return named(found, "output"), [matrices[str(place)] for place in range(len(pairs))], given.call.batch

    def jvp(
        self,
        inputs: Mapping[str, Tensor],
        tangents: Mapping[str, Tensor],
        param_overrides: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensors, Tensors]:
        """Evaluate the outputs and their derivatives along a direction; see `Model.jvp`."""
        if self._is_small(inputs, param_overrides):
            return self.model.jvp(inputs, tangents, param_overrides)
        caller = self.model._caller
        derivatives.require_directions(caller, tangents)
        with torch.no_grad():
            call = caller.admit(inputs, param_overrides)
            flat = derivatives.flat_tangents(caller, tangents, call)
            found = self._run("jvp", arguments(caller, call, tangents=flat))
        return named(found, "output"), named(found, "along")

    def param_jacobian(
        self,
        inputs: Mapping[str, Tensor],
        param_overrides: Mapping[str, Tensor] | None = None,
        *,
        params: Sequence[str] | None = None,
    ) -> tuple[Tensors, Blocks]:
        """Evaluate the outputs and the derivative blocks by promoted parameters; see `Model.param_jacobian`."""
        if self._is_small(inputs, param_overrides):
            return self.model.param_jacobian(inputs, param_overrides, params=params)
        derivatives.parameter_pairs(self.model._caller, params)
        found = self._run("param_jacobian", self._admit(inputs, param_overrides), params=params)
        return named(found, "output"), blocks_of(found)

    def param_vjp(
        self,
        inputs: Mapping[str, Tensor],
        cotangents: Mapping[str, Tensor],
        param_overrides: Mapping[str, Tensor] | None = None,
        *,
        params: Sequence[str] | None = None,
    ) -> Tensors:
        """Contract cotangents with the derivatives by promoted parameters; see `Model.param_vjp`."""
        if self._is_small(inputs, param_overrides):
            return self.model.param_vjp(inputs, cotangents, param_overrides, params=params)
        caller = self.model._caller
        derivatives.require_cotangents(caller, cotangents, derivatives.parameter_pairs(caller, params))
        with torch.no_grad():
            call = caller.admit(inputs, param_overrides)
            flat = {}
            for name, value in cotangents.items():
                shape = caller.boundary.output_by_name[name].variable.natural_shape
                whole = derivatives.expanded_cotangent(caller, name, value, call.batch + shape)
                flat[name] = whole.reshape((call.rows, *shape))
            found = self._run("param_vjp", arguments(caller, call, cotangents=flat), params=params)
        gradients = named(found, "gradient")
        return {name: gradients[name].sum_to_size(call.in_force[name].shape) for name in sorted(gradients)}

    # -- what they have in common -----------------------------------------------------------------------------------

    def _is_small(self, inputs: object, overrides: object) -> bool:
        """Whether a batch is to be evaluated in this process."""
        if self.processes.closed:
            raise AOTIError("this pool is closed. Make a new one.")
        worth_it = self._sizes.worth_it
        return worth_it is None or rows_of(self.model, inputs, overrides) < worth_it

    def _is_followed(self, inputs: Mapping[str, Tensor], overrides: Mapping[str, Tensor] | None) -> bool:
        return autograd.is_followed(self.model._caller, inputs, overrides)

    def _admit(self, inputs: Mapping[str, Tensor], overrides: Mapping[str, Tensor] | None) -> Arguments:
        with torch.no_grad():
            return arguments(self.model._caller, self.model._caller.admit(inputs, overrides))

    def _run(self, operation: str, given: Arguments, **options: Any) -> Arrays:
        """Have an operation done on all rows; its results by what they are, with the caller's batch shape."""
        ref = model_ref(self.model, self.processes.folder)
        parts = chunks.cut(given.call.rows, self.workers, self._sizes)
        return SpreadCall(self.model, ref, operation, given, options, parts).run(self.processes)
