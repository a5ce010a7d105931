"""What programs that tests start in processes of their own begin with: `from attacks.scene import *`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from neml2_aoti_plugin import Model


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def inputs(model: Model, rows: int = 3) -> dict[str, Tensor]:
    """A step of a second from nothing to a strain that makes a viscoplastic model flow."""
    step = {"strain": 2e-3 * torch.ones(rows, 6, dtype=torch.float64), "t": zeros() + 1.0}
    return {name: step.get(name, zeros(*variable.base_shape)) for name, variable in model.inputs.items()}


def stress(model: Model, rows: int = 3) -> Tensor:
    return model.forward(inputs(model, rows))["stress"]


def in_fork(work: Callable[[], object], limit: int = 30) -> int:
    """Do something in a forked process, and give its status."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(limit)
        try:
            work()
            sys.stdout.flush()
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", flush=True)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def everything(temporary: str | Path) -> list[tuple[str, bytes]]:
    """All that is in a folder of temporary files, beside the empty one that the next load uses again."""
    ours = f"neml2-aoti-plugin-{os.getuid() if hasattr(os, 'getuid') else 0}"
    found = (path for path in Path(temporary).rglob("*") if path.name != ours)
    return sorted((str(path), path.read_bytes() if path.is_file() else b"") for path in found)
