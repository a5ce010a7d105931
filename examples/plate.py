"""A plate with a hole is pulled in plane strain: scikit-fem around compiled integration points, with adaptive steps.

`make plate`, or `python examples/plate.py` in an environment with the plugin, scikit-fem and matplotlib. A quarter of
the plate is meshed by mapping; elements are quadrilaterals with nine nodes and nine points. The law is that of
stubs/viscoplasticity.i. Lengths in mm, stress in MPa, time in s.

Each step: predict by the tangent that converged last; Newton's method; `commit`. Where a point fails or Newton's method
does not converge, `revert` and a smaller step. Points say how much smaller or larger the next step should be.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.linalg import splu
from skfem import Basis, ElementQuad1, ElementQuad2, ElementVector, MeshQuad

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from neml2_aoti_plugin import Points  # noqa: E402
from stubs.build import compiled  # noqa: E402

Array = NDArray[np.float64]

SIDE, RADIUS = 10.0, 3.0
DURATION, PULL = 10.0, 0.08
# Of the residual's norm over the force at the pulled side; and Newton steps until a step counts as failed.
TOLERANCE, ITERATIONS = 1e-10, 12
# In s. The first one is too long, and taken back.
FIRST_STEP, LONGEST_STEP, SHORTEST_STEP = 2.0, 0.5, 1e-3


@dataclass
class Run:
    """What a run gives.

    Args:
        displacement: of all degrees of freedom at the end.
        plastic: equivalent plastic strain, `(elements, points)`.
        force: at the pulled side after each step.
        times: after each step.
        residuals: of each step that was committed, over the force.
        reverted: how many steps were taken back.
        seconds: by what they were spent for.
    """

    displacement: Array
    plastic: Array
    force: list[float] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    residuals: list[list[float]] = field(default_factory=list)
    reverted: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def clock(self, name: str) -> Iterator[None]:
        """Count the seconds of a part."""
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start


class Plate:
    """The mesh, and what assembly needs of it.

    Args:
        radial: elements from the hole outwards.
        around: elements along the quarter of the hole; an even number, for the corner.
    """

    def __init__(self, radial: int = 10, around: int = 16) -> None:
        self.mesh = mesh(radial, around)
        self.basis = Basis(self.mesh, ElementVector(ElementQuad2()), intorder=5)
        dofs = self.basis.element_dofs
        self.elements = dofs.shape[1]
        # Strains xx, yy and engineering xy at each point, by the displacements of its element.
        gradients = np.stack([np.asarray(shape[0].grad) for shape in self.basis.basis])
        b = [gradients[:, 0, 0], gradients[:, 1, 1], gradients[:, 0, 1] + gradients[:, 1, 0]]
        self.b = np.ascontiguousarray(np.stack(b).transpose(2, 3, 0, 1))
        self.weighted = self.b * self.basis.dx[:, :, None, None]
        self.dofs = dofs.T
        self.points = self.b.shape[0] * self.b.shape[1]
        self.rows = np.repeat(self.dofs, self.dofs.shape[1], 1).ravel()
        self.columns = np.tile(self.dofs, (1, self.dofs.shape[1])).ravel()
        find = self.basis.get_dofs
        self.pulled = find(lambda x: np.isclose(x[1], SIDE)).all("u^2")
        self.held = np.concatenate(
            [find(lambda x: np.isclose(x[0], 0.0)).all("u^1"), find(lambda x: np.isclose(x[1], 0.0)).all("u^2")]
        )
        self.free = np.setdiff1d(np.arange(self.basis.N), np.concatenate([self.pulled, self.held]))

    def strain(self, u: Array) -> Array:
        """Strains at all points, `(points, 3)`."""
        found: Array = np.einsum("eqai,ei->eqa", self.b, u[self.dofs], optimize=True).reshape(-1, 3)
        return found

    def forces(self, stress: Array) -> Array:
        """Forces at all degrees of freedom from stresses `(points, 3)`."""
        per_element = np.einsum("eqai,eqa->ei", self.weighted, stress.reshape(self.elements, -1, 3), optimize=True)
        found: Array = np.bincount(self.dofs.ravel(), per_element.ravel(), self.basis.N).astype(float)
        return found

    def stiffness(self, tangent: Array) -> Any:
        """The stiffness from tangents `(points, 3, 3)`, as a sparse matrix."""
        c = tangent.reshape(self.elements, -1, 3, 3)
        per_element = (self.weighted.swapaxes(2, 3) @ (c @ self.b)).sum(1)
        return coo_matrix((per_element.ravel(), (self.rows, self.columns))).tocsc()


def mesh(radial: int, around: int) -> Any:
    """A quarter of the plate: rays from the hole to the square around it, closer together at the hole."""
    grid = MeshQuad.init_tensor(np.linspace(0.0, 1.0, radial + 1) ** 1.5, np.linspace(0.0, np.pi / 2.0, around + 1))
    along, angle = grid.p
    ray = np.stack([np.cos(angle), np.sin(angle)])
    outside = SIDE * ray / np.abs(ray).max(0)
    return MeshQuad((1.0 - along) * RADIUS * ray + along * outside, grid.t)


def run(plate: Plate, points: Any, *, end: float = DURATION, first_step: float = FIRST_STEP) -> Run:
    """Pull the plate.

    Args:
        plate: the mesh.
        points: `Points`, or others with the same methods: plane strain, engineering shears.
        end: time at which to stop.
        first_step: size of the first step.
    """
    points.initial()
    found = Run(np.zeros(plate.basis.N), np.zeros((plate.elements, plate.points // plate.elements)))
    now, step = 0.0, first_step
    # A tangent to begin with: of the material at rest.
    rest = points.update(strain=np.zeros((plate.points, 3)), t=step)
    tangent, stress = rest.tangent["stress"]["strain"], rest.outputs["stress"]
    points.revert()
    while now < end - 1e-9:
        step = min(step, end - now)
        if step < SHORTEST_STEP:
            raise RuntimeError(f"the step at {now} s became shorter than {SHORTEST_STEP} s.")
        u, result, residuals = equilibrium(plate, points, found, now + step, PULL * step / DURATION, tangent, stress)
        if result.failed or residuals[-1] > TOLERANCE:
            points.revert()
            found.reverted += 1
            why = f"{len(result.failed)} points failed" if result.failed else "no equilibrium"
            print(f"{now + step:6.2f} s  step {step:.3f} s  taken back: {why}", flush=True)
            step *= min(result.step_factor, 0.5)
            continue
        points.commit()
        now += step
        tangent, stress = result.tangent["stress"]["strain"], result.outputs["stress"]
        found.displacement, found.plastic = u, result.outputs["equivalent_plastic_strain"].reshape(found.plastic.shape)
        found.times.append(now)
        found.force.append(float(plate.forces(stress)[plate.pulled].sum()))
        found.residuals.append(residuals)
        shown = " ".join(f"{r:.0e}" for r in residuals)
        print(f"{now:6.2f} s  step {step:.3f} s  force {found.force[-1]:8.2f} N/mm  residuals {shown}", flush=True)
        step = min(step * result.step_factor, LONGEST_STEP)
    return found


def equilibrium(
    plate: Plate, points: Any, found: Run, now: float, pull: float, tangent: Array, stress: Array
) -> tuple[Array, Any, list[float]]:
    """Newton's method for one step, from a prediction by the tangent and stress that converged last.

    Args:
        plate: the mesh.
        points: the points.
        found: the run; its displacement is where the step starts.
        now: time at the end of the step.
        pull: how much further the side is pulled.
        tangent: at the start of the step, `(points, 3, 3)`.
        stress: at the start of the step, `(points, 3)`.

    Returns:
        Displacement, the last update, and the residuals, over the force at the pulled side.
    """
    u = found.displacement.copy()
    residuals: list[float] = []
    move = np.zeros_like(u)
    move[plate.pulled] = pull
    residual = plate.forces(stress)
    while True:
        with found.clock("assembly"):
            k = plate.stiffness(tangent)
            rhs = -(residual + k @ move)[plate.free]
            inner = k[plate.free][:, plate.free]
        with found.clock("solver"):
            move[plate.free] = splu(inner).solve(rhs)
        u, move = u + move, np.zeros_like(u)
        with found.clock("assembly"):
            strain = plate.strain(u)
        with found.clock("material"):
            result = points.update(strain=strain, t=now)
        if result.failed:
            # What points that failed give is no number, and nothing can be assembled of it.
            return u, result, [*residuals, np.inf]
        with found.clock("assembly"):
            residual = plate.forces(result.outputs["stress"])
        tangent = result.tangent["stress"]["strain"]
        scale = np.linalg.norm(residual[plate.pulled])
        residuals.append(float(np.linalg.norm(residual[plate.free]) / scale))
        if residuals[-1] < TOLERANCE or len(residuals) == ITERATIONS:
            return u, result, residuals


def is_quadratic(residuals: list[float]) -> bool:
    """Whether residuals, once small, are below a multiple of the square of the one before, or below the tolerance."""
    pairs = [(a, b) for a, b in pairwise(residuals) if a < 1e-3]
    return all(b < max(1e2 * a * a, TOLERANCE) for a, b in pairs)


def draw(path: Path, plate: Plate, found: Run) -> None:
    """Draw the equivalent plastic strain on the deformed plate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.tri import Triangulation

    scalar = Basis(plate.mesh, ElementQuad1(), quadrature=plate.basis.quadrature)
    nodal = scalar.project(100.0 * found.plastic)
    x, y = plate.mesh.p + 20.0 * found.displacement[plate.basis.nodal_dofs]
    t = plate.mesh.t
    triangles = Triangulation(x, y, np.concatenate([t[[0, 1, 2]], t[[0, 2, 3]]], 1).T)
    figure, panel = plt.subplots(figsize=(6.4, 5.4), constrained_layout=True)
    colours = panel.tripcolor(triangles, np.maximum(nodal, 0.0), shading="gouraud", cmap="viridis")
    edges = np.concatenate([t[[0, 1]], t[[1, 2]], t[[2, 3]], t[[3, 0]]], 1)
    panel.plot(x[edges], y[edges], color="white", linewidth=0.3)
    figure.colorbar(colours, label="equivalent plastic strain (%)")
    panel.set(aspect="equal", xlabel="x (mm)", ylabel="y (mm)", title="displacement 20 times as large")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Pull the plate, report and draw; the exit status is 1 if residuals do not fall quadratically."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "demo" / "plate.png", help="the picture")
    options = parser.parse_args(arguments)
    plate = Plate()
    artifact = compiled("viscoplasticity") / "viscoplasticity"
    points = Points(artifact, plate.points, notation="voigt", dimension="plane strain")
    found = run(plate, points)
    total = sum(found.seconds.values())
    split = ", ".join(f"{name} {seconds:.2f} s ({seconds / total:.0%})" for name, seconds in found.seconds.items())
    print(f"{len(found.times)} steps, {found.reverted} taken back; {plate.points} points; {split}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    draw(options.output, plate, found)
    print(f"The picture is {options.output}.")
    return 0 if all(map(is_quadratic, found.residuals)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
