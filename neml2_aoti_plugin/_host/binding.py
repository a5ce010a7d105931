"""The module that stands in for `neml2.aoti._aoti`: what neml2 imports from its C++ binding, by the same names."""

from __future__ import annotations

from .. import _log as log
from ..errors import ConvergenceError
from ..model import Model
from .eager import krylov_solve_eager, krylov_solve_linear, newton_solve_eager, newton_solve_eager_masked

__all__ = [
    "ConvergenceError",
    "Model",
    "krylov_solve_eager",
    "krylov_solve_linear",
    "log",
    "newton_solve_eager",
    "newton_solve_eager_masked",
]
