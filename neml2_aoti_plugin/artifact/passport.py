"""May this artifact run here? Everything that can be told without running any of it."""

from __future__ import annotations

import platform
import sys
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path

import torch

from ..errors import ArtifactError, ArtifactNotFoundError
from .package import Build, open_archive, read_build
from .place import Place
from .schema import Metadata

# What inductor calls an instruction set, and the CPU flags that it takes.
CPU_FLAGS = {
    "AVX512": ("avx512f", "avx512dq", "avx512bw", "avx512vl", "fma"),
    "AVX512_VNNI": ("avx512_vnni",),
    "AVX2": ("avx2", "fma"),
    "AMX_TILE": ("amx_tile",),
}


def check(metadata: Metadata, place: Place) -> None:
    """Refuse an artifact that cannot run here, with a cure per complaint.

    Args:
        metadata: of the artifact.
        place: of its leaf.

    Raises:
        ArtifactNotFoundError: a file is missing.
        ArtifactError: anything else is wrong.
    """
    names = sorted(files_of(metadata))
    missing = [name for name in names if not (place.leaf / name).is_file()]
    if missing:
        raise ArtifactNotFoundError(
            f"{place.leaf}: {', '.join(missing)} named by {place.metadata.name} "
            f"{'is' if len(missing) == 1 else 'are'} not there. Copy the whole artifact folder, or compile the model "
            "again."
        )
    complaints = [c for name in names for c in inspect(place.leaf / name, place)]
    if complaints:
        raise ArtifactError("\n".join(dict.fromkeys(complaints)))


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


def inspect(file: Path, place: Place) -> list[str]:
    """List what speaks against running one package here."""
    with open_archive(file) as archive:
        bad = [n for n in archive.namelist() if n.startswith(("/", "\\")) or ".." in Path(n).parts or ":" in n]
    if bad:
        return [f"{file}: archive entry {bad[0]!r} leads out of the folder it is unpacked to. Do not use this file."]
    build = read_build(file)
    return [f"{file.parent}: {c}" for c in (_of_device(build, place), _of_machine(build), _of_cpu(build, place)) if c]


def _of_device(build: Build, place: Place) -> str:
    wanted = place.device.type
    if build.device and build.device.split(":")[0] != wanted:
        return f"compiled for device {build.device}, loaded for {wanted}. Load it with device={build.device!r}."
    if wanted == "cuda" and not torch.cuda.is_available():
        return "compiled for cuda, and torch sees no CUDA device here. Load a cpu leaf with device='cpu'."
    if wanted == "cuda" and build.compute_capability:
        major, minor = torch.cuda.get_device_capability(place.device)
        have = f"{major}{minor}"
        if build.compute_capability.isdigit() and int(build.compute_capability) > int(have):
            return (
                f"compiled for compute capability {build.compute_capability}, the device has {have}. Compile it here: "
                "neml2-compile INPUT --model NAME --device cuda."
            )
    return ""


def _of_machine(build: Build) -> str:
    here, machine = sys.platform, platform.machine().lower()
    same_machine = {"amd64": "x86_64", "arm64": "aarch64"}
    built_for = build.machine.lower()
    if build.platform and build.platform != here:
        return f"compiled on platform {build.platform}, this is {here}. Compile the model here with neml2-compile."
    if built_for and same_machine.get(built_for, built_for) != same_machine.get(machine, machine):
        return f"compiled for {build.machine} processors, this is {machine}. Compile the model here with neml2-compile."
    return ""


def _of_cpu(build: Build, place: Place) -> str:
    have = cpu_flags()
    if not have or place.device.type != "cpu":
        return ""
    lacking = [flag for name in build.cpu_isa.split() for flag in CPU_FLAGS.get(name, ()) if flag not in have]
    if not lacking:
        return ""
    return (
        f"compiled for a processor with {build.cpu_isa}; this one lacks {', '.join(lacking)} and would stop with an "
        "illegal instruction. Compile the model here, or anywhere with ATEN_CPU_CAPABILITY=avx2."
    )


@cache
def cpu_flags() -> frozenset[str]:
    """Flags of this machine's CPU; empty where the system does not tell."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    for line in text.splitlines():
        if line.startswith(("flags", "Features")):
            return frozenset(line.partition(":")[2].split())
    return frozenset()
