"""`Model`: a compiled model over raw tensors."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._artifact.schema import Shape
from . import _autograd as autograd
from ._derivatives import Pair
from ._guard import public
from ._module import CompiledModule
from ._outcomes import Blocks, Solution, Tensors


class Model(CompiledModule):
    """A compiled model: raw tensors in, raw tensors out.

    All calls take `inputs`, a dict from name to tensor `(*batch, *sub_batch, *base)` with batch shapes of any rank that
    broadcast; beside the inputs it may hold initial guesses, where Newton's method starts (no result depends on that
    beyond the tolerance, no derivative at all). They take `param_overrides` too, values of promoted parameters for that
    call. All but `solve` raise `ConvergenceError` if a row does not converge. A torch module: autograd follows
    `forward`, by inputs and promoted parameters that require grad; the promoted parameters are frozen until
    `requires_grad_()`. What the other calls return is detached. Copies and pickles hold where the artifact is and not
    the artifact; they load it anew and refuse another one.

    Not listed here, and working: the rest of a torch module, and what neml2's C++ runtime has (`input_names`,
    `input_base_shapes`, `output_names`, `output_base_shapes`, `parameter_base_shapes`, `set_solver_config`).

    Attributes:
        inputs: type and shapes of each input, by name.
        outputs: type and shapes of each output, by name.
        initial_guesses: type and shapes of the unknowns that may be given as initial guesses, by name.
        mode: `rowwise` or `lockstep`, see the argument.
        artifact: folder of the metadata file.

    Args:
        artifact: the artifact's folder, its metadata file, a folder inside it, or the stub that names it.
        device: device to run on; torch's current default device if not given.
        dtype: `float64` or `float32`; if not given, float64 where compiled, else the only one compiled.
        mode: `rowwise` (each row of a batch iterates on its own) or `lockstep` (all rows iterate until the slowest has
            converged, with the iterates of neml2's C++ runtime); the environment variable `NEML2_AOTI_PLUGIN_MODE` if
            not given, else `rowwise`.
        solver: Newton settings in place of the artifact's own, by the field names of `NewtonSettings`.
        parameters: a file that `save_parameters` wrote, with values of the promoted parameters.
        name: of the model, which a stub with several needs.

    Raises:
        ArtifactNotFoundError: there is no artifact, or none for that device and dtype.
        ArtifactError: the artifact is damaged, of an unknown schema, or made for another machine, or the leaf is of an
            earlier compile of another source.
        InputError: an argument has no such value, or the file of parameters is that of another artifact.
    """

    def __init__(
        self,
        artifact: str | os.PathLike[str],
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        *,
        mode: str | None = None,
        solver: Mapping[str, Any] | None = None,
        parameters: str | os.PathLike[str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(artifact, device, dtype, mode=mode, solver=solver, name=name)
        if parameters is not None:
            self.load_parameters(parameters)

    def __repr__(self) -> str:
        return f"Model({self.extra_repr()})"

    # -- evaluation -------------------------------------------------------------------------------------------------

    @public
    def forward(self, inputs: Mapping[str, Tensor], param_overrides: Mapping[str, Tensor] | None = None) -> Tensors:
        """Evaluate the outputs.

        Args:
            inputs: by name, each `(*batch, *sub_batch, *base)`; perhaps with initial guesses, see the class.
            param_overrides: values of promoted parameters for this call only, `(*batch, *base)`.

        Returns:
            Outputs by name in the order of `outputs`, `(*batch, *sub_batch, *base)`. As elsewhere in torch, NaN
            in gives NaN out: what explicit segments make of it is returned; `solve` counts a row with it as failed.

        Raises:
            ConvergenceError: rows of an implicit segment did not converge.
            InputError: an input or an override does not fit.
        """
        plans = self._caller.plans
        if plans is not None and not param_overrides:
            found = plans.forward(inputs)
            if found is not None:
                return found
        return autograd.evaluate(self._caller, inputs, param_overrides)[0]

    @public
    def forward_with_batch(
        self, inputs: Mapping[str, Tensor], param_overrides: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensors, Shape]:
        """As `forward`; gives the common batch shape of the inputs as well."""
        outputs, _, batch = autograd.evaluate(self._caller, inputs, param_overrides)
        return outputs, batch

    @public
    def linearise(
        self,
        inputs: Mapping[str, Tensor],
        pairs: Sequence[tuple[str, str]],
        param_overrides: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensors, list[Tensor], Shape]:
        """Evaluate the outputs and the derivatives of chosen pairs as matrices; autograd follows the outputs.

        Args:
            inputs: as for `forward`.
            pairs: (output, input) pairs.
            param_overrides: as for `forward`.

        Returns:
            Outputs; for each pair a matrix `(*batch, entries of the output, entries of the input)`, where entries are
            those of sub-batch and base; and the batch shape.

        Raises:
            DerivativeNotCompiledError: a pair was not compiled.
            ConvergenceError: as for `forward`.
            InputError: as for `forward`.
        """
        self._caller.derivatives.chosen(pairs)
        # One matrix for each pair, also for one that is there twice.
        wanted: list[Pair] = [(out, ("input", name)) for out, name in pairs]
        return autograd.evaluate(self._caller, inputs, param_overrides, wanted)

    @public
    def solve(
        self,
        inputs: Mapping[str, Tensor],
        param_overrides: Mapping[str, Tensor] | None = None,
        *,
        jacobian: bool = False,
        pairs: Sequence[tuple[str, str]] | None = None,
        expand: bool = True,
    ) -> Solution:
        """Evaluate the outputs, and derivatives if asked for, of the rows that converge; the others never raise.

        A row with an output, or a derivative that is asked for, that is NaN or infinite has failed as well, in a model
        without implicit segments too; its outcome is `Outcome.NOT_FINITE`.

        Args:
            inputs: as for `forward`.
            param_overrides: as for `forward`.
            jacobian: whether to evaluate derivative blocks too.
            pairs: as for `jacobian`, which they imply; here a pair may be of an output and a promoted parameter, too.
            expand: as for `jacobian`, but that blocks have the batch axes unless told otherwise.

        Returns:
            Outputs, blocks, which rows converged, and how each fared.

        Raises:
            DerivativeNotCompiledError: as for `jacobian`.
            InputError: as for `forward`.
        """
        caller = self._caller
        wanted = caller.derivatives.chosen(pairs, or_parameters=True) if jacobian or pairs is not None else ()
        with torch.no_grad():
            return caller.evaluate(inputs, param_overrides, wanted, expand=expand, or_fail=False).solution

    @public
    def jvp(
        self,
        inputs: Mapping[str, Tensor],
        tangents: Mapping[str, Tensor],
        param_overrides: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensors, Tensors]:
        """Evaluate the outputs and their derivatives along a direction of the inputs.

        `tangents` is the direction by input name, `(*batch, *sub_batch, *base)`; zero for inputs that are absent.

        Returns:
            Outputs, and the derivative along the direction of each output that is in a compiled pair.

        Raises:
            DerivativeNotCompiledError: no derivative was compiled, or one that the direction needs was not.
        """
        return self._caller.jvp(inputs, tangents, param_overrides)

    @public
    def jacobian(
        self,
        inputs: Mapping[str, Tensor],
        param_overrides: Mapping[str, Tensor] | None = None,
        *,
        pairs: Sequence[tuple[str, str]] | None = None,
        expand: bool = False,
    ) -> tuple[Tensors, Blocks]:
        """Evaluate the outputs and the compiled derivative blocks.

        Args:
            inputs: as for `forward`.
            param_overrides: as for `forward`.
            pairs: (output, input) pairs to evaluate; all that were compiled if not given.
            expand: whether a block that does not depend on the batch has the batch axes too.

        Returns:
            Outputs, and `J[out][in]` for each pair, `(*batch, *out_base, *in_base)`. Unless `expand`, a block of a
            model of one explicit segment that does not depend on the batch is `(*out_base, *in_base)`. One between
            sub-batched variables is per site, `(*batch, *sub_batch, *out_base, *in_base)`.

        Raises:
            DerivativeNotCompiledError: no derivative was compiled, or one of `pairs` was not.
            ConvergenceError: as for `forward`.
            InputError: as for `forward`.
        """
        return self._caller.jacobian(inputs, param_overrides, pairs, expand=expand)

    @public
    def param_jacobian(
        self,
        inputs: Mapping[str, Tensor],
        param_overrides: Mapping[str, Tensor] | None = None,
        *,
        params: Sequence[str] | None = None,
    ) -> tuple[Tensors, Blocks]:
        """Evaluate the outputs and the compiled derivative blocks by promoted parameters, or by those in `params`.

        Returns:
            Outputs, and `P[out][parameter]` for each compiled pair, `(*batch, *out_base, *parameter_base)`.

        Raises:
            DerivativeNotCompiledError: no derivative by a parameter was compiled, or none by one of `params`.
        """
        found = self._caller.evaluate(inputs, param_overrides, self._caller.derivatives.by_parameters(params))
        return found.outputs, found.blocks

    @public
    def param_vjp(
        self,
        inputs: Mapping[str, Tensor],
        cotangents: Mapping[str, Tensor],
        param_overrides: Mapping[str, Tensor] | None = None,
        *,
        params: Sequence[str] | None = None,
    ) -> Tensors:
        """Contract cotangents of the outputs with the derivatives by promoted parameters, or by those in `params`.

        `cotangents` are by output name, each broadcasting to `(*batch, *out_base)`.

        Returns:
            Gradient by parameter name, of the shape of the value in force: summed over the batch where the value is
            common to it.
        """
        return self._caller.param_vjp(inputs, cotangents, param_overrides, params)
