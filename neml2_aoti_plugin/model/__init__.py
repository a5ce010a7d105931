"""`Model`: what callers give and get."""

from .model import Model
from .solution import Solution

__all__ = ["Model", "Solution"]
