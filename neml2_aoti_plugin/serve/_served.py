"""A model as the service has it: its name, its operations by the protocol's names, and what is told of it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import InputError
from ..model import Model, Outcome
from ..model._operations import OPERATIONS, Operation

Shape = tuple[int, ...]

PLATFORM = "neml2_aoti"
# The protocol asks for versions; an artifact is one.
VERSION = "1"
# The protocol's names of the dtypes that models have, and of those that are sent.
DATATYPES = {torch.float64: "FP64", torch.float32: "FP32"}
DTYPES: dict[str, np.dtype[Any]] = {
    "FP64": np.dtype("<f8"),
    "FP32": np.dtype("<f4"),
    "INT64": np.dtype("<i8"),
    "BOOL": np.dtype("?"),
}
# Prefixes of what operations take and give beside the model's own inputs and outputs.
TANGENT, COTANGENT, GRADIENT = "tangent:", "cotangent:", "gradient:"
# How each row fared; no variable has such a name.
CONVERGED, ITERATIONS, OUTCOME = "@converged", "@iterations", "@outcome"


@dataclass(frozen=True)
class DriverValues:
    """What a driver of a model prescribes at its first point, by variable, with which the page begins."""

    name: str
    # How long it takes.
    time: float
    # Entries of inputs at the start and at the end, and of the state at the start.
    first: dict[str, list[float]]
    last: dict[str, list[float]]
    initial: dict[str, list[float]]


@dataclass(frozen=True)
class ModelSource:
    """A model to serve: its name here, its artifact, arguments of `Model`; or the model where it is loaded already."""

    name: str
    artifact: Path
    device: str | None = None
    dtype: str | None = None
    solver: Mapping[str, Any] | None = None
    parameters: str | os.PathLike[str] | None = None
    driver: DriverValues | None = None
    loaded: Model | None = None

    def load(self) -> Served:
        """Load the model; raises what `Model` raises."""
        found = self.loaded
        if found is None:
            found = Model(self.artifact, self.device, self.dtype, solver=self.solver, parameters=self.parameters)
            found.requires_grad_(False)
        return Served(self.name, found, self.driver)


@dataclass(frozen=True)
class Signature:
    """What an operation of one model takes and gives."""

    operation: Operation
    # The protocol's name of the dtype of all that it takes.
    datatype: str
    # Shapes, without the rows, of what must be given, and of what may be.
    inputs: dict[str, Shape]
    optional: dict[str, Shape]
    # In the order of the answer.
    outputs: tuple[str, ...]
    # Derivative blocks by the name of their output tensor.
    pairs: dict[str, tuple[str, str]]

    @property
    def name(self) -> str:
        """Of the operation."""
        return self.operation.name


@dataclass(frozen=True)
class Served:
    """A loaded model under its name; values of its parameters may change."""

    name: str
    model: Model
    driver: DriverValues | None = None

    def __post_init__(self) -> None:
        """Refuse a model with a variable that has the name of a derivative here: one of both would be lost."""
        ours = {f"{out}:{by}" for out, by in (*self.model.derivative_pairs, *self.model.parameter_derivative_pairs)}
        ours |= {prefix + name for name in (*self.model.inputs, *self.model.outputs) for prefix in (TANGENT, COTANGENT)}
        for name in (*self.model.inputs, *self.model.initial_guesses, *self.model.outputs):
            if name in ours:
                raise InputError(
                    f"a variable is called {name!r}, which is how requests call a derivative. Give it another name in "
                    "the input file, and compile the model again with neml2-compile."
                )

    @cached_property
    def lacking(self) -> dict[str, str]:
        """Why the model lacks operations, by their names."""
        return {name: why for name, operation in OPERATIONS.items() if (why := operation.lacking(self.model))}

    @cached_property
    def signatures(self) -> dict[str, Signature]:
        """The operations that the model has."""
        return {name: _signature(self.model, OPERATIONS[name]) for name in OPERATIONS if name not in self.lacking}

    @property
    def per_row(self) -> bool:
        """Whether each promoted parameter has one value now, in whose place each row may have its own."""
        shapes = self.model.parameter_base_shapes
        return all(list(value.shape) == shapes[name] for name, value in self.model.named_parameters().items())

    @property
    def datatype(self) -> str:
        """The protocol's name of the model's dtype."""
        return DATATYPES[self.model.dtype]

    @property
    def metadata(self) -> dict[str, object]:
        """The protocol's metadata of the model; `parameters` tells what requests may ask for."""

        def told(shapes: Mapping[str, Shape]) -> list[dict[str, object]]:
            return [{"name": n, "datatype": self.datatype, "shape": [-1, *shape]} for n, shape in shapes.items()]

        return {
            "name": self.name,
            "versions": [VERSION],
            "platform": PLATFORM,
            "inputs": told(self.signatures["forward"].inputs),
            "outputs": told({name: tuple(variable.natural_shape) for name, variable in self.model.outputs.items()}),
            "parameters": {
                "operations": {
                    name: {
                        "inputs": told(signature.inputs),
                        "optional_inputs": told(signature.optional),
                        "outputs": list(signature.outputs),
                    }
                    for name, signature in self.signatures.items()
                },
                "promoted_parameters": {
                    name: {"shape": list(value.shape), "value": value.detach().cpu().tolist()}
                    for name, value in self.model.named_parameters().items()
                },
                # What the numbers in the output @outcome mean.
                "outcomes": [outcome.words for outcome in Outcome],
                "driver": None if self.driver is None else asdict(self.driver),
                "digest": self.model.digest,
            },
        }

    def config(self, rows: int) -> dict[str, object]:
        """The model's configuration, as the protocol's extension has it; `rows` is the most of one request."""
        kind = f"TYPE_{self.datatype}"
        outputs = {name: list(variable.natural_shape) for name, variable in self.model.outputs.items()}
        return {
            "name": self.name,
            "platform": PLATFORM,
            "backend": PLATFORM,
            "max_batch_size": rows,
            "input": [
                {"name": name, "data_type": kind, "dims": list(shape)}
                for name, shape in self.signatures["forward"].inputs.items()
            ],
            "output": [{"name": name, "data_type": kind, "dims": dims} for name, dims in outputs.items()],
        }


def _signature(model: Model, operation: Operation) -> Signature:
    """An operation that the model has."""
    inputs = {name: tuple(variable.natural_shape) for name, variable in model.inputs.items()}
    optional = {name: tuple(variable.natural_shape) for name, variable in model.initial_guesses.items()}
    if operation.takes == "tangents":
        optional |= {TANGENT + name: inputs[name] for name in operation.beside(model)}
    elif operation.takes == "cotangents":
        inputs |= {COTANGENT + name: tuple(model.outputs[name].natural_shape) for name in operation.beside(model)}
    pairs = {f"{out}:{by}": (out, by) for out, by in operation.pairs(model)}
    given = {
        "outputs": tuple(model.outputs),
        "rows": (CONVERGED, ITERATIONS, OUTCOME),
        "blocks": tuple(pairs),
        "along": tuple(TANGENT + out for out in dict.fromkeys(out for out, _ in pairs.values())),
        "gradients": tuple(GRADIENT + name for name in sorted({by for _, by in pairs.values()})),
    }
    outputs = tuple(name for kind in operation.gives for name in given[kind])
    chosen = {} if operation.takes == "tangents" else pairs
    return Signature(operation, DATATYPES[model.dtype], inputs, optional, outputs, chosen)


def require_names(names: Sequence[str]) -> None:
    """Refuse names that no address can have, and names of two models."""
    for place, name in enumerate(names):
        if name in names[:place]:
            raise InputError(f"two models have the name {name!r}. Give one of them another: --name NAME=PATH.")
        if not name or "/" in name or not name.isprintable() or name == "stats":
            raise InputError(f"a model has the name {name!r}, which no address can have: --name NAME=PATH.")
