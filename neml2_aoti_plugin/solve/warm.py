"""Compile all kernels and keep their machine code: `python -m neml2_aoti_plugin.solve.warm`, when an image is built."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from . import block, machine_code, native


def compile_all() -> None:
    """Compile each kernel, or take it from where it is kept."""
    native.solve_block.compile("int64(int64)")
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    block.columns(one, one, [0])


def files() -> list[Path]:
    """The files of machine code that there are."""
    return [file for folder in machine_code.folders() for file in sorted(folder.glob("*.nbc"))]


if __name__ == "__main__":
    compile_all()
    if machine_code.not_kept or not files():
        sys.exit(f"The machine code cannot be kept in any of: {', '.join(map(str, machine_code.folders()))}")
    print(f"{len(files())} files of machine code in {' and '.join(sorted({str(f.parent) for f in files()}))}")
