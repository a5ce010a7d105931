"""`Model`: what callers give and get."""

from .model import Model, Solution

__all__ = ["Model", "Solution"]
