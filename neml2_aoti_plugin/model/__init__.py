"""`Model`: what callers give and get."""

from ..solve.outcome import Outcome
from .given import as_model, name_at
from .model import Model
from .solution import Solution

__all__ = ["Model", "Outcome", "Solution", "as_model", "name_at"]
