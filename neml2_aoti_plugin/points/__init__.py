"""Integration points of a finite-element program over a compiled model: state, notation, NumPy in and out."""

from ._interface import PointsResult
from ._points import Points
from ._state import PointsState

__all__ = ["Points", "PointsResult", "PointsState"]
