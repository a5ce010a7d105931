"""How a model travels: where its artifact is and which leaf, with digests that tell whether it is the same one."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from ..artifact.place import Place
from ..errors import ArtifactError
from ..settings import NewtonSettings

# By file: size and time of last change when the model was loaded.
Files = dict[Path, tuple[int, int]]


@dataclass(frozen=True)
class Recipe:
    """What a pickle of a model holds beside its parameters.

    Args:
        artifact: as it was given, absolute.
        device: of the leaf.
        dtype: of the leaf.
        settings: Newton settings that were set on the model.
        digests: SHA-256 by name of file.
    """

    artifact: Path
    device: torch.device
    dtype: torch.dtype
    settings: NewtonSettings | None
    digests: dict[str, str]


def files_of(place: Place) -> Files:
    """The files that a leaf is read from.

    Args:
        place: the leaf.
    """
    return {path: _stamp(path) for path in (place.metadata, *sorted(place.leaf.glob("*.pt2")))}


def digests(files: Files) -> dict[str, str]:
    """The SHA-256 digests of files by name.

    Args:
        files: as they were when the model was loaded.

    Raises:
        ArtifactError: a file is no longer what was loaded.
    """
    for path, stamp in files.items():
        if not path.is_file() or _stamp(path) != stamp:
            raise ArtifactError(
                f"{path} was changed or removed after the model was loaded, so a copy of the model would be another "
                "one. Load the model again, then copy or pickle it."
            )
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def require_same(recipe: Recipe, place: Place) -> None:
    """Refuse an artifact that is not the one of the recipe.

    Args:
        recipe: of a pickled model.
        place: what there is in its place.

    Raises:
        ArtifactError: a file differs, is missing or was added.
    """
    found = digests(files_of(place))
    differing = sorted(n for n in recipe.digests.keys() | found.keys() if recipe.digests.get(n) != found.get(n))
    if differing:
        raise ArtifactError(
            f"{recipe.artifact} is not the artifact that the pickled model was made from: {', '.join(differing)} "
            "differ. Put the same artifact there, or load this one anew instead of unpickling."
        )


def _stamp(path: Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns
