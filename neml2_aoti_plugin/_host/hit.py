"""`AOTIModel`: the HIT type of a compiled model, typed tensors in and out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import nmhit
import torch
from neml2.schema import option
from neml2.types import TensorWrapper
from torch import Tensor, nn

from .._artifact.stub import read_stub
from .._checks import require_names
from ..errors import ArtifactError, DerivativeNotCompiledError, InputError, InputTypeError
from ..model._admission import INITIAL_GUESS
from ..model._autograd import evaluate
from ..model._guard import public
from ..model._module import CompiledModule
from ..model._outcomes import Blocks, Tensors
from . import typed
from .overrides import OpenSchema, parameter_values

Value: TypeAlias = TensorWrapper | Tensor


class _Declared(nn.Module):
    """Names of variables inside the compiled graphs, so that neml2's check of declared names finds them."""

    def __init__(self, names: set[str]) -> None:
        super().__init__()
        self.output_spec = dict.fromkeys(sorted(names))


class AOTIModel(CompiledModule):
    """A compiled model in the role of a neml2 model: typed tensors, chain rule, a part of other models.

    A torch module, as `Model` is. The derivative calls take typed tensors or raw ones; they return typed ones if they
    were given any, else raw ones.

    Args:
        artifact: the artifact's folder, its metadata file, or a folder inside it.
        device: device to run on; torch's current default device if not given.
        dtype: `float64` or `float32`; if not given, float64 where compiled, else the only one compiled.
        declared: names of variables inside the model that the input file declares shapes for.
        solver: Newton settings in place of the artifact's own, by the field names of `NewtonSettings`.

    Raises:
        ArtifactNotFoundError: there is no artifact, or none for that device and dtype.
        ArtifactError: the artifact is damaged, of an unknown schema, or made for another machine.
        InputError: a setting has no such value.
    """

    SECTION = "Models"
    SUPPORTS_SECOND_ORDER = False
    output_priorities: Mapping[str, str | None] = {}

    hit = OpenSchema(
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
        """Load the artifact that a `[Models]` block of neml2's input file (`factory`) points at."""
        try:
            settings = factory.settings
        except nmhit.Error:
            # A stub repeats the settings of its source, without what was given to neml2-compile alone, such as `n:=5`.
            settings = None
        declared = {name for name in getattr(settings, "example_batch_shape", None) or {} if name != "*"}
        try:
            try:
                stub = read_stub(node, Path(factory._path).parent, lambda n: factory._find_in_section("Solvers", n))
                artifact = stub.artifact.resolve()
                model = cls(artifact, factory._device, factory._dtype, declared=declared, solver=stub.solver)
            except (ArtifactError, InputError):
                # An option that is misspelt may be why.
                cls.hit.require_known(node)
                raise
            promoted = model._caller.promoted
            for name, value in parameter_values(node, factory, cls.hit, promoted.specs).items():
                model.set_parameter(name, value.to(promoted.values[name]) if isinstance(value, Tensor) else value)
            return model
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
        super().__init__(artifact, device, dtype, solver=solver)
        self.input_spec = {name: typed.wrapper_class(v, name) for name, v in self.inputs.items()}
        self._wrappers = tuple(self.input_spec.values())
        self.output_spec = {name: typed.wrapper_class(v, name) for name, v in self.outputs.items()}
        self._output_wrappers = tuple(enumerate(self.output_spec.values()))
        # Most artifacts do not tell the types of unknowns that may be given as initial guesses; any wrapper then.
        self._guess_spec = {
            name: typed.wrapper_class(v, name) if v.type else TensorWrapper for name, v in self.initial_guesses.items()
        }
        self.input_sub_batch = {name: v.sub_batch_shape for name, v in self.inputs.items()}
        if declared:
            self._declared = _Declared(declared)
        promoted = self._caller.promoted
        for name, spec in promoted.specs.items():
            node, leaf = promoted.homes[name]
            classes = node.__dict__.setdefault("_typed_storage_classes", {})
            classes[leaf] = typed.class_of_base_shape(spec.base_shape)

    # -- evaluation -------------------------------------------------------------------------------------------------

    @public
    def forward(self, *args: Value, v: Any = None, v2: Any = None, vh: Any = None) -> tuple[Any, ...]:
        """Evaluate the outputs, and their tangents if asked for.

        Args:
            args: a typed tensor, or a raw one `(*batch, *sub_batch, *base)`, per input in the order of `input_spec`.
            v: tangents `v[input][leaf]` of the inputs, with leading chain-rule axes.
            v2: not supported.
            vh: not supported.

        Returns:
            One typed tensor per output, in the order of `output_spec`; with `v`, behind them the tangents
            `[output][leaf]` of the outputs.

        Raises:
            InputError: an input does not fit.
            DerivativeNotCompiledError: a tangent needs a derivative that was not compiled, or a second one.
            ConvergenceError: rows of an implicit segment did not converge.
        """
        if v2 is not None or vh is not None:
            raise DerivativeNotCompiledError(
                f"second derivatives (v2=, vh=) of {self.artifact} were asked for; neml2-compile compiles first "
                "derivatives only."
            )
        if len(args) != len(self.input_spec):
            raise InputTypeError(
                f"{len(args)} positional inputs given, expected {len(self.input_spec)}: {', '.join(self.input_spec)}."
            )
        plans = self._caller.plans
        if plans is not None and v is None:
            found = plans.values([*map(_plain, args, self._wrappers)])
            if found is not None:
                return tuple([wrapper(found[place]) for place, wrapper in self._output_wrappers])
        inputs = self._raw(dict(zip(self.input_spec, args, strict=True)))
        if v is None:
            return tuple(self._evaluate(inputs).values())
        require_names(v, self.input_spec, f"v= of {self.artifact}", "inputs")
        pairs = [(out, name) for out in self.output_spec for name in self.inputs if v.get(name)]
        wanted = self._caller.derivatives.chosen(pairs)
        outputs, matrices, batch = evaluate(self._caller, inputs, None, wanted)
        wrapped = typed.wrap(outputs, self.output_spec, len(batch))
        by_pair = dict(zip(pairs, matrices, strict=True))
        return (*wrapped.values(), typed.push_forward(v, by_pair, self.inputs, wrapped))

    @public
    def call_by_name(self, state: Mapping[str, Value]) -> dict[str, TensorWrapper]:
        """Evaluate the outputs for inputs by name.

        Args:
            state: typed or raw tensors by name, among them the inputs. Unknowns of implicit segments are taken as
                initial guesses; any other name is passed over.

        Returns:
            Typed outputs by name.

        Raises:
            UnknownNameError: an input is absent.
        """
        guesses = {name: state[name] for name in self._guess_spec if name in state}
        if guesses or any(name not in state for name in self.input_spec):
            inputs = {name: state[name] for name in self.input_spec if name in state}
            return self._evaluate(self._raw({**inputs, **guesses}))
        return dict(zip(self.output_spec, self(*(state[name] for name in self.input_spec)), strict=True))

    def _evaluate(self, inputs: Mapping[str, Tensor]) -> dict[str, TensorWrapper]:
        """Typed outputs for raw inputs, and initial guesses, by name."""
        outputs, _, batch = evaluate(self._caller, inputs)
        return typed.wrap(outputs, self.output_spec, len(batch))

    # -- a part of other models -------------------------------------------------------------------------------------

    @property
    def consumed_items(self) -> frozenset[str]:
        """Names of the inputs, for neml2's resolver of dependencies."""
        return frozenset(self.input_spec)

    @property
    def provided_items(self) -> frozenset[str]:
        """Names of the outputs, for neml2's resolver of dependencies."""
        return frozenset(self.output_spec)

    def iterable_export_form(self) -> None:
        """None: there is no loop in a compiled model that another compile could take apart."""
        return None

    # -- derivatives ------------------------------------------------------------------------------------------------

    @public
    def jvp(
        self,
        inputs: Mapping[str, Value],
        tangents: Mapping[str, Value],
        param_overrides: Mapping[str, Tensor] | None = None,
    ) -> tuple[Mapping[str, Value], Mapping[str, Value]]:
        """Outputs and their derivative along a direction; see `Model.jvp`."""
        plain = self._raw(inputs)
        outputs, along = self._caller.jvp(plain, self._raw(tangents, "tangent"), param_overrides)
        if not (typed.has_typed(inputs) or typed.has_typed(tangents)):
            return outputs, along
        rank = self._batch_rank(plain)
        return typed.wrap(outputs, self.output_spec, rank), typed.wrap(along, self.output_spec, rank)

    @public
    def jacobian(
        self, inputs: Mapping[str, Value], param_overrides: Mapping[str, Tensor] | None = None
    ) -> tuple[Mapping[str, Value], Mapping[str, Mapping[str, Any]]]:
        """Outputs and compiled derivative blocks; see `Model.jacobian`. Typed blocks are `neml2.types.Tensor`."""
        plain = self._raw(inputs)
        outputs, blocks = self._caller.jacobian(plain, param_overrides)
        if not typed.has_typed(inputs):
            return outputs, blocks
        rank = self._batch_rank(plain)
        wrapped = typed.wrap_blocks(blocks, self.input_spec, self.output_spec, rank)
        return typed.wrap(outputs, self.output_spec, rank), wrapped

    @public
    def param_jacobian(
        self,
        inputs: Mapping[str, Value],
        param_overrides: Mapping[str, Tensor] | Sequence[str] | None = None,
        *,
        params: Sequence[str] | None = None,
    ) -> tuple[Tensors, Blocks]:
        """Outputs and compiled derivative blocks by parameters, raw; see `Model.param_jacobian`.

        In the second place it also takes the names of parameters, as neml2's eager models do.
        """
        overrides, names = _overrides_and_names(param_overrides, params)
        pairs = self._caller.derivatives.by_parameters(names)
        found = self._caller.evaluate(self._raw(inputs), overrides, pairs)
        return found.outputs, found.blocks

    @public
    def param_vjp(
        self,
        inputs: Mapping[str, Value],
        cotangents: Mapping[str, Value],
        param_overrides: Mapping[str, Tensor] | Sequence[str] | None = None,
        *,
        params: Sequence[str] | None = None,
    ) -> Tensors:
        """Gradients by parameters for cotangents of the outputs, raw; see `Model.param_vjp`.

        In the third place it also takes the names of parameters, as neml2's eager models do.
        """
        overrides, names = _overrides_and_names(param_overrides, params)
        plain = {n: c.data if isinstance(c, TensorWrapper) else c for n, c in cotangents.items()}
        return self._caller.param_vjp(self._raw(inputs), plain, overrides, names)

    def set_parameter(self, name: str, value: Value | float) -> None:
        """Set the value of a promoted parameter; see `Model.set_parameter`."""
        super().set_parameter(name, value.data if isinstance(value, TensorWrapper) else value)

    def _raw(self, inputs: Mapping[str, Value], kind: str = "input") -> Tensors:
        """Unwrap typed inputs and initial guesses to `(*batch, *sub_batch, *base)`; raw ones pass."""
        found = typed.unwrap(inputs, self.inputs, self.input_spec, kind, self.artifact)
        if self._guess_spec.keys().isdisjoint(found):
            return found
        guesses = self.initial_guesses
        return typed.unwrap(found, guesses, self._guess_spec, INITIAL_GUESS, self.artifact)

    def _batch_rank(self, inputs: Mapping[str, Tensor]) -> int:
        """Number of batch axes that raw inputs and initial guesses have together."""
        variables = {**self.initial_guesses, **self.inputs}
        return max((x.ndim - len(variables[name].natural_shape) for name, x in inputs.items()), default=0)


def _plain(value: Any, wrapper: typed.Wrapper) -> Any:
    """The tensor in a typed one without sub-batch and chain-rule axes; what is no typed one passes."""
    if type(value) is wrapper:
        return None if value.sub_batch_ndim or value.k_ndim else value.data
    return value


def _overrides_and_names(
    given: Mapping[str, Tensor] | Sequence[str] | None, names: Sequence[str] | None
) -> tuple[Mapping[str, Tensor] | None, Sequence[str] | None]:
    """Tell values of parameters from names of parameters, which compiled and eager models take in the same place."""
    if given is None or isinstance(given, Mapping):
        return given, names
    if names is not None:
        raise InputTypeError("names of parameters were given twice, by place and by params=.")
    return None, given
