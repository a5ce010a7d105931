"""Safetensors files with a note of what they are: which tensors, for which model, in which form."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..errors import InputError
from ..writing import draft

KIND = "neml2-aoti"


@dataclass(frozen=True)
class TensorFile:
    """What such a file holds.

    Args:
        tensors: by name.
        notes: text by key; what the file says of itself.
    """

    tensors: dict[str, Tensor]
    notes: dict[str, str]


def write_tensors(path: Path, kind: str, tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> None:
    """Write tensors to a file, whole or not at all.

    Args:
        path: of the file; one that was there is replaced.
        kind: what the file is, such as `parameters 1`; `read_tensors` asks for it.
        tensors: by name.
        notes: text by key.

    Raises:
        InputError: the file cannot be written.
    """
    from safetensors.torch import save_file

    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    with draft(path) as scratch:
        save_file(plain, scratch, {KIND: kind, **notes})


def read_tensors(given: str | os.PathLike[str], kind: str, what: str) -> TensorFile:
    """Read such a file.

    Args:
        given: its path.
        kind: what it must be.
        what: that in words, for messages.

    Returns:
        Its tensors, on the CPU, and its notes.

    Raises:
        InputError: there is no such file, or it is another one.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(given)
    try:
        with safe_open(path, framework="pt") as file:
            notes = file.metadata() or {}
            if notes.get(KIND) != kind:
                held = f"{notes[KIND]!r}" if KIND in notes else "no such note"
                raise InputError(
                    f"{path}: is not {what} (its note {KIND!r} should be {kind!r}; there is {held}). Give another file."
                )
            # A list of names is all that it has; it is no dict.
            return TensorFile({name: file.get_tensor(name) for name in file.keys()}, notes)  # noqa: SIM118
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}). Give {what}.") from None
    except SafetensorError as error:
        raise InputError(f"{path}: is not {what} (no safetensors file: {error}). Give another file.") from None
