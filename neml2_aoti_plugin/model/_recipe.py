"""How a model travels: where its artifact is and which leaf, with digests that tell whether it is the same one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from .._artifact import files
from .._artifact.files import Folder
from .._artifact.locate import Place
from .._artifact.package import Package
from .._artifact.schema import Metadata
from ..errors import ArtifactError
from ..settings import NewtonSettings


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


@dataclass(frozen=True)
class Origin:
    """The files that a model was loaded from, as they were read then.

    Args:
        folder: of the artifact.
        metadata: the metadata file.
        digests: SHA-256 of it and of the packages that it names, by path.
    """

    folder: Folder
    metadata: Path
    digests: dict[Path, str]

    @property
    def by_name(self) -> dict[str, str]:
        """The digests by name of file."""
        return {path.name: digest for path, digest in self.digests.items()}

    @property
    def digest(self) -> str:
        """One SHA-256 for all of them."""
        lines = (f"{digest} {name}\n" for name, digest in sorted(self.by_name.items()))
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def origin(place: Place, metadata: Metadata, packages: Iterable[Package]) -> Origin:
    """What a model is made of, once it has been looked over."""
    digests = {place.metadata: metadata.digest, **{package.file: package.digest for package in packages}}
    return Origin(place.folder, place.metadata, digests)


def require_unchanged(made_of: Origin) -> None:
    """Refuse to copy a model whose artifact is no longer there as it was: the copy would be another one.

    Args:
        made_of: its files when it was loaded.

    Raises:
        ArtifactError: a file is no longer what was loaded.
    """
    for path, digest in made_of.digests.items():
        kind = files.METADATA if path == made_of.metadata else files.PACKAGE
        try:
            same = files.digest_file(path, kind, made_of.folder.root) == digest
        except (ArtifactError, FileNotFoundError):
            same = False
        if not same:
            raise ArtifactError(
                f"{path} was changed or removed after the model was loaded, so a copy of the model would be another "
                "one. Load the model again, then copy or pickle it."
            )


def require_same(recipe: Recipe, found: Origin) -> None:
    """Refuse an artifact that is not the one of the recipe.

    Args:
        recipe: of a pickled model.
        found: what there is in its place.

    Raises:
        ArtifactError: a file differs, is missing or was added.
    """
    there = found.by_name
    differing = sorted(n for n in recipe.digests.keys() | there.keys() if recipe.digests.get(n) != there.get(n))
    if differing:
        raise ArtifactError(
            f"{recipe.artifact} is not the artifact that the pickled model was made from: {', '.join(differing)} "
            "differ. Put the same artifact there, or load this one anew instead of unpickling."
        )
