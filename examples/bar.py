"""A tapered bar that cannot widen is pulled: finite elements in NumPy and SciPy around compiled integration points.

`python examples/bar.py`. Each element has two nodes and one point. The strain is along x alone, as between rigid walls.
The law is that of stubs/viscoplasticity.i. Lengths in mm, stress in MPa, time in s.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_banded

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from neml2_aoti_plugin import Points  # noqa: E402
from stubs.build import compiled  # noqa: E402

ELEMENTS, LENGTH, DURATION, PULL = 50, 100.0, 10.0, 1.0
TOLERANCE = 1e-10


def run(points: Any, steps: int = 10) -> tuple[NDArray[np.float64], NDArray[np.float64], list[list[float]]]:
    """Pull the right end in equal steps; give displacements, stresses along x and the residuals of each step."""
    h = LENGTH / ELEMENTS
    area = np.linspace(2.0, 1.0, ELEMENTS)
    u, tangent = np.zeros(ELEMENTS + 1), None
    history = []
    points.initial()
    for step in range(1, steps + 1):
        time = DURATION * step / steps
        residuals: list[float] = []
        # The initial guess moves by the tangent of the last step; the first one of all, by equal strains.
        move = np.full(ELEMENTS, PULL / steps / ELEMENTS)
        if tangent is not None:
            flexibility = h / (area * tangent)
            move = PULL / steps * flexibility / flexibility.sum()
        u[1:] += np.cumsum(move)
        while True:
            strain = np.zeros((ELEMENTS, 6))
            strain[:, 0] = np.diff(u) / h
            found = points.update(strain=strain, t=time)
            if found.failed:
                raise RuntimeError(f"points {found.failed} failed at {time} s; take more steps.")
            force = area * found.outputs["stress"][:, 0]
            tangent = found.tangent["stress"]["strain"][:, 0, 0]
            # Of the inner nodes; those at the ends are held and pulled.
            residual = force[:-1] - force[1:]
            residuals.append(float(np.linalg.norm(residual) / np.abs(force).max()))
            if residuals[-1] < TOLERANCE:
                break
            if len(residuals) == 20:
                raise RuntimeError(f"no equilibrium at {time} s; residuals {residuals}.")
            k = area * tangent / h
            bands = np.array([np.append(0.0, -k[1:-1]), k[:-1] + k[1:], np.append(-k[1:-1], 0.0)])
            u[1:-1] -= solve_banded((1, 1), bands, residual)
        points.commit()
        history.append(residuals)
        print(f"{time:5.1f} s  force {force.mean():8.3f} N  residuals", *map("{:.0e}".format, residuals))
    return u, found.outputs["stress"][:, 0], history


if __name__ == "__main__":
    run(Points(compiled("viscoplasticity") / "viscoplasticity", ELEMENTS))
