"""By how much the peak memory of a process grows in one call.

`python -m benchmarks.memory PEER MODEL FOLDER POOL ROWS THREADS` prints a line of JSON; each peer and number of rows
has a process of its own, because memory that was freed once is used again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

STATUS = Path("/proc/self/status")
# The graphs are loaded, and the libraries' buffers made, by a call on so many rows.
WARM_ROWS = 512


def peak_growth(call: Callable[[], T]) -> tuple[T, int]:
    """A call's result, and the bytes by which the peak of the process's memory grew over what it held before."""
    if not STATUS.exists():
        raise NotImplementedError("this system has no /proc/self/status")
    _reset_peak()
    before = _bytes("VmRSS")
    result = call()
    return result, _bytes("VmHWM") - before


def _reset_peak() -> None:
    """Let the peak be what is held now; where that is not allowed, an earlier peak can hide a later one."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def _bytes(name: str) -> int:
    line = next(line for line in STATUS.read_text(encoding="ascii").splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


def main() -> int:
    """Measure one peer on one number of rows."""
    import torch

    from stubs.catalogue import CATALOGUE

    from . import machine
    from .batches import taken
    from .cases import HETEROGENEOUS
    from .peers import Loaded

    machine.be_killed_first()
    peer, model, folder, pool, rows, threads = sys.argv[1:]
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(int(threads))
    loaded = Loaded(CATALOGUE[model], Path(folder))
    small = torch.load(pool)[HETEROGENEOUS]
    loaded.forward(peer, taken(small, WARM_ROWS))()
    inputs = taken(small, int(rows))
    call = loaded.forward(peer, inputs)
    result, growth = peak_growth(call)
    outputs = loaded.plain("forward", result, int(rows))
    size = {
        kind: sum(value.numel() * value.element_size() for value in tensors.values())
        for kind, tensors in (("inputs", inputs), ("outputs", outputs))
    }
    print(json.dumps({"growth": growth, **size}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
