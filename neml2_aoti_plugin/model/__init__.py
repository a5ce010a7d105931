"""`Model`: what callers give and get."""

from ..solve.outcome import Outcome
from .model import Model
from .solution import Solution

__all__ = ["Model", "Outcome", "Solution"]
