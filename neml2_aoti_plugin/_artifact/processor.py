"""Which instruction sets this machine's processor has, from the flags that it gives itself."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch

# What inductor calls an instruction set, and the flags of a processor that has what inductor then compiles for.
NEEDS = {
    "AVX2": ("avx2", "fma", "f16c"),
    "AVX512": ("avx512f", "avx512dq", "avx512bw", "avx512vl", "fma"),
    "AVX512_VNNI": ("avx512_vnni",),
    "AMX_TILE": ("amx_tile", "amx_bf16", "amx_int8"),
    "ASIMD": ("asimd",),
    "ZVECTOR": ("vx",),
}

# Where the system tells no flags, torch asks the processor for some of them.
ASK = {
    "AVX2": "_is_avx2_supported",
    "AVX512": "_is_avx512_supported",
    "AVX512_VNNI": "_is_vnni_supported",
    "AMX_TILE": "_is_amx_tile_supported",
}

SAME_MACHINE = {"amd64": "x86_64", "arm64": "aarch64"}


def machine(name: str | None = None) -> str:
    """One spelling for each kind of processor; this machine's if no name is given."""
    name = (platform.machine() if name is None else name).lower()
    return SAME_MACHINE.get(name, name)


def lacking(instruction_sets: str, have: frozenset[str] | None = None) -> list[str]:
    """List what this processor lacks of instruction sets.

    Args:
        instruction_sets: their names in inductor's spelling, with spaces between.
        have: the processor's flags; of this machine if None.

    Returns:
        Flags, or names of instruction sets where the system tells no flags. A processor with more lacks nothing; what
        is not known counts as there.
    """
    flags = cpu_flags() if have is None else have
    wanted = instruction_sets.upper().split()
    if flags:
        return list(dict.fromkeys(flag for name in wanted for flag in NEEDS.get(name, ()) if flag not in flags))
    return [name for name in wanted if name in ASK and not getattr(torch.cpu, ASK[name], lambda: True)()]


@cache
def cpu_flags() -> frozenset[str]:
    """Flags of this machine's processor; empty where the system does not tell."""
    try:
        # Line by line: with many cores the system takes its time to write the whole file.
        with Path("/proc/cpuinfo").open() as lines:
            for line in lines:
                if line.lower().startswith(("flags", "features")):
                    return frozenset(line.partition(":")[2].split())
    except OSError:
        pass
    return frozenset()
