"""What callers of any kind may ask of a model, and what they may give for one.

The service, long runs and the command offer, check and make operations from this one list.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal

from .._artifact.locate import absolute
from .._artifact.stub import is_input_file, model_in
from ..errors import InputError, InputTypeError
from ._model import Model


@dataclass(frozen=True)
class Operation:
    """One operation: the method of `Model` that has its name.

    Args:
        name: of the operation and of the method.
        takes: what the method takes behind the inputs, a dict of tensors by name; nothing but `param_overrides` if "".
        gives: what the method gives, in its order; "rows" is how each row fared, with NaN in those that failed.
        by: which derivatives it needs.
    """

    name: str
    takes: Literal["", "tangents", "cotangents"]
    gives: tuple[Literal["outputs", "rows", "blocks", "along", "gradients"], ...]
    by: Literal["", "inputs", "parameters"]

    def method(self, model: Model) -> Callable[..., Any]:
        """The method of a model: of inputs, tangents or cotangents where it takes them, and `param_overrides`."""
        found: Callable[..., Any] = getattr(model, self.name)
        return found

    def pairs(self, model: Model) -> list[tuple[str, str]]:
        """The compiled (output, input) or (output, parameter) pairs that it works with."""
        if not self.by:
            return []
        return model.derivative_pairs if self.by == "inputs" else model.parameter_derivative_pairs

    def beside(self, model: Model) -> tuple[str, ...]:
        """Names of the inputs that may have tangents, or of the outputs that must have cotangents."""
        pairs = self.pairs(model)
        outs = tuple(dict.fromkeys(out for out, _ in pairs))
        if self.takes == "cotangents":
            return outs
        # A direction must find all the pairs that it needs.
        return tuple(n for n in model.inputs if pairs and all((out, n) in pairs for out in outs)) if self.takes else ()

    def lacking(self, model: Model) -> str:
        """Why a model does not have it, with the flag of neml2-compile; empty where it does."""
        if not self.by or self.pairs(model):
            return ""
        if self.by == "inputs":
            return "the model was compiled without derivatives by its inputs: neml2-compile ... -d OUTPUT:INPUT"
        return (
            "the model was compiled without derivatives by promoted parameters: neml2-compile ... -p PARAMETER "
            "-d OUTPUT:PARAMETER"
        )


OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation("forward", "", ("outputs",), ""),
        Operation("solve", "", ("outputs", "rows"), ""),
        Operation("jacobian", "", ("outputs", "blocks"), "inputs"),
        Operation("jvp", "tangents", ("outputs", "along"), "inputs"),
        Operation("param_jacobian", "", ("outputs", "blocks"), "parameters"),
        Operation("param_vjp", "cotangents", ("gradients",), "parameters"),
    )
}


def operation(name: str, among: Collection[str] = OPERATIONS) -> Operation:
    """The operation of that name; an `InputError` that lists `among` where there is none."""
    if name not in among:
        raise InputError(f"operation is {name!r}, expected one of {', '.join(among)}.")
    return OPERATIONS[name]


def as_model(given: object, device: str | None = None) -> Model:
    """A `Model`, or one loaded from the path of an artifact or of its stub."""
    if isinstance(given, Model):
        return given
    if not isinstance(given, (str, os.PathLike)):
        raise InputTypeError(
            f"model is a {type(given).__name__}, expected a Model or the path of an artifact or of its stub. Of a "
            "model that neml2.load_model gave, take the path that it was loaded from."
        )
    return Model(given, device)


def name_at(path: str | os.PathLike[str]) -> str:
    """The name of the model that a path leads to: as the stub has it, else that of the artifact's folder."""
    found = absolute(path)
    return model_in(found)[0] if is_input_file(found) else found.name
