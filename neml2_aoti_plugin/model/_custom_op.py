"""A compiled model as an operator of torch, so that torch.compile and torch.export hold calls without breaking."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .._checks import require_names
from ..errors import InputError
from ._model import Model

NAMESPACE = "neml2_aoti_plugin"


class CustomOp(torch.nn.Module):
    """A compiled model as one operator of torch, `torch.ops.neml2_aoti_plugin.NAME`.

    `torch.compile(..., fullgraph=True)` and `torch.export`, with a dynamic batch too, keep it in their graphs. Autograd
    follows it by the compiled derivatives, which are evaluated when they are needed. Its parameters are the model's
    promoted ones, whatever these are at a call; an exported program keeps those that it was exported with. A program
    that was exported and saved is loaded by a process that has made the same operator.

    Args:
        model: what is called.
        name: of the operator, a Python identifier; each is given once in a process.

    Raises:
        InputError: there is an operator of that name, or it is no identifier.
    """

    def __init__(self, model: Model, name: str) -> None:
        super().__init__()
        self._inputs, self._outputs = list(model.inputs), list(model.outputs)
        self._names = list(model.named_parameters())
        self.promoted = _Promoted(model)
        self._op = _register(model, name)

    def forward(
        self, inputs: Mapping[str, Tensor], param_overrides: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Evaluate the outputs.

        Args:
            inputs: by name, each `(*batch, *sub_batch, *base)`, without initial guesses.
            param_overrides: values of promoted parameters for this call, `(*batch, *base)`.

        Returns:
            Outputs by name, `(*batch, *sub_batch, *base)`.

        Raises:
            InputError: an input or parameter is unknown or missing; and what `Model.forward` raises.
            DerivativeNotCompiledError: in `backward()`, where a derivative that is needed was not compiled.
        """
        given = param_overrides or {}
        require_names(inputs, self._inputs, "inputs of the operator", "inputs", needed=self._inputs)
        require_names(given, self._names, "param_overrides of the operator", "promoted parameters")
        values = [inputs[name] for name in self._inputs]
        values += [given[name] if name in given else self.promoted.value(name) for name in self._names]
        found = self._op(*values)
        return dict(zip(self._outputs, [found] if isinstance(found, Tensor) else found, strict=True))


class _Promoted(torch.nn.Module):
    """The promoted parameters of a model, in the model's own dicts: what is put in their place there is here, too."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.__dict__.update(_parameters=model._parameters, _modules=model._modules)

    def value(self, name: str) -> Tensor:
        """A parameter by its qualified name."""
        node: torch.nn.Module = self
        *path, leaf = name.split(".")
        for part in path:
            node = node._modules[part]  # type: ignore[assignment]
        value = node._parameters.get(leaf)
        # A parametrised value (torch.nn.utils.parametrize) is an attribute only.
        found: Tensor = value if value is not None else getattr(node, leaf)
        return found


def _register(model: Model, name: str) -> Any:
    """Define the operator, what it gives for tensors without values, and its derivative."""
    if not name.isidentifier():
        raise InputError(f"{name!r} is not a name that an operator of torch may have; give a Python identifier.")
    if hasattr(getattr(torch.ops, NAMESPACE), name):
        raise InputError(
            f"torch.ops.{NAMESPACE}.{name} is there already. Operators are known to the whole process by their names: "
            "give another one, or use the CustomOp that was made before."
        )
    inputs, outputs, parameters = list(model.inputs), list(model.outputs), list(model.named_parameters())
    natural = {k: v.natural_shape for k, v in (*model.inputs.items(), *model.outputs.items())}
    natural |= {k: tuple(shape) for k, shape in model.parameter_base_shapes.items()}
    given = ", ".join(f"Tensor a{k}" for k in range(len(inputs) + len(parameters)))
    returned = ", ".join("Tensor" for _ in outputs)
    cotangents = ", ".join(f"Tensor c{k}" for k in range(len(outputs)))

    def parted(values: tuple[Tensor, ...]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return dict(zip(inputs, values, strict=False)), dict(zip(parameters, values[len(inputs) :], strict=True))

    def call(*values: Tensor) -> Any:
        found = model.forward(*parted(values))
        # torch expects memory of the operator's own.
        fresh = tuple(found[out].clone() for out in outputs)
        return fresh if len(fresh) > 1 else fresh[0]

    def without_values(*values: Tensor) -> Any:
        shapes = [v.shape[: v.ndim - len(natural[k])] for k, v in zip((*inputs, *parameters), values, strict=True)]
        batch = torch.broadcast_shapes(*shapes)
        fresh = tuple(values[0].new_empty((*batch, *natural[out])) for out in outputs)
        return fresh if len(fresh) > 1 else fresh[0]

    def pull_back(wanted: list[bool], *values: Tensor) -> list[Tensor]:
        weights = {out: c for out, c in zip(outputs, values, strict=False) if bool(c.any())}
        leaves = [v.detach().requires_grad_(by) for v, by in zip(values[len(outputs) :], wanted, strict=True)]
        asked = [leaf for leaf in leaves if leaf.requires_grad] if weights else []
        gradients: Iterator[Tensor] = iter(())
        if asked:
            with torch.enable_grad():
                found = model.forward(*parted(tuple(leaves)))
            ends = [found[out] for out in weights]
            gradients = iter(torch.autograd.grad(ends, asked, list(weights.values()), materialize_grads=True))
        return [next(gradients).clone() if asked and x.requires_grad else torch.zeros_like(x) for x in leaves]

    op = torch.library.custom_op(f"{NAMESPACE}::{name}", call, mutates_args=(), schema=f"({given}) -> ({returned})")
    op.register_fake(without_values)
    backward = torch.library.custom_op(
        f"{NAMESPACE}::{name}_backward",
        pull_back,
        mutates_args=(),
        schema=f"(bool[] wanted, {cotangents}, {given}) -> Tensor[]",
    )
    backward.register_fake(lambda wanted, *values: [torch.empty_like(v) for v in values[len(outputs) :]])

    def differentiate(context: Any, *weights: Tensor) -> Any:
        found = backward(list(context.needs_input_grad), *weights, *context.saved_tensors)
        return tuple(g if needed else None for g, needed in zip(found, context.needs_input_grad, strict=True))

    def keep(ctx: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    op.register_autograd(differentiate, setup_context=keep)
    return op
