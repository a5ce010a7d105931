"""Are the operators registered that a graph calls by name?"""

from __future__ import annotations

import re
from functools import cache
from importlib import import_module

import torch

_NAME = re.compile(r"[A-Za-z_]\w{0,63}::[A-Za-z_]\w{0,127}\Z")


def operator_fault(names: tuple[str, ...]) -> str:
    """Tell which of a graph's operators are not registered.

    neml2 registers its own while it is imported; it is imported here if a graph needs one of them.

    Args:
        names: such as `neml2::opaque_pow`.

    Returns:
        What is wrong and the cure; empty for nothing.
    """
    odd = [name for name in names if not _NAME.match(name)]
    if odd:
        return f"calls {len(odd)} things by what is no operator's name. Do not use this file."
    absent = [name for name in names if not _registered(name)]
    if not absent:
        return ""
    listed = ", ".join(absent[:8]) + (", ..." if len(absent) > 8 else "")
    if all(name.startswith("neml2::") for name in absent):
        return (
            f"calls {listed}, which neml2 {_version('neml2')} does not register. Install the neml2 that compiled the "
            "model, or compile the model again with neml2-compile."
        )
    if all(name.startswith("aten::") for name in absent):
        return (
            f"calls {listed}, which torch {torch.__version__} does not have. Install the torch that the model was "
            "compiled with, or compile it again here with neml2-compile."
        )
    return f"calls {listed}, which nothing has registered. Import the Python package that defines it before loading."


@cache
def _known(name: str) -> bool:
    """Whether an operator is there; only what is there is asked for once."""
    namespace, _, operator = name.partition("::")
    try:
        getattr(getattr(torch.ops, namespace), operator)
    except (AttributeError, RuntimeError):
        raise LookupError(name) from None
    return True


def _registered(name: str) -> bool:
    try:
        return _known(name)
    except LookupError:
        pass
    if not name.startswith("neml2::"):
        return False
    try:
        import_module("neml2")
        return _known(name)
    except (ImportError, LookupError):
        return False


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"
