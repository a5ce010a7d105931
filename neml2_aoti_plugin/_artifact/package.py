"""Read a `.pt2` package without running it: what it was built for and what its graph takes and returns.

The generated wrapper source inside the package spells out dtype, rank and fixed extents of each argument. Nothing else
tells them: the loader checks nothing, and the metadata file does not record the traced batch axes.
"""

from __future__ import annotations

import json
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import ArtifactError, ArtifactNotFoundError
from . import files
from .archive import open_archive, read_text
from .folder import Contents, Folder, folder_at
from .telling import reason

_CHECK = r'"input_handles\[(\d+)\]: '
_DTYPE = re.compile(_CHECK + r'unmatched dtype, "\s*<< "expected: " << \w+ << "\(at::k(\w+)\)')
_FIXED = re.compile(_CHECK + r'unmatched dim value at (\d+), "\s*<< "expected: (\d+), ')
_DYNAMIC = re.compile(_CHECK + r"dim value is too (?:small|large) at (\d+)")
_STRIDE = re.compile(_CHECK + r"unmatched stride value at (\d+)")
_ARITY = re.compile(r"AOTInductorModelBase\(\s*(\d+),\s*(\d+),")
_CALL = re.compile(r'in_spec_ = R"\((.*?)\)";', re.DOTALL)
_DTYPES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
}


@dataclass(frozen=True)
class Argument:
    """One input of a graph.

    Args:
        dtype: of the tensor.
        extents: size of each axis; None for one that is free.
        kind: name of the class in which the exporter handed it over; empty for a plain tensor.
    """

    dtype: torch.dtype
    extents: tuple[int | None, ...]
    kind: str = ""


@dataclass(frozen=True)
class Signature:
    """What a graph takes and how many tensors it returns."""

    arguments: tuple[Argument, ...]
    outputs: int


@dataclass(frozen=True)
class Build:
    """What a package was built for; a field is empty where the package does not tell."""

    device: str = ""
    platform: str = ""
    machine: str = ""
    cpu_isa: str = ""
    compute_capability: str = ""


@dataclass(frozen=True)
class Package:
    """A package that was looked over, and may run.

    Args:
        file: where it was then.
        folder: of its artifact.
        digest: SHA-256 of the bytes that were looked over; what has another one is another package.
        signature: what its graph takes; None where it does not tell.
    """

    file: Path
    folder: Folder
    digest: str
    signature: Signature | None

    def read(self) -> bytes:
        """Read the bytes that were looked over once more.

        Raises:
            ArtifactNotFoundError: the file is gone.
            ArtifactError: it has changed, or cannot be read.
        """
        data, digest = read_package(self.file, self.folder)
        if digest != self.digest:
            raise ArtifactError(
                f"{self.file}: has changed since the model was loaded, so that it may not go with the rest any more. "
                "Load the model again."
            )
        return data


def read_package(file: Path, folder: Folder) -> Contents:
    """Read the bytes of a package.

    Args:
        file: the package.
        folder: of its artifact.

    Returns:
        The bytes and their digest.

    Raises:
        ArtifactNotFoundError: there is no such file.
        ArtifactError: it cannot be read.
    """
    try:
        return folder.read(file, files.PACKAGE)
    except FileNotFoundError:
        raise ArtifactNotFoundError(
            f"{file}: no such file, although the metadata names it; a leaf of an earlier compile may have been left "
            "without it. Copy the whole artifact folder, or compile the model again."
        ) from None


def read_signature(file: Path, folder: Folder | None = None) -> Signature | None:
    """Read what a graph takes from its package.

    Args:
        file: the package.
        folder: of its artifact; the one that the file is in, if not given.

    Returns:
        The signature; None where the package does not spell it out.
    """
    with open_archive(file, read_package(file, folder or folder_at(file.parent)).data) as archive:
        return signature_in(archive)


def signature_in(archive: zipfile.ZipFile) -> Signature | None:
    """Read what a graph takes from its open package; None where the package does not spell it out."""
    source = read_text(archive, "wrapper.cpp")
    return parse_signature(source) if source is not None else None


def parse_signature(source: str) -> Signature | None:
    """Read a graph's signature out of the generated wrapper's source."""
    arity = _ARITY.search(source)
    if arity is None:
        return None
    count, outputs = int(arity[1]), int(arity[2])
    dtypes = {int(i): _DTYPES.get(kind) for i, kind in _DTYPE.findall(source)}
    extents: dict[int, dict[int, int | None]] = {i: {} for i in range(count)}
    # A free axis shows in its stride's check or in the check of its range, a fixed one in a check of its own.
    for i, axis in _STRIDE.findall(source) + _DYNAMIC.findall(source):
        extents.setdefault(int(i), {}).setdefault(int(axis), None)
    for i, axis, size in _FIXED.findall(source):
        extents.setdefault(int(i), {})[int(axis)] = int(size)
    kinds = parse_kinds(source, count)
    arguments = []
    for i in range(count):
        dtype, axes = dtypes.get(i), extents[i]
        if dtype is None or sorted(axes) != list(range(len(axes))):
            return None
        arguments.append(Argument(dtype, tuple(axes[k] for k in range(len(axes))), kinds[i]))
    return Signature(tuple(arguments), outputs)


def parse_kinds(source: str, count: int) -> list[str]:
    """Read from the wrapper's call spec in what class each of `count` arguments was handed over; empty for none."""
    found = _CALL.search(source)
    try:
        _, call = json.loads(found[1]) if found is not None else (0, {})
        handed = call["children_spec"][0]["children_spec"]
        kinds = [str(argument["type"] or "") for argument in handed]
        single = all(len(argument["children_spec"]) <= 1 for argument in handed)
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        return [""] * count
    return kinds if single and len(kinds) == count else [""] * count


def build_in(archive: zipfile.ZipFile) -> Build:
    """Read what a package was built for.

    Args:
        archive: the open package.

    Returns:
        The build facts that inductor recorded.

    Raises:
        ArtifactError: they are damaged.
    """
    found = read_text(archive, "wrapper_metadata.json") or read_text(archive, "_metadata.json")
    try:
        facts = json.loads(found) if found is not None else {}
    except (ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{archive.filename}: its build record is not JSON ({reason(error)}). Compile the model again."
        ) from None
    if not isinstance(facts, dict):
        raise ArtifactError(f"{archive.filename}: its build record is not an object. Compile the model again.")
    text = {key: value for key, value in facts.items() if isinstance(value, str)}
    return Build(
        device=text.get("AOTI_DEVICE_KEY", ""),
        platform=text.get("AOTI_PLATFORM", ""),
        machine=text.get("AOTI_MACHINE", ""),
        cpu_isa=text.get("AOTI_CPU_ISA", ""),
        compute_capability=text.get("AOTI_COMPUTE_CAPABILITY", ""),
    )


def operators_in(archive: zipfile.ZipFile) -> tuple[str, ...]:
    """Read which operators a graph calls by name, such as `neml2::opaque_pow`.

    Args:
        archive: the open package.

    Returns:
        Their names without overloads, each once.

    Raises:
        ArtifactError: the list is damaged.
    """
    found = read_text(archive, "wrapper.json")
    if found is None:
        return ()
    try:
        targets = [str(entry["node"]["target"]).partition(".")[0] for entry in json.loads(found)["nodes"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(
            f"{archive.filename}: its list of operators is damaged ({reason(error)}). Compile the model again."
        ) from None
    return tuple(dict.fromkeys(targets))
