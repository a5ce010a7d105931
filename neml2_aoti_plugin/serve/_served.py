"""A model as the service has it: its name, its operations, and what is told of it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..model import Model, Outcome
from ._operations import DATATYPES, Missing, Operation, operations_of

PLATFORM = "neml2_aoti"
# The protocol asks for versions; an artifact is one.
VERSION = "1"


@dataclass(frozen=True)
class Source:
    """Where a model is loaded from.

    Args:
        name: under which it is served.
        artifact: the artifact's folder.
        device: see `Model`.
        dtype: see `Model`.
        solver: Newton settings in place of the artifact's own.
        parameters: a file with values of promoted parameters.
    """

    name: str
    artifact: Path
    device: str | None = None
    dtype: str | None = None
    solver: Mapping[str, Any] | None = None
    parameters: str | os.PathLike[str] | None = None

    def load(self) -> Model:
        """Load the model; raises what `Model` raises."""
        return Model(
            self.artifact, self.device, self.dtype, solver=self.solver, parameters=self.parameters
        ).requires_grad_(False)


@dataclass(frozen=True)
class Served:
    """A loaded model under its name.

    Args:
        name: under which it is served.
        model: the model; nobody changes it any more.
        operations: by name.
        implicit: whether rows may fail to converge.
        per_row: whether each promoted parameter has one value, in whose place each row may have its own.
        heads: of requests with binary data, by their JSON; `reading` keeps them.
    """

    name: str
    model: Model
    operations: dict[str, Operation | Missing] = field(init=False)
    implicit: bool = field(init=False)
    per_row: bool = field(init=False)
    heads: dict[bytes, Any] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        model = self.model
        shapes = model.parameter_base_shapes
        object.__setattr__(self, "operations", operations_of(model))
        object.__setattr__(self, "implicit", model.solver is not None)
        object.__setattr__(
            self, "per_row", all(list(x.shape) == shapes[name] for name, x in model.named_parameters().items())
        )

    @property
    def datatype(self) -> str:
        """The protocol's name of the model's dtype."""
        return DATATYPES[self.model.dtype]

    @property
    def metadata(self) -> dict[str, object]:
        """The protocol's metadata of the model; `parameters` tells what requests may ask for."""
        forward = self.operations["forward"]
        assert isinstance(forward, Operation)

        outputs = [
            {"name": name, "datatype": self.datatype, "shape": [-1, *known.natural_shape]}
            for name, known in self.model.outputs.items()
        ]
        return {
            "name": self.name,
            "versions": [VERSION],
            "platform": PLATFORM,
            "inputs": [port.metadata for port in forward.inputs.values()],
            "outputs": outputs,
            "parameters": {
                "operations": {
                    known.name: {
                        "inputs": [port.metadata for port in known.inputs.values()],
                        "optional_inputs": [port.metadata for port in known.optional.values()],
                        "outputs": list(known.outputs),
                    }
                    for known in self.operations.values()
                    if isinstance(known, Operation)
                },
                "promoted_parameters": {
                    name: {"shape": list(value.shape), "value": value.detach().cpu().tolist()}
                    for name, value in self.model.named_parameters().items()
                },
                # What the numbers in the output @outcome mean.
                "outcomes": [outcome.words for outcome in Outcome],
                "digest": self.model.digest,
            },
        }

    def config(self, rows: int) -> dict[str, object]:
        """The model's configuration, as the protocol's extension has it.

        Args:
            rows: the most that one request may have.
        """
        forward = self.operations["forward"]
        assert isinstance(forward, Operation)
        kind = f"TYPE_{self.datatype}"
        return {
            "name": self.name,
            "platform": PLATFORM,
            "backend": PLATFORM,
            "max_batch_size": rows,
            "input": [{"name": n, "data_type": kind, "dims": list(port.shape)} for n, port in forward.inputs.items()],
            "output": [
                {"name": n, "data_type": kind, "dims": list(known.natural_shape)}
                for n, known in self.model.outputs.items()
            ],
        }


def require_names(names: Sequence[str]) -> None:
    """Refuse names that no address can have, and names of two models.

    Raises:
        InputError: there is such a name.
    """
    for place, name in enumerate(names):
        if name in names[:place]:
            raise InputError(f"two models have the name {name!r}. Give one of them another: --name NAME=PATH.")
        if not name or "/" in name or not name.isprintable() or name == "stats":
            raise InputError(f"a model has the name {name!r}, which no address can have: --name NAME=PATH.")
