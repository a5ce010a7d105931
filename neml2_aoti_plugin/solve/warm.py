"""Compile all kernels and keep their machine code: `python -m neml2_aoti_plugin.solve.warm`, when an image is built."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from ..settings import NewtonSettings
from . import arrays, machine_code


def compile_all() -> None:
    """Call each kernel once, for a system of one row and one unknown."""

    def residual(u: Tensor, g: Tensor) -> Tensor:
        return 1.0 - u

    def jacobian(u: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return residual(u, g), torch.ones(1, 1, 1, dtype=torch.float64)

    zero = torch.zeros(1, 1, dtype=torch.float64)
    space = arrays.Workspace(1, 1, 1)
    rows = arrays.ArrayRows(residual, jacobian, zero, zero, NewtonSettings(), space)
    rows.start()
    rows.step()
    rows.chord()
    rows.settle()
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    arrays.columns(one, one, [0])


def files() -> list[Path]:
    """The files of machine code that there are."""
    return [file for folder in machine_code.folders() for file in sorted(folder.glob("*.nbc"))]


if __name__ == "__main__":
    compile_all()
    if machine_code.not_kept or not files():
        sys.exit(f"The machine code cannot be kept in any of: {', '.join(map(str, machine_code.folders()))}")
    print(f"{len(files())} files of machine code in {' and '.join(sorted({str(f.parent) for f in files()}))}")
