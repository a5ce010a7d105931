"""What a command is pointed at: an artifact, or a stub that names one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._artifact.compatibility import files_of
from .._artifact.decode import read_metadata
from .._artifact.layout import DEVICE_METADATA, absolute, device_files, find_root, leaves, root_of
from .._artifact.locate import Place, locate
from .._artifact.schema import Metadata
from .._artifact.stub import blocks, is_input_file, model_in
from ..errors import ArtifactNotFoundError, InputError, UnknownNameError
from ..model import Model

if TYPE_CHECKING:
    import nmhit


@dataclass(frozen=True)
class Target:
    """An artifact, and the stub through which it was named.

    Args:
        artifact: path of the artifact, absolute.
        model: name of the model.
        stub: the input file; None where the artifact itself was named.
        solver: Newton settings that the stub gives in place of the artifact's.
    """

    artifact: Path
    model: str
    stub: Path | None = None
    solver: dict[str, Any] | None = None

    def place(self, device: str | None = None, dtype: str | None = None) -> Place:
        """The leaf for a device and a dtype; see `locate`.

        Raises:
            InputError: there is no such leaf.
            ArtifactError: the artifact may not be loaded, is not as it was sealed, or is damaged.
        """
        try:
            return locate(self.artifact, device, dtype)
        except ArtifactNotFoundError as error:
            raise InputError(str(error)) from None

    def metadata(self, device: str | None = None, dtype: str | None = None) -> Metadata:
        """The metadata of a leaf; the arguments and errors are those of `place`."""
        place = self.place(device, dtype)
        return read_metadata(place.metadata, place.folder, solver=self.solver)

    def files(self, device: str | None = None, dtype: str | None = None) -> list[Path]:
        """The files that loading a leaf reads; the arguments and errors are those of `place`."""
        place, names = self.place(device, dtype), files_of(self.metadata(device, dtype))
        return [*([self.stub] if self.stub is not None else []), place.metadata, *(place.leaf / n for n in names)]

    def load(self, device: str | None = None, dtype: str | None = None, **options: Any) -> Model:
        """Load the model.

        Args:
            device: see `Model`.
            dtype: see `Model`.
            options: further arguments of `Model`.

        Raises:
            InputError: there is no such leaf.
            ArtifactError: the artifact cannot run here.
        """
        self.place(device, dtype)
        return Model(self.artifact, device, dtype, solver=self.solver, **options)


def find_target(given: str | os.PathLike[str], model: str | None = None, overrides: tuple[str, ...] = ()) -> Target:
    """Find the artifact that a path leads to.

    Args:
        given: an artifact's folder, its metadata file, or a stub.
        model: name of the model, for a stub with several; it is checked for others.
        overrides: HIT overrides of a stub.

    Returns:
        The target.

    Raises:
        InputError: there is neither an artifact nor a stub, or the stub has no such model.
    """
    path = absolute(given)
    if is_input_file(path):
        name, stub = model_in(path, model, overrides)
        return Target(stub.artifact, name, path, stub.solver)
    try:
        root = root_of(path)
    except ArtifactNotFoundError as error:
        raise InputError(str(error)) from None
    found = model_of(path, root)
    if model is not None and model != found:
        raise UnknownNameError(
            f"{path} holds the model {found!r}, not {model!r}. Leave the name out, or give that one."
        )
    return Target(path, found)


def model_of(path: Path, root: Path) -> str:
    """The name of the model that an artifact holds.

    Args:
        path: to the artifact.
        root: its folder.
    """
    if find_root(path) is not None:
        return root.name or root.resolve().name
    files = device_files(path)
    return files[0].name.removesuffix(DEVICE_METADATA)


def places(target: Target) -> list[Place]:
    """The leaves of a target's artifact, each with its files, device and dtype.

    Raises:
        ArtifactError: the artifact may not be loaded, is not as it was sealed, or is damaged.
    """
    found = find_root(target.artifact)
    if found is not None:
        return [locate(found[0], device, dtype) for device, dtype in leaves(found[0])]
    files = device_files(target.artifact)
    return [locate(file) for file in files]


def require_block(root: nmhit.Node, section: str, name: str, path: Path) -> nmhit.Node:
    """A block of an input file.

    Args:
        root: the file, parsed.
        section: such as `Drivers`.
        name: of the block.
        path: of the file.

    Raises:
        UnknownNameError: there is no such block.
    """
    found = blocks(root, section)
    if name not in found:
        raise UnknownNameError(
            f"{path} has no block [{section}/{name}]; in [{section}] there are: {', '.join(found) or 'none'}."
        )
    return found[name]
