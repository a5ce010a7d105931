"""May this artifact run here? Everything that can be told without running any of it, in one report."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from zipfile import ZipFile

import torch

from ..errors import ArtifactError, ArtifactNotFoundError
from . import archive as zipped
from .binary import library_fault
from .operators import operator_fault
from .order import order_faults
from .package import Build, Package, Signature, build_in, operators_in, read_package, signature_in
from .place import DEVICES, Place
from .processor import NEEDS, lacking, machine
from .schema import Metadata
from .telling import named
from .wiring import Wire, roles_fault, wire_fault, wires

OLDEST_TORCH = (2, 10)


def check(metadata: Metadata, place: Place) -> dict[str, Package]:
    """Refuse an artifact that cannot run here, with all that was found and a cure for each.

    Args:
        metadata: of the artifact.
        place: of its leaf.

    Returns:
        The packages by the names that the metadata has for them.

    Raises:
        ArtifactNotFoundError: a file is missing.
        ArtifactError: anything else is wrong.
    """
    names = sorted(files_of(metadata))
    handed = wires(metadata)
    packages: dict[str, Package] = {}
    # By what is wrong, the packages it is wrong with.
    found: dict[str, list[str]] = {}
    for text in (_of_torch(torch.__version__), _of_device(place), _of_metadata(metadata, place)):
        if text:
            found[text] = []
    missing = False
    findings: dict[str, list[str]] = {}
    for name in names:
        file = place.leaf / name
        try:
            packages[name], findings[name] = inspect(file, place, [w for w in handed if w.file == name])
        except ArtifactError as error:
            findings[name] = [str(error).removeprefix(f"{file}: ")]
            missing = missing or isinstance(error, ArtifactNotFoundError)
    signatures = {name: package.signature for name, package in packages.items()}
    for more in (roles_fault(handed), order_faults(metadata, place.leaf, signatures)):
        for name, text in more.items():
            findings[name].append(text)
    for name in names:
        for text in findings[name]:
            found.setdefault(text, []).append(name)
    if found:
        raise (ArtifactNotFoundError if missing else ArtifactError)(_report(found, place))
    return packages


def files_of(metadata: Metadata) -> set[str]:
    """Names of all packages that the metadata speaks of."""
    found: set[str] = set()

    def collect(thing: object) -> None:
        if isinstance(thing, tuple):
            for item in thing:
                collect(item)
        elif is_dataclass(thing):
            for field in fields(thing):
                collect(getattr(thing, field.name))
        elif isinstance(thing, str) and thing.endswith(".pt2"):
            found.add(thing)

    collect(metadata.segments)
    return found


def inspect(file: Path, place: Place, handed: list[Wire]) -> tuple[Package, list[str]]:
    """List what speaks against running one package here.

    Args:
        file: the package.
        place: of the leaf it is in.
        handed: what the metadata gives its graph.

    Returns:
        The package, and what is wrong with the cure, a line for each.

    Raises:
        ArtifactNotFoundError: there is no such file.
        ArtifactError: the package is damaged, so that there is no more to tell.
    """
    data, digest = read_package(file, place.folder)
    known = (digest, file.stem)
    inside = _looked_over.get(known)
    if inside is None:
        inside = look_over(file, data)
        _looked_over[known] = inside
        # Not without end, however many artifacts a process goes through.
        if len(_looked_over) > _MANY:
            for old in list(_looked_over)[:-_MANY]:
                _looked_over.pop(old, None)
    package = Package(file, place.folder, digest, inside.signature)
    if inside.faults:
        return package, list(inside.faults)
    build = inside.build
    faults = [*_of_machine(build), _of_build_device(build, place), _of_cpu(build, place)]
    if place.device.type == "cuda" and torch.cuda.is_available():
        have = torch.cuda.get_device_capability(place.device)
        faults.append(gpu_fault(build.compute_capability, have, inside.portable))
    faults.append(operator_fault(inside.operators))
    faults += [wire_fault(wire, inside.signature) for wire in handed]
    return package, list(dict.fromkeys(fault for fault in faults if fault))


@dataclass(frozen=True)
class Inside:
    """What the bytes of a package tell, wherever they lie.

    Args:
        faults: what speaks against them anywhere; with any, the rest is not told.
        build: what they were built for.
        portable: whether there is code that later GPUs can translate.
        operators: that the graph calls by name.
        signature: what the graph takes.
    """

    faults: tuple[str, ...] = ()
    build: Build = field(default_factory=Build)
    portable: bool = False
    operators: tuple[str, ...] = ()
    signature: Signature | None = None


# By digest and name of the package: the same bytes need not be looked over again.
_looked_over: dict[tuple[str, str], Inside] = {}
_MANY = 4096


def look_over(file: Path, data: bytes) -> Inside:
    """Look into a package.

    Args:
        file: the package; its name is that of the graph.
        data: its bytes.

    Returns:
        What is in it.

    Raises:
        ArtifactError: it is damaged, so that there is no more to tell.
    """
    with zipped.open_archive(file, data) as archive:
        faults = zipped.faults(archive) or _of_contents(archive, file, data)
        if faults:
            return Inside(tuple(faults))
        return Inside(
            build=build_in(archive),
            portable=any(name.endswith((".fatbin", ".ptx")) for name in archive.namelist()),
            operators=operators_in(archive),
            signature=signature_in(archive),
        )


def gpu_fault(built_for: str, have: tuple[int, int], portable: bool) -> str:
    """Tell whether kernels for one GPU generation run on another.

    Args:
        built_for: compute capability as inductor records it, such as `90`; empty or a name where there is none.
        have: of the device.
        portable: whether the package holds code that later generations can translate.

    Returns:
        What is wrong and the cure; empty for nothing.
    """
    if not re.fullmatch("[0-9]{1,4}", built_for):
        return ""
    wanted, here = int(built_for), have[0] * 10 + have[1]
    if wanted <= here and (portable or wanted // 10 == have[0]):
        return ""
    return (
        f"compiled for compute capability {wanted}, the device has {here}. Compile it here: "
        "neml2-compile ... --device cuda."
    )


def _of_contents(archive: ZipFile, file: Path, data: bytes) -> list[str]:
    """Is everything there, whole, and of this package?"""
    folders = {name.partition("/")[0] for name in archive.namelist()}
    if folders != {file.stem}:
        return [
            f"holds {_few(folders)}, expected {file.stem}: it is the package of another graph. "
            "Copy the whole artifact folder, or compile the model again."
        ]
    libraries = [info for info in zipped.graph_entries(archive) if info.filename.endswith((".so", ".pyd", ".dylib"))]
    if len(libraries) != 1:
        # torch would call a C++ compiler, with the flags that the package gives.
        return [f"holds {len(libraries)} compiled libraries, expected 1. Compile the model again with neml2-compile."]
    # Entries that nobody reads, such as the kernels' source, may be damaged.
    fault = library_fault(zipped.read_entry(archive, libraries[0], data))
    return [fault] if fault else []


def _few(folders: set[str]) -> str:
    listed = [named(name).strip("'") for name in sorted(folders)]
    return ", ".join(listed[:4]) + (", ..." if len(listed) > 4 else "") or "nothing"


def _of_metadata(metadata: Metadata, place: Place) -> str:
    if place.digest and metadata.digest != place.digest:
        return "its metadata was changed while the model was loaded. Load the model again."
    return ""


def _of_torch(version: str) -> str:
    numbers = version.split(".")[:2]
    if len(numbers) == 2 and all(n.isdigit() for n in numbers) and (int(numbers[0]), int(numbers[1])) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        return f"torch {version} is not known to run compiled models. Install {oldest} or later: pip install -U torch."
    return ""


def _of_device(place: Place) -> str:
    wanted = place.device
    if wanted.type != "cuda":
        return ""
    if not torch.cuda.is_available():
        return "compiled for cuda, and torch sees no CUDA device here. Load a cpu leaf with device='cpu'."
    if wanted.index is not None and wanted.index >= torch.cuda.device_count():
        return f"there is no device {wanted}, only {torch.cuda.device_count()}. Load it with device='cuda:0'."
    return ""


def _of_build_device(build: Build, place: Place) -> str:
    if build.device and build.device.split(":")[0] != place.device.type:
        return (
            f"compiled for device {_word(build.device)}, loaded for {place.device.type}. Load it with "
            f"device={build.device if build.device in DEVICES else 'the device it was compiled for'!r}."
        )
    return ""


def _of_machine(build: Build) -> list[str]:
    found = []
    if build.platform and build.platform != sys.platform:
        found.append(
            f"compiled on platform {_word(build.platform)}, this is {sys.platform}. Compile the model here with "
            "neml2-compile."
        )
    if build.machine and machine(build.machine) != machine():
        found.append(
            f"compiled for {_word(build.machine)} processors, this is {machine()}. Compile the model here with "
            "neml2-compile."
        )
    return found


def _of_cpu(build: Build, place: Place) -> str:
    missing = lacking(build.cpu_isa) if place.device.type == "cpu" and machine(build.machine) == machine() else []
    if not missing:
        return ""
    built_for = " ".join(name for name in build.cpu_isa.split() if name in NEEDS)
    return (
        f"compiled for a processor with {built_for}; this one lacks {', '.join(missing)} and would stop with an "
        "illegal instruction. Compile the model here with neml2-compile."
    )


def _word(text: str) -> str:
    """What a build record calls a machine, as an error may show it."""
    return named(text).strip("'")


def _report(found: dict[str, list[str]], place: Place) -> str:
    """One line where there is one finding; else a list of all."""
    lines = []
    for text, names in found.items():
        if not names:
            lines.append(f"{place.leaf}: {text}")
        elif len(names) == 1:
            lines.append(f"{place.leaf / names[0]}: {text}")
        else:
            lines.append(f"{place.leaf}{os.sep}{{{', '.join(names)}}}: {text}")
    if len(lines) == 1:
        return lines[0]
    return f"{place.leaf} cannot run here, for {len(lines)} reasons:\n" + "\n".join(f"- {line}" for line in lines)
