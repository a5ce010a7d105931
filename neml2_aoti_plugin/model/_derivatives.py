"""Which derivatives of a model were compiled, and how to compile those that were not."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from .._artifact.schema import Metadata, Shape
from .._artifact.stub import drivers_of
from .._checks import require_names
from ..errors import DerivativeNotCompiledError, InputTypeError
from ._admission import INITIAL_GUESS, Boundary
from ._parameters import PromotedParameters

# What is differentiated by, as callers know it: ("input", name) or ("parameter", name). Autograd holds initial guesses
# in the same form, (INITIAL_GUESS, name).
By = tuple[str, str]
# An output, and what it is differentiated by.
Pair = tuple[str, By]

# The direction of the tangents of a call.
DIRECTION: By = ("direction", "")

# From this schema on, neml2 names the block of a model that is one block in the names of its parameters.
QUALIFIED = 7


class Derivatives:
    """The compiled pairs of a model by names at the boundary, and what is wrong with others."""

    def __init__(self, metadata: Metadata, boundary: Boundary, promoted: PromotedParameters) -> None:
        self._metadata, self._boundary, self._promoted = metadata, boundary, promoted
        # The authored name of all that a call takes, and its shape without batch axes.
        self.known: dict[By, tuple[str, Shape]] = {
            **{("input", name): (v.name, v.natural_shape) for name, v in boundary.inputs.items()},
            **{("parameter", name): (p.name, p.base_shape) for name, p in promoted.specs.items()},
            **{(INITIAL_GUESS, name): (v.name, v.natural_shape) for name, v in boundary.guesses.items()},
        }
        self.known[DIRECTION] = "", ()
        outputs, inputs, parameters = boundary.output_names, boundary.input_names, promoted.public
        pairs = [(outputs[o], ("input", inputs[i])) for o, i in metadata.derivatives]
        pairs += [(outputs[o], ("parameter", parameters[p])) for o, p in metadata.parameter_derivatives]
        # In the order of the metadata.
        self.compiled = dict.fromkeys(pairs)
        # Where to find derivatives by what is no input but a promoted parameter.
        self.of_parameters = {
            name: f"{name!r} is a promoted parameter: call param_jacobian(inputs, params=[{name!r}]), or param_vjp."
            for name in promoted.specs
        }

    def by(self, kind: Literal["input", "parameter"]) -> list[Pair]:
        """The compiled pairs by inputs or by parameters."""
        return [pair for pair in self.compiled if pair[1][0] == kind]

    def require(self, kind: Literal["input", "parameter"]) -> list[Pair]:
        """As `by`; an error that tells how to compile some where there are none."""
        found = self.by(kind)
        if found:
            return found
        metadata = self._metadata
        if kind == "input":
            what, by = "inputs", [variable.name for variable in metadata.inputs]
        else:
            what = f"parameters (promoted: {', '.join(self._promoted.specs) or 'none'})"
            by = [parameter.name for parameter in metadata.parameters] or ["PARAMETER"]
        every = [(out.name, name) for out in metadata.outputs for name in by]
        raise DerivativeNotCompiledError(
            f"{self._boundary.where} was compiled without derivatives by {what}. Compile it with them: "
            f"{compile_command(metadata, self._boundary, every)}"
        )

    def chosen(self, pairs: Sequence[tuple[str, str]] | None, *, or_parameters: bool = False) -> list[Pair]:
        """Pairs of outputs and inputs, each of which must be compiled; if None, all by inputs.

        With `or_parameters` they may be by promoted parameters, too.
        """
        if pairs is None:
            return self.require("input")
        boundary = self._boundary
        found: list[Pair] = []
        for pair in pairs:
            if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(isinstance(name, str) for name in pair):
                raise InputTypeError(f"pairs hold {pair!r}, expected pairs of names such as ('stress', 'strain').")
            out, name = pair
            what = f"{pair!r} in pairs of {boundary.where}"
            require_names([out], boundary.outputs, what, "outputs")
            parameter = or_parameters and name in self._promoted.specs and name not in boundary.inputs
            if not parameter:
                require_names([name], boundary.inputs, what, "inputs", hints=self.of_parameters)
            by = ("parameter" if parameter else "input", name)
            if (out, by) not in self.compiled:
                raise self.missing(out, by)
            found.append((out, by))
        return list(dict.fromkeys(found))

    def by_parameters(self, params: Sequence[str] | None) -> list[Pair]:
        """The compiled pairs by the parameters that are chosen, each of which must have one; if None, by all."""
        pairs = self.require("parameter")
        if params is None:
            return pairs
        here = "is an input: call jacobian for derivatives by inputs."
        self._promoted.require(params, {name: f"{name!r} {here}" for name in self._boundary.inputs})
        for name in params:
            if not any(by[1] == name for _, by in pairs):
                raise self.missing(next(iter(self._boundary.outputs)), ("parameter", name))
        return [pair for name in params for pair in pairs if pair[1][1] == name]

    def missing(self, out: str, by: By) -> DerivativeNotCompiledError:
        """The error for a derivative that has no graph."""
        boundary, (kind, name) = self._boundary, by
        there = ", ".join(f"{o}:{other}" for o, (its, other) in self.compiled if its == kind)
        pair = (boundary.outputs[out].name, self.known[by][0])
        return DerivativeNotCompiledError(
            f"d({out})/d({name}) was not compiled into {boundary.where}; there are: {there or 'none'}. "
            f"Compile it: {compile_command(self._metadata, boundary, [pair])}"
        )


def compile_command(metadata: Metadata, boundary: Boundary, missing: Iterable[tuple[str, str]] = ()) -> str:
    """The command that compiles a model again, with derivatives `missing` by authored names, as a line for a shell.

    The input file, which the artifact does not name, is `INPUT.i`. A driver that the stub has is named in place of the
    model; where neml2-compile would not take one, because names are changed at the boundary, the stub is left alone.
    """
    model = boundary.model
    # In the layout of schema 7 the metadata is in a folder of the device.
    folder = Path(boundary.where).parent if metadata.schema == QUALIFIED else Path(boundary.where)
    # Up to schema 3 the stub is beside the metadata.
    stubs = (folder.parent / f"{model}_aoti.i", folder / f"{model}_aoti.i")
    driver = next((name for stub in stubs for name in drivers_of(stub, model)), None)
    aliases = metadata.aliases
    renamed = bool(aliases.inputs or aliases.outputs or aliases.parameters)
    inputs = [variable.name for variable in metadata.inputs]
    outputs = [variable.name for variable in metadata.outputs]
    wanted = set(missing)
    promoted = [parameter.name for parameter in metadata.parameters]
    promoted += sorted({by for _, by in wanted} - {*inputs, *promoted})
    pairs = {*metadata.derivatives, *(pair for pair in wanted if pair[1] in inputs)}
    by_parameter = {*metadata.parameter_derivatives, *(pair for pair in wanted if pair[1] not in inputs)}
    command = ["neml2-compile", "INPUT.i", *(["--driver", driver] if driver and not renamed else ["--model", model])]
    for name in promoted:
        command += ["-p", _qualified(name, metadata, model)]
    for text in _input_flags(pairs, outputs, inputs):
        command += ["-d", text]
    for out in outputs:
        for name in promoted:
            if (out, name) in by_parameter:
                command += ["-d", f"{out}:{_qualified(name, metadata, model)}"]
    for option, names in (
        ("--rename-input", aliases.inputs),
        ("--rename-output", aliases.outputs),
        ("--rename-parameter", aliases.parameters),
    ):
        for inside, outside in names.items():
            command += [option, f"{inside}:{outside}"]
    dtype = str(boundary.dtype).removeprefix("torch.")
    command += ["--device", boundary.device.type] if boundary.device.type != "cpu" else []
    command += ["--dtype", dtype] if dtype != "float64" else []
    command += ["--no-stub"] if driver and renamed else []
    return shlex.join([*command, "--output-dir", str(folder.parent)])


def _input_flags(pairs: set[tuple[str, str]], outputs: list[str], inputs: list[str]) -> list[str]:
    """What `-d` says for (output, input) pairs, as briefly as it can."""
    if pairs and all((out, name) in pairs for out in outputs for name in inputs):
        return [":"]
    found = []
    for out in outputs:
        own = [name for name in inputs if (out, name) in pairs]
        found += [f"{out}:"] if own == inputs else [f"{out}:{name}" for name in own]
    return found


def _qualified(name: str, metadata: Metadata, model: str) -> str:
    """A parameter's name as neml2 3.1.0 takes it."""
    return f"{model}.{name}" if metadata.schema < QUALIFIED and "." not in name else name
