"""Time a loss and its gradient by two parameters: pyzag's adjoint against autograd through the compiled update.

`python -m benchmarks.pyzag_adjoint` compiles the residual and the update of the viscoplastic model into a temporary
folder, checks that all ways give the same gradients, and prints a table in Markdown.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import neml2
import torch
from neml2.pyzag import NEML2PyzagModel
from pyzag import chunktime, nonlinear
from torch import Tensor

from neml2_aoti_plugin import Model
from stubs.build import QUICK
from stubs.catalogue import CATALOGUE

SOURCE = CATALOGUE["viscoplasticity"].path
SYSTEM = """
[EquationSystems]
  [balance]
    type = NonlinearSystem
    model = 'residual'
    unknowns = 'stress equivalent_plastic_strain'
  []
[]
"""
PARAMETERS = ("overstress.sy", "hardening.K")
STEPS, ROUNDS = 60, 5


def compiled(folder: Path, *what: str, prefix: str = "") -> Path:
    """Compile a part of the model, with the two parameters and all derivatives."""
    flags = [flag for name in PARAMETERS for flag in ("-p", prefix + name, "-d", f":{prefix}{name}")]
    command = [str(Path(sys.executable).with_name("neml2-compile")), str(SOURCE), *what, "-d", ":", *flags]
    subprocess.run(
        [*command, "--output-dir", str(folder)], env={**os.environ, **QUICK}, check=True, capture_output=True
    )
    return folder


def strains(points: int) -> tuple[Tensor, Tensor]:
    """Times and strains of points that are pulled in directions of their own, `(steps + 1, points, ...)`."""
    direction = torch.randn(points, 6, generator=torch.Generator().manual_seed(1))
    direction /= direction.norm(dim=-1, keepdim=True)
    ramp = torch.linspace(0.0, 1.0, STEPS + 1)
    return 20.0 * ramp[:, None].expand(-1, points), 0.02 * ramp[:, None, None] * direction


def by_pyzag(file: Path, points: int, block: int) -> Callable[[], list[Tensor]]:
    """The loss and its gradient by pyzag, with `block` steps solved at a time."""
    equations = NEML2PyzagModel(
        neml2.load_input(file).get_equation_system("balance"),
        include_parameters=[name.replace(".", "_") for name in PARAMETERS],
    )
    times, strain = strains(points)
    forces = equations.assemble_forces({"strain": strain, "t": times})
    start = {"stress": torch.zeros(points, 6), "equivalent_plastic_strain": torch.zeros(points)}
    solver = nonlinear.RecursiveNonlinearEquationSolver(
        equations,
        step_generator=nonlinear.StepGenerator(block),
        predictor=nonlinear.PreviousStepsPredictor(),
        nonlinear_solver=chunktime.ChunkNewtonRaphson(rtol=1e-10, atol=1e-8),
    )

    def run() -> list[Tensor]:
        equations.zero_grad()
        found = nonlinear.solve_adjoint(solver, equations.assemble_state(start), STEPS + 1, forces)
        found[..., :6].square().sum().backward()
        return [getattr(equations, name.replace(".", "_")).grad.clone() for name in PARAMETERS]

    return run


def by_autograd(artifact: Path, points: int) -> Callable[[], list[Tensor]]:
    """The loss and its gradient by autograd through the compiled update, step by step."""
    model = Model(artifact)
    model.requires_grad_()
    times, strain = strains(points)

    def run() -> list[Tensor]:
        model.zero_grad()
        state = {"stress": torch.zeros(points, 6), "equivalent_plastic_strain": torch.zeros(points)}
        loss = torch.zeros(())
        for step in range(1, STEPS + 1):
            given = {"strain": strain[step], "t": times[step], "t~1": times[step - 1], "strain~1": strain[step - 1]}
            given |= {f"{name}~1": value for name, value in state.items()}
            state = model.forward({name: given[name] for name in model.inputs})
            loss = loss + state["stress"].square().sum()
        loss.backward()
        return [p.grad.clone() for _, p in sorted(model.named_parameters().items(), reverse=True) if p.grad is not None]

    return run


def main() -> None:
    """Measure and print."""
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        residual = compiled(Path(made) / "residual", "--model", "residual") / "residual_aoti.i"
        residual.write_text(residual.read_text(encoding="utf-8") + SYSTEM, encoding="utf-8")
        eager = Path(made) / SOURCE.name
        eager.write_text(SOURCE.read_text(encoding="utf-8"), encoding="utf-8")
        update = compiled(Path(made) / "update", "--driver", "driver", prefix="residual.")
        artifact = next(path for path in update.iterdir() if path.is_dir())
        print(f"| points, {STEPS} steps | way | processor time |\n|--:|---|--:|")
        for points in (3, 300):
            ways = {"autograd through the compiled update": by_autograd(artifact, points)}
            for block in (1, 10):
                ways[f"pyzag, compiled residual, {block} step(s) at a time"] = by_pyzag(residual, points, block)
            ways["pyzag, eager residual, 10 step(s) at a time"] = by_pyzag(eager, points, 10)
            right = next(iter(ways.values()))()
            for name, run in ways.items():
                for found, expected in zip(run(), right, strict=True):
                    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0.0)
                taken = []
                for _ in range(ROUNDS):
                    begin = time.process_time()
                    run()
                    taken.append(time.process_time() - begin)
                print(f"| {points} | {name} | {median(taken):.2f} s |", flush=True)


if __name__ == "__main__":
    main()
