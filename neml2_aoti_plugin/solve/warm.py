"""Compile all kernels and keep their machine code: `python -m neml2_aoti_plugin.solve.warm`, when an image is built."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..settings import NewtonSettings
from . import arrays, kernels, machine_code


def compile_all() -> None:
    """Call each kernel once, for a system of one row and one unknown."""

    def residual(u: Tensor, g: Tensor) -> Tensor:
        return 1.0 - u

    def jacobian(u: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return residual(u, g), torch.ones(1, 1, 1, dtype=torch.float64)

    zero = torch.zeros(1, 1, dtype=torch.float64)
    space = arrays.Workspace(1, 1, 1)
    rows = arrays.ArrayRows(residual, jacobian, zero, zero, NewtonSettings(), space, hold=True)
    rows.start()
    rows.step()
    rows.cut_back()
    rows.chord()
    rows.settle()
    matrix, record, solution = np.ones((1, 1, 1)), np.zeros((1, 2), np.int64), np.zeros((1, 1))
    waiting = np.zeros(1, np.int64)
    kernels.last_steps(matrix, solution, waiting, space.vectors, space.lu, space.pivots, record, solution)
    arrays.columns(torch.from_numpy(matrix), torch.from_numpy(matrix), [0])


def files() -> list[Path]:
    """The files of machine code that there are."""
    return [file for folder in machine_code.folders() for file in sorted(folder.glob("*.nbc"))]


if __name__ == "__main__":
    compile_all()
    if machine_code.not_kept or not files():
        sys.exit(f"The machine code cannot be kept in any of: {', '.join(map(str, machine_code.folders()))}")
    print(f"{len(files())} files of machine code in {' and '.join(sorted({str(f.parent) for f in files()}))}")
