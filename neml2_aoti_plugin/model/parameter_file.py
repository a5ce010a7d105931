"""Values of promoted parameters in a file that says for which artifact they are.

They are meant for an artifact by its metadata file: the same for all devices and dtypes, and for a compile of the same
input by the same neml2 on another machine.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import InputError, UnknownNameError
from .promoted import PromotedParameters
from .tensor_file import TensorFile, read_tensors, write_tensors

FILE_KIND = "parameters 1"
WHAT = "a file of parameters (Model.save_parameters, or neml2-aoti params --out)"
MODEL, DIGEST = "model", "metadata_sha256"


def write_parameters(path: Path, model: str, digest: str, values: Mapping[str, Tensor]) -> None:
    """Write the values of a model's parameters.

    Args:
        path: of the file.
        model: name of the model.
        digest: SHA-256 of the artifact's metadata file.
        values: by boundary name, `(*batch, *base)`.

    Raises:
        InputError: there are none, or the file cannot be written.
    """
    if not values:
        raise InputError(
            f"the model {model!r} has no promoted parameters to write. Promote them at compile time: neml2-compile "
            f"INPUT --model {model} -p PARAMETER."
        )
    write_tensors(path, FILE_KIND, values, {MODEL: model, DIGEST: digest})


def read_parameters(path: str | os.PathLike[str]) -> TensorFile:
    """Read a file of parameters; see `read_tensors`."""
    return read_tensors(path, FILE_KIND, WHAT)


def require_same(found: TensorFile, digest: str, path: str, where: str) -> None:
    """Refuse a file that was written for another artifact.

    Args:
        found: what it holds.
        digest: SHA-256 of this artifact's metadata file.
        path: of the file.
        where: this artifact, for messages.

    Raises:
        InputError: it was written for another.
    """
    if found.notes.get(DIGEST) != digest:
        raise InputError(
            f"{path}: holds parameters of another artifact (model {found.notes.get(MODEL)!r}), not of {where}. Take "
            f"that artifact; or, if the values are meant for this one all the same: neml2-aoti params {where} --from "
            f"{path} --out NEW.safetensors"
        )


def set_values(found: TensorFile, promoted: PromotedParameters, path: str) -> None:
    """Set a model's parameters to the values that a file holds, whichever artifact it was made for.

    Raises:
        InputError: its names or shapes are not those of the model's parameters.
    """
    there, wanted = set(found.tensors), set(promoted.specs)
    if there != wanted:
        raise UnknownNameError(
            f"{path}: holds {', '.join(sorted(there)) or 'nothing'}, expected the model's promoted parameters "
            f"{', '.join(sorted(wanted)) or '(it has none)'}."
        )
    for name, value in found.tensors.items():
        present = promoted.values[name]
        try:
            promoted.set(name, value.to(present.device, present.dtype))
        except InputError as error:
            raise InputError(f"{path}: {error}") from None


def detached(values: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Copies of the parameters as they are now; float64 where they are numbers with a fraction."""
    return {n: v.detach().to(torch.float64) if v.is_floating_point() else v.detach() for n, v in values.items()}
