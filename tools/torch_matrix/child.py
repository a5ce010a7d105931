"""What runs in an environment's own process: evaluate compiled stubs, and compare with what another torch gave.

`python -m tools.torch_matrix.child TASK [FILE]` is started in the copy of the repository, which has no package beside
it; it prints what it found as the last line, in JSON.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stubs.build import folder_of
from stubs.catalogue import CATALOGUE

if TYPE_CHECKING:
    from torch import Tensor

    from neml2_aoti_plugin.model import Model

STUBS = [name for name, stub in CATALOGUE.items() if not stub.wide]


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


def numbers(file: str) -> dict[str, Any]:
    """Evaluate what this torch has compiled, and save inputs and numbers; give how many, and what went wrong."""
    import torch

    import references  # of tests/

    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    troubles: dict[str, str] = {}
    for name in STUBS:
        if not folder_of(name).is_dir():
            continue
        try:
            case = references.case(name)
            inputs = case.rows()
            values, derivatives = evaluate(case.load(tight=False), inputs)
        except Exception as error:
            traceback.print_exc()
            troubles[name] = line_of(error)
            continue
        given = {"artifact": str(case.artifact), "inputs": inputs}
        found[name] = {**given, "values": values, "derivatives": derivatives}
    torch.save(found, file)
    return {"evaluated": len(found), "not_evaluated": troubles}


def crossing(file: str) -> dict[str, Any]:
    """Evaluate what another torch has compiled, compare with its `numbers`, and give fields of a `Crossing`."""
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


def folders() -> dict[str, Any]:
    """Where this environment looks for the compiled stubs of the default tests, by name."""
    return {name: str(folder_of(name)) for name in STUBS}


def size(value: Tensor) -> float:
    """Give the largest absolute value, 1 where all is zero."""
    return (float(value.detach().abs().max()) if value.numel() else 0.0) or 1.0


def worst(found: dict[str, Tensor], wanted: dict[str, Tensor], least: dict[str, float] | None = None) -> float:
    """Give the largest difference over the largest number of the same tensor, or over what is named for it if larger.

    Raises:
        ValueError: There is no comparing.
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


def child(task: str, *arguments: str) -> None:
    """Carry out a task in an environment, and print what it found as the last line, in JSON."""
    import neml2_aoti_plugin

    place = Path(neml2_aoti_plugin.__file__).resolve()
    if not place.is_relative_to(Path(sys.prefix).resolve()):
        raise SystemExit(f"neml2_aoti_plugin comes from {place}, not from what was installed")
    tasks = {"folders": folders, "numbers": numbers, "crossing": crossing}
    found = tasks[task](*arguments)  # type: ignore[operator]
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    child(*sys.argv[1:])
