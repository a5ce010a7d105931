"""`Model`: a compiled model over raw tensors."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace
from torch import Tensor

from .._artifact.compatibility import check
from .._artifact.decode import read_metadata
from .._artifact.kinship import kinship
from .._artifact.layout import absolute
from .._artifact.locate import locate
from .._artifact.schema import ImplicitInfo, Shape
from .._artifact.stub import is_input_file, model_in
from .._program.program import Program
from ..errors import ArtifactError, InputError, UnknownNameError
from ..settings import NewtonSettings, changed_settings, newton_settings
from . import _autograd as autograd
from . import _derivatives as derivatives
from ._admission import Boundary, callers_level
from ._call import Caller
from ._module import CompiledModule, Recipe, origin, public
from ._outcomes import Blocks, Solution, Tensors, solution
from ._parameters import PromotedParameters
from ._plan import plan_of

MODE = "NEML2_AOTI_PLUGIN_MODE"
MODES = ("rowwise", "lockstep")

# What `Model._load` makes, and no pickle holds.
_LOADED = ("artifact", "inputs", "outputs", "initial_guesses", "_metadata", "_boundary", "_caller", "_plan", "_origin")


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
        super().__init__()
        self.mode = _mode(mode)
        self._given = absolute(artifact)
        self._solver = dict(solver) if solver else None
        from_stub = is_input_file(self._given)
        if from_stub:
            _, stub = model_in(self._given, name)
            self._given, self._solver = stub.artifact, {**(stub.solver or {}), **(solver or {})} or None
        self._load(device, dtype)
        if name is not None and not from_stub and name != self._boundary.model:
            raise UnknownNameError(f"{self._given} holds the model {self._boundary.model!r}, not {name!r}.")
        if parameters is not None:
            self.load_parameters(parameters)

    def _load(
        self,
        device: str | torch.device | None,
        dtype: str | torch.dtype | None,
        made: Recipe | None = None,
    ) -> None:
        """Load a leaf, that of a recipe if there is one; the promoted parameters stay what they are."""
        place = locate(self._given, device, dtype)
        metadata = read_metadata(place, solver=self._solver)
        checked = check(metadata, place)
        metadata, packages = checked.metadata, checked.packages
        kin = kinship(metadata, place)
        if kin.fault:
            raise ArtifactError(kin.fault)
        if kin.doubt:
            warnings.warn(kin.doubt, UserWarning, stacklevel=callers_level())
        made_of = origin(place, metadata, packages.values())
        if made is not None:
            made_of.require_same(made)
        program = Program(metadata, packages, place.device, self.mode == "lockstep")
        boundary = Boundary(metadata, place, program.dtype)
        promoted = PromotedParameters(metadata, boundary, self)
        self.artifact = place.metadata.parent
        self._metadata, self._boundary = metadata, boundary
        self._plan = plan_of(program, boundary)
        self._caller = Caller(metadata, boundary, program, promoted)
        self._origin = made_of
        self.inputs = {name: replace(variable, name=name) for name, variable in boundary.inputs.items()}
        self.outputs = {name: replace(variable, name=name) for name, variable in boundary.outputs.items()}
        self.initial_guesses = {name: replace(variable, name=name) for name, variable in boundary.guesses.items()}

    @property
    def _promoted(self) -> PromotedParameters:
        return self._caller.promoted

    def _move(self, device: torch.device, dtype: torch.dtype) -> None:
        settings = self._caller.settings
        self._load(device, dtype)
        self._caller.settings = settings

    def _place(self) -> tuple[torch.device, torch.dtype]:
        return self.device, self.dtype

    def __getstate__(self) -> dict[str, Any]:
        """What travels: where the artifact is, which leaf, the options and the parameters; not what was loaded."""
        state = {name: value for name, value in super().__getstate__().items() if name not in _LOADED}
        self._origin.require_unchanged()
        made = Recipe(self._given, self.device, self.dtype, self._caller.settings, self._origin.by_name)
        return {**state, "_recipe": made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Load the leaf anew, if the artifact is the same."""
        made: Recipe = state["_recipe"]
        kept = {name: value for name, value in state.items() if name != "_recipe"}
        super().__setstate__(kept)
        self._load(made.device, made.dtype, made)
        self._caller.settings = made.settings

    # -- what the model is ------------------------------------------------------------------------------------------

    @property
    def input_names(self) -> list[str]:
        """Names of the inputs, in the model's order."""
        return list(self._boundary.inputs)

    @property
    def output_names(self) -> list[str]:
        """Names of the outputs, in the model's order."""
        return list(self._boundary.outputs)

    @property
    def input_base_shapes(self) -> list[list[int]]:
        """Base shape of each input, in the order of `input_names`."""
        return [list(variable.base_shape) for variable in self._boundary.inputs.values()]

    @property
    def output_base_shapes(self) -> list[list[int]]:
        """Base shape of each output, in the order of `output_names`."""
        return [list(variable.base_shape) for variable in self._boundary.outputs.values()]

    @property
    def device(self) -> torch.device:
        """Device that the model runs on."""
        return self._boundary.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of inputs and outputs."""
        return self._boundary.dtype

    @property
    def digest(self) -> str:
        """SHA-256 of the artifact's files as they were loaded, of metadata and graphs together."""
        return self._origin.digest

    @property
    def derivative_pairs(self) -> list[tuple[str, str]]:
        """The (output, input) pairs whose derivatives were compiled."""
        outputs, inputs = self._boundary.output_names, self._boundary.input_names
        return [(outputs[o], inputs[i]) for o, i in self._metadata.derivatives]

    @property
    def parameter_derivative_pairs(self) -> list[tuple[str, str]]:
        """The (output, parameter) pairs whose derivatives were compiled."""
        outputs, parameters = self._boundary.output_names, self._promoted.public
        return [(outputs[o], parameters[p]) for o, p in self._metadata.parameter_derivatives]

    def __repr__(self) -> str:
        leaf = f"{self.device}/{str(self.dtype).removeprefix('torch.')}"
        return f"Model({str(self.artifact)!r}, {leaf}: {', '.join(self.input_names)} -> {', '.join(self.output_names)})"

    def save_parameters(self, path: str | os.PathLike[str]) -> None:
        """Write the promoted parameters to a safetensors file, which `Model(..., parameters=path)` takes."""
        self._promoted.save(Path(path), self._boundary.model, self._metadata.digest)

    def load_parameters(self, path: str | os.PathLike[str], *, same_artifact: bool = True) -> None:
        """Set the promoted parameters to the values in a file that `save_parameters` wrote.

        It must have been written for this artifact: one with the same metadata, for whatever device, dtype and machine;
        or, unless `same_artifact`, for one whose parameters have the same names and shapes. Else it is an `InputError`.
        """
        self._promoted.load(path, self._metadata.digest if same_artifact else None)

    # -- solver settings --------------------------------------------------------------------------------------------

    @property
    def solver(self) -> NewtonSettings | None:
        """Newton settings in force, of the first implicit segment if they differ; None without implicit segments."""
        parts = (part for part in self._metadata.segments if isinstance(part, ImplicitInfo))
        first = next(parts, None)
        return None if first is None else self._caller.settings or first.newton

    def set_solver(self, **settings: Any) -> None:
        """Change some Newton settings of all implicit segments, as in `set_solver(atol=1e-8)`; the others stay.

        They are atol, rtol, miters (one more than the updates allowed), ls_type, ls_max_iters (one more than the trials
        allowed; 1 is no line search), ls_cutback, ls_c, substep_del_tol and chord_steps; see `NewtonSettings`.
        """
        self._caller.settings = changed_settings(self.solver, settings, str(self.artifact))

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
        """Replace all Newton settings that neml2's C++ runtime has; `set_solver` takes them one by one."""
        present = self.solver
        self._caller.settings = newton_settings(
            atol=atol,
            rtol=rtol,
            miters=miters,
            ls_type=ls_type,
            ls_max_iters=ls_max_iters,
            ls_cutback=ls_cutback,
            ls_c=ls_c,
            substep_del_tol=substep_del_tol,
            chord_steps=present is None or present.chord_steps,
        )

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
        if self._plan is not None and not param_overrides:
            found = self._plan.forward(inputs)
            if found is not None:
                return found
        return self.forward_with_batch(inputs, param_overrides)[0]

    @public
    def forward_with_batch(
        self, inputs: Mapping[str, Tensor], param_overrides: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensors, Shape]:
        """As `forward`; gives the common batch shape of the inputs as well."""
        if autograd.is_followed(self._caller, inputs, param_overrides):
            outputs, _, batch = autograd.linearise(self._caller, inputs, param_overrides)
            return outputs, batch
        with torch.no_grad():
            call = self._caller.admit(inputs, param_overrides)
            found = self._caller.evaluate(call)
            self._caller.require_convergence(found, call)
            return self._caller.outputs(found.values, call.batch), call.batch

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
        # One matrix for each pair, also for one that is there twice.
        derivatives.input_pairs(self._caller, pairs)
        wanted: list[derivatives.Pair] = [(out, ("input", name)) for out, name in pairs]
        if autograd.is_followed(self._caller, inputs, param_overrides):
            return autograd.linearise(self._caller, inputs, param_overrides, wanted)
        with torch.no_grad():
            return derivatives.linearise(self._caller, inputs, param_overrides, wanted)

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
        with torch.no_grad():
            asked = jacobian or pairs is not None
            wanted = derivatives.input_pairs(self._caller, pairs, or_parameters=True) if asked else []
            call = self._caller.admit(inputs, param_overrides)
            found = derivatives.evaluate(self._caller, call, wanted, expand=expand)
            return solution(found.outputs, found.blocks, found.shared, found.found.report, call.batch)

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
        with torch.no_grad():
            return derivatives.jvp(self._caller, inputs, tangents, param_overrides)

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
        if self._plan is not None and not param_overrides and pairs is None and not expand:
            found = self._plan.jacobian(inputs)
            if found is not None:
                return found
        with torch.no_grad():
            wanted = derivatives.input_pairs(self._caller, pairs)
            return derivatives.jacobian(self._caller, inputs, param_overrides, wanted, expand=expand)

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
        with torch.no_grad():
            wanted = derivatives.parameter_pairs(self._caller, params)
            return derivatives.jacobian(self._caller, inputs, param_overrides, wanted)

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
        with torch.no_grad():
            return derivatives.param_vjp(self._caller, inputs, cotangents, param_overrides, params)


def _mode(mode: str | None) -> str:
    found = mode or os.environ.get(MODE) or "rowwise"
    if found not in MODES:
        source = "mode" if mode else f"the environment variable {MODE}"
        raise InputError(f"{source} is {found!r}, expected one of {', '.join(MODES)}.")
    return found


def require_pairs(model: Model, pairs: Sequence[tuple[str, str]] | None = None) -> None:
    """Refuse pairs of an output and an input or parameter that were not compiled; without any, that none was."""
    derivatives.input_pairs(model._caller, pairs, or_parameters=True)
