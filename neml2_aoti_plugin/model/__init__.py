"""`Model`: what callers give and get."""

from .._solve.outcome import Outcome
from ._given import as_model, name_at
from ._model import Model
from ._solution import Solution

__all__ = ["Model", "Outcome", "Solution", "as_model", "name_at"]
