"""Try neml2's own binding in a process of its own, which it may crash."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from .target import Target

# Prints the word of what was reached last, and what went wrong.
_CODE = """
import json, sys
step, trouble = "import", ""
try:
    import neml2, torch
    from neml2.aoti._aoti import Model
    step = "load"
    if len(sys.argv) > 1:
        inputs = {n: torch.zeros(2, *shape, dtype=getattr(torch, sys.argv[3])) for n, shape in json.loads(sys.argv[2])}
        model = Model(sys.argv[1])
        step = "call"
        found = model.forward(inputs)
        step = "done"
        wrong = [n for n, v in found.items() if list(v.shape) != [2, *dict(json.loads(sys.argv[4]))[n]]]
        trouble = f"outputs of a wrong shape: {', '.join(wrong)}" if wrong else ""
except BaseException as error:
    lines = str(error).strip().splitlines() or [""]
    trouble = f"{type(error).__name__}: {lines[0]}"
print("\\n" + json.dumps([step, trouble]))
"""

TIMEOUT = 300


def try_binding(target: Target | None) -> str:
    """Import neml2's own binding, and call a model through it, in a process without the plugin.

    Args:
        target: the model to call, with zeros for two rows; None to import only.

    Returns:
        What happened, in words.
    """
    command = [sys.executable, "-c", _CODE]
    if target is not None:
        model = target.load()
        inputs = [(name, v.natural_shape) for name, v in model.inputs.items()]
        outputs = [(name, v.natural_shape) for name, v in model.outputs.items()]
        dtype = str(model.dtype).removeprefix("torch.")
        command += [str(model.artifact), json.dumps(inputs), dtype, json.dumps(outputs)]
    environment = {**os.environ, "NEML2_AOTI_PLUGIN": "0"}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False, errors="replace"
        )
    except subprocess.TimeoutExpired:
        return f"did not end within {TIMEOUT} s"
    if done.returncode != 0:
        return f"crashed the interpreter (exit status {done.returncode})"
    step, trouble = json.loads(done.stdout.splitlines()[-1])
    if step == "done":
        return trouble or "loads the model, and a call gives outputs of the right shape"
    if not trouble:
        return "imports; give an artifact to see whether it can be called"
    return f"fails at the {step} ({trouble})"
