"""A notched bar is pulled in torch-fem with a compiled material, and its force is differentiated by two parameters.

`python examples/torch_fem_bar.py`; it takes `pip install torch-fem`. The law is that of stubs/viscoplasticity.i with
its yield stress and hardening modulus as parameters. Lengths in mm, stress in MPa, time in s.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from torchfem import Solid  # noqa: E402
from torchfem.materials.base import MechanicsMaterial  # noqa: E402
from torchfem.mesh import cube_hexa  # noqa: E402

from neml2_aoti_plugin import Model  # noqa: E402
from neml2_aoti_plugin.notation import convert, convert_tangent  # noqa: E402
from stubs.build import compiled  # noqa: E402

PARAMETERS = ("residual.overstress.sy", "residual.hardening.K")
LENGTH, WIDTH, PULL, DURATION, STEPS = 10.0, 2.0, 0.1, 10.0, 10


class CompiledMaterial(MechanicsMaterial):
    """A compiled model as a material of torch-fem: all state is in torch-fem, so that its steps can be differentiated.

    Args:
        model: of stubs/viscoplasticity.i, with the derivative of the stress by the strain.
        dt: seconds that each increment takes.
    """

    def __init__(self, model: Model, dt: float) -> None:
        super().__init__()
        # The state: the strain so far in Mandel's notation, and the equivalent plastic strain.
        self.model, self.dt, self.n_state = model, dt, 7

    def step(
        self, H_inc: Tensor, F: Tensor, stress: Tensor, state: Tensor, de0: Tensor, cl: Tensor, iter: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Give stress, state and tangent at the end of an increment, as torch-fem asks for them."""
        before, plastic = state[..., :6], state[..., 6]
        strain = before + convert(0.5 * (H_inc + H_inc.mT) - de0, "tensor", "mandel")
        start = torch.zeros((), dtype=strain.dtype)
        inputs = {
            "strain": strain,
            "strain~1": before,
            "stress~1": convert(stress, "tensor", "mandel"),
            "equivalent_plastic_strain~1": plastic,
            "t": start + self.dt,
            "t~1": start,
        }
        found, blocks = self.model.jacobian(inputs, pairs=[("stress", "strain")])
        if torch.is_grad_enabled():  # torch-fem evaluates once more with autograd, at the solution
            found = self.model.forward(inputs)
        after = torch.cat([strain, found["equivalent_plastic_strain"].unsqueeze(-1)], -1)
        tangent = convert_tangent(blocks["stress"]["strain"], "mandel", "tensor")
        return convert(found["stress"], "mandel", "tensor"), after, tangent


def bar(model: Model, cells: int = 8) -> Solid:
    """A bar along x, thinner in the middle, held at one end and pulled at the other."""
    nodes, elements = cube_hexa(cells + 1, 3, 3, LENGTH, WIDTH, WIDTH)
    waist = 1.0 - 0.3 * torch.exp(-(((nodes[:, :1] - LENGTH / 2) / 2.0) ** 2))
    nodes[:, 1:] = (nodes[:, 1:] - WIDTH / 2) * waist
    solid = Solid(nodes, elements, CompiledMaterial(model, DURATION / STEPS))
    left, right = nodes[:, 0] == 0.0, nodes[:, 0] == LENGTH
    solid.constraints[left] = solid.constraints[right] = True
    solid.displacements[right, 0] = PULL
    return solid


def pull(model: Model) -> tuple[Tensor, Tensor]:
    """Pull the bar: the force after each increment `(STEPS + 1,)`, and displacements `(STEPS + 1, nodes, 3)`."""
    solid = bar(model)
    asked = [p for p in model.named_parameters().values() if p.requires_grad]
    # Increments are not cut back: a part of one would take the time of a whole one. Take more of them instead.
    u, f, *_ = solid.solve(
        torch.linspace(0.0, 1.0, STEPS + 1),
        max_cutbacks=0,
        return_intermediate=True,
        differentiable_parameters=asked,
    )
    return f[:, solid.nodes[:, 0] == LENGTH, 0].sum(1), u


def main() -> None:
    """Pull the bar, and print its force with the derivatives by the parameters."""
    torch.set_default_dtype(torch.float64)
    model = Model(compiled("calibration") / "viscoplasticity")
    model.requires_grad_()
    force, _ = pull(model)
    for step, value in enumerate(force.tolist()):
        print(f"{step * DURATION / STEPS:5.1f} s  {value:9.3f} N")
    force[-1].backward()
    for name in PARAMETERS:
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        print(f"d force / d {name} = {gradient.item():.6f} mm^2")


if __name__ == "__main__":
    main()
