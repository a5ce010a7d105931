"""Integration points of a finite-element program over a compiled model: state, notation, NumPy in and out."""

from .interface import PointsResult
from .points import Points
from .state import PointsState

__all__ = ["Points", "PointsResult", "PointsState"]
