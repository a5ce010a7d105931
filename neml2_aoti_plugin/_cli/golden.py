"""Golden files: points with the values and derivatives that a model gave there, to hold a later one against."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from .._artifact.layout import root_of
from .._tensor_files import Header, read_tensors, write_tensors
from ..errors import InputError
from ..model import Model
from .points import Evaluated, Points
from .target import Target

KIND = "golden 1"
WHAT = "a golden file (neml2-aoti verify --record)"


def golden_beside(target: Target) -> Path | None:
    """The golden file beside an artifact, if there is one, by which it is compared where none is named."""
    root = root_of(target.artifact)
    found = root.with_name(f"{root.name}.golden.safetensors")
    return found if found.is_file() else None


def write_golden(path: Path, model: str, digest: str, found: Evaluated) -> None:
    """Write what a model of that name gave, whose metadata has that SHA-256."""
    tensors = {f"input.{name}": value for name, value in found.points.inputs.items()}
    tensors |= {f"output.{name}": value for name, value in found.outputs.items()}
    tensors |= {f"derivative.{number}": block for number, block in enumerate(found.blocks.values())}
    notes = {"model": model, "metadata_sha256": digest, "derivatives": json.dumps(list(found.blocks))}
    write_tensors(path, KIND, tensors, notes)


def read_golden(path: Path, model: Model, name: str) -> Evaluated:
    """Read a golden file of the model of that name."""
    pairs: list[tuple[str, str]] = []

    def check(header: Header) -> Iterable[str]:
        header.require_kind(KIND, WHAT)
        other = f"{path}: is of another model ({header.notes.get('model')!r})"
        known = {f"{kind}.{n}": v.natural_shape for kind, of in variables.items() for n, v in of.items()}
        blocks = {name for name in header.claims if name.startswith("derivative.")}
        differing = sorted(name.partition(".")[2] for name in (header.claims.keys() - blocks) ^ known.keys())
        if differing:
            raise InputError(
                f"{other}, not of {name!r}: {', '.join(differing)} are not in both. Give the golden file of this model."
            )
        pairs.extend((str(out), str(by)) for out, by in json.loads(header.notes.get("derivatives", "[]")))
        if not set(pairs) <= set(there) or blocks != {f"derivative.{number}" for number in range(len(pairs))}:
            raise InputError(f"{other}: it holds the derivatives {pairs}, in {name!r} there are: {there or 'none'}.")
        rows = {claim.shape[:1] for claim in header.claims.values()}
        if len(rows) != 1 or rows & {(), (0,)}:
            raise InputError(f"{path}: its tensors have different numbers of rows, or none. Give another golden file.")
        for of, natural in known.items():
            shape = header.claims[of].shape
            # Artifacts do not record the sites of outputs.
            if shape[len(shape) - len(natural) :] != natural:
                raise InputError(f"{other}: {of!r} has shape {shape[1:]} a row, in {name!r} it is {natural}.")
        return header.claims

    variables = {"input": model.inputs, "output": model.outputs}
    there = [*model.derivative_pairs, *model.parameter_derivative_pairs]
    found = read_tensors(path, WHAT, check).tensors
    inputs, outputs = ({name: found[f"{kind}.{name}"] for name in of} for kind, of in variables.items())
    blocks = {pair: found[f"derivative.{number}"] for number, pair in enumerate(pairs)}
    return Evaluated(Points({n: v.to(model.dtype) for n, v in inputs.items()}, path.name), outputs, blocks)
