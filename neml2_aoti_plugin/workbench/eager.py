"""neml2's eager model of the same input file: values and derivatives to hold a compiled model against."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..artifact.schema import Aliases
from ..errors import AOTIError, InputError
from ..model import Model
from .points import defaults, first_line
from .target import AOTI_MODEL, parse_input, require_block

Tensors = dict[str, Tensor]
Blocks = dict[tuple[str, str], Tensor]


class Source:
    """The eager model that a compiled one was made from.

    Args:
        path: the input file.
        name: of the model in it.
        compiled: the compiled model, whose names and shapes are asked for.
        aliases: of the compiled model: names inside to names at its boundary.

    Raises:
        InputError: the file has no such model, neml2 cannot build it, or it has other inputs or outputs.
    """

    def __init__(self, path: Path, name: str, compiled: Model, aliases: Aliases) -> None:
        block = require_block(parse_input(path), "Models", name, path)
        if block.param_optional_str("type", "") == AOTI_MODEL:
            raise InputError(f"[Models/{name}] in {path} is compiled itself. Give the input file that was compiled.")
        import neml2

        try:
            with defaults(None, "float64"):
                self._model: Any = neml2.load_input(path).get_model(name)
        except AOTIError:
            raise
        except Exception as error:
            raise InputError(f"[Models/{name}] in {path}: {first_line(error)}") from error
        self._compiled, self._aliases, self._where = compiled, aliases, f"[Models/{name}] in {path}"
        self._inside = {new: old for old, new in {**aliases.inputs, **aliases.outputs}.items()}
        _tighten(self._model)
        spec, inputs = self._model.input_spec, [self._inside.get(name, name) for name in compiled.inputs]
        outputs = [self._inside.get(name, name) for name in compiled.outputs]
        strange = [n for n in spec if n not in inputs] + [n for n in outputs if n not in self._model.output_spec]
        if strange:
            raise InputError(
                f"[Models/{name}] in {path} is not what was compiled: {', '.join(strange)} differ(s). It takes "
                f"{', '.join(spec)} and gives {', '.join(self._model.output_spec)}."
            )

    def outputs(self, inputs: Mapping[str, Tensor]) -> Tensors:
        """Values for inputs `(rows, *sub_batch, *base)` by boundary name; some may have no axis of rows."""
        with self._named():
            found = self._model(*self._typed(inputs).values())
        values = dict(zip(self._model.output_spec, found if isinstance(found, tuple) else (found,), strict=True))
        return {name: values[self._inside.get(name, name)].data.detach() for name in self._compiled.outputs}

    def jacobian(self, inputs: Mapping[str, Tensor], pairs: Iterable[tuple[str, str]]) -> Blocks:
        """Derivatives by inputs, `(rows, *out_base, *in_base)`, for pairs of boundary names.

        Those by inputs with a sub-batch are left out, for which neml2 and compiled models have blocks of other forms.
        """
        typed = self._typed(inputs)
        wanted = [pair for pair in pairs if not self._compiled.inputs[pair[1]].sub_batch_shape]
        if any(value.sub_batch_ndim for value in typed.values()):
            return self._by_columns(typed, wanted)
        with self._named():
            _, blocks = self._model.jacobian(typed)
        inside = self._inside
        return {(o, i): blocks[inside.get(o, o)][inside.get(i, i)].data.detach() for o, i in wanted}

    def _by_columns(self, typed: dict[str, Any], pairs: list[tuple[str, str]]) -> Blocks:
        """Along one direction at a time: neml2's `jacobian` does not take inputs with a sub-batch."""
        found: Blocks = {}
        for by in dict.fromkeys(by for _, by in pairs):
            name, base = self._inside.get(by, by), tuple(self._compiled.inputs[by].base_shape)
            value, columns = typed[name].data, []
            for direction in torch.eye(prod(base), dtype=torch.float64).reshape(-1, *base):
                with self._named():
                    _, along = self._model.jvp(typed, {name: direction.expand(value.shape).contiguous()})
                columns.append(along)
            for out in (out for out, of in pairs if of == by):
                stacked = torch.stack([along[self._inside.get(out, out)].data.detach() for along in columns], -1)
                found[out, by] = stacked.reshape(*stacked.shape[:-1], *base)
        return found

    def parameter_jacobian(self, inputs: Mapping[str, Tensor], parameters: list[str]) -> Blocks:
        """Derivatives by parameters of these boundary names, `(rows, *out_base, *parameter_base)`, by pair.

        Those that the eager model has by another name are left out.
        """
        present = dict(self._model.named_parameters())
        inside: dict[str, str] = {}
        authored = {new: old for old, new in self._aliases.parameters.items()}
        for name in parameters:
            own = authored.get(name, name)
            # A lone model is not named in the names of its own parameters.
            for candidate in (own, own.partition(".")[2]):
                if candidate in present:
                    inside[candidate] = name
                    break
        if not inside:
            return {}
        with self._named():
            _, blocks = self._model.param_jacobian(self._typed(inputs), list(inside))
        names = self._aliases.outputs
        return {
            (names.get(out, out), inside[parameter]): block.detach()
            for out, row in blocks.items()
            for parameter, block in row.items()
        }

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Say of an error that it is the eager model's."""
        try:
            yield
        except Exception as error:
            raise InputError(
                f"{self._where}: the source model itself fails at these points ({first_line(error)}). Give others "
                "(--points FILE, --driver NAME, or --scale NAME=VALUE)."
            ) from error

    def _typed(self, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        """Inputs as the eager model takes them, by its names and in its order."""
        variables = {self._inside.get(name, name): (name, v) for name, v in self._compiled.inputs.items()}
        found = {}
        for name, wrapper in self._model.input_spec.items():
            given, variable = variables[name]
            found[name] = wrapper(inputs[given].to(torch.float64), sub_batch_ndim=len(variable.sub_batch_shape))
        return found


def _tighten(model: Any) -> None:
    """Let an eager model solve to its absolute tolerance, and not be content with a relative one."""
    for update in _implicit_updates(model):
        update.solver.atol *= 0.1
        update.solver.rtol = 0.0


def _implicit_updates(model: Any) -> Iterator[Any]:
    from neml2.models.common.ImplicitUpdate import ImplicitUpdate

    return (module for module in model.modules() if isinstance(module, ImplicitUpdate))
