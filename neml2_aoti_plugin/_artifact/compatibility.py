"""May this artifact run here? Everything that can be found without running any of it, in one report."""

from __future__ import annotations

import os
import platform
import re
import struct
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path

import torch

from ..errors import ArtifactError, ArtifactNotFoundError
from .files import AGAIN, named
from .locate import DEVICES, Place
from .package import (
    Build,
    GraphSignature,
    Package,
    archive_faults,
    build_in,
    libraries_in,
    open_archive,
    operators_in,
    read_entry,
    read_package,
    signature_in,
)
from .schema import Metadata
from .wiring import wire_faults, with_argument_order

OLDEST_TORCH = (2, 10)
_HERE = "Compile the model here with neml2-compile."


@dataclass(frozen=True)
class Checked:
    """An artifact that was looked over."""

    metadata: Metadata  # with the order of arguments where only packages show it
    packages: dict[str, Package]  # by the names that the metadata has for them
    faults: list[str]  # what is wrong where, each with its cure
    missing: bool  # whether a file is missing


def check(metadata: Metadata, place: Place) -> Checked:
    """Look an artifact over, and refuse it with all that is wrong in one error."""
    found = look_over(metadata, place)
    if not found.faults:
        return found
    error = ArtifactNotFoundError if found.missing else ArtifactError
    if len(found.faults) == 1:
        raise error(found.faults[0])
    listed = "\n".join(f"- {fault}" for fault in found.faults)
    raise error(f"{place.leaf} cannot run here, for {len(found.faults)} reasons:\n{listed}")


def look_over(metadata: Metadata, place: Place) -> Checked:
    """Look an artifact over, without running any of it."""
    packages: dict[str, Package] = {}
    findings: dict[str, list[str]] = {}
    missing = False
    for name in sorted(metadata.files):
        file = place.leaf / name
        try:
            packages[name], findings[name] = _inspect(file, place)
        except ArtifactError as error:
            findings[name] = [str(error).removeprefix(f"{file}: ")]
            missing = missing or isinstance(error, ArtifactNotFoundError)
    # A package that is damaged has a fault already, and no signature.
    taken = {name: p.signature for name, p in packages.items() if p.signature is not None or not findings[name]}
    metadata, more = with_argument_order(metadata, taken)
    for name, text in (*more, *wire_faults(metadata, taken)):
        findings[name].append(text)
    # By what is wrong, the packages it is wrong with; none for the leaf itself.
    found: dict[str, list[str]] = {text: [] for text in (torch_fault(torch.__version__), _device_fault(place)) if text}
    for name, texts in findings.items():
        for text in dict.fromkeys(texts):
            found.setdefault(text, []).append(name)
    faults = []
    for text, names in found.items():
        several = f"{place.leaf}{os.sep}{{{', '.join(names)}}}"
        faults.append(f"{several if len(names) > 1 else place.leaf.joinpath(*names)}: {text}")
    return Checked(metadata, packages, faults, missing)


# -- one package -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Inside:
    """What the bytes of a package say, wherever they lie; with any faults, nothing else."""

    faults: tuple[str, ...] = ()
    build: Build = field(default_factory=Build)
    portable: bool = False  # whether there is code that later GPUs can translate
    operators: tuple[str, ...] = ()  # that the graph calls by name
    signature: GraphSignature | None = None


# By digest and name of the package: the same bytes need not be looked over again.
known_packages: dict[tuple[str, str], _Inside] = {}
_MANY = 4096


def _inspect(file: Path, place: Place) -> tuple[Package, list[str]]:
    """A package, and what speaks against running it here, whatever the metadata gives its graph."""
    data, digest = read_package(file, place.folder)
    known = (digest, file.stem)
    inside = known_packages.get(known)
    if inside is None:
        inside = known_packages[known] = _look_into(file, data)
        # Not without end, however many artifacts a process goes through.
        for old in list(known_packages)[:-_MANY]:
            known_packages.pop(old, None)
    package = Package(file, place.folder, digest, inside.signature)
    if inside.faults:
        return package, list(inside.faults)
    faults = [*_build_faults(inside.build, place), operator_fault(inside.operators)]
    if place.device.type == "cuda" and torch.cuda.is_available():
        have = torch.cuda.get_device_capability(place.device)
        faults.append(gpu_fault(inside.build.compute_capability, have, inside.portable))
    return package, [fault for fault in faults if fault]


def _look_into(file: Path, data: bytes) -> _Inside:
    """Is everything there, whole, and of this package? Its folder has the name of the graph."""
    with open_archive(file, data) as archive:
        faults = archive_faults(archive)
        if faults:
            return _Inside(tuple(faults))
        folders = {name.partition("/")[0] for name in archive.namelist()}
        libraries = libraries_in(archive)
        if folders != {file.stem}:
            listed = [_word(name) for name in sorted(folders)]
            few = ", ".join(listed[:4]) + (", ..." if len(listed) > 4 else "")
            fault = (
                f"holds {few or 'nothing'}, expected {file.stem}: it is the package of another graph. Copy the whole "
                "artifact folder, or compile the model again."
            )
        elif len(libraries) != 1:
            # torch would call a C++ compiler, with the flags that the package gives.
            fault = (
                f"holds {len(libraries)} compiled libraries, expected 1. Compile the model again with neml2-compile."
            )
        else:
            # Entries that nobody reads, such as the kernels' source, may be damaged.
            fault = _library_fault(read_entry(archive, libraries[0], data))
        if fault:
            return _Inside((fault,))
        return _Inside(
            build=build_in(archive),
            portable=any(name.endswith((".fatbin", ".ptx")) for name in archive.namelist()),
            operators=operators_in(archive),
            signature=signature_in(archive),
        )


def _word(text: str) -> str:
    """A word of a package, as an error may show it."""
    return named(text).strip("'")


# Processors by the number that an ELF file gives them.
_ELF_MACHINES = {3: "i686", 21: "ppc64le", 22: "s390x", 40: "armv7l", 62: "x86_64", 183: "aarch64", 243: "riscv64"}
_SHARED, _LOAD = 3, 1


def _library_fault(data: bytes | memoryview) -> str:
    """What speaks against loading a shared library here, with the cure; only ELF files are looked into."""
    if not data:
        return f"its shared library is empty. {AGAIN}"
    if not sys.platform.startswith("linux"):
        return ""
    if bytes(data[:4]) != b"\x7fELF":
        return f"its shared library is not an ELF file. {AGAIN}"
    try:
        if (data[4], data[5]) != (2, 1 if sys.byteorder == "little" else 2):
            return f"its shared library is of another kind of machine. {_HERE}"
        kind, number = struct.unpack_from("=HH", data, 16)
        built_for = _ELF_MACHINES.get(number, f"machine {number}")
        if built_for != machine() and machine() in _ELF_MACHINES.values():
            return f"its shared library is for {built_for} processors, this is {machine()}. {_HERE}"
        start, size, count = struct.unpack_from("=Q14xHH", data, 32)
        if kind != _SHARED or size != 56 or count == 0:
            return f"its shared library has a damaged header. {AGAIN}"
        for i in range(count):
            of_type, offset, filled = struct.unpack_from("=I4xQ16xQ", data, start + i * size)
            # The system maps such a part and kills the process when it is read.
            if of_type == _LOAD and offset + filled > len(data):
                return f"its shared library is cut off: {len(data)} bytes, expected {offset + filled} or more. {AGAIN}"
    except (struct.error, IndexError):
        return f"its shared library is cut off within its header. {AGAIN}"
    return ""


# -- torch, the machine and its devices --------------------------------------------------------------------------------


def torch_fault(release: str) -> str:
    """What speaks against a release of torch; empty for nothing, as for all faults here."""
    numbers = re.match(r"(\d+)\.(\d+)", release)
    if numbers and (int(numbers[1]), int(numbers[2])) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        return f"torch {release} is not known to run compiled models. Install {oldest} or later: pip install -U torch."
    return ""


def _device_fault(place: Place) -> str:
    wanted = place.device
    if wanted.type != "cuda":
        return ""
    if not torch.cuda.is_available():
        return "compiled for cuda, and torch sees no CUDA device here. Load a cpu leaf with device='cpu'."
    if wanted.index is not None and wanted.index >= torch.cuda.device_count():
        return f"there is no device {wanted}, only {torch.cuda.device_count()}. Load it with device='cuda:0'."
    return ""


def _build_faults(build: Build, place: Place) -> list[str]:
    """What speaks against a build on this machine, for the device of a leaf."""
    found, device, built_for = [], place.device.type, build.device_key
    if build.platform and build.platform != sys.platform:
        found.append(f"compiled on platform {_word(build.platform)}, this is {sys.platform}. {_HERE}")
    if build.machine and machine(build.machine) != machine():
        found.append(f"compiled for {_word(build.machine)} processors, this is {machine()}. {_HERE}")
    if built_for and built_for.split(":")[0] != device:
        own = built_for if built_for in DEVICES else "the device it was compiled for"
        found.append(f"compiled for device {_word(built_for)}, loaded for {device}. Load it with device={own!r}.")
    missing = lacking(build.cpu_isa) if device == "cpu" and machine(build.machine) == machine() else []
    if missing:
        sets = " ".join(name for name in build.cpu_isa.split() if name in NEEDS)
        found.append(
            f"compiled for a processor with {sets}; this one lacks {', '.join(missing)} and would stop with an "
            f"illegal instruction. {_HERE}"
        )
    return found


def gpu_fault(built_for: str, have: tuple[int, int], portable: bool) -> str:
    """Whether kernels for one GPU generation, such as `90`, run on another; `portable` ones run on later ones too."""
    if not re.fullmatch("[0-9]{1,4}", built_for):
        return ""
    wanted, here = int(built_for), have[0] * 10 + have[1]
    if wanted <= here and (portable or wanted // 10 == have[0]):
        return ""
    return (
        f"compiled for compute capability {wanted}, the device has {here}. Compile it here: "
        "neml2-compile ... --device cuda."
    )


# What inductor calls an instruction set, and the flags of a processor that has what inductor then compiles for.
NEEDS = {
    "AVX2": ("avx2", "fma", "f16c"),
    "AVX512": ("avx512f", "avx512dq", "avx512bw", "avx512vl", "fma"),
    "AVX512_VNNI": ("avx512_vnni",),
    "AMX_TILE": ("amx_tile", "amx_bf16", "amx_int8"),
    "ASIMD": ("asimd",),
    "ZVECTOR": ("vx",),
}
# Where the system lists no flags, torch knows whether the processor has some of them.
_LEVELS = {"AVX2": ("AVX2", "AVX512"), "AVX512": ("AVX512",)}
_SAME_MACHINE = {"amd64": "x86_64", "arm64": "aarch64"}


def machine(name: str | None = None) -> str:
    """One spelling for each kind of processor; this machine's if no name is given."""
    name = (platform.machine() if name is None else name).lower()
    return _SAME_MACHINE.get(name, name)


def lacking(instruction_sets: str, have: frozenset[str] | None = None) -> list[str]:
    """What a processor, by default this one, lacks of instruction sets in inductor's spelling: flags, or sets."""
    flags = cpu_flags() if have is None else have
    # What is not known counts as there.
    wanted = instruction_sets.upper().split()
    if flags:
        return list(dict.fromkeys(flag for name in wanted for flag in NEEDS.get(name, ()) if flag not in flags))
    level = torch.backends.cpu.get_cpu_capability()
    return [name for name in wanted if name in _LEVELS and level not in _LEVELS[name]]


@cache
def cpu_flags() -> frozenset[str]:
    """Flags of this machine's processor; empty where the system lists none."""
    # Line by line: with many cores the system takes its time to write the whole file.
    with suppress(OSError), Path("/proc/cpuinfo").open() as lines:
        for line in lines:
            if line.lower().startswith(("flags", "features")):
                return frozenset(line.partition(":")[2].split())
    return frozenset()


# -- operators that a graph calls by name ------------------------------------------------------------------------------

_OPERATOR = re.compile(r"[A-Za-z_]\w{0,63}::[A-Za-z_]\w{0,127}\Z")


def operator_fault(names: tuple[str, ...]) -> str:
    """What is wrong with a graph's operators; neml2, which registers its own, is imported if a graph needs one."""
    odd = [name for name in names if not _OPERATOR.match(name)]
    if odd:
        return f"calls {len(odd)} things by what is no operator's name. Do not use this file."
    absent = [name for name in names if not _is_registered(name)]
    if any(name.startswith("neml2::") for name in absent):
        with suppress(ImportError):
            import_module("neml2")
        absent = [name for name in absent if not _is_registered(name)]
    if not absent:
        return ""
    listed = ", ".join(absent[:8]) + (", ..." if len(absent) > 8 else "")
    if all(name.startswith("neml2::") for name in absent):
        return (
            f"calls {listed}, which the neml2 that is installed here does not register. Install the neml2 that "
            "compiled the model, or compile the model again with neml2-compile."
        )
    if all(name.startswith("aten::") for name in absent):
        return (
            f"calls {listed}, which torch {torch.__version__} does not have. Install the torch that the model was "
            "compiled with, or compile it again here with neml2-compile."
        )
    return f"calls {listed}, which nothing has registered. Import the Python package that defines it before loading."


def _is_registered(name: str) -> bool:
    namespace, _, operator = name.partition("::")
    # An operator that torch cannot make sense of counts as not there.
    with suppress(RuntimeError):
        return hasattr(getattr(torch.ops, namespace), operator)
    return False
