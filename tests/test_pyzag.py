"""pyzag and pyro around a compiled residual, by neml2's own adapter, against the eager model: `make test-clients`."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import page_shell
from environments import ROOT
from stubs.build import QUICK
from stubs.catalogue import CATALOGUE

pytestmark = [
    *(pytest.mark.clients, pytest.mark.timeout(900), pytest.mark.filterwarnings("default")),
    pytest.mark.usefixtures("doubles"),
]

SOURCE = CATALOGUE["viscoplasticity"].path
# The names that neml2's adapter gives to overstress.sy and hardening.K.
PARAMETERS = ("overstress_sy", "hardening_K")
POINTS, STEPS = 4, 20
PAGE = {language: block for language, block in page_shell.blocks((ROOT / "docs/howto/pyzag.md").read_text("utf-8"))}


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled residual of the viscoplastic model and its equation system, as the page has it."""
    folder = tmp_path_factory.mktemp("residual")
    shutil.copytree(SOURCE.parent, folder / "stubs")
    name, *flags = shlex.split(PAGE["sh"])
    command = [str(Path(sys.executable).with_name(name)), *flags]
    # Two processes of the test run may compile this at once, which damages files in a cache of torch's that they share.
    own = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    subprocess.run(command, cwd=folder, env={**os.environ, **QUICK, **own}, check=True, timeout=800)
    file = folder / "residual" / "residual_aoti.i"
    file.write_text(file.read_text(encoding="utf-8") + PAGE["ini"], encoding="utf-8")
    return file


class March(torch.nn.Module):
    """All steps of a strain path by pyzag, with its adjoint; the stress along x of each point, `(steps, points, 1)`."""

    def __init__(self, path: Path) -> None:
        import neml2
        from neml2.pyzag import NEML2PyzagModel

        super().__init__()
        system = neml2.load_input(path).get_equation_system("balance")
        self.equations = NEML2PyzagModel(system, include_parameters=list(PARAMETERS))

    def forward(self, strain: Tensor) -> Tensor:
        from pyzag import chunktime, nonlinear

        points = strain.shape[1]
        time = torch.linspace(0.0, 20.0, len(strain))[:, None].expand(-1, points)
        forces = self.equations.assemble_forces({"strain": strain, "t": time})
        start = {"stress": torch.zeros(points, 6), "equivalent_plastic_strain": torch.zeros(points)}
        solver = nonlinear.RecursiveNonlinearEquationSolver(
            self.equations,
            step_generator=nonlinear.StepGenerator(5),
            predictor=nonlinear.PreviousStepsPredictor(),
            nonlinear_solver=chunktime.ChunkNewtonRaphson(rtol=1e-12, atol=1e-9),
        )
        found: Tensor = nonlinear.solve_adjoint(solver, self.equations.assemble_state(start), len(strain), forces)
        return found[..., :1]


def strains() -> Tensor:
    direction = torch.randn(POINTS, 6, generator=torch.Generator().manual_seed(1))
    direction /= direction.norm(dim=-1, keepdim=True)
    return 0.02 * torch.linspace(0.0, 1.0, STEPS + 1)[:, None, None] * direction


def gradients(march: March) -> dict[str, float]:
    march.zero_grad()
    march(strains()).square().sum().backward()
    return {name: p.grad.item() for name, p in march.named_parameters() if p.grad is not None}


def test_the_adjoint(stub: Path) -> None:
    compiled, eager = March(stub), March(SOURCE)
    assert compiled.equations.parameter_names == ["hardening_K", "overstress_sy"]
    assert torch.allclose(compiled(strains()), eager(strains()), rtol=1e-10)
    found = gradients(compiled)
    assert len(found) == 2 and found == pytest.approx(gradients(eager), rel=1e-10)
    yield_stress = compiled.equations.overstress_sy
    ends = []
    for step in (0.01, -0.01):
        with torch.no_grad():
            yield_stress += step
            ends.append(compiled(strains()).square().sum().item())
            yield_stress -= step
    assert found["equations.overstress_sy"] == pytest.approx((ends[0] - ends[1]) / 0.02, rel=1e-6)


def test_parameters_in_another_scale(stub: Path) -> None:
    from pyzag import reparametrization

    def scaled(path: Path) -> March:
        march = March(path)
        bounds = {"equations.overstress_sy": (100.0, 300.0), "equations.hardening_K": (1000.0, 3000.0)}
        scales = {name: reparametrization.RangeRescale(*map(torch.tensor, ends)) for name, ends in bounds.items()}
        reparametrization.Reparameterizer(scales, error_not_provided=True)(march)
        return march

    found = gradients(scaled(stub))
    assert len(found) == 2 and found == pytest.approx(gradients(scaled(SOURCE)), rel=1e-10)


def test_stochastic_variational_inference(stub: Path) -> None:
    import pyro
    from pyzag import stochastic

    data = March(SOURCE)(strains()).detach() + 1.0

    def losses(path: Path) -> list[float]:
        pyro.clear_param_store()
        pyro.set_rng_seed(5)
        model: Any = stochastic.HierarchicalStatisticalModel(March(path), stochastic.MapNormal(0.05), torch.tensor(5.0))
        guide = pyro.infer.autoguide.AutoDelta(model)
        optimizer = pyro.optim.ClippedAdam({"lr": 1e-3})
        inference = pyro.infer.SVI(model, guide, optimizer, loss=pyro.infer.Trace_ELBO())
        return [inference.step(strains(), results=data) for _ in range(5)]

    found, expected = losses(stub), losses(SOURCE)
    assert len(set(found)) == 5
    assert found == pytest.approx(expected, rel=1e-10)


def test_the_page(stub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(stub.parent.parent)
    exec(compile(PAGE["python"], "docs/howto/pyzag.md", "exec"), {})
