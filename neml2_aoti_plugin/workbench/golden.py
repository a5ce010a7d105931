"""Golden files: points with the values and derivatives that a model gave there, to hold a later one against."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..errors import InputError
from ..model import Model
from ..model.tensor_file import read_tensors, write_tensors
from .points import Points, Tensors

KIND = "golden 1"
WHAT = "a golden file (neml2-aoti verify --record)"
SUFFIX = ".golden.safetensors"

Blocks = dict[tuple[str, str], Tensor]


@dataclass(frozen=True)
class Golden:
    """What a model gave at some points.

    Args:
        points: the inputs.
        outputs: by name, `(rows, *sub_batch, *base)`.
        blocks: derivatives by (output, input or parameter), as `Model.jacobian` gives them.
        digest: SHA-256 of the metadata of the artifact that gave them.
    """

    points: Points
    outputs: Tensors
    blocks: Blocks
    digest: str


def beside(artifact: Path) -> Path:
    """Where a golden file is looked for when none is named: `elasticity.golden.safetensors` beside `elasticity`."""
    return artifact.with_name(artifact.name + SUFFIX)


def write_golden(path: Path, model: str, golden: Golden) -> None:
    """Write a golden file.

    Args:
        path: of the file.
        model: name of the model.
        golden: what to write.

    Raises:
        InputError: the file cannot be written.
    """
    tensors = {f"input.{name}": value for name, value in golden.points.inputs.items()}
    tensors |= {f"output.{name}": value for name, value in golden.outputs.items()}
    tensors |= {f"derivative.{number}": block for number, block in enumerate(golden.blocks.values())}
    notes = {"model": model, "metadata_sha256": golden.digest, "derivatives": json.dumps(list(golden.blocks))}
    write_tensors(path, KIND, tensors, notes)


def read_golden(path: Path, model: Model, name: str) -> Golden:
    """Read a golden file.

    Args:
        path: of the file.
        model: that is to be held against it.
        name: of that model.

    Raises:
        InputError: it is no golden file, or that of another model.
    """
    found = read_tensors(path, KIND, WHAT)
    inputs = {n.removeprefix("input."): v for n, v in found.tensors.items() if n.startswith("input.")}
    outputs = {n.removeprefix("output."): v for n, v in found.tensors.items() if n.startswith("output.")}
    pairs = [tuple(pair) for pair in json.loads(found.notes.get("derivatives", "[]"))]
    blocks = {(out, by): found.tensors[f"derivative.{number}"] for number, (out, by) in enumerate(pairs)}
    differing = sorted(set(inputs) ^ set(model.inputs)) + sorted(set(outputs) ^ set(model.outputs))
    if differing:
        raise InputError(
            f"{path}: is of another model ({found.notes.get('model')!r}), not of {name!r}: {', '.join(differing)} are "
            "not in both. Give the golden file of this model."
        )
    for kind, given, variables in (("input", inputs, model.inputs), ("output", outputs, model.outputs)):
        for of, value in given.items():
            shape = variables[of].natural_shape
            # Artifacts do not tell the sites of outputs.
            if tuple(value.shape[value.ndim - len(shape) :]) != shape:
                raise InputError(
                    f"{path}: is of another model ({found.notes.get('model')!r}): the {kind} {of!r} has shape "
                    f"{tuple(value.shape[1:])} a row, in {name!r} it is {shape}."
                )
    points = Points({n: v.to(model.dtype) for n, v in inputs.items()}, path.name)
    return Golden(points, outputs, blocks, found.notes.get("metadata_sha256", ""))
