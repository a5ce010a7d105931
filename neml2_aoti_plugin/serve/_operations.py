"""What can be asked of a model: each operation with the tensors that it takes and gives, by the protocol's names."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch

from ..errors import InputError
from ..model import Model
from ._tensors import Port

# Prefixes of what operations take and give beside the model's own inputs and outputs.
TANGENT, COTANGENT, GRADIENT = "tangent:", "cotangent:", "gradient:"
# How each row fared; no variable has such a name.
CONVERGED, ITERATIONS, OUTCOME = "@converged", "@iterations", "@outcome"

DATATYPES = {torch.float64: "FP64", torch.float32: "FP32"}

Pair = tuple[str, str]


@dataclass(frozen=True)
class Operation:
    """One operation of a model.

    Args:
        name: as requests have it.
        inputs: tensors that must be given, by name.
        optional: tensors that may be given, by name.
        outputs: names of the tensors of the answer, in its order.
        pairs: derivative blocks by the name of their output tensor.
    """

    name: str
    inputs: dict[str, Port]
    optional: dict[str, Port]
    outputs: tuple[str, ...]
    pairs: dict[str, Pair] = field(default_factory=dict)

    @cached_property
    def required(self) -> tuple[str, ...]:
        """Names of the tensors that must be given."""
        return tuple(self.inputs)

    @cached_property
    def ports(self) -> dict[str, Port]:
        """All tensors that it takes."""
        return {**self.inputs, **self.optional}


@dataclass(frozen=True)
class Missing:
    """An operation that the model was not compiled for.

    Args:
        name: as requests have it.
        reason: what it takes at compile time.
    """

    name: str
    reason: str


def operations_of(model: Model) -> dict[str, Operation | Missing]:
    """The operations of a model, by name; those that it was not compiled for say why."""
    datatype = DATATYPES[model.dtype]
    inputs = {name: Port(name, datatype, tuple(known.natural_shape)) for name, known in model.inputs.items()}
    iterates = {name: Port(name, datatype, tuple(known.natural_shape)) for name, known in model.initial_guesses.items()}
    values = tuple(model.outputs)
    _require_own_names(model)
    found: list[Operation | Missing] = [
        Operation("forward", inputs, iterates, values),
        Operation("solve", inputs, iterates, (*values, CONVERGED, ITERATIONS, OUTCOME)),
    ]
    pairs = {f"{out}:{by}": (out, by) for out, by in model.derivative_pairs}
    if pairs:
        along = dict.fromkeys(out for out, _ in pairs.values())
        # A direction must find all the pairs that it needs.
        moved = [name for name in inputs if all((out, name) in pairs.values() for out in along)]
        tangents = {TANGENT + n: Port(TANGENT + n, datatype, inputs[n].shape) for n in moved}
        found += [
            Operation("jacobian", inputs, iterates, (*values, *pairs), pairs),
            Operation("jvp", inputs, {**iterates, **tangents}, (*values, *(TANGENT + out for out in along))),
        ]
    else:
        lacking = "the model was compiled without derivatives by its inputs: neml2-compile ... -d OUTPUT:INPUT"
        found += [Missing("jacobian", lacking), Missing("jvp", lacking)]
    by_parameter = model.parameter_derivative_pairs
    if by_parameter:
        outs = dict.fromkeys(out for out, _ in by_parameter)
        cotangents = {
            COTANGENT + out: Port(COTANGENT + out, datatype, tuple(model.outputs[out].natural_shape)) for out in outs
        }
        gradients = tuple(GRADIENT + name for name in sorted({name for _, name in by_parameter}))
        found.append(Operation("param_vjp", {**inputs, **cotangents}, iterates, gradients))
    else:
        found.append(
            Missing(
                "param_vjp",
                "the model was compiled without derivatives by promoted parameters: neml2-compile ... -p PARAMETER "
                "-d OUTPUT:PARAMETER",
            )
        )
    return {operation.name: operation for operation in found}


def _require_own_names(model: Model) -> None:
    """Refuse a model with a variable that has the name of a derivative here: one of both would be lost."""
    ours = {f"{out}:{by}" for out, by in model.derivative_pairs}
    ours |= {prefix + name for name in (*model.inputs, *model.outputs) for prefix in (TANGENT, COTANGENT)}
    for name in (*model.inputs, *model.initial_guesses, *model.outputs):
        if name in ours:
            raise InputError(
                f"a variable is called {name!r}, which is how requests call a derivative. Give it another name in the "
                "input file, and compile the model again with neml2-compile."
            )
