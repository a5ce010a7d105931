"""May this artifact run here? Everything that can be told without running any of it, in one report."""

from __future__ import annotations

import os
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from zipfile import ZipFile

import torch

from ..errors import ArtifactError, ArtifactNotFoundError
from . import archive as zipped
from .binary import library_fault
from .operators import operator_fault
from .package import Build, build_in, operators_in, signature_in
from .place import Place
from .processor import lacking, machine
from .roots import beyond
from .schema import Metadata
from .seal import expected, require
from .wiring import Wire, roles_fault, wire_fault, wires

OLDEST_TORCH = (2, 10)


def check(metadata: Metadata, place: Place) -> None:
    """Refuse an artifact that cannot run here, with all that was found and a cure for each.

    Args:
        metadata: of the artifact.
        place: of its leaf.

    Raises:
        ArtifactNotFoundError: a file is missing.
        ArtifactError: anything else is wrong.
    """
    names = sorted(files_of(metadata))
    handed = wires(metadata)
    doubled = roles_fault(handed)
    # By what is wrong, the packages it is wrong with.
    found: dict[str, list[str]] = {}
    for text in (_of_torch(torch.__version__), _of_device(place)):
        if text:
            found[text] = []
    missing = False
    for name in names:
        try:
            texts = inspect(place.leaf / name, place, [w for w in handed if w.file == name])
        except ArtifactError as error:
            texts = [str(error).removeprefix(f"{place.leaf / name}: ")]
            missing = missing or isinstance(error, ArtifactNotFoundError)
        for text in (*texts, *([doubled[name]] if name in doubled else [])):
            found.setdefault(text, []).append(name)
    if found:
        raise (ArtifactNotFoundError if missing else ArtifactError)(_report(found, place))


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


def inspect(file: Path, place: Place, handed: list[Wire]) -> list[str]:
    """List what speaks against running one package here.

    Args:
        file: the package.
        place: of the leaf it is in.
        handed: what the metadata gives its graph.

    Returns:
        What is wrong and the cure, a line for each.

    Raises:
        ArtifactNotFoundError: there is no such file.
        ArtifactError: the package is damaged, so that there is no more to tell.
    """
    data = read_package(file)
    outside = beyond(file)
    if outside:
        return [outside]
    require(file, data, expected(file))
    with zipped.open_archive(file, data) as archive:
        faults = zipped.faults(archive) or _of_contents(archive, file, data)
        if faults:
            return faults
        build = build_in(archive)
        faults = [*_of_machine(build), _of_build_device(build, place), _of_cpu(build, place)]
        if place.device.type == "cuda" and torch.cuda.is_available():
            have = torch.cuda.get_device_capability(place.device)
            portable = any(name.endswith((".fatbin", ".ptx")) for name in archive.namelist())
            faults.append(gpu_fault(build.compute_capability, have, portable))
        faults.append(operator_fault(operators_in(archive)))
        signature = signature_in(archive)
    faults += [wire_fault(wire, signature) for wire in handed]
    return list(dict.fromkeys(fault for fault in faults if fault))


def read_package(file: Path) -> bytes:
    """The bytes of a package.

    Raises:
        ArtifactNotFoundError: there is no such file.
        ArtifactError: it cannot be read.
    """
    try:
        # A pipe or a device would be waited for without end.
        if file.exists() and not file.is_file():
            raise ArtifactError(f"{file}: not a file. {zipped.AGAIN}")
        return file.read_bytes()
    except FileNotFoundError:
        raise zipped.missing(file) from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{file}: cannot be read ({error}). {zipped.AGAIN}") from error


def gpu_fault(built_for: str, have: tuple[int, int], portable: bool) -> str:
    """Tell whether kernels for one GPU generation run on another.

    Args:
        built_for: compute capability as inductor records it, such as `90`; empty or a name where there is none.
        have: of the device.
        portable: whether the package holds code that later generations can translate.

    Returns:
        What is wrong and the cure; empty for nothing.
    """
    if not built_for.isdigit():
        return ""
    wanted, here = int(built_for), have[0] * 10 + have[1]
    if wanted <= here and (portable or wanted // 10 == have[0]):
        return ""
    return (
        f"compiled for compute capability {wanted}, the device has {here}. Compile it here: "
        "neml2-compile INPUT --model NAME --device cuda."
    )


def _of_contents(archive: ZipFile, file: Path, data: bytes) -> list[str]:
    """Is everything there, whole, and of this package?"""
    named = {name.partition("/")[0] for name in archive.namelist()}
    if named != {file.stem}:
        return [
            f"holds {', '.join(sorted(named)) or 'nothing'}, expected {file.stem}: it is the package of another graph. "
            "Copy the whole artifact folder, or compile the model again."
        ]
    libraries = [info for info in zipped.graph_entries(archive) if info.filename.endswith((".so", ".pyd", ".dylib"))]
    if len(libraries) != 1:
        # torch would call a C++ compiler, with the flags that the package gives.
        return [f"holds {len(libraries)} compiled libraries, expected 1. Compile the model again with neml2-compile."]
    # Entries that nobody reads, such as the kernels' source, may be damaged.
    fault = library_fault(zipped.read_entry(archive, libraries[0], data))
    return [fault] if fault else []


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
            f"compiled for device {build.device}, loaded for {place.device.type}. Load it with device={build.device!r}."
        )
    return ""


def _of_machine(build: Build) -> list[str]:
    found = []
    if build.platform and build.platform != sys.platform:
        found.append(
            f"compiled on platform {build.platform}, this is {sys.platform}. Compile the model here with neml2-compile."
        )
    if build.machine and machine(build.machine) != machine():
        found.append(
            f"compiled for {build.machine} processors, this is {machine()}. Compile the model here with neml2-compile."
        )
    return found


def _of_cpu(build: Build, place: Place) -> str:
    missing = lacking(build.cpu_isa) if place.device.type == "cpu" and machine(build.machine) == machine() else []
    if not missing:
        return ""
    return (
        f"compiled for a processor with {build.cpu_isa}; this one lacks {', '.join(missing)} and would stop with an "
        "illegal instruction. Compile the model here: neml2-compile INPUT --model NAME."
    )


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
