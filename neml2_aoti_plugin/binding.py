"""The module that stands in for `neml2.aoti._aoti`: what neml2 imports from its C++ binding, by the same names."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from . import log
from .errors import ConvergenceError

_LATE = {
    "Model": ".model",
    "krylov_solve_eager": ".eager",
    "krylov_solve_linear": ".eager",
    "newton_solve_eager": ".eager",
    "newton_solve_eager_masked": ".eager",
}

__all__ = ["ConvergenceError", "log"]


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LATE[name], __package__), name)
