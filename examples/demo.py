"""Compile the viscoplastic stub, inspect it, run it, and hold the result against two others.

`make demo`, or `python examples/demo.py` in an environment with the plugin, matplotlib and scipy. What it writes
goes to the folder demo/.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import numpy as np  # noqa: E402

from examples.reference import Array, Viscoplasticity  # noqa: E402
from stubs.catalogue import CATALOGUE  # noqa: E402

if TYPE_CHECKING:
    from neml2.aoti import Model

STUB = CATALOGUE["viscoplasticity"]
OUT = ROOT / "demo"
# The steps in which the points begin to flow; these are also taken in REFINEMENT smaller steps each.
KNEE = 6
REFINEMENT = 64
POINTS = ("near uniaxial", "shear", "mixture")


def main() -> int:
    """Run all of it; the exit status is 1 if something failed."""
    OUT.mkdir(exist_ok=True)
    stub = OUT / "aoti" / f"{STUB.model}_aoti.i"
    seconds: dict[str, float | None] = {"compile": None}
    try:
        if stub.exists():
            print(f"{stub.parent.relative_to(ROOT)} is there from before; remove it to compile again.")
        else:
            print("neml2-compile compiles one graph after the other, which takes a minute or two.")
            options = ("--driver", STUB.driver, *STUB.flags, "--output-dir", str(stub.parent))
            seconds["compile"] = run("neml2-compile", str(STUB.path), *options)
        run("neml2-inspect", str(stub), STUB.model)
        seconds["compiled"] = run("neml2-run", str(stub), STUB.driver, saving("compiled.pt"))
        seconds["eager"] = run("neml2-run", str(STUB.path), STUB.driver, saving("eager.pt"))
    except subprocess.CalledProcessError as error:
        print(f"{Path(error.cmd[0]).name} failed with exit status {error.returncode}.", file=sys.stderr)
        return 1

    times, strains, coarse = trajectory(OUT / "compiled.pt")
    _, _, eager = trajectory(OUT / "eager.pt")
    fine_times = np.linspace(0.0, times[KNEE], KNEE * REFINEMENT + 1)
    fine_strains = fine_times[:, None, None] / times[-1] * strains[-1]
    fine, seconds["fine"] = march(stub.parent / STUB.model, fine_times, fine_strains)
    # Where scipy's solution is wanted: densely in the knee, and then at the driver's times.
    exact_times = np.concatenate([fine_times, times[KNEE + 1 :]])
    law = Viscoplasticity()
    exact = np.stack([law.integrate(exact_times, rate)[:, :6] for rate in strains[-1] / times[-1]], axis=1)
    exact_strains = exact_times[:, None, None] / times[-1] * strains[-1]

    report(seconds, coarse, eager, fine, exact)
    picture = OUT / "stress_strain.png"
    draw(picture, (strains, coarse), (fine_strains, fine), (exact_strains, exact))
    print(f"\nThe picture is {picture.relative_to(ROOT)}.")
    return 0


def run(*words: str) -> float:
    """Run one of neml2's console scripts of this environment; give the seconds it took."""
    script = shutil.which(words[0], path=str(Path(sys.executable).parent))
    if script is None:
        raise SystemExit(f"{words[0]} is not beside {sys.executable}; `make demo` installs it.")
    shown = [word.replace(f"{ROOT}/", "") for word in words]
    print(f"\n$ {shlex.join(shown)}", flush=True)
    start = time.monotonic()
    subprocess.run([script, *words[1:]], check=True, cwd=ROOT)
    elapsed = time.monotonic() - start
    print(f"  {elapsed:.1f} s", flush=True)
    return elapsed


def saving(name: str) -> str:
    """Give the override that makes the driver save its result in the output folder."""
    return f"Drivers/{STUB.driver}/save_as:={OUT / name}"


def trajectory(path: Path) -> tuple[Array, Array, Array]:
    """Read the times, strains and stresses that a driver saved; the first step has no output and starts at zero."""
    import torch

    saved: dict[str, Any] = torch.load(path, weights_only=True)
    steps = sum(1 for key in saved if key.startswith("input.") and key.endswith(".t"))
    times = np.array([float(saved[f"input.{k}.t"]) for k in range(steps)])
    strains = np.stack([saved[f"input.{k}.strain"].numpy() for k in range(steps)])
    stresses = np.stack([saved[f"output.{k}.stress"].detach().numpy() for k in range(1, steps)])
    return times, strains, np.concatenate([np.zeros_like(stresses[:1]), stresses])


def march(artifact: Path, times: Array, strains: Array) -> tuple[Array, float]:
    """Take the compiled model through a strain history by direct calls; give the stresses and the seconds."""
    import torch
    from neml2.aoti import Model

    model: Model = Model(str(artifact))
    t, strain = (torch.from_numpy(np.ascontiguousarray(x)) for x in (times, strains))
    stress, plastic = torch.zeros_like(strain[0]), torch.zeros_like(strain[0, :, 0])
    stresses = [stress]
    start = time.monotonic()
    for k in range(1, len(t)):
        found = model.forward(
            {
                "t": t[k],
                "t~1": t[k - 1],
                "strain": strain[k],
                "strain~1": strain[k - 1],
                "stress~1": stress,
                "equivalent_plastic_strain~1": plastic,
            }
        )
        stress, plastic = found["stress"], found["equivalent_plastic_strain"]
        stresses.append(stress)
    elapsed = time.monotonic() - start
    return torch.stack(stresses).numpy(), elapsed


def relative(found: Array, reference: Array, scale: Array) -> str:
    """Give the largest difference of any stress component at any time, as a fraction of the largest stress."""
    return f"{np.abs(found - reference).max() / np.abs(scale).max():.0e}"


def report(seconds: dict[str, float | None], coarse: Array, eager: Array, fine: Array, exact: Array) -> None:
    """Print the table."""
    knee = KNEE * REFINEMENT + 1
    at_steps = np.concatenate([exact[:knee:REFINEMENT], exact[knee:]])
    small = f"Model, 1/{REFINEMENT} steps, to {KNEE}"

    def differences(found: Array, reference: Array) -> tuple[str, str]:
        return relative(found, reference, exact), relative(found[-1], reference[-1], exact)

    rows: list[tuple[str, int | str, float | None, str, str, str]] = [
        ("neml2-compile", "", seconds["compile"], "", "", ""),
        (
            "neml2-run, compiled",
            len(coarse) - 1,
            seconds["compiled"],
            *differences(coarse, at_steps),
            relative(coarse, eager, exact),
        ),
        ("neml2-run, eager", len(eager) - 1, seconds["eager"], *differences(eager, at_steps), ""),
        (small, len(fine) - 1, seconds["fine"], *differences(fine, exact[:knee]), ""),
    ]
    print("\nDifference to                                     scipy      scipy      eager")
    print(f"{'':<24}{'steps':>6}{'seconds':>10}{'largest':>15}{'at the end':>12}{'largest':>10}")
    for name, count, duration, largest, last, to_eager in rows:
        shown = "before" if duration is None else f"{duration:.1f}"
        print(f"{name:<24}{count:>6}{shown:>10}{largest:>15}{last:>12}{to_eager:>10}".rstrip())
    print("Differences are those of the stress components, over the largest stress. scipy integrates the law as it")
    print("stands in examples/reference.py to about nine digits. The model takes backward Euler steps, which cut the")
    print("corner where flow begins; there its difference to scipy is that of the steps, and shrinks with them.")


Curve = tuple[Array, Array]


def draw(path: Path, coarse: Curve, fine: Curve, exact: Curve) -> None:
    """Draw stress over strain, all of it and the knee; each curve is strains and stresses, (times, points, 6)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # What is drawn of each point: the entry, its name, and what makes a tensor component of the stored number.
    drawn = ((0, "xx", 1.0), (5, "xy", 1 / np.sqrt(2)), (0, "xx", 1.0))
    steps, knee = len(coarse[0]) - 1, slice(KNEE + 1)
    circles: dict[str, Any] = {"marker": "o", "markersize": 5, "fillstyle": "none", "linestyle": ""}
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5.2), layout="constrained")
    for point, (entry, name, factor) in enumerate(drawn):

        def along(curve: Curve, entry: int = entry, factor: float = factor, point: int = point) -> Curve:
            return 100 * factor * curve[0][:, point, entry], factor * curve[1][:, point, entry]

        color = f"C{point}"
        (x, y), (x_fine, y_fine), (x_exact, y_exact) = along(coarse), along(fine), along(exact)
        left.plot(x_exact, y_exact, color=color, linewidth=1.4, label=f"{POINTS[point]}: {name}")
        left.plot(x, y, color=color, **circles)
        dense = slice(len(x_fine))
        right.plot(x_exact[dense], y_exact[dense], color=color, linewidth=1.4)
        right.plot(x_fine, y_fine, color="black", linestyle=(0, (1, 3)), linewidth=1.6)
        right.plot(x[knee], y[knee], color=color, **circles)
    left.plot([], [], color="0.3", linewidth=1.4, label="scipy")
    left.plot([], [], color="0.3", label=f"compiled, {steps} steps", **circles)
    right.plot([], [], color="0.3", linewidth=1.4, label="scipy")
    right.plot([], [], color="0.3", label=f"compiled, {steps} steps", **circles)
    right.plot(
        [], [], color="black", linestyle=(0, (1, 3)), linewidth=1.6, label=f"compiled, steps 1/{REFINEMENT} as long"
    )
    left.set_title("Viscoplasticity at three material points")
    right.set_title("Where flow begins")
    left.legend(frameon=False, ncols=2, loc="lower right")
    right.legend(frameon=False, loc="lower right")
    for axes in (left, right):
        axes.set_xlabel("strain component, %")
        axes.set_ylabel("stress component, MPa")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


if __name__ == "__main__":
    raise SystemExit(main())
