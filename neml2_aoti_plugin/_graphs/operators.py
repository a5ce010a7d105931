"""Have graphs call other operators than they list, where these do the same and better.

A graph that calls Python runs the interpreter inside torch's C++. A signal handler may run there, and torch turns what
it raises into an error without a cause; a finalizer may run there, and call the same graph again. `neml2::opaque_pow`,
which every power law calls, is torch's power and nothing else. A graph names its operators in a list beside its
library; with torch's power in that list, no Python runs inside the graph, and there is nothing to guard.

A graph of a linear solve asks torch to raise where a matrix is singular: one row then fails the whole batch, and torch
prints the failure on stderr each time. Without that question the row comes back not finite, and is judged by that.

By the C interface, a graph calls an operator through a *proxy executor*: a C++ object with a virtual method. The object
here has torch's power as a method in machine code.
"""

from __future__ import annotations

import ctypes
import io
import json
import threading
import zipfile
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .._artifact.package import graph_entries, operators_in, read_entry
from .c_interface import Unavailable, address, function, libtorch

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
        content = json.loads(bytes(read_entry(archive, info)))
        nodes = [entry["node"] for entry in content["nodes"]]
        for node in nodes:
            # torch finds the arguments by their names in the operator's schema. What is of another form stays as it is.
            given, target = node.get("inputs"), node["target"]
            takes = [one.get("name") for one in given if isinstance(one, dict)] if isinstance(given, list) else []
            if power and target == PYTHON_POWER and takes == ["base", "exponent"]:
                node["target"] = POWER
                given[0]["name"] = "self"
            elif target == RAISE_IF_SINGULAR and takes[:1] == ["info"] and not node.get("outputs"):
                node["target"], node["inputs"] = ASK_NOTHING, given[:1]
                given[0]["name"] = "a"
        changed[info.filename] = json.dumps(content).encode()
        names = tuple(str(node["target"]) for node in nodes)
    return changed, any(not name.startswith("aten::") for name in names)


def repacked(archive: zipfile.ZipFile, changed: dict[str, bytes]) -> bytes:
    """Make a package anew."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as package:
        for info in archive.infolist():
            data = changed.get(info.filename)
            package.writestr(info.filename, bytes(read_entry(archive, info)) if data is None else data)
    return out.getvalue()


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


# The function by which torch calls a proxy executor, and that of its power.
_CALL = "aoti_torch_proxy_executor_call_function"
_POWER = "aoti_torch_cpu_pow_Tensor_Tensor"
# More entries than the table of the method's class has.
_ENTRIES = 8
_KINDS: Any = (ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
_Method = ctypes.CFUNCTYPE(None, *_KINDS)


@cache
def power_executor(method: int) -> int:
    """The address of a proxy executor whose only operator is the power, by a method in machine code at an address."""
    functions = (_POWER, "aoti_torch_assign_tensors", "aoti_torch_delete_tensor_object")
    table = [0] * _ENTRIES
    table[_entry()] = method
    return _executor(table, [address(function(libtorch(), name)) for name in functions])


# What executors lie in; they are needed as long as the process lives.
_kept: list[Any] = []


def _executor(table: list[int], words: list[int]) -> int:
    """The address of an object with a table of methods, and these words."""
    methods = (ctypes.c_void_p * len(table))(*table)
    found = (ctypes.c_void_p * (1 + len(words)))(ctypes.addressof(methods), *words)
    _kept.extend((methods, found))
    return ctypes.addressof(found)


def _entry() -> int:
    """Find out which entry of the table torch calls: each notes what it is called with, which harms nothing."""
    calls: list[tuple[Any, ...]] = []

    def note(entry: int) -> Any:
        return _Method(lambda *arguments: calls.append((entry, *arguments)))

    notes = [note(entry) for entry in range(_ENTRIES)]
    given = (_executor([address(one) for one in notes], []), 7, 3, 0x1000, 5, 0x2000)
    failed = function(libtorch(), _CALL)(*(kind(value) for kind, value in zip(_KINDS, given, strict=True)))
    if failed or len(calls) != 1 or calls[0][1:] != given:
        raise Unavailable("torch does not call a proxy executor as expected")
    return int(calls[0][0])
