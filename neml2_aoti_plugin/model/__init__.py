"""`Model`: what callers give and get."""

from .._solve.outcome import Outcome
from ._custom_op import CustomOp
from ._model import Model
from ._operations import as_model, name_at
from ._outcomes import Solution

__all__ = ["CustomOp", "Model", "Outcome", "Solution", "as_model", "name_at"]
