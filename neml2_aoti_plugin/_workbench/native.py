"""Try neml2's own binding in a process of its own, which it may crash."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from ..errors import AOTIError
from .evaluation import Where, choose_points, evaluate
from .target import Target

# Prints the word of what was reached last, what went wrong, and the largest difference to our outputs.
_CODE = """
import json, sys
step, trouble, apart = "import", "", 0.0
try:
    import neml2, torch
    from neml2.aoti._aoti import Model
    step = "load"
    if len(sys.argv) > 1:
        inputs, wanted = torch.load(sys.argv[2], weights_only=True)
        model = Model(sys.argv[1])
        step = "call"
        found = model.forward(inputs)
        wrong = [name for name, value in wanted.items() if found[name].shape != value.shape]
        if wrong:
            raise ValueError(f"outputs of a wrong shape: {', '.join(wrong)}")
        for name, value in wanted.items():
            apart = max(apart, float((found[name] - value).abs().max() / (value.abs().max() or 1.0)))
        step = "done"
except BaseException as error:
    lines = str(error).strip().splitlines() or [""]
    trouble = f"{type(error).__name__}: {lines[0]}"
print("\\n" + json.dumps([step, trouble, apart]))
"""

TIMEOUT = 300
ROWS = 2
# Above this the binding does not give what we give; both solve to their tolerances.
CLOSE = 1e-6


def try_binding(target: Target | None) -> str:
    """Import neml2's own binding, and call a model through it, in a process without the plugin.

    Args:
        target: the model to call, at points of its driver and random ones; None to import only.

    Returns:
        What happened, in words.
    """
    if target is None:
        return _tried([])
    model = target.load()
    try:
        found, _ = evaluate(model, choose_points(target, model, Where(rows=ROWS)))
    except AOTIError as error:
        return f"{_tried([])}; the artifact was not called ({error})"
    with tempfile.TemporaryDirectory(prefix="neml2-aoti-doctor-") as folder:
        points = Path(folder) / "points.pt"
        torch.save((found.points.inputs, found.outputs), points)
        # From 3.0.7 on this is the artifact's folder, which is all that the binding loads.
        return _tried([str(model.artifact), str(points)])


def _tried(arguments: list[str]) -> str:
    command = [sys.executable, "-c", _CODE, *arguments]
    environment = {**os.environ, "NEML2_AOTI_PLUGIN": "0"}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False, errors="replace"
        )
    except subprocess.TimeoutExpired:
        return f"did not end within {TIMEOUT} s"
    if done.returncode != 0:
        return f"crashes the interpreter (exit status {done.returncode})"
    step, trouble, apart = json.loads(done.stdout.splitlines()[-1])
    if trouble:
        return f"fails at the {step} ({trouble})"
    if step != "done":
        return "imports; give an artifact to see whether it can be called"
    verdict = "works" if apart <= CLOSE else "loads the artifact, and gives other numbers"
    return f"{verdict}: called, its outputs are within {apart:.0e} of ours"
