"""What a command is pointed at: an artifact, or a stub that names one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._artifact.decode import read_metadata
from .._artifact.locate import Place, absolute, artifact_at, dtype_name, leaves, locate
from .._artifact.schema import Metadata
from .._artifact.stub import blocks, is_input_file, model_in
from .._artifact.upgrade import RELEASES
from ..errors import ArtifactError, ArtifactNotFoundError, InputError, UnknownNameError
from ..model import Model
from .output import waits_for

if TYPE_CHECKING:
    import nmhit


@dataclass(frozen=True)
class Target:
    """An artifact, with the leaf that was asked for, and the stub through which it was named.

    A leaf that is not there is an `InputError`; an `ArtifactError` says that the artifact may not be loaded, is not as
    it was sealed, or is damaged.
    """

    artifact: Path  # absolute
    model: str
    device: str | None = None
    dtype: str | None = None
    stub: Path | None = None
    solver: dict[str, Any] | None = None  # Newton settings that the stub gives in place of the artifact's

    def place(self) -> Place:
        """The leaf; see `locate`."""
        try:
            return locate(self.artifact, self.device, self.dtype)
        except ArtifactNotFoundError as error:
            raise InputError(str(error)) from None

    def places(self) -> list[Place]:
        """All leaves."""
        there = artifact_at(self.artifact)
        if there.shared:
            found = [locate(there.root, device, dtype) for device, dtype in leaves(there.root)]
        else:
            found = [locate(file) for file in there.metadata]
        if not found:
            raise ArtifactError(f"{self.artifact} has metadata and no leaf (a folder DEVICE/DTYPE). Copy it whole.")
        return found

    def metadata(self) -> Metadata:
        """The metadata of the leaf, with the stub's Newton settings."""
        return read_metadata(self.place(), solver=self.solver)

    def files(self) -> list[Path]:
        """The files that loading the leaf reads."""
        place, names = self.place(), self.metadata().files
        return [*([self.stub] if self.stub is not None else []), place.metadata, *(place.leaf / n for n in names)]

    def load(self) -> Model:
        """Load the model."""
        self.place()
        waits_for(f"loading {self.artifact}")
        return Model(self.artifact, self.device, self.dtype, solver=self.solver)


def find_target(
    given: str | os.PathLike[str],
    model: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    overrides: tuple[str, ...] = (),
) -> Target:
    """Find the artifact that a path leads to: its folder, its metadata file, or a stub, which overrides may change.

    The name of the model chooses among those of a stub, and is checked for an artifact.
    """
    path = absolute(given)
    if is_input_file(path):
        name, stub = model_in(path, model, overrides)
        return Target(stub.artifact, name, device, dtype, path, stub.solver)
    try:
        found = artifact_at(path).model
    except ArtifactNotFoundError as error:
        raise InputError(str(error)) from None
    if model is not None and model != found:
        raise UnknownNameError(
            f"{path} holds the model {found!r}, not {model!r}. Leave the name out, or give that one."
        )
    return Target(path, found, device, dtype)


def leaf_name(place: Place) -> str:
    """A leaf as reports name it, `device/dtype`."""
    return f"{place.device.type}/{dtype_name(place.dtype)}"


def release_of(schema: int) -> str:
    """The neml2 releases that write a schema."""
    return RELEASES.get(schema, "none; an unreleased neml2")


def lag(name: str) -> tuple[str, int]:
    """Split `x~2`, the value of `x` two steps before, into `x` and 2; a name without a lag has 0."""
    base, mark, steps = name.rpartition("~")
    return (base, int(steps)) if mark and steps.isdigit() else (name, 0)


def require_block(root: nmhit.Node, section: str, name: str, path: Path) -> nmhit.Node:
    """The block of a parsed input file, such as `[Drivers/name]`."""
    found = blocks(root, section)
    if name not in found:
        raise UnknownNameError(
            f"{path} has no block [{section}/{name}]; in [{section}] there are: {', '.join(found) or 'none'}."
        )
    return found[name]
