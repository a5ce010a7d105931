"""Values of promoted parameters in a file that says for which artifact they are.

They are meant for an artifact by its metadata file: the same for all devices and dtypes, and for a compile of the same
input by the same neml2 on another machine.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .._tensor_files import Header, read_tensors, write_tensors
from ..errors import InputError, UnknownNameError
from ._promoted import PromotedParameters

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
            f"the model {model!r} has no promoted parameters to write. Promote them at compile time: "
            "neml2-compile ... -p PARAMETER."
        )
    write_tensors(path, FILE_KIND, values, {MODEL: model, DIGEST: digest})


def load_parameters(path: str | os.PathLike[str], promoted: PromotedParameters, digest: str | None, where: str) -> None:
    """Set a model's parameters to the values in a file.

    Args:
        path: of the file.
        promoted: the parameters.
        digest: SHA-256 of the metadata file that it must have been written for; None for any.
        where: the artifact, for messages.

    Raises:
        InputError: there is no such file, it was written for another artifact, or it holds other parameters. None is
            set then.
    """

    def check(header: Header) -> Iterable[str]:
        header.require_kind(FILE_KIND, WHAT)
        if digest is not None and header.notes.get(DIGEST) != digest:
            raise InputError(
                f"{path}: holds parameters of another artifact (model {header.notes.get(MODEL)!r}), not of {where}. "
                f"Take that artifact; or, if the values are meant for this one all the same: neml2-aoti params {where} "
                f"--from {path} --out NEW.safetensors"
            )
        if header.claims.keys() != promoted.specs.keys():
            raise UnknownNameError(
                f"{path}: holds {', '.join(sorted(header.claims)) or 'nothing'}, expected the model's promoted "
                f"parameters {', '.join(sorted(promoted.specs)) or '(it has none)'}."
            )
        for name, spec in promoted.specs.items():
            shape, base = header.claims[name].shape, spec.base_shape
            if 0 in shape or shape[len(shape) - len(base) :] != base:
                wanted = ", ".join(("*batch", *map(str, base)))
                raise InputError(f"{path}: {name!r} has shape {shape}, expected ({wanted}), and no empty batch.")
        return promoted.specs

    values = {}
    for name, value in read_tensors(path, WHAT, check).tensors.items():
        own = promoted.values[name]
        values[name] = value.to(own.device, own.dtype)
        # A parameter may hold whole numbers, or fewer digits.
        same = values[name].isfinite() if own.is_floating_point() else values[name].cpu().to(value.dtype) == value
        if not bool(same.all()):
            raise InputError(f"{path}: {name!r} holds numbers that {own.dtype} does not have.")
    for name, value in values.items():
        promoted.set(name, value)


def is_parameter_file(path: Path) -> bool:
    """Whether a file is one of parameters, of whatever artifact."""

    def check(header: Header) -> Iterable[str]:
        header.require_kind(FILE_KIND, WHAT)
        return ()

    try:
        read_tensors(path, WHAT, check)
    except InputError:
        return False
    return True


def detached(values: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Copies of the parameters as they are now, in float64."""
    return {name: value.detach().to(torch.float64) for name, value in values.items()}
