"""The command that compiles a model again, with what it has and what is missing."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path

from .._artifact.schema import Metadata
from .._artifact.stub import drivers_of
from ._admission import Boundary

Pair = tuple[str, str]

# From this schema on, neml2 names the block of a model that is one block in the names of its parameters.
QUALIFIED = 7


def compile_command(metadata: Metadata, boundary: Boundary, missing: Iterable[Pair] = ()) -> str:
    """Write the whole command: all that was compiled, and derivatives that are missing.

    Args:
        metadata: of the artifact.
        boundary: of the model.
        missing: (output, input or parameter) by authored name; a parameter need not be promoted yet.

    Returns:
        A line for a shell; the input file, which the artifact does not name, is `INPUT.i`. It keeps what the stub has:
        a driver of the model is named in place of the model, and where neml2-compile would not take one, because names
        are changed at the boundary, the stub is left alone.
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


def _input_flags(pairs: set[Pair], outputs: list[str], inputs: list[str]) -> list[str]:
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
