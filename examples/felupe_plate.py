"""A plate with a hole is pulled in felupe with a compiled material, and its equivalent plastic strain is drawn.

`python examples/felupe_plate.py`; it takes `pip install felupe matplotlib`. A quarter of the plate, in plane strain.
The law is that of stubs/viscoplasticity.i. Lengths in mm, stress in MPa, time in s.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import felupe
import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402

from neml2_aoti_plugin import Model  # noqa: E402
from neml2_aoti_plugin.notation import convert, convert_tangent  # noqa: E402
from stubs.build import compiled  # noqa: E402

Array = NDArray[np.float64]

SIDE, RADIUS, PULL, DURATION, STEPS = 10.0, 3.0, 0.08, 10.0, 20
PICTURE = ROOT / "demo" / "felupe_plate.png"


class CompiledMaterial:
    """A compiled model as the material of `felupe.MaterialStrain`: stress, strain and state are felupe's own.

    felupe gives any number of cells at a time, from several threads where it is asked to, and calls for the stress and
    for the tangent one by one; so nothing is kept here.

    Args:
        model: of stubs/viscoplasticity.i, with the derivative of the stress by the strain.
    """

    def __init__(self, model: Model) -> None:
        self.model = model

    def __call__(
        self, increment: Array, strain: Array, stress: Array, state: list[Array], *, tangent: bool, dt: float
    ) -> tuple[Array | None, Array, list[Array]]:
        """Give tangent, stress and state after an increment; tensors are `(3, 3, points, cells)`."""
        shape = increment.shape[2:]
        inputs = {
            "strain": _rows(strain + increment),
            "strain~1": _rows(strain),
            "stress~1": _rows(stress),
            "equivalent_plastic_strain~1": torch.from_numpy(np.ascontiguousarray(state[0]).reshape(-1)),
            "t": torch.tensor(dt, dtype=torch.float64),
            "t~1": torch.tensor(0.0, dtype=torch.float64),
        }
        blocks: Any = None
        if tangent:
            found, blocks = self.model.jacobian(inputs, pairs=[("stress", "strain")])
            by_strain = convert_tangent(blocks["stress"]["strain"], "mandel", "tensor")
            blocks = by_strain.movedim(0, -1).reshape(3, 3, 3, 3, *shape).numpy()
        else:
            found = self.model.forward(inputs)
        after = convert(found["stress"], "mandel", "tensor").movedim(0, -1).reshape(3, 3, *shape).numpy()
        return blocks, after, [found["equivalent_plastic_strain"].reshape(1, *shape).numpy()]


def _rows(values: Array) -> torch.Tensor:
    """Tensors `(3, 3, points, cells)` as rows in Mandel's notation."""
    rows = np.ascontiguousarray(np.moveaxis(values.reshape(3, 3, -1), -1, 0))
    return convert(torch.from_numpy(rows), "tensor", "mandel")


def plate(radial: int = 10, around: int = 16) -> Any:
    """A quarter of the plate: rays from the hole to the square around it, closer together at the hole."""
    mesh = felupe.Rectangle(n=(radial + 1, around + 1))
    along, angle = mesh.points[:, 0] ** 1.5, mesh.points[:, 1] * np.pi / 2.0
    ray = np.stack([np.cos(angle), np.sin(angle)])
    mesh.update(points=((1.0 - along) * RADIUS * ray + along * SIDE * ray / np.abs(ray).max(0)).T)
    return mesh


def pull(model: Model, mesh: Any, steps: int = STEPS, **options: Any) -> tuple[Array, Array, Array]:
    """Pull the upper side in equal steps: forces `(steps + 1,)`, displacements, plastic strains `(points, cells)`."""
    field = felupe.FieldContainer([felupe.FieldPlaneStrain(felupe.RegionQuad(mesh), dim=2)])
    material = felupe.MaterialStrain(material=CompiledMaterial(model), statevars=(1,), dt=DURATION / steps)
    solid = felupe.SolidBody(material, field)
    boundaries = {
        "left": felupe.Boundary(field[0], fx=0.0, skip=(False, True)),
        "bottom": felupe.Boundary(field[0], fy=0.0, skip=(True, False)),
        "pulled": felupe.Boundary(field[0], fy=SIDE, skip=(True, False)),
    }
    step = felupe.Step(
        items=[solid], ramp={boundaries["pulled"]: np.linspace(0.0, PULL, steps + 1)}, boundaries=boundaries
    )
    curve = felupe.CharacteristicCurve(steps=[step], boundary=boundaries["pulled"])
    curve.evaluate(verbose=False, **options)
    return np.array(curve.y)[:, 1], field[0].values, solid.results.statevars[0]


def draw(mesh: Any, plastic: Array, file: Path) -> None:
    """Draw the equivalent plastic strain, the mean of each cell."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.collections import PolyCollection

    figure, axes = plt.subplots(figsize=(5.5, 4.5), layout="constrained")
    cells = PolyCollection(
        list(mesh.points[mesh.cells]), array=100.0 * plastic.mean(0), edgecolor="white", linewidth=0.2
    )
    axes.add_collection(cells)
    axes.set(xlabel="x in mm", ylabel="y in mm", title="equivalent plastic strain in %", aspect="equal")
    axes.autoscale_view()
    figure.colorbar(cells)
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file, dpi=150)


def main() -> None:
    """Pull the plate, print its force, and draw it."""
    mesh = plate()
    force, _, plastic = pull(Model(compiled("viscoplasticity") / "viscoplasticity"), mesh)
    for step, value in enumerate(force):
        print(f"{step * DURATION / STEPS:5.1f} s  {value:9.2f} N/mm")
    draw(mesh, plastic, PICTURE)
    print(f"The picture is {PICTURE.relative_to(ROOT)}.")


if __name__ == "__main__":
    main()
