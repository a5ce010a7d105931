"""What runs in an environment's own process: evaluate compiled stubs, and compare with what another torch gave.

`python -m tools.torch_matrix.child TASK FILE` is started in the copy of the repository, which has no package beside
it; it prints what it found as the last line, in JSON.
"""

from __future__ import annotations

import json
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from neml2_aoti_plugin.model import Model


def evaluate(model: Model, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Give the outputs of a compiled model, and all derivatives that it was compiled with, by `OUT:BY`."""
    outputs = dict(model.forward(inputs))
    blocks: dict[str, Tensor] = {}
    calls = ((model.derivative_pairs, model.jacobian), (model.parameter_derivative_pairs, model.param_jacobian))
    for pairs, call in calls:
        if pairs:
            found: dict[str, dict[str, Tensor]] = call(inputs)[1]
            blocks.update({f"{out}:{by}": found[out][by] for out, by in pairs})
    return outputs, blocks


def numbers(file: Path) -> dict[str, Any]:
    """Evaluate the stubs of the default tests that this torch has compiled, and save inputs and numbers.

    Args:
        file: Where to save them.

    Returns:
        The number of stubs evaluated, and what went wrong with the others.
    """
    import torch

    import references  # of tests/
    from stubs.build import folder_of
    from stubs.catalogue import CATALOGUE

    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    troubles: dict[str, str] = {}
    for name, stub in CATALOGUE.items():
        if stub.wide or not folder_of(name).is_dir():
            continue
        try:
            case = references.case(name)
            inputs = case.rows()
            values, derivatives = evaluate(case.load(tight=False), inputs)
        except Exception as error:
            traceback.print_exc()
            troubles[name] = line_of(error)
            continue
        found[name] = {
            "artifact": str(case.artifact),
            "inputs": inputs,
            "values": values,
            "derivatives": derivatives,
        }
    torch.save(found, file)
    return {"evaluated": len(found), "not_evaluated": troubles}


def cross(file: Path) -> dict[str, Any]:
    """Evaluate under this torch what another has compiled, and compare with the numbers that the other gave.

    Args:
        file: What `numbers` has saved under the other torch.

    Returns:
        The fields of a `Crossing` that are found here.
    """
    import torch
    from neml2.aoti import Model

    torch.set_num_threads(1)
    saved: dict[str, Any] = torch.load(file, weights_only=True)
    value_gaps: dict[str, float] = {}
    derivative_gaps: dict[str, float] = {}
    refused: dict[str, str] = {}
    for name, was in saved.items():
        try:
            model = Model(was["artifact"])
            values, derivatives = evaluate(model, was["inputs"])
            value_gaps[name] = worst(values, was["values"])
            if derivatives or was["derivatives"]:
                givens = was["inputs"] | dict(model.named_parameters())
                # A derivative may be zero but for rounding; then its numbers are no measure of what matters.
                pairs = {pair: pair.split(":") for pair in derivatives}
                least = {pair: size(values[out]) / size(givens[by]) for pair, (out, by) in pairs.items()}
                derivative_gaps[name] = worst(derivatives, was["derivatives"], least)
        except Exception as error:
            traceback.print_exc()
            refused[name] = line_of(error)
    return {"wanted": len(saved), "values": value_gaps, "derivatives": derivative_gaps, "refused": refused}


def adopt(file: Path) -> dict[str, Any]:
    """Copy compiled stubs to where this environment looks for them.

    Args:
        file: Names of stubs, each with the folder that another environment has compiled it into.

    Returns:
        The number of stubs.
    """
    from stubs.build import folder_of

    told: dict[str, str] = json.loads(file.read_text(encoding="utf-8"))
    for name, folder in told.items():
        shutil.rmtree(folder_of(name), ignore_errors=True)
        shutil.copytree(folder, folder_of(name))
    return {"adopted": len(told)}


def size(value: Tensor) -> float:
    """Give the largest absolute value, 1 where all is zero."""
    return (float(value.detach().abs().max()) if value.numel() else 0.0) or 1.0


def worst(found: dict[str, Tensor], wanted: dict[str, Tensor], least: dict[str, float] | None = None) -> float:
    """Compare tensors by name; raise where there is no comparing.

    Args:
        found: Tensors.
        wanted: What they should be.
        least: What the difference is taken over at least, by name.

    Returns:
        The largest difference over the largest number of the same tensor.
    """
    if set(found) != set(wanted):
        raise ValueError(f"names {sorted(found)}, and {sorted(wanted)} under the torch that compiled")
    gaps = [0.0]
    for name, value in found.items():
        other = wanted[name]
        if value.shape != other.shape or value.dtype != other.dtype or not bool(value.isfinite().all()):
            raise ValueError(f"{name}: {value.dtype} {tuple(value.shape)}, or not finite")
        if value.numel():
            gaps.append(float((value - other).abs().max()) / max(size(other), (least or {}).get(name, 0.0)))
    return max(gaps)


def line_of(error: Exception) -> str:
    """Put an exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def child(task: str, file: str) -> None:
    """Carry out a task in an environment, and print what it found as the last line, in JSON."""
    import neml2_aoti_plugin

    place = Path(neml2_aoti_plugin.__file__).resolve()
    if not place.is_relative_to(Path(sys.prefix).resolve()):
        raise SystemExit(f"neml2_aoti_plugin comes from {place}, not from the wheel")
    tasks: dict[str, Callable[[Path], dict[str, Any]]] = {"adopt": adopt, "numbers": numbers, "crossing": cross}
    found = tasks[task](Path(file))
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    child(*sys.argv[1:])
