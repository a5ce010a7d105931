"""neml2's eager model of the same input file: values and derivatives to hold a compiled model against."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._artifact.schema import Aliases
from .._artifact.stub import AOTI_MODEL, parse_input
from ..errors import AOTIError, InputError
from ..model import Model
from .output import first_line
from .points import Blocks, Pair, Tensors, defaults
from .target import require_block

# What to give where another file was given.
SOURCE = "the input file that was compiled"


class Source:
    """The eager model that a compiled one was made from, in an input file; its names are those at the boundary."""

    def __init__(self, path: Path, name: str, compiled: Model, aliases: Aliases) -> None:
        block = require_block(parse_input(path, what=SOURCE), "Models", name, path)
        if block.param_optional_str("type", "") == AOTI_MODEL:
            raise InputError(f"[Models/{name}] in {path} is compiled itself. Give {SOURCE}.")
        import neml2
        from neml2.models.common.ImplicitUpdate import ImplicitUpdate

        try:
            with defaults(None, "float64"):
                self._model: Any = neml2.load_input(path).get_model(name)
        except AOTIError:
            raise
        except Exception as error:
            raise InputError(f"[Models/{name}] in {path}: {first_line(error)}") from error
        self._compiled, self._aliases, self._where = compiled, aliases, f"[Models/{name}] in {path}"
        self._inside = {new: old for old, new in {**aliases.inputs, **aliases.outputs}.items()}
        # It solves to its absolute tolerance, and is not content with a relative one.
        for update in (module for module in self._model.modules() if isinstance(module, ImplicitUpdate)):
            update.solver.atol *= 0.1
            update.solver.rtol = 0.0
        spec, inputs = self._model.input_spec, [self._inside.get(name, name) for name in compiled.inputs]
        outputs = [self._inside.get(name, name) for name in compiled.outputs]
        strange = [n for n in spec if n not in inputs] + [n for n in outputs if n not in self._model.output_spec]
        if strange:
            raise InputError(
                f"[Models/{name}] in {path} is not what was compiled: {', '.join(strange)} differ(s). It takes "
                f"{', '.join(spec)} and gives {', '.join(self._model.output_spec)}."
            )

    def outputs(self, inputs: Mapping[str, Tensor]) -> Tensors:
        """Values for inputs `(rows, *sub_batch, *base)`; some may have no axis of rows."""
        try:
            found = self._model(*self._typed(inputs).values())
        except Exception as error:
            raise InputError(
                f"{self._where}: the source model itself fails at these points ({first_line(error)}). Give others "
                "(--points FILE, --driver NAME, or --scale NAME=VALUE)."
            ) from error
        values = dict(zip(self._model.output_spec, found if isinstance(found, tuple) else (found,), strict=True))
        return {name: values[self._inside.get(name, name)].data.detach() for name in self._compiled.outputs}

    def blocks(self, inputs: Mapping[str, Tensor], pairs: Sequence[Pair]) -> tuple[Blocks, dict[Pair, str]]:
        """Derivatives by inputs and parameters, and for the pairs that the eager model gives none of, why.

        Pairs with an input that has a sub-batch are in neither: neml2 and compiled models have blocks of other forms
        for them.
        """
        by_inputs = [
            (o, i) for o, i in pairs if i in self._compiled.inputs and not self._compiled.inputs[i].sub_batch_shape
        ]
        by_parameters = [pair for pair in pairs if pair[1] not in self._compiled.inputs]
        found: Blocks = {}
        missing: dict[Pair, str] = {}
        typed = self._typed(inputs)
        for pairs, take in ((by_inputs, self._by_inputs), (by_parameters, self._by_parameters)):
            try:
                more, cannot = take(typed, pairs)
            except Exception as error:
                more, cannot = {}, dict.fromkeys(pairs, _failing(error))
            found |= more
            missing |= cannot
        return found, missing

    def _by_inputs(self, typed: dict[str, Any], pairs: Sequence[Pair]) -> tuple[Blocks, dict[Pair, str]]:
        if not pairs:
            return {}, {}
        try:
            _, blocks = self._model.jacobian(typed)
        except Exception:
            # It takes no inputs with a sub-batch, and no output that depends on no input.
            return self._by_columns(typed, pairs), {}
        inside = self._inside
        return {(o, i): blocks[inside.get(o, o)][inside.get(i, i)].data.detach() for o, i in pairs}, {}

    def _by_columns(self, typed: dict[str, Any], pairs: Sequence[Pair]) -> Blocks:
        """Along one direction at a time."""
        found: Blocks = {}
        for by in dict.fromkeys(by for _, by in pairs):
            name, base = self._inside.get(by, by), tuple(self._compiled.inputs[by].base_shape)
            value, columns = typed[name].data, []
            for direction in torch.eye(prod(base), dtype=torch.float64).reshape((-1, *base)):
                _, along = self._model.jvp(typed, {name: direction.expand(value.shape).contiguous()})
                columns.append(along)
            for out in (out for out, of in pairs if of == by):
                stacked = torch.stack([along[self._inside.get(out, out)].data.detach() for along in columns], -1)
                found[out, by] = stacked.reshape((*stacked.shape[:-1], *base))
        return found

    def _by_parameters(self, typed: dict[str, Any], pairs: Sequence[Pair]) -> tuple[Blocks, dict[Pair, str]]:
        """One output at a time: neml2's `param_jacobian` gives none where one output depends on no parameter."""
        own = {by: self._parameter(by) for _, by in pairs}
        missing = {pair: "it has no parameter of that name" for pair in pairs if own[pair[1]] is None}
        wanted: dict[str, list[str]] = {}
        for out, by in pairs:
            if own[by] is not None:
                wanted.setdefault(out, []).append(by)
        if not wanted:
            return {}, missing
        found: Blocks = {}
        leaves = self._leaves(own, rows=next(iter(typed.values())).data.shape[0])
        spec = list(self._model.output_spec)

        def differentiate() -> None:
            values = self._model(*typed.values())
            values = values if isinstance(values, tuple) else (values,)
            for out, bys in wanted.items():
                value = values[spec.index(self._inside.get(out, out))].data
                try:
                    found.update(_gradients(out, value, {by: leaves[by] for by in bys}))
                except Exception as error:
                    missing.update({(out, by): _failing(error) for by in bys})

        # neml2 reads the parameters again on the way back through an implicit update, so all of it is done inside.
        stand_ins = {f"model.{own[by]}": leaf for by, leaf in leaves.items()}
        torch.func.functional_call(_Within(self._model), stand_ins, (differentiate,))
        return found, missing

    def _leaves(self, own: Mapping[str, str | None], rows: int) -> Tensors:
        """A value for each row of each parameter, so that the derivatives of the rows are not added up."""
        values = dict(self._model.named_parameters())
        shapes = {by: (rows, *self._compiled.parameter_base_shapes[by]) for by in own}
        return {
            by: values[name].detach().expand(shapes[by]).clone().requires_grad_()
            for by, name in own.items()
            if name is not None
        }

    def _parameter(self, name: str) -> str | None:
        """The eager model's own name of a parameter; None where it has another one."""
        own = next((old for old, new in self._aliases.parameters.items() if new == name), name)
        present = dict(self._model.named_parameters())
        # A lone model is not named in the names of its own parameters.
        return next((found for found in (own, own.partition(".")[2]) if found in present), None)

    def _typed(self, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        """Inputs as the eager model takes them, by its names and in its order."""
        variables = {self._inside.get(name, name): (name, v) for name, v in self._compiled.inputs.items()}
        found = {}
        for name, wrapper in self._model.input_spec.items():
            given, variable = variables[name]
            found[name] = wrapper(inputs[given].to(torch.float64), sub_batch_ndim=len(variable.sub_batch_shape))
        return found


def _failing(error: Exception) -> str:
    return f"it fails ({first_line(error)})"


class _Within(nn.Module):
    """A model, and work to do while `functional_call` has its parameters exchanged."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], None]) -> None:
        work()


def _gradients(out: str, value: Tensor, leaves: Mapping[str, Tensor]) -> Blocks:
    """Derivatives of an output by parameters with a value for each row; zero where it does not depend on one."""
    rows = next(iter(leaves.values())).shape[0]
    columns: dict[str, list[Tensor]] = {by: [] for by in leaves}
    flat = value.expand(rows, *value.shape[1:]).reshape(rows, -1)
    for entry in flat.unbind(1):
        given: Sequence[Tensor | None] = (None,) * len(leaves)
        if entry.requires_grad:
            given = torch.autograd.grad(entry.sum(), [*leaves.values()], retain_graph=True, allow_unused=True)
        for (by, leaf), gradient in zip(leaves.items(), given, strict=True):
            columns[by].append(torch.zeros_like(leaf) if gradient is None else gradient)
    return {
        (out, by): torch.stack(entries, 1).reshape((rows, *value.shape[1:], *leaves[by].shape[1:]))
        for by, entries in columns.items()
    }
