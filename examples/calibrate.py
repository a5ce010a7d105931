"""Calibrate two parameters of the compiled viscoplastic model against a noisy stress-strain curve.

`make calibrate`, or `python examples/calibrate.py` in an environment with the plugin and matplotlib. The model, its
loading and its time steps are those of stubs/viscoplasticity.i. The yield stress and the hardening modulus were
promoted when it was compiled, with all derivatives, so that the gradient of a misfit leads back through all time steps
of neml2's TransientDriver. The data are the model's own at other values of the parameters, with noise.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import neml2  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from stubs.build import compiled  # noqa: E402
from stubs.catalogue import CATALOGUE  # noqa: E402

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STUB = CATALOGUE["calibration"]
YIELD, HARDENING = "residual.overstress.sy", "residual.hardening.K"
# In MPa. The initial guess is what the artifact was compiled with.
TRUTH = {YIELD: 240.0, HARDENING: 3100.0}
NOISE = 3.0
POINTS = ("near uniaxial", "shear", "mixture")


@dataclass(frozen=True)
class Fit:
    """What a calibration gives.

    Args:
        strain: `(steps, points, 6)`.
        data: stress with noise in MPa, `(steps, points, 6)`.
        first: stress of the initial guess.
        fitted: stress after the fit.
        parameters: fitted values in MPa by name.
        evaluations: how often the driver was run with a gradient.
        seconds: of the fit.
    """

    strain: Tensor
    data: Tensor
    first: Tensor
    fitted: Tensor
    parameters: dict[str, float]
    evaluations: int
    seconds: float


def stresses(driver: Any) -> Tensor:
    """Run a driver; give the stress of all steps but the first, which has none, `(steps, points, 6)`."""
    driver.run()
    return torch.stack([step["stress"].data for step in driver.result_out[1:]])


def calibrate(seed: int = 0) -> Fit:
    """Make data, start from the compiled values, and fit.

    Args:
        seed: of the noise.
    """
    driver = neml2.load_input(compiled(STUB.name) / f"{STUB.model}_aoti.i").get_driver(STUB.driver)
    model = driver.model
    guess = {name: float(value) for name, value in model.named_parameters().items()}

    for name, value in TRUTH.items():
        model.set_parameter(name, value)
    exact = stresses(driver)
    data = exact + NOISE * torch.randn(exact.shape, generator=torch.Generator().manual_seed(seed), dtype=exact.dtype)
    for name, value in guess.items():
        model.set_parameter(name, value)
    first = stresses(driver)

    model.requires_grad_()
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=30, line_search_fn="strong_wolfe", tolerance_change=1e-10
    )
    evaluations = 0

    def misfit() -> Tensor:
        nonlocal evaluations
        evaluations += 1
        optimizer.zero_grad()
        # In units of the variance of the noise.
        loss = ((stresses(driver) - data) / NOISE).square().mean()
        loss.backward()
        return loss

    start = time.monotonic()
    optimizer.step(misfit)
    seconds = time.monotonic() - start
    model.requires_grad_(False)
    return Fit(
        torch.stack([step["strain"].data for step in driver.result_in[1:]]),
        data,
        first,
        stresses(driver),
        {name: float(value) for name, value in model.named_parameters().items()},
        evaluations,
        seconds,
    )


def draw(path: Path, fit: Fit) -> None:
    """Draw data, initial guess and fit of each point along its own direction of strain."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(POINTS), figsize=(12, 4), constrained_layout=True)
    for k, (name, panel) in enumerate(zip(POINTS, axes, strict=True)):
        direction = fit.strain[-1, k] / fit.strain[-1, k].norm()
        _curves(panel, fit, k, direction)
        panel.set(title=name, xlabel="strain along its direction (%)", ylabel="stress along it (MPa)")
    axes[0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _curves(panel: Axes, fit: Fit, k: int, direction: Tensor) -> None:
    """Draw one point."""
    strain = 100.0 * (fit.strain[:, k] @ direction)
    panel.plot(strain, fit.data[:, k] @ direction, ".", color="0.6", label="data")
    panel.plot(strain, fit.first[:, k] @ direction, "--", color="tab:red", label="initial guess")
    panel.plot(strain, fit.fitted[:, k] @ direction, "-", color="tab:blue", label="fit")


def main(arguments: list[str] | None = None) -> int:
    """Calibrate, report and draw; the exit status is 1 if a parameter is off by more than 1 %."""
    parser = argparse.ArgumentParser(description="Calibrate the compiled viscoplastic model.")
    parser.add_argument("--output", type=Path, default=ROOT / "demo" / "calibration.png", help="the picture")
    options = parser.parse_args(arguments)
    fit = calibrate()
    print(f"{fit.evaluations} runs of the driver with gradients in {fit.seconds:.1f} s")
    worst = 0.0
    for name, truth in TRUTH.items():
        off = fit.parameters[name] / truth - 1.0
        worst = max(worst, abs(off))
        print(f"{name:<24}{fit.parameters[name]:10.2f} MPa, truth {truth:.0f} MPa, off by {100.0 * off:+.2f} %")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    draw(options.output, fit)
    print(f"The picture is {options.output}.")
    return 0 if worst < 0.01 else 1


if __name__ == "__main__":
    raise SystemExit(main())
