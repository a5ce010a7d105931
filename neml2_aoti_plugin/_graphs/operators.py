"""Have graphs call other operators than they list, where these do the same and better.

A graph that calls Python runs the interpreter inside torch's C++. A signal handler may run there, and torch turns what
it raises into an error without a cause; a finalizer may run there, and call the same graph again. `neml2::opaque_pow`,
which every power law calls, is torch's power and nothing else. A graph names its operators in a list beside its
library; with torch's power in that list, no Python runs inside the graph, and there is nothing to guard.

A graph of a linear solve asks torch to raise where a matrix is singular: one row then fails the whole batch, and torch
prints the failure on stderr each time. Without that question the row comes back not finite, and is judged by that.
"""

from __future__ import annotations

import io
import json
import threading
import zipfile
from functools import cache

import torch
from torch import Tensor

from .._artifact.package import graph_entries, operators_in, read_entry

PYTHON_POWER = "neml2::opaque_pow"
POWER = "aten::pow.Tensor_Tensor"
RAISE_IF_SINGULAR = "aten::_linalg_check_errors"
# Compares a tensor with what it is given, which here is nothing.
ASK_NOTHING = "aten::_assert_tensor_metadata"

# How the name of the entry ends that lists them.
LISTED = "wrapper.json"


def operators(archive: zipfile.ZipFile, device: torch.device) -> tuple[dict[str, bytes], bool]:
    """Replace neml2's power in Python by torch's, and leave the question for singular matrices out.

    Gives the entries of the package that change, by name, and whether an operator is left that may be in Python.
    """
    names = operators_in(archive)
    changed: dict[str, bytes] = {}
    power = PYTHON_POWER in names and same_as_torch(device)
    if power or RAISE_IF_SINGULAR in names:
        info = next(info for info in graph_entries(archive) if info.filename.endswith(LISTED))
        changed[info.filename], names = _exchanged(bytes(read_entry(archive, info)), power=power)
    return changed, any(not name.startswith("aten::") for name in names)


def repacked(archive: zipfile.ZipFile, changed: dict[str, bytes]) -> bytes:
    """Make a package anew."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as package:
        for info in archive.infolist():
            data = changed.get(info.filename)
            package.writestr(info.filename, bytes(read_entry(archive, info)) if data is None else data)
    return out.getvalue()


def _exchanged(listed: bytes, *, power: bool) -> tuple[bytes, tuple[str, ...]]:
    """Exchange operators in a list; give the list, and the names that are in it."""
    content = json.loads(listed)
    nodes = [entry["node"] for entry in content["nodes"]]
    for node in nodes:
        # torch finds the arguments by their names in the operator's schema. What is of another form stays as it is.
        given, target = node.get("inputs"), node["target"]
        names = [one.get("name") for one in given if isinstance(one, dict)] if isinstance(given, list) else []
        if power and target == PYTHON_POWER and names == ["base", "exponent"]:
            node["target"] = POWER
            node["inputs"][0]["name"] = "self"
        elif target == RAISE_IF_SINGULAR and names[:1] == ["info"] and not node.get("outputs"):
            node["target"] = ASK_NOTHING
            node["inputs"] = node["inputs"][:1]
            node["inputs"][0]["name"] = "a"
    return json.dumps(content).encode(), tuple(str(node["target"]) for node in nodes)


@cache
def same_as_torch(device: torch.device) -> bool:
    """Whether neml2's power is torch's, to the last bit, for numbers of all kinds."""
    outcome: list[bool] = []
    # What the caller has switched on in this thread (a mode, a transform, another default) must not matter here.
    thread = threading.Thread(target=lambda: outcome.append(_compare(device)))
    thread.start()
    thread.join()
    return outcome == [True]


def _compare(device: torch.device) -> bool:
    inf, nan = float("inf"), float("nan")
    bases = [-inf, -2.0, -1.0, -0.3, -0.0, 0.0, 1e-300, 1e-30, 0.3, 1.0, 1.7, 5.0, 1e30, 1e300, inf, nan]
    exponents = [-inf, -7.3, -2.0, -1.0, -0.5, 0.0, 0.3, 0.5, 1.0, 2.0, 3.0, 4.6, 20.0, inf, nan]
    for dtype, bits in ((torch.float64, torch.int64), (torch.float32, torch.int32)):
        base = torch.tensor(bases, dtype=dtype, device=device)[:, None]
        for exponent in (torch.tensor(exponents, dtype=dtype, device=device), base[9, 0]):
            try:
                found: Tensor = torch.ops.neml2.opaque_pow(base, exponent)
            except (AttributeError, RuntimeError):
                return False
            right = torch.pow(base, exponent)
            if found.shape != right.shape or not torch.equal(found.view(bits), right.view(bits)):
                return False
    return True
